"""Why features fail on another group of a set: the step from group to group, or the task itself.

    jaxhisto embed ENCODER IMAGES --out FEATURES.h5
    python benchmarks/transfer.py FEATURES.h5... --images DIR --labels labels.csv --label label \
        --classes non_tumor tumor --group region [--json FILE]

A logistic probe of standardised features, over several strengths of regularisation: trained on one
group and tested on another, and, as what the task allows, cross-validated inside the tested group
(five folds of images; neighbours are alike, so that this is the upper end). `groups` is how well a
probe tells the two groups apart (0.5: not at all). `own moments` standardises each group by itself,
which takes a shift of stain away. Features of several files of one name are rows of their own.
"""

from __future__ import annotations

import argparse
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxhisto.data.labelled import Labelled, read_labelled
from jaxhisto.runlog import environment, write_atomically

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def main() -> None:
    """Prints a table a file of features, and writes the record."""
    args = arguments()
    found = read_labelled(args.images, args.labels, args.label, args.group, classes=args.classes)
    print(found.summary())
    groups = np.array(found.groups)
    rows = []
    for path in args.features:
        name, x = features(path, found)
        for source, target in permutations(np.unique(groups), 2):
            rows.append({"encoder": name, "from": source, "to": target})
            rows[-1] |= moved(x, found.labels, groups == source, groups == target)
            print(lines(rows[-1]), flush=True)
    if args.json:
        record = {"environment": environment(["CPU"]), "strengths": STRENGTHS, "rows": rows}
        write_atomically(args.json, json.dumps(record, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="+", type=Path, help="what `jaxhisto embed` wrote")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--label", required=True, help="column of the two classes")
    parser.add_argument("--classes", nargs=2, required=True, help="the two classes, negative first")
    parser.add_argument("--group", required=True, help="column of patients, sections or regions")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def features(path: Path, found: Labelled) -> tuple[str, np.ndarray]:
    """The encoder's name, and (n, d) float32 features of the labelled images in their order."""
    with h5py.File(path) as file:
        row = {name.decode(): i for i, name in enumerate(file["names"][:])}
        missing = [name for name in found.names if name not in row]
        if missing:
            more = f"{path}: has no features of {len(missing)} images, {missing[0]} the first"
            raise SystemExit(f"{more}; embed the same folder.")
        rows = [row[name] for name in found.names]
        return str(file.attrs["encoder"]), file["features"][:][rows]


def moved(x: np.ndarray, y: np.ndarray, source: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """AUC at each strength: of the step between the groups, and inside the tested one."""
    both = source | target
    own = np.zeros_like(x)
    for group in (source, target):
        own[group] = StandardScaler().fit_transform(x[group])

    def step(of: np.ndarray, c: float) -> float:
        scores = probe(c).fit(of[source], y[source]).decision_function(of[target])
        return float(roc_auc_score(y[target], scores))

    return {
        "images": [int(source.sum()), int(target.sum())],
        "auc": [step(x, c) for c in STRENGTHS],
        "auc_own_moments": [step(own, c) for c in STRENGTHS],
        "auc_inside_source": [inside(x[source], y[source], c) for c in STRENGTHS],
        "auc_inside": [inside(x[target], y[target], c) for c in STRENGTHS],
        "auc_groups": inside(x[both], source[both], 1e-2),
    }


def inside(x: np.ndarray, y: np.ndarray, c: float) -> float:
    """AUC of five folds of images."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(probe(c), x, y, cv=folds, method="decision_function")
    return float(roc_auc_score(y, scores))


def probe(c: float) -> Any:
    """Standardised features, L2 logistic regression."""
    model = LogisticRegression(C=c, max_iter=5000, class_weight="balanced")
    return make_pipeline(StandardScaler(), model)


def lines(row: dict[str, Any]) -> str:
    """A heading, and a line a quantity over the strengths."""
    kinds = {
        "auc": f"{row['from']} to {row['to']}",
        "auc_own_moments": "the same, own moments",
        "auc_inside_source": f"inside {row['from']}",
        "auc_inside": f"inside {row['to']}",
    }
    out = [f"{row['encoder']}: {row['from']} ({row['images'][0]} images) to {row['to']} "
           f"({row['images'][1]}); groups told apart {row['auc_groups']:.3f}",
           f"  {'C':<26}" + "".join(f"{c:>8g}" for c in STRENGTHS)]  # fmt: skip
    return "\n".join(
        out + [f"  {what:<26}" + "".join(f"{a:8.3f}" for a in row[k]) for k, what in kinds.items()]
    )


if __name__ == "__main__":
    main()
