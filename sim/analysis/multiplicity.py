"""Many arms at once: which of them left the safe set, or differ, if all are looked at.

* ``holm``: p-values, any dependence; the chance of one false finding stays below alpha (Holm 1979).
* ``e_bh``: e-values, any dependence; the expected share of false findings stays below alpha (Wang &
  Ramdas 2022). The k arms of largest e-value are found for the largest k whose k-th e-value is at
  least arms / (alpha k).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from envs.usage import UsageError, check_ranges
from sim.analysis.load import Run, by_arm


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number; those at most alpha are found at level alpha.

    Raises:
        ValueError: a value outside [0, 1].
    """
    check_ranges(p_values, **{name: "0 to 1" for name in p_values})
    adjusted, largest = {}, 0.0
    for done, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def e_bh(log_e_values: Mapping[str, float], alpha: float = 0.05) -> list[str]:
    """The arms found at false discovery rate ``alpha``, in the order given.

    Args:
        log_e_values: natural logarithms of e-values by arm; -inf is an e-value of 0.
        alpha: rate in (0, 1).

    Raises:
        ValueError: alpha out of range, or a value that is no number.
    """
    check_ranges({"alpha": alpha}, alpha="> 0, < 1")
    values = np.array(list(log_e_values.values()), float)
    if np.isnan(values).any():
        raise UsageError("e-values: NaN; allowed: numbers")
    ordered = np.sort(values)[::-1]
    needed = np.log(max(values.size, 1) / (alpha * np.arange(1, values.size + 1)))
    passed = np.flatnonzero(ordered >= needed)
    if not passed.size:
        return []
    return [name for name, value in log_e_values.items() if value >= ordered[passed[-1]]]


def exit_e_values(runs: Iterable[Run]) -> dict[str, float]:
    """Log e-value of every arm against "no evaluated policy of any run of it was out".

    The mean over runs of the e-process at each run's last evaluation: a mean of e-values is one
    whatever they share.
    """
    from scipy.special import logsumexp

    found = {}
    for arm, members in by_arm(runs).items():
        last = [_last_log_e_value(run) for run in members]
        found[arm] = float(logsumexp(last) - np.log(len(last)))
    return found


def _last_log_e_value(run: Run) -> float:
    values = run.column("safety/log_e_value").dropna()
    return float(values.iloc[-1]) if len(values) else 0.0  # never evaluated: nothing staked
