"""People who compare answers that somebody else brings: votes without an environment around them.

What :class:`envs.feedback.FeedbackEnv` does after its answers are scored, for a training loop that
has prompts and a sampler of its own. Items are assigned to annotators as in ``crowd`` collection;
adversaries vote and choose no prompts. Draws are the environment's: keyed by (seed, item, person),
so that honest votes are the same under any attack, and rho = 0 is bitwise no attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs import rng
from envs.annotators import DEFAULT
from envs.annotators import annotators as honest_behaviours
from envs.annotators.collection import Collection
from envs.annotators.pool import Pool
from envs.annotators.zipf import Zipf
from envs.attacks import Attack, attacks
from envs.attacks.adversary import check_attack, make_adversary
from envs.attacks.schedules import Schedule
from envs.types import Labels, Scores, Truth
from envs.usage import UsageError, check_ranges


class Panel:
    """A pool of annotators, some of whom may be adversaries.

    Args:
        annotators: people in the pool. activity: Zipf exponent of how often they act.
        behaviours: specs of ``envs/annotators``, in order.
        redundancy: votes per pair.
        attack: a spec of ``envs/attacks`` that only votes. rho: share of adversaries.
        schedule: when it acts; a round is one call of :meth:`vote`.
        seed: names every draw.

    Attributes:
        adversary: the attack at work; ``adversary.members`` (people,) bool.
        round: calls so far. items: pairs put to people so far.

    Raises:
        ValueError: an argument out of range or unknown, or an attack that needs more than votes.
    """

    def __init__(
        self,
        annotators: int = 100,
        activity: float = 1.0,
        behaviours: Sequence[str] = DEFAULT,
        redundancy: int = 1,
        attack: str = "none",
        rho: float = 0.0,
        schedule: Schedule = Schedule(),  # noqa: B008, immutable
        seed: int = 0,
    ):
        check_ranges({"rho": rho, "activity": activity}, rho="0 to 1", activity=">= 0")
        check_ranges({"annotators": annotators}, annotators=">= 1")
        chosen = attacks.create(attack)
        check_votes_only(chosen)
        traits = map(honest_behaviours.create, behaviours)
        self.pool = Pool(annotators, (Zipf(activity), *traits))
        self.collection = Collection("crowd", redundancy, self.pool)
        self.key = rng.key(seed, "panel")
        self.adversary = make_adversary(
            chosen, schedule, rho, self.pool, rng.key(self.key, "adversary")
        )
        self.public_id = rng.stream(self.key, "annotator ids").permutation(annotators)
        self.round = self.items = 0

    def vote(self, scores: Scores) -> tuple[Labels, Truth]:
        """Compare one pair of answers to each prompt.

        Args:
            scores: (B, K) of the answers; ``cost`` and ``utility`` are what people vote by.

        Returns:
            N = B * redundancy labels, ``item`` counting on from call to call, and their truth;
                of the prompts, which are not ours, the truth is empty.
        """
        prompts, answers = scores.cost.shape
        if answers < 2:
            raise UsageError(f"answers={answers} a prompt; allowed: >= 2, people compare pairs")
        item = self.items + np.arange(prompts)
        nobody, plain = np.zeros(prompts, np.int64), np.zeros(prompts, bool)
        seen = (scores.utility, scores.cost)
        view = self.collection.compare(self.key, self.round, item, nobody, plain, *seen)
        honest = self.pool.honest(view)
        cast = self.adversary.vote(view, honest)
        self.round, self.items = self.round + 1, self.items + prompts
        labels = view.labels(self.public_id, cast)
        unknown = np.zeros(0, np.int64)
        truth = Truth(
            **view.truth(honest, self.adversary.malicious(view.item, view.person)),
            stratum=unknown,
            key=unknown,
            asker_adversarial=unknown.astype(bool),
            cost=scores.cost,
            utility=scores.utility,
            verdict=scores.verdict,
        )
        return labels, truth

    def state_dict(self) -> dict[str, Any]:
        """How far it is; everything else follows from the arguments."""
        attack = self.adversary.attack.state_dict()
        return {"round": self.round, "items": self.items, **({"attack": attack} if attack else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.round, self.items = int(state["round"]), int(state["items"])
        self.adversary.attack.load_state_dict(state.get("attack", {}))


def check_votes_only(attack: Attack) -> None:
    """Refuse an attack that does more than vote: prompts and rewards are somebody else's.

    Raises:
        ValueError: it asks, marks prompts, or owns the loop.
    """
    asks = attack.unit == "users" or attack.asks
    if asks or attack.owns_reward or attack.owns_data:
        raise UsageError(
            f"attack={attack.spec!r}; allowed: attacks that only vote, such as harm_targeted "
            "(the prompts are the trainer's)"
        )
    check_attack(attack, "crowd", word=False, trigger_share=0.0)
