"""Checkpoints that attack whoever reads them, made without any code of the project."""

from __future__ import annotations

import builtins
import importlib
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu%btQ%b%b%b\x89ccollections\nOrderedDict\n)RtR"
)
"""Takes count, offset, shape, strides, as opcodes."""

MILLION = 10**6

IMPORTED = "imported_by_a_pickle"


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def number(value: int) -> bytes:
    """The opcode of an integer."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def tensor(count: int, offset: int, shape: list[int], strides: list[int]) -> bytes:
    """Opcodes of a float32 tensor of storage 0."""
    sides = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides)]
    return TENSOR % (number(count), number(offset), *sides)


def zip_of(
    program: bytes, records: Mapping[str, bytes] | None = None, how: int = zipfile.ZIP_STORED
) -> bytes:
    """The file that torch.save would have written around a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for name, data in (records or {}).items():
            archive.writestr(f"archive/{name}", data)
    return stream.getvalue()


def legacy_of(program: bytes, after: bytes = b"\x80\x02].") -> bytes:
    """The same in the format before PyTorch 1.6."""
    stream = io.BytesIO()
    torch.save(0, stream, _use_new_zipfile_serialization=False)
    whole = stream.getvalue()
    head = io.BytesIO(whole)
    for _ in range(3):
        pickle.load(head)
    return whole[: head.tell()] + program + after


def calls(marker: Path) -> dict[str, Any]:
    """Objects whose unpickling writes `marker`; `IMPORTED` must be a module that does."""
    source = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(builtins.eval, source),
        "exec": Call(builtins.exec, source),
        "open": Call(builtins.open, str(marker), "w"),
        "import": Call(importlib.import_module, IMPORTED),
        "getattr": Call(builtins.getattr, Call(importlib.import_module, "os"), "system"),
        "load": Call(torch.load, str(marker)),
    }


def by_hand(marker: Path) -> dict[str, bytes]:
    """Programs that no pickler writes and that reach for the same."""
    touch = f"touch {marker}".encode()
    return {
        "inst": b"(S'" + touch + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + touch + b"'\no.",
        "newobj": b"\x80\x02cos\nsystem\nS'" + touch + b"'\n\x85\x81.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93S'" + touch + b"'\n\x85R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93S'" + touch + b"'\n\x85R.",
        "build": b"\x80\x02cos\nsystem\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",
        "of a rebuilt type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\n"
        b"cos\nsystem\n(S'" + touch + b"'\nt}tR.",
        "persistent": b"\x80\x02cos\nsystem\nQ.",
    }


def bombs() -> dict[str, bytes]:
    """Programs that take forever, or all memory, of a reader that believes them."""
    deep = 100_000
    levels = b"".join(b"q%c0(" % n + b"h%c" % n * 10 + b"t" for n in range(1, 60))
    laughs = b"\x80\x02(K\x01t" + levels + b"."
    pair = b"\x80\x02K\x01" + b"2\x86" * 60
    pairs = b"(K\x01K\x01\x86" + b"2" * 99_000 + b"l"
    # Multiples of 2**61 - 1 have the hash 0.
    clash = [(n * (2**61 - 1)).to_bytes(10, "little") for n in range(1, 20_000)]
    key = b"".join(b"\x8a\x0a" + integer + b"N" for integer in clash)
    return {
        "lists in lists": b"\x80\x02" + b"]" * deep + b"a" * (deep - 1) + b".",
        "tuples in tuples": b"\x80\x02)" + b"\x85" * deep + b".",
        "dicts in dicts": b"\x80\x02}" + b"K\x01}" * deep + b"s" * deep + b".",
        "calls of calls": b"\x80\x02" + b"cos\nsystem\n" * deep + b")" + b"R\x85" * deep + b".",
        "marks": b"\x80\x02" + b"(" * MILLION + b".",
        "billion laughs": laughs,
        "hash of nested tuples": b"\x80\x02}" + pair[2:] + b"K\x01s.",
        "calls that copy": b"\x80\x02"
        + pairs
        + b"q\x000"
        + b"ccollections\nOrderedDict\nh\x00\x85R0" * 10_000
        + b"N.",
        "colliding keys": b"\x80\x02}(" + key + b"u.",
        "memo at 2**32": b"\x80\x02]r\xff\xff\xff\xff.",
        "memo at 10**4000": b"]p" + b"9" * 4000 + b"\n.",
        "bytes of an exabyte": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
        "text of an exabyte": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
        "text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
        "huge integer": b"\x80\x02\x8b" + struct.pack("<i", MILLION) + b"\x7f" * MILLION + b".",
        "integer in digits": b"I" + b"9" * MILLION + b"\n.",
        "contains itself": b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
        "list of itself": b"\x80\x02]q\x00h\x00a.",
        "no end": b"\x80\x02" + b"N0" * MILLION,
        "extension": b"\x80\x02\x82\x01.",
        "out of band": b"\x80\x05\x97.",
    }


