"""A0, apathy: a control that is careless and not hostile.

Lapses at rate 1: a fair coin on every pair the person would have voted on. Zhao et al. (2025)
separate apathetic from adversarial annotators; a defence that only finds the careless is not one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.annotators.view import View
from envs.attacks import Attack, attacks
from envs.types import VOTE_A, VOTE_B, VOTE_SKIP


@attacks.register("apathetic")
@dataclass(frozen=True)
class Apathetic(Attack):
    """Votes at random, on as many pairs as an honest person would."""

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) fair coins; what would be skipped stays skipped."""
        coin = np.where(view.draw("coin") < 0.5, VOTE_A, VOTE_B)
        return np.where(honest == VOTE_SKIP, honest, coin).astype(np.int8)
