"""Do the fast step and the plain one train alike? Their losses over 200 steps, over each other.

    python benchmarks/loss_curves.py [--model resnet10 --tile-px 32 --batch 32 --steps 200
                                      --json FILE --png FILE]

Both begin with the same weights and see the same made tiles. Two forms of a step differ by
rounding, which grows as a network trains; how much of that is lawful a third curve says: the
plain form from weights moved by one rounding of float32. The last line holds the fast form's
distance from the plain one against that control's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path


def main() -> None:
    args = parse()
    from jaxhisto.bench.curves import CONTROL, agreement, draw, loss_curves
    from jaxhisto.config import ModelConfig, PretrainConfig
    from jaxhisto.models.convolution import convolutions
    from jaxhisto.runlog import environment

    config = PretrainConfig(
        out="",
        batch_size=args.batch,
        tile_px=args.tile_px,
        precision="f32",
        model=ModelConfig(name=args.model),
    )
    forms = {form: partial(convolutions, form) for form in ("plain", "fast")}
    curves = loss_curves(config, args.steps, forms)
    found = agreement(curves["plain"], curves["fast"], curves[CONTROL])
    if args.png:
        draw(curves, Path(args.png))
    if args.json:
        record = {
            "what": {k: v for k, v in vars(args).items() if k not in ("json", "png")},
            "agreement": asdict(found),
            "losses": {
                name: [round(x, 6) for x in curve.tolist()] for name, curve in curves.items()
            },
            "environment": {k: v for k, v in environment([]).items() if k != "command"},
        }
        Path(args.json).write_text(json.dumps(record) + "\n")
    print(
        f"loss in the last quarter {found.size:.4f}; farthest from plain in the first steps: fast "
        f"{found.first:.1e}, control {found.control_first:.1e}"
    )
    print(
        f"ratio {found.last / found.control_last:.2f} = fast {found.last:.2e} / control "
        f"{found.control_last:.2e}, root mean square distance from plain in the last quarter of "
        f"{args.steps} steps; means differ by {found.mean:+.2e}, the control's by "
        f"{found.control_mean:+.2e} ({args.model}, {args.tile_px} px, batch {args.batch})"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet10", choices=("resnet10", "resnet18", "resnet34"))
    parser.add_argument("--tile-px", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", help="write the record there")
    parser.add_argument("--png", help="draw the curves there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
