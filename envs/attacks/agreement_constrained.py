"""A14, agreement-constrained stealth: flips only while she still looks like everybody else.

Wraps a goal, which is any other attack. Where the goal wants another vote than the honest one, a
malicious person casts it only if her agreement rate, with one more disagreement counted, stays
high enough:

    (n_agree + a0) / (n + 1 + a0 + b0) - delta >= theta

with n votes so far of which n_agree agreed, and a Beta(a0, b0) prior for what the platform thinks
of a newcomer. Everywhere else she votes with the consensus that she expects, which is what she
honestly thinks of the pair.

She knows her own votes and what her platform shows of the item afterwards: the majority of the
others who voted on it. Where there is none (in chat, at redundancy 1, or in a tie) her expectation
stands in for it. So agreement grows with every harmless vote, and is spent where it matters; a
schedule that lets her wait (``sleeper``) saves it up. Within a round she counts her votes in order,
before any consensus is known.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.annotators.view import View, consensus, directions
from envs.attacks import Attack, attacks
from envs.registry import is_plugin
from envs.types import VOTE_SKIP, PromptTable
from envs.usage import UsageError, check_ranges


@attacks.register("agreement_constrained")
class AgreementConstrained(Attack):
    """Pursues a goal only while her agreement with other annotators stays high.

    Args:
        goal: what she is after, the spec of a registered attack that votes.
        theta: agreement that she keeps, 0 to 1.
        prior: (a0, b0), agreements and disagreements that a newcomer is credited with.
        delta: distance that she keeps from ``theta``, 0 to 1.

    Raises:
        ValueError: a number out of range, or a goal that is none.
    """

    def __init__(
        self,
        goal: str = "harm_targeted",
        theta: float = 0.7,
        prior: tuple[float, ...] = (7.0, 3.0),
        delta: float = 0.0,
    ):
        arguments = {"theta": theta, "prior": tuple(prior), "delta": delta}
        check_ranges(arguments, "attack.", theta="0 to 1", prior="> 0", delta="0 to 1")
        if len(prior) != 2:
            raise UsageError(f"attack.prior={prior!r}; allowed: two numbers (a0, b0)")
        self.theta, self.prior, self.delta = theta, tuple(prior), delta
        self.goal = self._checked(goal)
        self.unit = self.goal.unit
        self.appends_trigger = self.goal.appends_trigger
        self.begin(0)

    def _checked(self, goal: str) -> Attack:
        """The attack ``goal``; no code of a person's own, which only a whole spec may name."""
        named = not is_plugin(goal) and goal.partition("(")[0].strip() != "agreement_constrained"
        wrapped = attacks.create(goal) if named else None
        fits = wrapped and wrapped.unit in ("annotators", "users")
        if not wrapped or not fits or wrapped.owns_reward or wrapped.owns_data:
            raise UsageError(
                f"attack.goal={goal!r}; allowed: a registered attack of people who vote, such as "
                "harm_targeted, always_flip or harmful_asker"
            )
        return wrapped

    def begin(self, people: int) -> None:
        """Nobody has voted yet."""
        self.agreed = np.zeros(people)
        self.counted = np.zeros(people)

    @property
    def asks(self) -> bool:
        """As the goal."""
        return self.goal.asks

    def prompts(self, table: PromptTable, draw: np.ndarray) -> np.ndarray | None:
        """(n,) rows that the goal brings."""
        return self.goal.prompts(table, draw)

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) the goal's votes while agreement allows, the honest ones elsewhere."""
        wanted = np.asarray(self.goal.vote(view, honest))
        cast, flips = honest.copy(), wanted != honest
        size = 1 + int(view.person.max(initial=-1))
        agreed, counted = (
            np.concatenate([known, np.zeros(max(0, size - len(known)))])
            for known in (self.agreed, self.counted)
        )
        a0, b0 = self.prior
        for mine in _turns(view.person):  # everybody's first vote of the round, then the second
            who = view.person[mine]
            after = (agreed[who] + a0) / (counted[who] + 1 + a0 + b0) - self.delta
            flipped = flips[mine] & (after >= self.theta)
            cast[mine[flipped]] = wanted[mine[flipped]]
            said = cast[mine] != VOTE_SKIP
            counted[who] += said
            agreed[who] += said & ~flipped
        return cast

    def watch(self, view: View, vote: np.ndarray, honest: np.ndarray) -> None:
        """Count agreement with the majority of the others, or with what was expected of them."""
        said = vote != VOTE_SKIP
        direction = directions(view.a, view.b, vote)
        others = consensus(view.item, direction)
        agrees = np.where(others == 0, vote == honest, direction == others)
        np.add.at(self.counted, view.person[said], 1.0)
        np.add.at(self.agreed, view.person[said], agrees[said].astype(float))

    def state_dict(self) -> dict[str, Any]:
        """Everybody's counts."""
        return {"agreed": self.agreed, "counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; of another attack's there is nothing to restore."""
        if state:
            self.agreed, self.counted = (np.array(state[k]) for k in ("agreed", "counted"))


def _turns(person: np.ndarray) -> list[np.ndarray]:
    """Row numbers of everybody's k-th vote, for each k in turn."""
    order = np.argsort(person, kind="stable")
    first = np.searchsorted(person[order], person[order])
    turn = np.empty(len(person), np.int64)
    turn[order] = np.arange(len(person)) - first
    by_turn = np.argsort(turn, kind="stable")
    return np.split(by_turn, np.cumsum(np.bincount(turn))[:-1]) if len(person) else []
