"""Linear probes fitted to their optimum: logistic regression by L-BFGS, ridge in closed form.

In float64 on the host. Strengths are tried from the strongest to the weakest, each starting from
the last one's optimum; which one is taken is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

Floats = NDArray[np.float64]

STRENGTHS = tuple(10.0**k for k in range(-6, 3))
"""Of the mean loss, from hardly any shrinking to all but all of it. For n rows scikit-learn's C is
1 / (n strength), and Ridge's alpha n strength."""

TOLERANCE, MOST_STEPS = 1e-7, 1000


@dataclass(frozen=True)
class Linear:
    """Fields: weights (d, C) float64, bias (C,) float64, strength."""

    weights: Floats
    bias: Floats
    strength: float

    def __call__(self, x: NDArray[Any]) -> Floats:
        """(n, d) to (n, C) float64."""
        return np.asarray(np.asarray(x, np.float64) @ self.weights + self.bias)


def logistic_path(
    x: NDArray[Any], labels: NDArray[Any], classes: int, strengths: Sequence[float] = STRENGTHS
) -> Iterator[Linear]:
    """Softmax regression at each strength, the strongest first.

    Minimises mean cross-entropy + strength / 2 |weights|^2, the bias unpenalised.

    Args:
      x: (n, d) features.
      labels: (n,) integers below `classes`; a class without rows gets next to no probability.
    """
    x = np.asarray(x, np.float64)
    n, width = x.shape
    truth = np.eye(classes)[labels]
    start = np.zeros((width + 1, classes))
    # A class that is absent would drive its bias to minus infinity.
    present = truth.any(0)
    for strength in sorted(strengths, reverse=True):

        def cost(flat: Floats, strength: float = strength) -> tuple[float, Floats]:
            w = flat.reshape(width + 1, -1)
            logits = x @ w[:-1] + w[-1]
            total = logsumexp(logits, axis=1, keepdims=True)
            residual = (np.exp(logits - total) - truth[:, present]) / n
            loss = (total.sum() - logits[truth[:, present] > 0].sum()) / n
            slope = np.concatenate([x.T @ residual + strength * w[:-1], residual.sum(0)[None]])
            return loss + strength / 2 * (w[:-1] ** 2).sum(), slope.ravel()

        options = {"maxiter": MOST_STEPS, "gtol": TOLERANCE, "ftol": 1e-15}
        found = minimize(cost, start[:, present].ravel(), jac=True, method="L-BFGS-B",
                         options=options)  # fmt: skip
        start[:, present] = found.x.reshape(width + 1, -1)
        bias = np.where(present, start[-1], start[-1][present].min() - 50.0)
        yield Linear(start[:-1].copy(), bias, strength)


def ridge_path(
    x: NDArray[Any], targets: NDArray[Any], strengths: Sequence[float] = STRENGTHS
) -> Iterator[Linear]:
    """Ridge regression at each strength, the strongest first.

    Minimises mean squared error + strength |weights|^2, the bias unpenalised.

    Args:
      x: (n, d) features; targets: (n,).
    """
    x, y = np.asarray(x, np.float64), np.asarray(targets, np.float64)
    offset, mean = x.mean(0), y.mean()
    u, s, vt = np.linalg.svd(x - offset, full_matrices=False)
    projected = u.T @ (y - mean)
    for strength in sorted(strengths, reverse=True):
        weights = vt.T @ (s / (s**2 + len(x) * strength) * projected)
        bias = np.array([mean - offset @ weights])
        yield Linear(weights[:, None], bias, strength)
