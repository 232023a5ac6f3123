"""`jaxhisto doctor` passes where all is well, and names what is not, with the remedy."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from jaxhisto import doctor


def test_every_check_passes_here(capsys):
    assert doctor.examine([]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    for check in doctor.CHECKS:
        assert f"ok    {check.__name__}" in said
    assert "mesh {'data': 4}" in said


def test_a_full_disk_is_said_with_the_remedy(capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**8))
    monkeypatch.setattr(doctor, "CHECKS", (doctor.disk,))
    assert doctor.examine([]) == 1
    said = capsys.readouterr().out
    assert "FAIL  disk" in said
    assert "make room" in said


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--what", 2)])
def test_it_takes_no_settings(flag, code):
    assert doctor.examine([flag]) == code
