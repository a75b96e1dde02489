"""H13, arrivals: person j acts at a rate proportional to rank_j^-s (Zipf).

A few people do most of the work, on crowd platforms and in chat alike; of 100 people at s = 1 the
first does 19 % of it. What an individual does in a round is then a draw from the rates, which is
what independent Poisson arrivals look like once their total is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.annotators import Behaviour, annotators
from envs.usage import check_ranges


@annotators.register("zipf")
@dataclass(frozen=True)
class Zipf(Behaviour):
    """Spreads activity unequally over people, by a power of their rank."""

    exponent: float = 1.0
    """s; 0 makes everybody equally active."""

    def __post_init__(self) -> None:
        """Check the exponent."""
        check_ranges(self, "zipf.", exponent=">= 0")

    def activity(self, weight: np.ndarray) -> np.ndarray:
        """(people,) rates; the first person is the most active."""
        return weight * np.arange(1, len(weight) + 1.0) ** -self.exponent
