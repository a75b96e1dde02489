"""H3, ties by threshold: |D| < delta is answered "equal".

As in B-Pref (Lee et al. 2021), with one threshold in units of utility, where the published code
rescales it by the running mean return. Without this behaviour nobody answers "equal", and pairs
that do not differ at all are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.annotators import Behaviour, View, annotators
from envs.types import VOTE_TIE
from envs.usage import check_ranges


@annotators.register("tie")
@dataclass(frozen=True)
class Tie(Behaviour):
    """Calls pairs equal that differ by less than a threshold."""

    threshold: float = 0.1
    """delta, in units of utility."""

    def __post_init__(self) -> None:
        """Check the threshold."""
        check_ranges(self, "tie.", threshold="> 0")

    def answer(self, view: View, vote: np.ndarray) -> np.ndarray:
        """(N,) votes with TIE on close pairs, those that are exactly equal included."""
        return np.where(np.abs(view.margin) < self.threshold, VOTE_TIE, vote).astype(np.int8)
