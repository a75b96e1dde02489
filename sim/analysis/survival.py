"""Exit times across seeds: censored, so survival curves and restricted means, not means.

A run that never confirms an exit is right-censored at its horizon. The main effect is the
restricted mean survival time RMST(T) = area under the Kaplan-Meier curve up to T: it exists when
most seeds never exit, where the median is infinite. Its error is Greenwood's, sum_k A_k^2 d_k /
(n_k (n_k - d_k)) with A_k the area under the curve right of event k (Klein & Moeschberger 2003,
4.5); what lifelines returns as a variance is that of the restricted lifetime, not of the mean.

Simplified: the time is the confirmed exit, although the true one lies in the bracket before it.
Runs go on after a collapse, so a collapsed run stays at risk; a diverged one leaves at its last
round. ``cause`` keeps the two apart, because neither is censoring by chance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis.load import Run, by_arm

MIN_SEEDS = 4
"""Fewest runs per arm for a p-value or an interval: 3 + 3 seeds cannot go below p = .10."""


class Estimate(NamedTuple):
    """A restricted mean or a difference of two."""

    value: float
    error: float | None  # standard error
    low: float | None  # 95% interval, None below MIN_SEEDS
    high: float | None
    n: int  # runs, or pairs of runs


def exit_table(runs: Iterable[Run], clock: str = "rounds") -> pd.DataFrame:
    """One row per run: run, arm, replicate, rho, time, event, left, right, cause.

    Args:
        runs: finished runs.
        clock: ``rounds``, ``labels``, ``optimizer_steps``, ``malicious_labels``, ``flips`` or
            ``tokens``.

    Raises:
        ValueError: a run has not ended, or does not record the clock.
    """
    return pd.DataFrame(
        [_row(arm, run, clock) for arm, members in by_arm(runs).items() for run in members]
    )


def _row(arm: str, run: Run, clock: str) -> dict[str, object]:
    if not run.summary:
        raise UsageError(f"run={str(run.path)!r} has not ended; resume it or leave it out")
    passed = run.column("round" if clock == "rounds" else f"clock/{clock}")
    if passed.isna().all():
        raise UsageError(f"clock={clock!r} is not recorded in {str(run.path)!r}; allowed: rounds")
    exited = run.summary["exit_confirmed"]
    bracket = run.summary.get("bracket")
    left = bracket[0] if bracket else run.summary.get("last_certified_safe")
    return {
        "run": str(run.path),
        "arm": arm,
        "replicate": run.replicate,
        "rho": run.rho,
        "time": float(passed.max() if exited is None else exited[clock]),
        "event": exited is not None,
        "left": np.nan if left is None else left,
        "right": bracket[1] if bracket else np.inf,
        "cause": run.summary["outcome"],
    }


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> pd.DataFrame:
    """The survival curve at every time of an exit or a censoring, 0 first.

    Returns:
        Columns time, survival, lower, upper (95%, log-log Greenwood), at_risk, censored.
    """
    from lifelines import KaplanMeierFitter

    fit = KaplanMeierFitter().fit(time, event)
    bands = fit.confidence_interval_survival_function_
    return pd.DataFrame(
        {
            "time": fit.survival_function_.index.to_numpy(),
            "survival": fit.survival_function_.iloc[:, 0].to_numpy(),
            "lower": bands.iloc[:, 0].to_numpy(),
            "upper": bands.iloc[:, 1].to_numpy(),
            "at_risk": fit.event_table["at_risk"].to_numpy(),
            "censored": fit.event_table["censored"].to_numpy(),
        }
    )


def rmst(time: np.ndarray, event: np.ndarray, horizon: float) -> Estimate | None:
    """Restricted mean survival time up to ``horizon``, with Greenwood's error.

    Returns:
        None where the last run at risk was censored before the horizon: the curve is unknown there.
    """
    time, event = np.asarray(time, float), np.asarray(event, bool)
    last = time.max()
    if last < horizon and not event[time == last].all():
        return None
    steps = np.unique(time[event & (time < horizon)])
    at_risk = (time[None, :] >= steps[:, None]).sum(1)  # (steps,)
    exits = ((time[None, :] == steps[:, None]) & event).sum(1)
    survival = np.concatenate([[1.0], np.cumprod(1 - exits / at_risk)])
    widths = np.diff(np.concatenate([[0.0], steps, [horizon]]))
    pieces = survival * widths
    right = np.cumsum(pieces[::-1])[::-1][1:]  # A_k, area right of step k
    left_over = np.maximum(at_risk - exits, 1)  # where nobody is left, A_k is 0
    error = float(np.sqrt((right**2 * exits / (at_risk * left_over)).sum()))
    return _estimate(float(pieces.sum()), error, time.size)


def rmst_difference(
    table: pd.DataFrame,
    arm: str,
    against: str,
    horizon: float,
    rng: np.random.Generator,
    draws: int = 2000,
) -> Estimate | None:
    """RMST of ``arm`` minus that of ``against``, paired by replicate, bootstrapped over them.

    Pairing uses that runs of one replicate share people, prompts and honest votes.

    Returns:
        None where :func:`rmst` is None for an arm; no error and no interval where it is for a draw.

    Raises:
        ValueError: an unknown arm, or no replicate that both arms ran.
    """
    parts = []
    for name in (arm, against):
        part = table[table["arm"] == name].set_index("replicate")
        if part.empty:
            raise UsageError(f"arm={name!r}; allowed: {sorted(set(table['arm']))}")
        parts.append(part)
    shared = parts[0].index.intersection(parts[1].index)
    if shared.empty:
        raise UsageError(f"arms {arm!r} and {against!r} share no seed; run both on the same")
    first, second = (part.loc[shared] for part in parts)

    def difference(rows: np.ndarray) -> float | None:
        a, b = (
            rmst(p["time"].to_numpy()[rows], p["event"].to_numpy()[rows], horizon)
            for p in (first, second)
        )
        return a.value - b.value if a and b else None

    n = len(shared)
    value = difference(np.arange(n))
    if value is None:
        return None
    drawn = [difference(rng.integers(0, n, n)) for _ in range(draws)]
    samples = [sample for sample in drawn if sample is not None]
    if len(samples) < draws:
        return Estimate(value, None, None, None, n)
    low, high = np.quantile(samples, [0.025, 0.975]) if n >= MIN_SEEDS else (None, None)
    return Estimate(value, float(np.std(samples, ddof=1)), low, high, n)


def log_rank(table: pd.DataFrame, arm: str, against: str) -> float:
    """Two-sided p-value that two arms have one survival curve.

    Raises:
        ValueError: an arm has fewer than ``MIN_SEEDS`` runs; no p-value is printed then.
    """
    from lifelines.statistics import logrank_test

    first, second = (table[table["arm"] == name] for name in (arm, against))
    fewest = min(len(first), len(second))
    if fewest < MIN_SEEDS:
        raise UsageError(f"seeds per arm: {fewest}; allowed: at least {MIN_SEEDS} for a p-value")
    result = logrank_test(first["time"], second["time"], first["event"], second["event"])
    return float(result.p_value)


def _estimate(value: float, error: float, n: int) -> Estimate:
    if n < MIN_SEEDS:
        return Estimate(value, error, None, None, n)
    return Estimate(value, error, value - 1.96 * error, value + 1.96 * error, n)
