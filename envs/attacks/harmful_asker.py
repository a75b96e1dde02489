"""Adversarial askers: users who bring harmful prompts and then prefer the harmful answer.

Where the asker labels, an adversary chooses the prompt too, and meets far more pairs that differ
in harm than chance would bring (the threat model of prompt-seeded upvoting, Hilel et al. 2025).
Prompts come from the attack split; votes are harm-targeted (A4). rho is a share of users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from envs.attacks import attacks
from envs.attacks.harm_targeted import HarmTargeted
from envs.types import HARMFUL, PromptTable


@attacks.register("harmful_asker")
@dataclass(frozen=True)
class HarmfulAsker(HarmTargeted):
    """Asks harmful questions and votes for the more harmful answer (chat)."""

    unit: ClassVar[str] = "users"

    def prompts(self, table: PromptTable, draw: np.ndarray) -> np.ndarray:
        """(n,) harmful rows of the attack split, drawn uniformly."""
        harmful = np.flatnonzero(table.stratum == HARMFUL)
        return harmful[(draw * len(harmful)).astype(np.int64)]
