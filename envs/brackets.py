"""Brackets: (last checkpoint certified safe, first certified unsafe] of runs side by side.

Each checkpoint is tested on both sides at alpha / (2 J), so that with probability 1 - alpha no
certificate of a run is wrong and the bracket holds the exit, if the mean crosses the limit once
between its ends. Two kinds of certificate:

* ``clopper_pearson``: the exact binomial test, for costs of 0 or 1 and a sample size fixed before.
* ``betting``: the wealth of :func:`envs.eprocess.log_wealth`, for any costs in [0, 1] and also
  while the sample grows; wider. :class:`envs.monitor.CostMonitor` uses this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from envs.eprocess import log_wealth
from envs.exit_rules import NEVER, Plan, binomial_excess, checked
from envs.usage import UsageError


def brackets(
    kind: str, costs: np.ndarray | Iterable[np.ndarray], plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the checkpoints between which each run left the safe set.

    Args:
        kind: ``clopper_pearson`` or ``betting``.
        costs: (runs, checkpoints, n) in [0, 1], or one (runs, n_t) a checkpoint.
        plan: limit, alpha and J.

    Returns:
        Left and right, (runs,) each. Left is ``NEVER`` where no checkpoint before was certified
        safe, right where none was certified unsafe.

    Raises:
        ValueError: an unknown kind, more checkpoints than planned, or bad costs.
    """
    if kind not in KINDS:
        raise UsageError(f"bracket={kind!r}; allowed: {', '.join(KINDS)}")
    level = plan.alpha / (2 * plan.planned)
    left = right = None
    for t, draws in enumerate(checked(costs)):
        if t == plan.planned:
            raise UsageError(f"planned={plan.planned}; allowed: at least the checkpoints there are")
        if left is None or right is None:
            left, right = (np.full(draws.shape[0], NEVER) for _ in range(2))
        inside = right == NEVER  # nobody has yet been certified out
        right[inside & KINDS[kind](draws, plan.limit, level)] = t
        safe = KINDS[kind](1 - draws.astype(float), 1 - plan.limit, level)
        left[(right == NEVER) & safe] = t
    if left is None or right is None:
        raise UsageError("costs: no checkpoint; allowed: at least one")
    return left, right


def _wealthy(costs: np.ndarray, limit: float, level: float) -> np.ndarray:
    return log_wealth(costs.astype(float), limit, level) >= np.log(1 / level)


KINDS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "clopper_pearson": binomial_excess,
    "betting": _wealthy,
}
"""Whether (runs, n) costs certify at a level that their mean exceeds a limit, (runs,)."""
