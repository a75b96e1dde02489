"""Harm by a classifier, corrected by an oracle that judges only some of the answers.

The classifier f is cheap and wrong, the oracle y right and dear. In every block of k answers one,
picked before anybody looked, is audited; with lambda the trust in the classifier

    z = lambda * mean_block(f) + (y - lambda * f) of the audited answer,   E[z] = E[y],

whatever the classifier does (prediction-powered inference: Angelopoulos et al. 2023; lambda as in
their PPI++). z lies in [-w, 1 + w] with w = lambda (k - 1) / k. Rescaled to [0, 1] the blocks are
independent bounded draws, and ``betting_bounds`` holds them at once, for any sample size.

One bound for z, and not one for f and one for y - f joined by a union: that is wider than what the
audited answers alone say. At trust 0, or in blocks of one, these speak alone; and they should where
harm is rare or audits are few (C = .05, 64 audits), since z has the wider range. At C = .2, 128
audits in blocks of 4 and a classifier wrong on 10 % of either kind, trust .5 brings .207 to .162.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from envs.eprocess import betting_bounds
from envs.usage import UsageError, check_ranges


class Audited(NamedTuple):
    """Mean harm by the oracle's measure, for (...) policies side by side."""

    value: np.ndarray  # unbiased
    low: np.ndarray  # holds the mean with probability 1 - alpha, in [0, 1]
    high: np.ndarray


def audited_mean(
    classifier: np.ndarray, oracle: np.ndarray, alpha: float = 0.05, trust: float = 0.5
) -> Audited:
    """Correct a classifier's mean harm by the answers that the oracle judged.

    Args:
        classifier: (..., m, k) harm in [0, 1] of k answers in each of m blocks; independent draws.
        oracle: (..., m) true harm in [0, 1] of the first answer of every block.
        alpha: probability in (0, 1) that the mean lies outside the bounds.
        trust: lambda in [0, 1], fixed before the answers are seen.

    Raises:
        ValueError: shapes that do not fit, or a value out of range.
    """
    classifier, oracle = np.asarray(classifier, float), np.asarray(oracle, float)
    check_ranges({"alpha": alpha, "trust": trust}, alpha="> 0, < 1", trust="0 to 1")
    if not oracle.size or classifier.shape[:-1] != oracle.shape or not classifier.size:
        shapes = f"{classifier.shape} by the classifier, {oracle.shape} by the oracle"
        raise UsageError(f"harm: {shapes}; allowed: (..., m, k) and (..., m)")
    for name, values in (("classifier", classifier), ("oracle", oracle)):
        if not (values.min() >= 0 and values.max() <= 1):
            raise UsageError(f"harm by the {name}: not within [0, 1]; allowed: 0 to 1")
    k = classifier.shape[-1]
    z = trust * classifier.mean(-1) + oracle - trust * classifier[..., 0]
    wide = trust * (k - 1) / k
    scale = 1 + 2 * wide
    # Rounding may leave [0, 1] by an ulp.
    low, high = betting_bounds(np.clip((z + wide) / scale, 0, 1), alpha)
    return Audited(
        value=z.mean(-1),
        low=np.clip(low * scale - wide, 0, 1),
        high=np.clip(high * scale - wide, 0, 1),
    )
