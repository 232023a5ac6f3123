"""Named pipes, sockets and devices that are named like inputs: one sentence, and nothing waits.

The lines run in a process with a time limit, since one that opened a pipe would never come back.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from made_dicom import new_series, write_dicom
from made_images import encoded, noise

from jaxhisto import unet_weights
from jaxhisto.models import unet
from jaxhisto.special_files import special_kind

LIMIT_S = 120
RUN_LINES = """
import contextlib, io, json, sys
from jaxhisto.cli import main
if __name__ == "__main__":
    answers = {}
    for name, line in json.load(open(sys.argv[1])).items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(line)
            except SystemExit as stopped:
                code = stopped.code
        answers[name] = [code, out.getvalue() + err.getvalue()]
        json.dump(answers, open(sys.argv[2], "w"))
"""


def pink() -> np.ndarray:
    """(256, 256, 3) that is foreground."""
    return np.full((256, 256, 3), (180, 100, 170), np.uint8)


def write_unet(path: Path) -> Path:
    about = unet_weights.describe(
        "resnet10", 2, ("a", "b"), mean=(0.5,) * 3, std=(0.2,) * 3, tile_px=32, mpp_range=(0.5, 0.5)
    )
    unet_weights.write_unet(path, *unet.init("resnet10", 2, seed=0), about)
    return path


def make_pipes(root: Path) -> None:
    """Slides, images and lists, and named pipes among them."""
    for folder in ("slides", "few", "beside", "images", "classes/one", "classes/two"):
        (root / folder).mkdir(parents=True)
    tifffile.imwrite(root / "slides" / "good.tif", pink(), photometric="rgb", tile=(64, 64),
                     resolution=(2e4, 2e4), resolutionunit="CENTIMETER", metadata=None)  # fmt: skip
    write_dicom(root / "beside" / "a.dcm", pink(), new_series("pink"))
    os.mkfifo(root / "beside" / "notes.txt")
    labelled = [f"classes/{c}/{i}.png" for c in ("one", "two") for i in range(6)]
    for seed, name in enumerate(["images/good.png", *labelled]):
        (root / name).write_bytes(encoded(noise(32, 32, seed)))
    for name in ("good.tif", "pipe.svs"):  # fewer: of two DICOM files the series are found first
        (root / "few" / name).symlink_to(root / "slides" / name)
    (root / "slides" / "link.tif").symlink_to(root / "slides" / "pipe.svs")
    for name in (
        "slides/pipe.svs", "slides/a.dcm", "slides/b.dcm", "images/pipe.png", "classes/two/9.png",
        "pipe.csv", "pipe.zip", "unet.safetensors",
    ):  # fmt: skip
        os.mkfifo(root / name)
    (root / "list.csv").write_text("path\nimages/good.png\nimages/pipe.png\n")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """(exit code, what was said) of lines whose inputs are, or hold, named pipes."""
    root = tmp_path_factory.mktemp("pipes")
    make_pipes(root)

    def embed(*inputs: str) -> list[str]:
        out = root / f"{len(lines)}.h5"
        return ["embed", "handmade", *(str(root / i) for i in inputs), "--out", str(out)]

    def predict(*inputs: str, unet: str = "u.safetensors") -> list[str]:
        return ["predict", *(str(root / i) for i in inputs), "--unet", str(root / unet),
                "--out", str(root / f"{len(lines)}")]  # fmt: skip

    write_unet(root / "u.safetensors")
    tile = ["tile", "--processes", "1", "--tile-px", "64", "--out"]
    lines: dict[str, list[str]] = {}
    lines["tile a folder"] = [*tile, str(root / "s"), str(root / "slides"), "--dataset", "d",
                              "--failures-allowed", "3"]  # fmt: skip
    lines["tile a pipe"] = [*tile, str(root / "t"), str(root / "slides" / "pipe.svs")]
    lines["embed beside a pipe"] = [*embed("beside"), "--kind", "slides"]
    lines["embed a slide"] = embed("slides/pipe.svs")
    lines["embed slides"] = [*embed("few"), "--kind", "slides", "--failures-allowed", "1"]
    lines["embed an image"] = embed("images/pipe.png")
    lines["embed images"] = embed("images")
    lines["embed a list"] = embed("list.csv")
    lines["embed a pipe as list"] = embed("pipe.csv")
    lines["embed an archive"] = embed("pipe.zip")
    lines["embed by a manifest"] = [*embed("s"), "--manifest", str(root / "pipe.csv")]
    lines["embed with a pipe"] = ["embed", str(root / "unet.safetensors"), str(root / "images"),
                                  "--out", str(root / "e.h5")]  # fmt: skip
    lines["import a pipe"] = ["import", str(root / "unet.safetensors"), "--out", str(root / "i")]
    lines["sample by a table"] = ["sample", str(root / "s"), "--out", str(root / "m"), "--datasets",
                                  str(root / "pipe.csv"), "--total", "4"]  # fmt: skip
    lines["leakage"] = ["leakage", str(root / "s"), "--against", str(root / "images"),
                        "--out", str(root / "l")]  # fmt: skip
    lines["probe labelled images"] = ["probe", "handmade", "--out", str(root / "p"),
                                      "--task.data", str(root / "classes")]  # fmt: skip
    lines["probe by a table"] = [*lines["probe labelled images"][:-1], str(root / "images"),
                                 "--task.labels", str(root / "pipe.csv")]  # fmt: skip
    lines["predict an image"] = predict("images/pipe.png")
    lines["predict images"] = predict("images")
    lines["predict a slide"] = predict("slides/pipe.svs")
    lines["predict with a pipe"] = predict("images/good.png", unet="unet.safetensors")
    return answered(root, lines)


def answered(root: Path, lines: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """The lines' answers, by a process of their own that is ended if one of them hangs."""
    (root / "lines.json").write_text(json.dumps(lines))
    (root / "run.py").write_text(RUN_LINES)
    files = [str(root / name) for name in ("run.py", "lines.json", "answers.json")]
    (root / "answers.json").write_text("{}")
    # Both of one session: what opened a pipe may be a process that the first one started.
    process = subprocess.Popen(
        [sys.executable, *files],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LIMIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = json.loads((root / "answers.json").read_text())
    assert done.keys() == lines.keys(), "the next one hangs, or ended the process"
    return done


PIPE = "it is a named pipe, no file"
REFUSED = {
    "tile a pipe": "pipe.svs: is a named pipe, no file; name a slide, or a folder with slides",
    "embed beside a pipe": "a.dcm: beside it lies notes.txt, a named pipe, on which OpenSlide",
    "embed a slide": "pipe.svs: ",
    "embed an image": f"pipe.png: cannot be read ({PIPE})",
    "embed images": f"the first, pipe.png, cannot be read ({PIPE}); remove it, or pass",
    "embed a list": f"the first, images/pipe.png, cannot be read ({PIPE}); remove it, or pass",
    "embed a pipe as list": f"pipe.csv: cannot be read ({PIPE})",
    "embed an archive": f"pipe.zip: cannot be read ({PIPE})",
    "embed by a manifest": f"pipe.csv: cannot be read as a manifest ({PIPE})",
    "embed with a pipe": "unet.safetensors: is no ",
    "import a pipe": "unet.safetensors: is a named pipe, no file; name a file of weights.",
    "sample by a table": f"{PIPE}",
    "leakage": f"the first, pipe.png, cannot be read ({PIPE})",
    "probe labelled images": f"9.png: cannot be read ({PIPE})",
    "probe by a table": f"{PIPE}",
    "predict an image": f"pipe.png: cannot be read ({PIPE})",
    "predict images": f"pipe.png: cannot be read ({PIPE})",
    "predict a slide": f"pipe.svs: cannot be read ({PIPE})",
    "predict with a pipe": f"{PIPE}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipe_is_refused_in_one_sentence(answers, name):
    code, said = answers[name]
    assert code == 1, said
    sentences = [line for line in said.splitlines() if line.startswith("jaxhisto ")]
    assert len(sentences) == 1, said
    assert REFUSED[name] in sentences[0]


@pytest.mark.parametrize("name", ["tile a folder", "embed slides"])
def test_pipes_among_slides_are_counted_and_cost_only_themselves(answers, name):
    """Three, of which one has two names."""
    code, said = answers[name]
    assert code == 0, said
    if name == "tile a folder":
        failed = [line for line in said.splitlines() if line.startswith("failed: ")]
        assert [line.split(":")[1] for line in failed] == [" a.dcm", " b.dcm", " pipe.svs"]
        assert all(f": cannot be read ({PIPE})" in line for line in failed)
        assert "16 tiles of 1 slide, 3 failed" in said


def test_sockets_and_devices_are_told_and_links_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may be 107 bytes long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("a.svs")
    os.symlink("a.svs", "b.svs")
    os.symlink(os.devnull, "c.svs")
    Path("d.svs").write_bytes(b"")
    os.symlink("nowhere", "e.svs")
    found = [special_kind(f"{name}.svs") for name in "abcde"]
    assert found == ["a socket", "a socket", "a device", "", ""]
    assert special_kind(tmp_path) == ""
    assert special_kind("a\0b") == ""
