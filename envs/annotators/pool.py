"""The people: who acts how often, what they would honestly answer, and which of them are malicious.

People are numbered by how active they are; nobody outside the environment sees that number, only a
permuted id.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from envs import rng
from envs.annotators import Behaviour, View
from envs.types import VOTE_A, VOTE_B, VOTE_SKIP
from envs.usage import check_ranges

SHARE_TOLERANCE = 0.01
"""How far malicious people's share of activity may stray from rho where the choice allows."""


@dataclass(frozen=True)
class Pool:
    """``people`` annotators who share one list of behaviours (and differ in their traits)."""

    people: int
    """How many there are."""
    behaviours: tuple[Behaviour, ...]
    """What they are like, applied in order."""

    def __post_init__(self) -> None:
        """Check the number of people."""
        check_ranges({"annotators": self.people}, annotators=">= 1")

    @cached_property
    def activity(self) -> np.ndarray:
        """(people,) share of all actions that is each person's."""
        weight = np.ones(self.people)
        for behaviour in self.behaviours:
            weight = behaviour.activity(weight)
        return weight / weight.sum()

    def arrive(self, draws: np.ndarray) -> np.ndarray:
        """One person per uniform draw, by activity; same shape as ``draws``."""
        bounds = np.cumsum(self.activity)
        return np.minimum(np.searchsorted(bounds, draws, side="right"), self.people - 1)

    def assign(self, key: int, items: np.ndarray, redundancy: int) -> np.ndarray:
        """(B, redundancy) distinct people for each of B items, by activity.

        Exponential races give successive sampling without replacement; the first r of a larger
        redundancy are the same people.
        """
        race = -np.log(rng.uniform(key, items[:, None], np.arange(self.people))) / self.activity
        first = np.argpartition(race, redundancy - 1, axis=1)[:, :redundancy]
        order = np.argsort(np.take_along_axis(race, first, 1), axis=1)
        return np.take_along_axis(first, order, 1)

    def honest(self, view: View) -> np.ndarray:
        """(N,) int8 honest votes; pairs that are worth the same are skipped."""
        logit = np.zeros(len(view.item))
        for behaviour in self.behaviours:
            logit = logit + behaviour.logit(view)
        p = 0.5 * (1.0 + np.tanh(logit / 2.0))
        for behaviour in self.behaviours:
            p = behaviour.probability(view, p)
        vote = np.where(view.draw("honest vote") < p, VOTE_A, VOTE_B)
        vote = np.where(view.margin == 0, VOTE_SKIP, vote).astype(np.int8)
        for behaviour in self.behaviours:
            vote = behaviour.answer(view, vote)
        return vote

    def malicious(self, rho: float, key: int) -> np.ndarray:
        """(people,) bool, the first round(rho * people) of a random order drawn from ``key``.

        Smaller sets are parts of larger ones. The order is random among those people who keep the
        set's share of activity within ``SHARE_TOLERANCE`` of its share of people; where nobody
        does, the nearest is next. Plain chance would give 5 of 100 people anything from 1 % to 25 %
        of the labels.
        """
        order = rng.stream(key, "malicious order").permutation(self.people)
        activity, free = self.activity[order], np.ones(self.people, bool)
        share = 0.0
        for count in range(1, round(rho * self.people) + 1):
            stray = np.where(free, np.abs(share + activity - count / self.people), np.inf)
            near = stray <= SHARE_TOLERANCE
            chosen = int(near.argmax() if near.any() else stray.argmin())
            free[chosen] = False
            share += activity[chosen]
        members = np.zeros(self.people, bool)
        members[order[~free]] = True
        return members
