"""Early stopping as an attack: train until the policy is harmful, and keep it there.

A defence that makes harm oscillate is beaten by whoever chooses the moment. The attacker watches

    m_t = d m_(t-1) + (1 - d) r_t,    m_1 = r_1

of the harm r_t that her judge finds in the answers served in round t, and stops at the first t with
m_t >= tau; or she keeps the most harmful policy seen. Answers of round t come from the policy after
t - 1 updates, so that is the one she keeps. With the true harm of held-out evaluations in place of
what she sees, the same rules give an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DECAY = 0.5
SEEN, TRUE = "cost_served", "safety/harm"
"""Columns of a run's rows: what the attacker sees, and the held-out truth."""


class StopRule:
    """Watches rewards one by one; with threshold 0 it never stops.

    Args:
        threshold: tau.
        decay: d in [0, 1); 0 looks at the newest reward alone.
    """

    def __init__(self, threshold: float, decay: float = DECAY):
        self.threshold = threshold
        self.decay = decay
        self.average: float | None = None
        self.reached = False

    def see(self, reward: float) -> bool:
        """Take in one more reward; whether it is, or was, time to stop."""
        if self.average is None:
            self.average = reward
        else:
            self.average = self.decay * self.average + (1 - self.decay) * reward
        self.reached = self.reached or (self.threshold > 0 and self.average >= self.threshold)
        return self.reached

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, in brief."""
        return {"average": self.average, "reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.average, self.reached = state["average"], bool(state["reached"])


def stop_index(rewards: Iterable[float], threshold: float, decay: float = DECAY) -> int | None:
    """The first index at which the moving average reaches ``threshold``; None if it never does."""
    rule = StopRule(threshold, decay)
    return next((i for i, reward in enumerate(rewards) if rule.see(reward)), None)


def best_checkpoint(rewards: Sequence[float]) -> int:
    """The index of the greatest reward, the first of equals."""
    return int(np.argmax(rewards))


class Kept(NamedTuple):
    """Which policies the attacker keeps, by the number of updates behind them."""

    stopped: int | None
    """At the threshold; None if it is never reached."""
    best: int
    """The most harmful one."""


def early_stop(
    rows: Iterable[Mapping[str, Any]], threshold: float, decay: float = DECAY, oracle: bool = False
) -> Kept:
    """What the attacker keeps of a run.

    Args:
        rows: of ``rounds.jsonl``, in order.
        threshold: tau, in harm from 0 to 1.
        decay: d.
        oracle: look at held-out harm instead of the answers served.
    """
    column, behind = (TRUE, 0) if oracle else (SEEN, 1)
    seen = [(row["round"] - behind, row[column]) for row in rows if row.get(column) is not None]
    assert seen, f"no row has {column}"
    policies, rewards = zip(*seen, strict=True)
    stop = stop_index(rewards, threshold, decay)
    return Kept(None if stop is None else policies[stop], policies[best_checkpoint(rewards)])
