"""H1, Boltzmann rationality: P(first preferred) = sigmoid(beta_j D).

D is the true difference in utility (Bradley and Terry 1952; as a model of annotators, Christiano
et al. 2017). Rationality differs between people, beta_j = beta exp(spread z_j) with z_j standard
normal; negative ``beta`` stands for a perfect judge, sign(D), as in B-Pref (Lee et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.annotators import Behaviour, View, annotators
from envs.usage import check_ranges


@annotators.register("boltzmann")
@dataclass(frozen=True)
class Boltzmann(Behaviour):
    """Prefers the better response with log-odds beta times the difference in utility."""

    beta: float = 4.0
    """Rationality; 0 is a coin, negative a perfect judge."""
    spread: float = 0.0
    """Standard deviation of log beta over people."""

    def __post_init__(self) -> None:
        """Check that both are finite, and the spread."""
        check_ranges(self, "boltzmann.", beta="", spread=">= 0")

    def logit(self, view: View) -> np.ndarray:
        """(N,) beta_j D; infinite for a perfect judge, 0 where nothing differs."""
        if self.beta < 0:
            margin = view.margin
            return np.where(margin == 0, 0.0, np.copysign(np.inf, margin))
        return self.beta * np.exp(self.spread * view.normal_trait("boltzmann")) * view.margin
