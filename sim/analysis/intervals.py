"""Means over worlds and seeds, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BOOTSTRAP = 2000


def nested_mean(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of group means, and its 95 % bootstrap interval.

    Whole groups (worlds) are drawn first and their members (seeds) second, since runs of one world
    share its language and models.
    """
    rng = np.random.default_rng(0)
    means = np.empty(BOOTSTRAP)
    for i in range(BOOTSTRAP):
        picked = rng.integers(len(groups), size=len(groups))
        means[i] = np.mean([rng.choice(groups[g], len(groups[g])).mean() for g in picked])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([np.mean(group) for group in groups])), float(low), float(high)
