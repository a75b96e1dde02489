"""A1, always flip: malicious annotators turn every vote round.

Two forms, with different breakdown points for aggregation without gold answers. One who *knows the
truth* answers 1 - sign(D), and unsupervised aggregation locks onto the attackers beyond a share
1 - 1 / (2 q) at honest accuracy q; one who turns round their *own noisy label* answers 1 - Y_h, and
the limit is one half. The first is the reverse preference attack of Rosati et al. (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.annotators.view import View
from envs.attacks import Attack, attacks, side
from envs.types import VOTE_A, VOTE_B


def turned(vote: np.ndarray) -> np.ndarray:
    """(N,) int8 votes for the other side; ties and skips stay what they are."""
    return np.select([vote == VOTE_A, vote == VOTE_B], [VOTE_B, VOTE_A], vote).astype(np.int8)


@attacks.register("always_flip")
@dataclass(frozen=True)
class AlwaysFlip(Attack):
    """Votes against the truth on every pair (knows which response is better)."""

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) the worse side; honest where neither is worse."""
        return np.where(view.margin != 0, side(-view.margin), honest)


@attacks.register("own_label_flip")
@dataclass(frozen=True)
class OwnLabelFlip(Attack):
    """Votes against the own honest, noisy label on every pair."""

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) the side not honestly preferred."""
        return turned(honest)
