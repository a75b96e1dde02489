"""An attack at work: who is malicious, and which of their acts are hostile this round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs import rng
from envs.annotators.pool import Pool
from envs.annotators.view import View
from envs.attacks import UNITS, Attack
from envs.attacks.schedules import Schedule
from envs.types import VOTE_A, VOTE_B, VOTE_SKIP, VOTE_TIE
from envs.usage import UsageError

VOTES = (VOTE_A, VOTE_B, VOTE_TIE, VOTE_SKIP)


def check_attack(attack: Attack, collection: str, word: bool, trigger_share: float) -> None:
    """Whether ``attack`` can do anything here.

    Args:
        attack: what was asked for.
        collection: ``chat`` or ``crowd``.
        word: whether the prompts have twins with a trigger word.
        trigger_share: share of honest prompts that carry it.

    Raises:
        ValueError: it cannot.
    """
    if attack.unit not in UNITS:
        raise UsageError(f"attack={attack.spec!r}: unit={attack.unit!r}; allowed: {UNITS}")
    if attack.unit == "users" and collection != "chat":
        raise UsageError(
            f"attack={attack.spec!r} with collection={collection!r}; allowed: 'chat', where those "
            "who ask also vote"
        )
    if attack.appends_trigger and not word:
        raise UsageError(f"attack={attack.spec!r}; allowed: any without a trigger (no such word)")
    if attack.appends_trigger and collection == "crowd" and trigger_share == 0:
        raise UsageError(
            f"trigger_share=0 with attack={attack.spec!r} and collection='crowd'; allowed: above 0 "
            "(nobody else brings the word)"
        )


def make_adversary(
    attack: Attack, schedule: Schedule, rho: float, pool: Pool, key: int
) -> Adversary:
    """``attack`` at share ``rho``; who is malicious depends on ``key`` and ``pool`` alone."""
    of_people = attack.unit in ("annotators", "users")
    members = pool.malicious(rho if of_people else 0.0, rng.key(key, "members"))
    attack.begin(pool.people)
    return Adversary(attack, schedule, rho, members, key)


@dataclass(frozen=True)
class Adversary:
    """``attack`` with its schedule, over the malicious ``members`` of the pool."""

    attack: Attack
    schedule: Schedule
    rho: float
    members: np.ndarray  # (people,) bool; nobody where rho is no share of people
    key: int

    def malicious(self, item: np.ndarray, person: np.ndarray) -> np.ndarray:
        """(N,) bool, whose act on these items it is: a malicious person's, or a chosen label."""
        if self.attack.unit == "labels":
            return rng.uniform(rng.key(self.key, "labels"), item, person) < self.rho
        return self.members[person]

    def acts(self, round: int, item: np.ndarray, person: np.ndarray) -> np.ndarray:
        """(N,) bool, on which items the schedule lets people act in ``round``.

        The draw belongs to item and person, so an asker who is hostile in asking is hostile in
        voting while the schedule stands still.
        """
        gate = rng.uniform(rng.key(self.key, "gate"), item, person)
        return gate < self.schedule.intensity(round)

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) int8 votes: the attack's where hostile, the honest ones elsewhere.

        Raises:
            ValueError: the attack's votes are none.
        """
        hostile = self.malicious(view.item, view.person)
        hostile &= self.acts(view.round, view.item, view.person)
        seen = view._replace(key=rng.key(self.key, "attack"), gold=None)
        mine = np.asarray(self.attack.vote(seen, honest))
        if mine.shape != honest.shape or not np.isin(mine, VOTES).all():
            raise UsageError(
                f"attack={self.attack.spec!r} in round {view.round + 1}: votes of shape "
                f"{mine.shape} with {np.unique(mine)[:5].tolist()}; allowed: shape {honest.shape} "
                f"of {VOTES}"
            )
        cast = np.where(hostile, mine, honest).astype(np.int8)
        self.attack.watch(seen, cast, honest)
        return cast
