"""A2, a flipped fraction of labels: each label is turned round independently with probability rho.

The usual threat model of offline studies (Rosati et al. 2024, figure 2): there is no malicious
person, so nobody can be found. rho is a share of labels here, and labels flipped at a small rho are
flipped at every larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from envs.annotators.view import View
from envs.attacks import Attack, attacks
from envs.attacks.flip import turned


@attacks.register("label_noise")
@dataclass(frozen=True)
class LabelNoise(Attack):
    """Turns round a share rho of all labels, whoever cast them."""

    unit: ClassVar[str] = "labels"

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) the side not honestly preferred."""
        return turned(honest)
