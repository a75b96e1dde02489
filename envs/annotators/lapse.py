"""H2b, lapses: P' = (1 - lam) P + lam / 2.

With probability lam the person does not look and answers at random; the same as mistakes at rate
lam / 2. AlpacaFarm's simulated annotators (Dubois et al. 2023) have lam = .5 in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.annotators import Behaviour, View, annotators
from envs.usage import check_ranges


@annotators.register("lapse")
@dataclass(frozen=True)
class Lapse(Behaviour):
    """Answers at random at a fixed rate."""

    rate: float = 0.02
    """lam, share of votes cast without looking."""

    def __post_init__(self) -> None:
        """Check the rate."""
        check_ranges(self, "lapse.", rate="0 to 1")

    def probability(self, view: View, p: np.ndarray) -> np.ndarray:
        """(N,) mixture of P and a fair coin."""
        return (1 - self.rate) * p + self.rate / 2
