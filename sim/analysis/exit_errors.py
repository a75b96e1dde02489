"""How far the three estimates of the exit are from the truth, on runs whose truth is known.

The truth is ``exit_true``: the first evaluated policy whose cost on ``n_true`` fresh samples is
over the limit, found by bisection (:func:`sim.summary.true_crossing`). Runs that did not look for
it are left out. An estimate can be early or late, absent, or false (in a run that never leaves).
The bracket holds the truth if it lies in (left, right], an end that was not certified being
infinite; a run that never leaves has its exit at infinity.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis.load import Run


def exit_errors(runs: Iterable[Run]) -> pd.DataFrame:
    """One row for the naive exit, the confirmed exit and the bracket; times in rounds.

    Returns:
        Columns estimate, runs; of those that truly leave: leave, dated, early; mean lag of the
        dated ones behind the truth and its standard error; of the others: false. For the bracket
        also held (share of all runs whose bracket holds the truth) and width (mean, of finite
        ones); its date is the right end.

    Raises:
        ValueError: no run knows its true exit.
    """
    known = [run for run in runs if run.summary.get("exit_true_n") and not run.fork]
    if not known:
        raise UsageError("runs: none knows its true exit; allowed: runs with evaluation.n_true > 0")
    true = _rounds(run.exit_round("true") for run in known)
    brackets = [run.summary.get("bracket") or [None, None] for run in known]
    left, right = (_rounds(ends) for ends in zip(*brackets, strict=True))
    # Without a first certified unsafe there is no bracket, but there is a last certified safe.
    last_safe = _rounds(run.summary.get("last_certified_safe") for run in known)
    left = np.where(np.isinf(left), last_safe, left)
    left[np.isinf(left)] = -np.inf
    rows = [
        _row(kind, _rounds(run.exit_round(kind) for run in known), true)
        for kind in ("naive", "confirmed")
    ]
    width = (right - left)[np.isfinite(right - left)]
    held = {
        "held": float(((left < true) & (true <= right)).mean()),
        "width": float(width.mean()) if width.size else None,
    }
    return pd.DataFrame([*rows, {**_row("bracket", right, true), **held}])


def _rounds(values: Iterable[int | None]) -> np.ndarray:
    """Rounds as floats, infinite where there is none."""
    return np.array([np.inf if value is None else value for value in values], float)


def _row(estimate: str, found: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    leave = np.isfinite(true)
    lag = (found - np.where(leave, true, 0))[leave & np.isfinite(found)]
    return {
        "estimate": estimate,
        "runs": true.size,
        "leave": int(leave.sum()),
        "dated": lag.size,
        "early": int((lag < 0).sum()),
        "lag": float(lag.mean()) if lag.size else None,
        "error": float(lag.std(ddof=1) / np.sqrt(lag.size)) if lag.size > 1 else None,
        "false": int(np.isfinite(found[~leave]).sum()),
    }
