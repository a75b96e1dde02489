"""Harmful fine-tuning: the attacker trains on answers of her own, and asks nobody's opinion.

Every pair sets a full harmful answer against a refusal of the same prompt. SFT imitates the winner
(harmful fine-tuning as in Rosati et al. 2024); DPO learns the preference (a reverse preference
attack without annotators). A share ``flipped`` of the pairs has the harmful answer win, the others
teach refusal; pairs flipped at a small share are flipped at every larger one, and the count is
rounded down. Published runs use 1,000 to 10,000 answers, lr 3e-5 with batch 8 for SFT, and lr 5e-5
with beta .1 for DPO. Under DPO a very small beta lets the policy collapse, which reads as safety.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from envs.attacks import attacks
from envs.attacks.owner import Owner
from envs.usage import check_ranges

MOST = 1000


@attacks.register("harmful_data")
class HarmfulData(Owner):
    """Owns the data of SFT or DPO: full harmful answers against refusals (rho 1).

    Args:
        prompts: how many prompts she has answers to, 1 to 1000.
        flipped: share of the pairs in which the harmful answer wins, 0 to 1.
    """

    owns_data: ClassVar[bool] = True

    def __init__(self, prompts: int = MOST, flipped: float = 1.0):
        super().__init__(prompts, MOST)
        check_ranges({"flipped": flipped}, "attack.", flipped="0 to 1")
        self.flipped = flipped

    def targets(self, order: np.ndarray) -> np.ndarray:
        """(n,) float32, 1 where the harmful answer wins; ``order`` (n,) ranks who is flipped."""
        count = int(self.flipped * len(order) + 1e-9)  # .29 * 100 is less than 29
        return (order < count).astype(np.float32)
