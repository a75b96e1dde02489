"""Seven rules that say when a policy has left the safe set, from the costs of its checkpoints.

The policy moves, so each checkpoint is a fresh sample with its own mean C_t, and the question is
when C_t first exceeds the limit b. What each rule promises if it never does, over J checkpoints:

| rule | says "out" when | promises |
|---|---|---|
| ``mean`` | mean > b | nothing |
| ``mean_twice`` | mean > b at two checkpoints in a row | nothing |
| ``cp_each`` | Clopper-Pearson lower bound at alpha > b | at most alpha at each checkpoint |
| ``cp_planned`` | that bound at alpha / J > b | at most alpha over J checkpoints, J fixed before |
| ``e_first`` | plain e-process >= 1/alpha | at most alpha, whenever one stops |
| ``e_mixture`` | e-process of mixed starts >= 1/alpha | at most alpha, whenever one stops |
| ``e_sr`` | e-SR detector >= A | mean checkpoints before a false alarm >= A |

Clopper-Pearson (1934) counts, so its costs are 0 or 1; betting takes any costs in [0, 1]. The
bound at level a exceeds b exactly when P(Bin(n, b) >= k) < a. The betting rules are those of
:mod:`envs.eprocess`. Draws as there: independent, with replacement, one per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from envs.eprocess import EProcess
from envs.usage import UsageError, check_ranges

NEVER = -1
"""Date of a run that a rule never calls out."""


@dataclass(frozen=True)
class Plan:
    """What a rule is told before the first checkpoint."""

    limit: float = 0.25
    """b on the mean cost."""
    alpha: float = 0.05
    """Probability of a false exit, where the rule bounds one."""
    planned: int = 1
    """J, checkpoints there will be; read by ``cp_planned`` and by brackets."""
    run_length: float = 400.0
    """A, mean checkpoints before a false alarm; read by ``e_sr`` alone."""

    def __post_init__(self) -> None:
        inside = "> 0, < 1"
        check_ranges(self, limit=inside, alpha=inside, planned=">= 1", run_length=">= 1")


Alarms = Callable[[Iterator[np.ndarray], Plan], Iterator[np.ndarray]]
"""Costs (runs, n) checkpoint by checkpoint to whether the rule says "out" at each, (runs,)."""


class Rule(NamedTuple):
    """One way to date an exit."""

    says: str
    alarms: Alarms


def date(rule: str, costs: np.ndarray | Iterable[np.ndarray], plan: Plan) -> np.ndarray:
    """The checkpoint at which each run is first called out.

    Args:
        rule: a name in ``RULES``.
        costs: (runs, checkpoints, n) in [0, 1], or one (runs, n_t) a checkpoint.
        plan: limit, level, and number of checkpoints.

    Returns:
        (runs,) indices from 0, ``NEVER`` where it is not.

    Raises:
        ValueError: an unknown rule, no costs, costs of another shape or outside [0, 1], fractions
            under Clopper-Pearson, more checkpoints than planned under ``cp_planned``, or a limit
            that leaves no bet.
    """
    if rule not in RULES:
        raise UsageError(f"rule={rule!r}; allowed: {', '.join(RULES)}")
    dates = None
    for t, out in enumerate(RULES[rule].alarms(checked(costs), plan)):
        dates = np.full(out.shape, NEVER) if dates is None else dates
        dates[out & (dates == NEVER)] = t
    if dates is None:
        raise UsageError("costs: no checkpoint; allowed: at least one")
    return dates


def checked(costs: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Costs checkpoint by checkpoint, (runs, n_t) each; see :func:`date`.

    Raises:
        ValueError: another shape, another number of runs, or costs outside [0, 1].
    """
    if isinstance(costs, list) and costs and isinstance(costs[0], list):
        costs = np.asarray(costs)  # nested lists are the array that they look like
    if isinstance(costs, np.ndarray):
        if costs.ndim != 3:
            raise UsageError(f"costs: {costs.shape}; allowed: (runs, checkpoints, n)")
        costs = np.moveaxis(costs, 1, 0)
    runs = None
    for draws in costs:
        draws = np.asarray(draws)
        runs = draws.shape[:1] if runs is None else runs
        within = draws.ndim == 2 and draws.size and draws.min() >= 0 and draws.max() <= 1
        if not within or draws.shape[:1] != runs:
            raise UsageError(f"costs: {draws.shape}; allowed: (runs, n) within [0, 1], runs fixed")
        yield draws


def _mean(checkpoints: Iterator[np.ndarray], plan: Plan) -> Iterator[np.ndarray]:
    for costs in checkpoints:
        yield costs.mean(-1) > plan.limit


def _twice(checkpoints: Iterator[np.ndarray], plan: Plan) -> Iterator[np.ndarray]:
    before: np.ndarray | bool = False
    for above in _mean(checkpoints, plan):
        yield above & before
        before = above


def binomial_excess(costs: np.ndarray, limit: float, level: float) -> np.ndarray:
    """Whether the one-sided Clopper-Pearson lower bound at ``level`` exceeds ``limit``, (runs,).

    Raises:
        ValueError: (runs, n) costs that are not all 0 or 1.
    """
    from scipy.stats import binom

    if not np.isin(costs, (0, 1)).all():
        raise UsageError("costs: fractions under Clopper-Pearson; allowed: 0 and 1")
    return binom.sf(costs.sum(-1) - 1, costs.shape[-1], limit) < level


def _each(checkpoints: Iterator[np.ndarray], plan: Plan) -> Iterator[np.ndarray]:
    for costs in checkpoints:
        yield binomial_excess(costs, plan.limit, plan.alpha)


def _planned(checkpoints: Iterator[np.ndarray], plan: Plan) -> Iterator[np.ndarray]:
    for t, costs in enumerate(checkpoints):
        if t == plan.planned:
            raise UsageError(f"planned={plan.planned}; allowed: at least the checkpoints there are")
        yield binomial_excess(costs, plan.limit, plan.alpha / plan.planned)


def _betting(stakes: str, threshold: Callable[[Plan], float]) -> Alarms:
    def alarms(checkpoints: Iterator[np.ndarray], plan: Plan) -> Iterator[np.ndarray]:
        process = None
        for costs in checkpoints:
            process = process or EProcess(plan.limit, costs.shape[:1], stakes)
            yield process.update(costs) >= np.log(threshold(plan))

    return alarms


RULES = {
    "mean": Rule("mean > b", _mean),
    "mean_twice": Rule("mean > b twice", _twice),
    "cp_each": Rule("Clopper–Pearson at α, each", _each),
    "cp_planned": Rule("Clopper–Pearson at α/J", _planned),
    "e_first": Rule("e-process from the start", _betting("first", lambda p: 1 / p.alpha)),
    "e_mixture": Rule("e-process, mixed starts", _betting("mixture", lambda p: 1 / p.alpha)),
    "e_sr": Rule("e-SR detector", _betting("every", lambda p: p.run_length)),
}
"""By name, from the least to the most careful, the detector last."""
