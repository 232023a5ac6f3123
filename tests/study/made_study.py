"""A small study that tests share: images, numbers, encoders, its file, what it wrote."""

from __future__ import annotations

import csv
from pathlib import Path

from made_sets import tissue, write_encoder, write_images

from jaxhisto import cli
from jaxhisto.downstream_config import StudyConfig
from jaxhisto.flags import parse

FILE = """
title = "Two sets"
percents = [50, 100]
repeats = 2
draws = 100
settings = ["linear", "last_layer"]

[encoders]
trained = ["a.safetensors", "b.safetensors"]
"hand-made" = "handmade"

[probe]
epochs = 4
embed_batch = 4

[tasks.shade]
data = "images"
side = 32
paper = "BACH"

[tasks.brightness]
data = "images"
labels = "numbers.csv"
target = "mean"
group = "patient"
side = 32
"""
CELLS = 2 * 3 * ((2 + 1) + (2 + 2))  # tasks x encoders x (linear + last layer) at two shares
TRAINED = 'trained = ["a.safetensors", "b.safetensors"]'
FEWER = (TRAINED, "")
FEW = CELLS // 3  # of the study without these


def make_place(place: Path) -> Path:
    """Writes images of two classes, their means, two encoders and two.toml."""
    light, dark = tissue(16, 1, 190), tissue(16, 2, 165)
    images = {f"light/{i:02d}.png": x for i, x in enumerate(light)}
    images |= {f"dark/{i:02d}.png": x for i, x in enumerate(dark)}
    write_images(place / "images", images)
    with (place / "numbers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "mean", "patient"])
        for i, (name, x) in enumerate(images.items()):
            writer.writerow([name, float(x.mean()), f"p{i % 8}"])
    write_encoder(place / "a.safetensors", 5)
    write_encoder(place / "b.safetensors", 6)
    (place / "two.toml").write_text(FILE)
    return place


def run(*args: object) -> int:
    """Exit code of a line."""
    return cli.main(["study", *map(str, args)])


def rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def changed(place: Path, to: Path, *edits: tuple[str, str]) -> Path:
    """The study file with other words."""
    text = FILE
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    to.write_text(text)
    return to


def no_picture(part, path: Path) -> Path:
    """Instead of a figure."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(part.name.encode())
    return path


def written(out: Path) -> dict[str, bytes]:
    """All that a person reads."""
    files = [*out.glob("tables/*"), *out.glob("figures/*"), *out.glob("report.*")]
    assert len(files) > 20
    assert "report.html" in {f.name for f in files}
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def config_of(file, *flags):
    """What the verb parses."""
    return parse(StudyConfig, [str(a) for a in (file, *flags)], "study", recipe=False)
