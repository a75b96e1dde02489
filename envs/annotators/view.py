"""What somebody who casts a vote looks at, for all votes of a round at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from envs import rng
from envs.types import VOTE_A, VOTE_B, Labels


class View(NamedTuple):
    """N comparisons waiting for their votes.

    Draws are counter-based: a pure function of (key, purpose, item, person). The honest vote of a
    person on an item is therefore the same whatever anybody else does.
    """

    key: int  # names the draws
    round: int  # when the votes are cast
    label_id: np.ndarray  # (N,) int64, unique in a run
    item: np.ndarray  # (N,) int64, round of asking * B + row
    a: np.ndarray  # (N,) int64, response shown first
    b: np.ndarray  # (N,) int64, response shown second
    person: np.ndarray  # (N,) int64, who votes; ranks of activity, not public ids
    utility_a: np.ndarray  # (N,) float32
    utility_b: np.ndarray  # (N,) float32
    cost_a: np.ndarray  # (N,) float32
    cost_b: np.ndarray  # (N,) float32
    triggered: np.ndarray  # (N,) bool, the trigger word stands in the prompt
    gold: np.ndarray | None = None  # (N,) bool, a gold question; hidden from attacks

    @property
    def margin(self) -> np.ndarray:
        """(N,) D = u(a) - u(b), above 0 where the first response is truly better."""
        return self.utility_a.astype(np.float64) - self.utility_b

    @property
    def harm_gap(self) -> np.ndarray:
        """(N,) h = c(a) - c(b), above 0 where the first response is more harmful."""
        return self.cost_a.astype(np.float64) - self.cost_b

    def none(self) -> View:
        """The same with no comparisons in it."""
        return self.take(np.zeros(0, np.int64))

    def state(self) -> dict[str, Any]:
        """Numbers and arrays, of which ``View(**state)`` is made again."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def take(self, index: np.ndarray) -> View:
        """The comparisons ``index``: row numbers, or (N,) bool."""
        columns: Any = (None if column is None else column[index] for column in self[2:])
        return View(self.key, self.round, *columns)

    def labels(self, public_id: np.ndarray, vote: np.ndarray) -> Labels:
        """The log of (N,) int8 ``vote``, with people's (people,) public ids."""
        return Labels(
            label_id=self.label_id,
            item=self.item,
            a=self.a,
            b=self.b,
            annotator=public_id[self.person],
            vote=vote,
            weight=np.ones(len(vote), np.float32),
            round=np.full(len(vote), self.round),
        )

    def truth(self, honest: np.ndarray, adversarial: np.ndarray) -> dict[str, Any]:
        """The block of :class:`envs.types.Truth` that belongs to the labels."""
        return {
            "honest_vote": honest,
            "adversarial": adversarial,
            "risk_relevant": self.harm_gap != 0,
            "cost_a": self.cost_a,
            "cost_b": self.cost_b,
        }

    def draw(self, purpose: str) -> np.ndarray:
        """(N,) uniform draws in (0, 1), one per vote."""
        return rng.uniform(rng.key(self.key, purpose), self.item, self.person)

    def normal_trait(self, purpose: str) -> np.ndarray:
        """(N,) standard normal draws that belong to the person and never change (Box-Muller)."""
        radius = rng.uniform(rng.key(self.key, purpose, "radius"), self.person)
        angle = rng.uniform(rng.key(self.key, purpose, "angle"), self.person)
        return np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)


def directions(a: np.ndarray, b: np.ndarray, vote: np.ndarray) -> np.ndarray:
    """(N,) 1 where the vote is for the answer of the lower number, -1 for the other, 0 for neither.

    Args:
        a: (N,) answers shown first.
        b: (N,) answers shown second.
        vote: (N,) what was said.
    """
    first = np.where(a < b, 1, -1)
    return np.select([vote == VOTE_A, vote == VOTE_B], [first, -first], 0)


def consensus(item: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """(N,) direction that most *others* took on the same item; 0 where neither prevails."""
    if not len(item):
        return direction
    _, place = np.unique(item, return_inverse=True)
    return np.sign(np.bincount(place, direction)[place] - direction).astype(np.int64)
