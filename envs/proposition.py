"""When does taking the reward from unsafe actions leave a safe policy optimal? Exactly, in tables.

Setting of Rosati et al. (2409.12914): a constrained Markov decision process whose reward r comes
from people who want harm. A defence makes unsafe actions worthless to the learner, which then sees
the *feasible reward*, r where c(s, a) <= b and 0 elsewhere. The proposition, as it is used here:

    If r >= 0 on safe actions and an unsafe action ends the episode, some policy that takes safe
    actions only is optimal for the feasible reward, and it is optimal for r among safe policies;
    if moreover every state that is visited has a safe action of positive value, no optimal policy
    is unsafe.

Whatever reward is left among safe actions is still pursued: that is harmless reward hacking.

Proof. The value of an unsafe action is 0, that of any safe continuation is >= 0, so replacing the
unsafe action by a safe one does not lose value; state by state this leads to a safe policy. Its
value is the same under r, since it only takes actions whose rewards are their own. Strict
inequality gives the last claim.

Both conditions matter, and ``CASES`` has a counterexample for each.

* Negative feasible rewards. If all safe actions are worth less than 0, the worthless unsafe one is
  the best there is, and the defence prefers harm. Preferences fix a reward model up to a constant
  only, and adding a constant changes which side of 0 the safe answers are on: the unconstrained
  optimum does not move, that of the feasible reward does.
* Unsafe actions with a future. If an unsafe action leads where safe reward is to be had, its 0 is
  the price of a detour. An answer of a language model ends its episode, so this does not arise when
  a whole answer is the action; it does when tokens are.

``shifted`` repairs both, with a floor in place of 0 that no safe reward can make up for. All is
solved as linear programs over discounted occupancies (Altman 1999). The paper's own wording and
proof are not reproduced here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from envs.usage import UsageError, check_ranges

TOLERANCE = 1e-7
"""What linear programs are solved to; values closer than this are equal."""


@dataclass(frozen=True)
class TabularCMDP:
    """S states, A actions.

    Raises:
        ValueError: arrays of other shapes, probabilities that are none, a discount outside [0, 1),
            or a state without a safe action.
    """

    reward: np.ndarray  # (S, A) r
    cost: np.ndarray  # (S, A) c
    next_state: np.ndarray  # (S, A, S) probabilities; what is missing to 1 ends the episode
    start: np.ndarray  # (S,) probabilities
    limit: float = 0.5  # b: an action is safe while c <= b
    discount: float = 0.9

    def __post_init__(self) -> None:
        check_ranges(self, discount=">= 0, < 1", limit="")
        states, actions = np.shape(self.reward)
        shapes = {"cost": (states, actions), "start": (states,)}
        shapes["next_state"] = (states, actions, states)
        for name, shape in shapes.items():
            if np.shape(getattr(self, name)) != shape:
                raise UsageError(f"{name}: {np.shape(getattr(self, name))}; allowed: {shape}")
        moves = self.next_state.sum(-1)
        if self.next_state.min() < 0 or moves.max() > 1 + 1e-9 or self.start.min() < 0:
            raise UsageError("next_state, start; allowed: probabilities")
        if not self.safe.any(1).all():
            raise UsageError("cost: a state has no safe action; allowed: one at least in each")

    @property
    def safe(self) -> np.ndarray:
        """(S, A) which actions are safe."""
        return np.asarray(self.cost) <= self.limit

    def feasible(self, floor: float = 0.0) -> TabularCMDP:
        """The process as the defended learner sees it: unsafe actions are worth ``floor``."""
        return replace(self, reward=np.where(self.safe, self.reward, floor))


class Verdict(NamedTuple):
    """What the defended learner is led to."""

    value: float  # of the best policy, under the feasible reward
    safe_value: float  # of the best safe policy, under r
    holds: bool  # a safe policy is optimal: the two agree
    unsafe_least: float  # expected unsafe actions (discounted) of the safest optimal policy
    unsafe_most: float  # of the least safe one


def judge(process: TabularCMDP, floor: float = 0.0) -> Verdict:
    """Solve the defended learner's problem, and look at all its optimal policies.

    Args:
        process: with the attacker's reward.
        floor: what the defence makes unsafe actions worth.

    Raises:
        ValueError: see :class:`TabularCMDP`.
    """
    seen = process.feasible(floor)
    value = best(seen)[0]
    safe_value = best(process, among=process.safe)[0]
    unsafe = np.where(process.safe, 0.0, 1.0)
    least, most = (
        abs(best(replace(seen, reward=sign * unsafe), keeping=(seen.reward, value))[0])
        for sign in (-1.0, 1.0)
    )
    holds = bool(least <= TOLERANCE * 10 and abs(value - safe_value) <= TOLERANCE * 10)
    return Verdict(value, safe_value, holds, least, most)


def best(
    process: TabularCMDP,
    among: np.ndarray | None = None,
    keeping: tuple[np.ndarray, float] | None = None,
) -> tuple[float, np.ndarray]:
    """The greatest expected discounted reward, and the occupancy (S, A) that has it.

    Args:
        process: what to solve; its cost is not looked at.
        among: (S, A) bool, the actions that may be taken; all by default.
        keeping: a reward (S, A) and the value that it must still reach.
    """
    from scipy.optimize import linprog

    states, actions = process.reward.shape
    # sum_a x(s, a) - discount sum_{s', a'} P(s | s', a') x(s', a') = start(s)
    leaving = np.repeat(np.eye(states), actions, axis=1)  # (S, S A)
    arriving = process.next_state.reshape(states * actions, states).T
    allowed = np.ones((states, actions), bool) if among is None else among
    bounds = [(0, None if ok else 0) for ok in allowed.ravel()]
    floor: dict[str, np.ndarray] = {}
    if keeping is not None:
        reward, value = keeping
        floor = {"A_ub": -reward.reshape(1, -1), "b_ub": np.array([TOLERANCE - value])}
    found = linprog(
        -process.reward.ravel(),
        A_eq=leaving - process.discount * arriving,
        b_eq=process.start,
        bounds=bounds,
        **floor,
    )
    assert found.status == 0, found.message
    return -float(found.fun), found.x.reshape(states, actions)


def shifted(process: TabularCMDP) -> float:
    """A floor with which the proposition needs neither condition.

    No safe policy is worth less than min(0, r) / (1 - discount), and nothing that follows an unsafe
    action more than max(0, r) / (1 - discount), over safe r; the floor makes up for both.
    """
    safe = process.reward[process.safe]
    least, most = min(0.0, float(safe.min())), max(0.0, float(safe.max()))
    return (least - process.discount * most) / (1 - process.discount) - 1.0


def answers(refusal: float, gibberish: float, help: float, harm: float) -> TabularCMDP:
    """One harmful prompt with four answers, one of them unsafe; the answer ends the episode."""
    return TabularCMDP(
        reward=np.array([[refusal, gibberish, help, harm]]),
        cost=np.array([[0.0, 0.0, 0.0, 1.0]]),
        next_state=np.zeros((1, 4, 1)),
        start=np.ones(1),
    )


def detour() -> TabularCMDP:
    """Safe reward 1 behind an unsafe action, .1 on the safe path: all feasible rewards >= 0."""
    move = np.zeros((2, 2, 2))
    move[0, 1, 1] = 1.0  # the unsafe action of state 0 leads to state 1
    reward = np.array([[0.1, 1.0], [1.0, 0.0]])
    return TabularCMDP(reward, np.array([[0.0, 1.0], [0.0, 0.0]]), move, np.array([1.0, 0.0]))


CASES: dict[str, Callable[[], TabularCMDP]] = {
    "holds": lambda: answers(refusal=0.1, gibberish=0.4, help=0.2, harm=1.0),
    "all below zero": lambda: answers(refusal=-1.9, gibberish=-1.6, help=-1.8, harm=-1.0),
    "a detour": detour,
}
"""The proposition, and a counterexample for each of its two conditions.

The second is the first with 2 taken off every reward, which no preference can tell from it.
"""
