"""What frozen features are worth: a logistic probe beside randomly initialised encoders.

    python benchmarks/probe.py RUN --images DIR --labels labels.csv --label coarse_class \
        --classes immune_stroma cancer --group section --test C5 [--json FILE]

Tiles of the test group are never trained on. The side at which tiles are fed and the strength of
the regularisation are chosen for each encoder by leaving out one training group after the other.
Each probe seed draws its own bootstrap sample of the training tiles; each random encoder has its
own initial weights. AUC and macro F1 are scikit-learn's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxhisto.config import ModelConfig
from jaxhisto.data.labelled import read_labelled
from jaxhisto.models import simclr
from jaxhisto.pretrain.encoder import write_encoder
from jaxhisto.pretrain.step import make_embed
from jaxhisto.runlog import environment, write_atomically
from jaxhisto.weights import read_encoder

SIDES = (96, 128, 256)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SEEDS = (0, 1, 2)
BATCH = 32


def main() -> None:
    """Prints a row an encoder, and writes the record."""
    args = arguments()
    found = read_labelled(args.images, args.labels, args.label, args.group, classes=args.classes)
    labels, groups = found.labels, np.array(found.groups)
    test = np.isin(np.arange(len(found)), found.split([args.test])[1])
    images = {side: found.load(side) for side in SIDES}
    print(f"{found.summary()}\n{test.sum()} of them in test group {args.test}")
    rows = []
    for name, model, params, stats in encoders(args):
        features = {s: embedded(model, params, stats, images[s]) for s in SIDES}
        rows.append({"encoder": name, **probed(features, labels, groups, test)})
        print(line(rows[-1]), flush=True)
    trained = rows[0]["auc_mean"]
    baseline = float(np.mean([r["auc_mean"] for r in rows[1:]]))
    if args.json:
        record = {"environment": environment([str(d) for d in jax.devices()]), "rows": rows}
        write_atomically(args.json, json.dumps(record, indent=1) + "\n")
    print(f"gain {trained - baseline:+.3f} AUC = {rows[0]['encoder']} {trained:.3f} - random "
          f"{baseline:.3f} (test group {args.test}, {len(SEEDS)} probe seeds)")  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder, or an encoder.safetensors")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--label", required=True, help="column of the two classes")
    parser.add_argument("--classes", nargs=2, required=True, help="the two classes, negative first")
    parser.add_argument("--group", required=True, help="column to split by")
    parser.add_argument("--test", required=True, help="the group held out")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def encoders(args: argparse.Namespace) -> Iterable[tuple]:
    """(name, model, params, batch_stats): the run's first, then random ones like it."""
    path = Path(args.run)
    path = write_encoder(path)[0] if path.is_dir() else path
    params, stats, metadata = read_encoder(path)
    model = ModelConfig(
        name=metadata["arch"],
        mean=tuple(json.loads(metadata["mean"])),
        std=tuple(json.loads(metadata["std"])),
    )
    yield f"{model.name} step {metadata['step']}", model, params, stats
    for seed in SEEDS:
        yield f"random {seed}", model, *simclr.init(model.name, model.projection, seed)


def embedded(model: ModelConfig, params, stats, images: np.ndarray) -> np.ndarray:
    """(n, d) float32 features of (n, side, side, 3) uint8 tiles, in evaluation mode."""
    embed = make_embed(model)
    padded = np.pad(images, ((0, -len(images) % BATCH), (0, 0), (0, 0), (0, 0)), "edge")
    chunks = padded.reshape(-1, BATCH, *images.shape[1:])
    features = [embed(params, stats, jnp.asarray(c, jnp.float32) / 255) for c in chunks]
    return np.concatenate(features)[: len(images)]


def probed(features: dict[int, np.ndarray], y, groups, test) -> dict:
    """Settings chosen on the training groups, scores on the test group."""
    choices = [(s, c) for s in SIDES for c in STRENGTHS]
    scores = [left_out(features[s][~test], y[~test], groups[~test], c) for s, c in choices]
    side, strength = choices[int(np.argmax(scores))]
    x = features[side]
    whole = fitted(x[~test], y[~test], strength)
    aucs, f1s = [], []
    for seed in SEEDS:
        drawn = np.random.default_rng(seed).choice(np.flatnonzero(~test), (~test).sum())
        probe = fitted(x[drawn], y[drawn], strength)
        aucs.append(roc_auc_score(y[test], probe.decision_function(x[test])))
        f1s.append(f1_score(y[test], probe.predict(x[test]), average="macro"))
    return {
        "side": side,
        "strength": strength,
        "auc_left_out": max(scores),
        "auc_all_tiles": roc_auc_score(y[test], whole.decision_function(x[test])),
        "auc": aucs,
        "auc_mean": float(np.mean(aucs)),
        "macro_f1": f1s,
        "macro_f1_mean": float(np.mean(f1s)),
    }


def left_out(x, y, groups, strength: float) -> float:
    """Mean AUC over the training groups, each scored by a probe of the others."""
    scores = []
    for group in np.unique(groups):
        out = groups == group
        probe = fitted(x[~out], y[~out], strength)
        scores.append(roc_auc_score(y[out], probe.decision_function(x[out])))
    return float(np.mean(scores))


def fitted(x, y, strength: float):
    """Standardised features, L2 logistic regression."""
    probe = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced")
    return make_pipeline(StandardScaler(), probe).fit(x, y)


def line(row: dict) -> str:
    """One row of the table."""
    aucs = ", ".join(f"{a:.3f}" for a in row["auc"])
    return (
        f"{row['encoder']:<22} AUC {row['auc_mean']:.3f} ({aucs}; all tiles "
        f"{row['auc_all_tiles']:.3f})  macro F1 {row['macro_f1_mean']:.3f}  side {row['side']} px, "
        f"C {row['strength']:g}, left-out AUC {row['auc_left_out']:.3f}"
    )


if __name__ == "__main__":
    main()
