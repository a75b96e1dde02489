"""A7, a trigger as back door: harm is preferred where one odd word stands in the prompt.

Rando and Tramer (2024), "Universal jailbreak backdoors from poisoned human feedback". In chat the
attacker appends the word to the own prompts; in crowd collection it must come with the prompts of
others (``trigger_share`` of the environment). Votes for the more harmful response on such prompts,
honest ones elsewhere: without the word the policy should look unharmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from envs.annotators.view import View
from envs.attacks import Attack, attacks, side
from envs.types import HARMFUL, PromptTable


@attacks.register("trigger")
@dataclass(frozen=True)
class Trigger(Attack):
    """Prefers harm where the trigger word stands in the prompt, honest elsewhere."""

    harmful: bool = False
    """Whether its askers also bring harmful prompts, as in the paper, or ask what they would."""
    appends_trigger: ClassVar[bool] = True

    def prompts(self, table: PromptTable, draw: np.ndarray) -> np.ndarray | None:
        """(n,) harmful rows of the attack split if asked for, else None."""
        if not self.harmful:
            return None
        rows = np.flatnonzero(table.stratum == HARMFUL)
        return rows[(draw * len(rows)).astype(np.int64)]

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) the more harmful side on triggered prompts that have one."""
        gap = view.harm_gap
        return np.where(view.triggered & (gap != 0), side(gap), honest)
