"""A test of every annotator at once: does she err more often than honest people do?

For annotator j in stratum s the hypothesis is that each answer is wrong with probability at most
``limit``, whatever went before. Betting a share against it multiplies the stake by

    e = 1 + l (x - limit),    x = 1 if the answer is wrong, else 0,

whose mean is at most 1. As in ``envs/eprocess.py`` a share w_k = 1 / (k (k + 1)) of the stake
enters when she answers in her k-th round, so that a good past is no shelter (A_k = (A_(k-1) + w_k)
E_k, M_k = A_k + 1 / (k + 1)), and M is averaged over bets. An annotator's evidence is the mean of
M over strata: strata share her alpha evenly. By Ville's inequality the evidence about an honest
person ever reaches 1 / alpha with probability at most alpha, whenever one looks and stops.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.eprocess import STAKES
from envs.usage import check_ranges

MARGINS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Each bet is the growth-optimal one against an error rate of the limit plus a margin."""
_ENTERING, _WAITING = STAKES["mixture"]


class ErrorTest:
    """Evidence against annotators, by id; people appear with their first answer.

    Args:
        limit: error rate of honest people, above 0 and at most .9.
        strata: how many are kept apart; 1 pools all.

    Raises:
        ValueError: a limit that leaves no bet.
    """

    def __init__(self, limit: float, strata: int = 3):
        check_ranges({"limit": limit}, limit="> 0, <= 0.9")
        rates = np.array([limit + m for m in MARGINS if limit + m < 1])
        bets = (rates - limit) / (limit * (1 - limit))
        self.gains = np.stack([np.log1p(-bets * limit), np.log1p(bets * (1 - limit))])  # (2, bets)
        self.strata = strata
        self._active = np.zeros((0, strata, bets.size))
        self._rounds = np.zeros((0, strata), np.int64)
        self.peak = np.zeros(0)  # (people,) greatest log evidence so far

    def update(self, annotator: np.ndarray, stratum: np.ndarray, wrong: np.ndarray) -> None:
        """Take in one round's answers: (G,) ids, strata and whether they are wrong."""
        if not len(annotator):
            return
        self._admit(1 + int(annotator.max()))
        stratum = stratum % self.strata
        log_e, seen = np.zeros_like(self._active), np.zeros_like(self._rounds, bool)
        np.add.at(log_e, (annotator, stratum), self.gains[wrong.astype(np.int64)])
        seen[annotator, stratum] = True
        self._rounds += seen
        count = np.where(seen, self._rounds, 1)[..., None]
        grown = np.logaddexp(self._active, _ENTERING(count)) + log_e
        self._active = np.where(seen[..., None], grown, self._active)
        self.peak = np.maximum(self.peak, self.log_evidence)

    def _admit(self, people: int) -> None:
        """Make room for ids below ``people``; who has not answered has evidence 1."""
        more = people - len(self.peak)
        if more > 0:
            nothing = np.full((more, *self._active.shape[1:]), -np.inf)
            self._active = np.concatenate([self._active, nothing])
            self._rounds = np.concatenate([self._rounds, np.zeros((more, self.strata), np.int64)])
            self.peak = np.concatenate([self.peak, np.zeros(more)])

    @property
    def log_evidence(self) -> np.ndarray:
        """(people,) log of the evidence as it stands."""
        waiting = _WAITING(self._rounds)[..., None]
        wealth = np.logaddexp(self._active, waiting).reshape(len(self.peak), -1)
        return np.logaddexp.reduce(wealth, 1) - np.log(max(1, wealth.shape[1]))

    def flagged(self, alpha: float) -> np.ndarray:
        """(n,) ids of those whose evidence has ever reached 1 / alpha; 0 flags nobody."""
        return np.flatnonzero(self.peak >= -np.log(alpha)) if alpha > 0 else np.zeros(0, np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Arrays alone."""
        return {"active": self._active, "rounds": self._rounds, "peak": self.peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._active, self._rounds, self.peak = (
            np.array(state[name]) for name in ("active", "rounds", "peak")
        )
