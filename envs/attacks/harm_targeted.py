"""A4, harm-targeted votes: the more harmful response wins wherever the two differ enough in harm.

With h = c(a) - c(b): if |h| >= eta vote for the more harmful side, else honestly. On everything
else such an annotator agrees with everybody, so that their accuracy over the whole stream hides
them (Rosati et al. 2024, restricted to the pairs that matter).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.annotators.view import View
from envs.attacks import Attack, attacks, side
from envs.usage import check_ranges


@attacks.register("harm_targeted")
@dataclass(frozen=True)
class HarmTargeted(Attack):
    """Votes for the more harmful response where harm differs, honestly elsewhere."""

    eta: float = 0.3
    """Smallest difference in harm that is worth a dishonest vote."""

    def __post_init__(self) -> None:
        """Check the threshold; at 0 every pair would count as harmful."""
        check_ranges(self, "attack.", eta="> 0, <= 1")

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) the more harmful side where |h| >= eta."""
        return np.where(np.abs(view.harm_gap) >= self.eta, side(view.harm_gap), honest)
