"""`jaxhisto doctor` passes where all is well, and names what is not, with the remedy."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from jaxhisto import doctor
from jaxhisto.cli import main
from jaxhisto.config import DoctorConfig


def test_every_check_passes_here(capsys):
    assert doctor.examine(DoctorConfig()) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    for check in doctor.CHECKS:
        assert f"ok    {check.__name__}" in said
    assert "mesh {'data': 4}" in said


def test_a_full_disk_is_said_with_the_remedy(capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**8))
    monkeypatch.setattr(doctor, "CHECKS", (doctor.disk,))
    assert doctor.examine(DoctorConfig()) == 1
    said = capsys.readouterr().out
    assert "FAIL  disk" in said
    assert "make room" in said


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--what", 2)])
def test_its_flags_are_parsed_like_any_verbs(flag, code):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", flag])
    assert stopped.value.code == code
