"""Slides and patients as names say them."""

from __future__ import annotations

import pytest

from jaxhisto.errors import ConfigError
from jaxhisto.leakage.names import Groups, Origin, read_patterns, shared, stem

TCGA = "(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})"
SLIDE = "TCGA-CR-7395-01A-01-TS1"


class Named:
    """A source of which only the names matter."""

    def __init__(self, path, *names):
        self.path, self.names = path, names

    def name(self, row):
        return self.names[row]

    def origins(self, patient=TCGA, slide=""):
        patterns = read_patterns(patient, slide)
        return [patterns.origin(self, row) for row in range(len(self.names))]


def store(*slides):
    return Named("a/store", *(f"a/store: tile 7 (slide {s})" for s in slides))


def folder(*names):
    return Named("a/set", *(f"a/set/{n}" for n in names))


def groups(source, **patterns):
    found = Groups()
    for row, origin in enumerate(source.origins(**patterns)):
        found.add(origin, source.name(row))
    return found


def kinds(a, b, **patterns):
    found = shared(groups(a, **patterns), groups(b, **patterns))
    return {(s.kind, s.id): (s.pretraining.tiles, s.labelled.tiles) for s in found}


def test_tcga_barcodes_give_patient_and_slide_in_any_case_and_place():
    (of_store,) = store(f"{SLIDE}.0f3a-uuid.svs").origins()
    assert of_store == Origin(f"{SLIDE}.0f3a-uuid.svs", True, SLIDE, "TCGA-CR-7395")
    (of_folder,) = folder(f"tumour/{SLIDE.lower()}_x0_y0.png").origins()
    assert (of_folder.slide, of_folder.patient) == (SLIDE, "TCGA-CR-7395")


def test_another_slide_of_the_patient_is_a_shared_patient_and_no_shared_slide():
    other = folder("TCGA-CR-7395-01Z-00-DX1_3.png", "TCGA-CR-7396-01Z-00-DX1_3.png")
    assert kinds(store(f"{SLIDE}.svs", f"{SLIDE}.svs"), other) == {
        ("patient", "TCGA-CR-7395"): (2, 1)
    }


def test_a_store_slide_is_known_by_its_id_with_or_without_suffix():
    assert kinds(store("P7.v2.svs"), store("P7.v2.tiff")) == {("slide", "P7.V2"): (1, 1)}
    assert kinds(store("P7.svs"), folder("sub/p7.png")) == {("slide", "P7"): (1, 1)}


def test_equal_image_names_in_two_folders_are_listed_and_are_no_slide():
    assert kinds(folder("a/1.png"), folder("b/1.jpg", "b/2.jpg")) == {("name", "1"): (1, 1)}


def test_an_image_that_lies_elsewhere_than_its_source_keeps_its_whole_name():
    (origin,) = Named("lists/train.manifest", "b/set/TCGA-CR-7395/3.png").origins()
    assert (origin.own, origin.patient) == ("b/set/TCGA-CR-7395/3.png", "TCGA-CR-7395")


def test_own_patterns_read_slide_and_patient():
    a, b = folder("p12-s3/x1.png", "p12-s3/x2.png"), folder("p12-s3_99.png", "p12-s4_1.png")
    found = kinds(a, b, patient=r"(p\d+)-", slide=r"p\d+-s\d+")
    assert found == {("slide", "P12-S3"): (2, 1), ("patient", "P12"): (2, 2)}


@pytest.mark.parametrize(("flag", "text"), [("patient", "("), ("slide", "(a)(b)")])
def test_a_pattern_that_cannot_be_used_names_its_flag(flag, text):
    with pytest.raises(ConfigError, match=f"--{flag}-pattern"):
        read_patterns(**{"patient": "x", "slide": "", flag: text})


def test_a_stem_keeps_dots_that_are_no_suffix():
    assert [stem(n) for n in ("a/b.c.svs", "x.a-long-uuid", ".x", "plain")] == [
        *("B.C", "X.A-LONG-UUID", ".X", "PLAIN")
    ]
