"""metrics.jsonl is the record: each step once, whole lines, also after a kill."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxhisto.errors import RunError
from jaxhisto.runlog import (
    Lines,
    RunLog,
    append_line,
    keep_steps,
    read_metrics,
    read_monitor,
)


def log(run, start, stop):
    with RunLog(run, start_step=start, steps=9, batch_size=4) as record:
        for step in range(start + 1, stop + 1):
            record.scalars(step, {"loss": float(step)}, wait_s=0.0)


def test_a_resume_leaves_each_step_once(tmp_path):
    log(tmp_path, 0, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # what a kill leaves
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    log(tmp_path, 4, 9)
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(1, 10))
    assert all(
        {"loss", "images_per_s", "wait_s", "time"} <= m.keys() for m in read_metrics(tmp_path)
    )


def test_a_value_that_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    with RunLog(tmp_path, start_step=0, steps=1, batch_size=4) as record:
        record.scalars(1, {"loss": float("nan")}, wait_s=0.0)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None


def test_reading_what_is_no_run_names_the_remedy(tmp_path):
    with pytest.raises(RunError, match="jaxhisto pretrain"):
        read_metrics(tmp_path)


def test_tensorboard_events_hold_the_loss(tmp_path):
    with RunLog(tmp_path, start_step=0, steps=1, batch_size=4, tensorboard=True) as record:
        record.scalars(1, {"loss": 2.5}, wait_s=0.0)
    events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"loss" in events


class FullDisk:
    """A file that takes `room` more bytes, then none: of the last write, a part."""

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[: self.room]
        self.room -= len(taken)
        self.content += taken
        return len(taken)

    def close(self) -> None:
        pass


def on(disk: FullDisk, path: Path) -> Lines:
    lines = Lines(path)
    lines.close()
    lines._file = disk
    return lines


def test_lines_wait_while_the_disk_is_full_and_none_is_torn(tmp_path, capsys):
    disk = FullDisk(room=10)
    lines = on(disk, tmp_path / "metrics.jsonl")
    for text in ("one..}\n", "two..}\n", "three}\n"):
        lines.append(text)
    assert disk.content == b"one..}\ntwo"
    disk.room = 5
    lines.append("four.}\n")
    assert disk.content == b"one..}\ntwo..}\nt"
    disk.room = 999
    lines.append("five.}\n")
    assert disk.content == b"one..}\ntwo..}\nthree}\nfour.}\nfive.}\n"
    lines.finish()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "cannot be written (No space left on device); lines wait in memory" in said[0]
    assert "can be written again" in said[1]


def test_lines_that_never_found_room_are_an_error_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(Lines, "HELD", 3)
    disk = FullDisk(room=3)
    lines = on(disk, tmp_path / "metrics.jsonl")
    for step in range(10):
        lines.append(f"step {step}}}\n")
    with pytest.raises(RunError, match=r"metrics.jsonl: lacks 10 lines \(No space left"):
        lines.finish()
    disk.room = 999
    with pytest.raises(RunError, match=r"lacks 6 lines \(there was no room for long\)"):
        lines.finish()
    assert disk.content == b"step 0}\nstep 7}\nstep 8}\nstep 9}\n"


def test_lines_appended_stand_whole_with_their_time(tmp_path):
    path = tmp_path / "monitor.jsonl"
    append_line(path, {"step": 0, "knn_f1": 0.5, "set": "abc"})
    append_line(path, {"step": 2, "knn_f1": float("nan"), "set": "abc"})
    with path.open("a") as file:
        file.write('{"step": 4, "kn')
    assert [(m["step"], m["knn_f1"], m["set"]) for m in read_monitor(tmp_path)] == [
        (0, 0.5, "abc"),
        (2, None, "abc"),
    ]
    keep_steps(path, 1)
    assert [m["step"] for m in read_monitor(tmp_path)] == [0]
    assert read_monitor(tmp_path / "nowhere") == []


def test_a_full_disk_leaves_no_half_line_for_the_next_to_go_on_from(tmp_path):
    program = """
import resource, sys
from pathlib import Path
from jaxhisto.errors import RunError
from jaxhisto.runlog import append_line
path, endless = Path(sys.argv[1]), resource.RLIM_INFINITY
append_line(path, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, endless))
try:
    append_line(path, {"step": 2})
except RunError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (endless, endless))
    append_line(path, {"step": 3})
"""
    path = tmp_path / "monitor.jsonl"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert [line["step"] for line in read_monitor(tmp_path)] == [1, 3]


def test_a_line_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        append_line(tmp_path / "no folder" / "monitor.jsonl", {"step": 0})