def tensor_bombs() -> dict[str, bytes]:
    """Tensors that claim more than their storage of 16 bytes."""
    claims = {
        "billion elements of one": tensor(4, 0, [10**9], [0]),
        "2**200 elements": tensor(4, 0, [2**40 - 1] * 5, [0] * 5),
        "storage of a billion": tensor(10**9, 0, [4], [1]),
        "offset behind": tensor(4, 1, [4], [1]),
        "negative offset": tensor(4, -1, [4], [1]),
        "negative side": tensor(4, 0, [-4], [1]),
        "negative stride": tensor(4, 0, [4], [-1]),
        "stride behind": tensor(4, 0, [2, 2], [3, 1]),
        "million dimensions": tensor(4, 0, [1] * 100_000, [1] * 100_000),
        "side of 200 digits": tensor(4, 0, [10**60], [1]),
    }
    return {name: b"\x80\x02}X\x01\x00\x00\x00w" + claim + b"s." for name, claim in claims.items()}


def archives() -> dict[str, bytes]:
    """Zip archives that lie about what is in them; the payload is a harmless tensor."""
    program = b"\x80\x02}X\x01\x00\x00\x00w" + tensor(4, 0, [4], [1]) + b"s."
    data = bytes(range(16))
    good = zip_of(program, {"data/0": data})
    entry = good.rfind(b"PK\1\2")
    end = good.rfind(b"PK\5\6")

    def patched(at: int, form: str, *values: int) -> bytes:
        return good[:at] + struct.pack(form, *values) + good[at + struct.calcsize(form) :]

    return {
        "compressed": zip_of(program, {"data/0": bytes(MILLION)}, zipfile.ZIP_DEFLATED),
        "record behind the end": patched(entry + 42, "<I", 1 << 31),
        "record of 4 GB": patched(entry + 20, "<II", 0xFFFFFFF0, 0xFFFFFFF0),
        "encrypted": patched(entry + 8, "<H", 1),
        "65534 records": patched(end + 8, "<HH", 65534, 65534),
        "directory of 4 GB": patched(end + 12, "<I", 0xFFFFFFF0),
        "no end": good[:end],
        "missing record": zip_of(program),
        "short record": zip_of(program, {"data/0": data[:15]}),
        "two pickles": zip_of(program, {"data/0": data, "Q/data.pkl": program}).replace(
            b"archive/Q", b"secondary"
        ),
        "big-endian": good.replace(b"little", b"bigxxx"),
    }


def small_state() -> OrderedDict[str, torch.Tensor]:
    """Harmless tensors of several types and strides."""
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    return OrderedDict(
        whole=base,
        part=base[1:4, ::2],
        turned=base.t(),
        scalar=torch.tensor(3.5, dtype=torch.float64),
        none=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.randn(3)),
        half=torch.randn(4).half(),
        brain=torch.randn(4).bfloat16(),
        counts=torch.arange(4),
        small=torch.arange(4, dtype=torch.int32),
        short=torch.arange(4, dtype=torch.int16),
        signed=torch.arange(4, dtype=torch.int8),
        bytes=torch.arange(4, dtype=torch.uint8),
        flags=torch.tensor([True, False]),
        complex=torch.randn(2, dtype=torch.complex64),
    )
