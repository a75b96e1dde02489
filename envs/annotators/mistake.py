"""H2, mistakes: P' = (1 - eps) P + eps (1 - P).

With probability eps the person presses the other button (B-Pref, Lee et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.annotators import Behaviour, View, annotators
from envs.usage import check_ranges


@annotators.register("mistake")
@dataclass(frozen=True)
class Mistake(Behaviour):
    """Presses the other button at a fixed rate."""

    rate: float = 0.1
    """eps, share of votes that are turned round."""

    def __post_init__(self) -> None:
        """Check the rate."""
        check_ranges(self, "mistake.", rate="0 to 1")

    def probability(self, view: View, p: np.ndarray) -> np.ndarray:
        """(N,) mixture of P and 1 - P."""
        return (1 - self.rate) * p + self.rate * (1 - p)
