"""Checkpoints are read as torch reads them, and nothing in them runs."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.pickles import LazyTensor, Mapped, Stub, read_checkpoint

SECONDS = 6.0  # of a processor, for any file; an idle core takes one at the most, a shared one two


def outcome(path: Path) -> Any:
    """What is read, or the sentence; anything else fails the test."""
    start = time.process_time()
    try:
        result = read_checkpoint(path)
        if isinstance(result, dict):
            for value in result.values():
                if isinstance(value, LazyTensor):
                    value.numpy()
    except ExportFileError as error:
        result = str(error)
        assert "\n" not in result
        assert result.startswith(f"{path}: ")
        assert result.endswith(".")
    assert time.process_time() - start < SECONDS
    return result


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "file.pth"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_tensors_are_those_of_torch(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    path, state = tmp_path / "file.pth", hostile.small_state()
    state._metadata = {"jaxhisto": {"arch": "resnet18"}}
    torch.save(
        {"state_dict": state, "epoch": 3, "rate": 0.5, "name": "a", "shape": torch.Size([2, 3])},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=is_zip,
    )
    content = read_checkpoint(path)
    assert {k: v for k, v in content.items() if k != "state_dict"} == {
        **{"epoch": 3, "rate": 0.5, "name": "a"},
        "shape": (2, 3),
    }
    read = content["state_dict"]
    assert isinstance(read, Mapped)
    assert read.state == {"_metadata": {"jaxhisto": {"arch": "resnet18"}}}
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].shape == tuple(tensor.shape)
        assert f"torch.{read[name].dtype}" == str(tensor.dtype)
        plain = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
        np.testing.assert_array_equal(read[name].numpy(), plain.numpy(), strict=True)


def test_views_are_read_only_and_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"w": torch.zeros(1000, 1000)}, path)
    array = read_checkpoint(path)["w"].numpy()
    assert not array.flags.writeable
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base if isinstance(array.base, np.ndarray) else np.asarray(array.base)
    assert isinstance(array, np.memmap)


def test_tensors_of_another_device_are_read(tmp_path: Path) -> None:
    program = b"\x80\x02}X\x01\x00\x00\x00w" + hostile.tensor(4, 1, [3], [1]) + b"s."
    program = program.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    data = np.arange(4, dtype="<f4")
    path = written(tmp_path, hostile.zip_of(program, {"data/0": data.tobytes()}))
    assert read_checkpoint(path)["w"].numpy().tolist() == [1, 2, 3]


def test_bits_without_a_checksum_are_taken(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(3.0)}, tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "file.pth")["w"].numpy().tolist() == [0, 1, 2]


def test_classes_come_as_their_names(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 3), "path": Path("a")}, tmp_path / "file.pth")
    content = read_checkpoint(tmp_path / "file.pth")
    assert isinstance(content["model"], Stub)
    assert content["model"].path == "torch.nn.modules.linear.Linear"
    assert isinstance(content["model"].state["_parameters"]["weight"], LazyTensor)
    assert content["path"].path.startswith("pathlib.")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", hostile.calls(Path("marker")))
def test_calls_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, protocol: int, is_zip: bool
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / f"{hostile.IMPORTED}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    program = pickle.dumps({"evil": hostile.calls(marker)[name], "epoch": 3}, protocol)
    wrap = hostile.zip_of if is_zip else hostile.legacy_of
    content = outcome(written(tmp_path, wrap(program)))
    assert not marker.exists()
    assert content["epoch"] == 3
    assert isinstance(content["evil"], Stub)


@pytest.mark.parametrize("name", hostile.by_hand(Path("x")))
def test_programs_by_hand_do_not_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    program = hostile.by_hand(marker)[name]
    for wrap in (hostile.zip_of, hostile.legacy_of):
        outcome(written(tmp_path, wrap(program)))
    assert not marker.exists()


@pytest.mark.parametrize("name", hostile.bombs())
def test_bombs_do_not_go_off(tmp_path: Path, name: str) -> None:
    program = hostile.bombs()[name]
    for wrap in (hostile.zip_of, hostile.legacy_of):
        outcome(written(tmp_path, wrap(program)))


@pytest.mark.parametrize("name", hostile.tensor_bombs())
def test_tensors_lie_in_their_storage(tmp_path: Path, name: str) -> None:
    program = hostile.tensor_bombs()[name]
    storages = b"\x80\x02]X\x01\x00\x00\x000a." + (4).to_bytes(8, "little") + bytes(16)
    for data in (
        hostile.zip_of(program, {"data/0": bytes(16)}),
        hostile.legacy_of(program, storages),
    ):
        assert "not a whole PyTorch checkpoint" in outcome(written(tmp_path, data))


@pytest.mark.parametrize("name", hostile.archives())
def test_archives_that_lie_are_refused(tmp_path: Path, name: str) -> None:
    assert isinstance(outcome(written(tmp_path, hostile.archives()[name])), str)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """All bombs one after the other, in a process of their own whose peak is read."""
    files = []
    for number, program in enumerate([*hostile.bombs().values(), *hostile.tensor_bombs().values()]):
        files.append(tmp_path / f"{number}.pth")
        files[-1].write_bytes(hostile.zip_of(program, {"data/0": bytes(16)}))
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from jaxhisto_export.pickles import read_checkpoint\n"
        "from jaxhisto_export.errors import ExportFileError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        read_checkpoint(Path(name))\n"
        "    except ExportFileError:\n        pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "assert 'torch' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(ran.stdout) * unit < 200e6


def test_other_files_are_named(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    for data, word in (
        (stream.getvalue(), "a tar archive"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "is empty"),
        (b"\x80", "not a whole PyTorch checkpoint"),
        (pickle.dumps({"a": 1}), "torch.save did not write it"),
        (hostile.zip_of(b"N.", {"constants.pkl": b"N."}), "TorchScript"),
    ):
        assert word in outcome(written(tmp_path, data))
    assert "no such file" in outcome(tmp_path / "absent.pth")
    assert "no such file" in outcome(tmp_path)


def test_byte_order_is_looked_at(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream, _use_new_zipfile_serialization=False)
    data = stream.getvalue().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    assert "big-endian" in outcome(written(tmp_path, data))
    data = hostile.zip_of(b"N.").replace(b"little", b"bigbig")
    assert "big-endian" in outcome(written(tmp_path, data))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_every_cut_is_seen(tmp_path: Path, is_zip: bool) -> None:
    stream = io.BytesIO()
    torch.save(hostile.small_state(), stream, _use_new_zipfile_serialization=is_zip)
    whole = stream.getvalue()
    for length in range(0, len(whole) - 1, 37):
        assert isinstance(outcome(written(tmp_path, whole[:length])), str), length


def test_every_flip_is_seen_or_harmless(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(hostile.small_state(), stream)
    path = written(tmp_path, stream.getvalue())
    truth = {name: lazy.numpy().copy() for name, lazy in read_checkpoint(path).items()}
    random = np.random.default_rng(0)
    for at in random.integers(0, len(stream.getvalue()), 1500):
        data = bytearray(stream.getvalue())
        data[at] ^= 1 << int(random.integers(8))
        read = outcome(written(tmp_path, bytes(data)))
        if isinstance(read, dict):
            assert list(read) == list(truth)
            for name, lazy in read.items():
                np.testing.assert_array_equal(lazy.numpy(), truth[name], strict=True)


def test_a_flipped_legacy_file_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    """That format has no checksum: what torch takes for whole may be taken for whole."""
    stream = io.BytesIO()
    torch.save({"a": torch.arange(5.0), "b": 3}, stream, _use_new_zipfile_serialization=False)
    random = np.random.default_rng(1)
    for at in random.integers(0, len(stream.getvalue()), 1000):
        data = bytearray(stream.getvalue())
        data[at] ^= 1 << int(random.integers(8))
        path = written(tmp_path, bytes(data))
        read = outcome(path)
        if isinstance(read, dict) and isinstance(read.get("a"), LazyTensor):
            theirs = _as_torch(path)
            if theirs is not None and isinstance(theirs.get("a"), torch.Tensor):
                np.testing.assert_array_equal(read["a"].numpy(), theirs["a"].numpy())


def _as_torch(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True)
    except Exception:  # whatever torch meets in a damaged file
        return None
