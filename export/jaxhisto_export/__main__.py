"""`python -m jaxhisto_export verify|convert`: torch, numpy and safetensors are enough."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxhisto_export.errors import ExportFileError

LAYOUTS = ("published", "torchvision", "dsmil", "timm", "smp", "onnx")
NEEDED = ("torch", "numpy", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 if all is well, 1 for a failure, 2 for usage."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except ExportFileError as error:
        print(error, file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(f"{error.name} is not installed: pip install {' '.join(NEEDED)}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxhisto_export", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verify = verbs.add_parser("verify", help="check an exported file")
    verify.add_argument("file", type=Path, metavar="FILE", help="or the folder of layout timm")
    verify.add_argument("--against", type=Path, metavar="FILE", help="holds the same weights?")
    verify.set_defaults(run=_verify)
    convert = verbs.add_parser("convert", help="encoder or UNet -> a PyTorch file")
    convert.add_argument(
        "encoder", type=Path, metavar="FILE", help="encoder.safetensors or unet.safetensors"
    )
    convert.add_argument("--layout", choices=LAYOUTS, default="published")
    convert.add_argument("--out", type=Path, required=True, help="file, or folder of layout timm")
    convert.add_argument("--golden", type=Path, help="default: what lies beside FILE")
    convert.add_argument(
        "--fc", choices=("none", "zero", "trained"), default="none", help="torchvision"
    )
    convert.add_argument("--normalise", action="store_true", help="onnx: take uint8 RGB tiles")
    convert.add_argument("--force", action="store_true", help="replace OUT")
    convert.set_defaults(run=_convert)
    return parser


def _verify(arguments: argparse.Namespace) -> int:
    from jaxhisto_export.verify import verify

    result = verify(arguments.file, arguments.against)
    print(*result.lines, sep="\n")
    for problem in result.problems:
        print(f"problem: {problem}", file=sys.stderr)
    print("verified" if result.ok else f"NOT VERIFIED, {len(result.problems)} problems")
    return 0 if result.ok else 1


def _convert(arguments: argparse.Namespace) -> int:
    from jaxhisto_export.layouts import convert
    from jaxhisto_export.weights_file import read_weights

    golden = arguments.golden
    if golden is None:
        beside = read_weights(arguments.encoder).golden_path
        golden = beside if beside.is_file() else None
    out, options = arguments.out, {"force": arguments.force, "normalise": arguments.normalise}
    for path in convert(arguments.encoder, arguments.layout, out, golden, arguments.fc, **options):
        print(f"wrote {path}")
    print(f"next: python -m jaxhisto_export verify {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
