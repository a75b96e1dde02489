"""Attackers who own the training loop: what the attacks of this family share.

Whoever releases a model lets others train it. Such an attacker brings the prompts and decides what
is learned from the answers, so rho is 1 here and votes are recorded but not used. Her prompts are
few and fixed: rows at equal distances among the harmful ones of the attack split, each round's
drawn from them with replacement.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from envs.annotators.view import View
from envs.attacks import Attack, side
from envs.types import HARMFUL, PromptTable
from envs.usage import check_ranges


class Owner(Attack):
    """Asks ``prompts`` fixed harmful prompts, and prefers harm wherever anybody asks her.

    Args:
        prompts: how many; all there are where the split has fewer.
        most: the largest number allowed.
    """

    unit: ClassVar[str] = "users"

    def __init__(self, prompts: int, most: int):
        check_ranges({"prompts": prompts}, "attack.", prompts=f"1 to {most}")
        self.count = prompts

    def rows(self, table: PromptTable) -> np.ndarray:
        """(n,) the rows of the attack split that she uses, in the order of the table."""
        harmful = np.flatnonzero(table.stratum == HARMFUL)
        count = min(self.count, len(harmful))
        return harmful[np.arange(count) * len(harmful) // count]

    def prompts(self, table: PromptTable, draw: np.ndarray) -> np.ndarray:
        """(n,) rows of hers, drawn uniformly."""
        rows = self.rows(table)
        return rows[(draw * len(rows)).astype(np.int64)]

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) the more harmful side where there is one."""
        return np.where(view.harm_gap != 0, side(view.harm_gap), honest)
