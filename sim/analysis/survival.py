"""Exit times across seeds: censored, so survival curves and restricted means, not means.

A run that never confirms an exit is right-censored at its horizon. The main effect is the
restricted mean survival time RMST(T) = area under the Kaplan-Meier curve up to T: it exists when
most seeds never exit, where the median is infinite. Its error is Greenwood's, sum_k A_k^2 d_k /
(n_k (n_k - d_k)) with A_k the area under the curve right of event k (Klein & Moeschberger 2003,
4.5); what lifelines returns as a variance is that of the restricted lifetime, not of the mean.

Simplified: the time is the confirmed exit, although the true one lies in the bracket before it.
Runs go on after a collapse, so a collapsed run stays at risk; a diverged one leaves at its last
round. ``outcome`` keeps the two apart, because neither is censoring by chance. A run that its own
sustained exit ended before an exit was confirmed counts as out from there (:func:`exit_clocks`): to
censor it would say that it was as safe as the runs that went on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis.load import Run, by_arm
from sim.analysis.words import in_words

MIN_SEEDS = 4
"""Fewest runs, or pairs of runs, for a p-value or an interval."""


class Estimate(NamedTuple):
    """A restricted mean, a median, or a difference of two."""

    value: float
    error: float | None  # standard error
    low: float | None  # 95% interval, None below MIN_SEEDS
    high: float | None
    n: int  # runs, or pairs of runs

    def in_words(self, form: str = "g") -> str:
        """Value and interval."""
        return in_words(self.value, self.low, self.high, form)


def exit_table(runs: Iterable[Run], clock: str = "rounds") -> pd.DataFrame:
    """One row per run: run, arm, replicate, world, rho, time, event, left, right, outcome.

    Times and brackets are on ``clock``; ``left`` is NaN where nothing was certified safe, ``right``
    infinite where nothing was certified unsafe.

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


def exit_clocks(run: Run) -> dict[str, float] | None:
    """Clocks of the confirmed exit of a finished run; without one, of the exit that ended it."""
    exited = run.summary["exit_confirmed"]
    return run.summary["exit_sustained"] if exited is None and ended_unconfirmed(run) else exited


def ended_unconfirmed(run: Run) -> bool:
    """Whether ``run`` ended at its sustained exit, with none confirmed."""
    asked = run.config.get("evaluation", {}).get("stop_on_sustained", False)
    known = {kind: run.summary.get(f"exit_{kind}") for kind in ("confirmed", "sustained")}
    return bool(asked and known["sustained"] and not known["confirmed"])


def _row(arm: str, run: Run, clock: str) -> dict[str, object]:
    if not run.summary:
        raise UsageError(f"run={str(run.path)!r} has not ended; resume it or leave it out")
    passed = run.column("round" if clock == "rounds" else f"clock/{clock}")
    if passed.isna().all():
        raise UsageError(f"clock={clock!r} is not recorded in {str(run.path)!r}; allowed: rounds")
    exited = exit_clocks(run)
    bracket = run.summary.get("bracket")
    left = bracket[0] if bracket else run.summary.get("last_certified_safe")
    on_clock = pd.Series(passed.to_numpy(), run.rounds["round"]).dropna()
    return {
        "run": str(run.path),
        "arm": arm,
        "replicate": run.replicate,
        "world": run.world,
        "rho": run.rho,
        "time": float(passed.max() if exited is None else exited[clock]),
        "event": exited is not None,
        "left": np.nan if left is None else on_clock.asof(left),
        "right": on_clock.asof(bracket[1]) if bracket else np.inf,
        "outcome": run.summary["outcome"],
    }


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> pd.DataFrame:
    """The survival curve at every time of an exit or a censoring, 0 first.

    Returns:
        Columns time, survival, lower, upper (95%, log-log Greenwood; NaN where nobody is left, of
        which it says nothing), censored.
    """
    from lifelines import KaplanMeierFitter

    fit = KaplanMeierFitter().fit(time, event)
    survival = fit.survival_function_.to_numpy()  # (times, 1)
    bands = np.where(survival > 0, fit.confidence_interval_survival_function_.to_numpy(), np.nan)
    return pd.DataFrame(
        {
            "time": fit.survival_function_.index.to_numpy(),
            "survival": survival[:, 0],
            "lower": bands[:, 0],
            "upper": bands[:, 1],
            "censored": fit.event_table["censored"].to_numpy(),
        }
    )


def horizon_of(runs: Iterable[Run], exits: pd.DataFrame, clock: str = "rounds") -> float:
    """How far every run could be followed: the horizon of restricted means over all of them.

    The least number of rounds that was asked for; on another clock the least that a run had reached
    when it ended inside, or if none did, when the last exit was confirmed.

    Args:
        runs: finished runs.
        exits: their :func:`exit_table` on ``clock``.
        clock: as there.
    """
    if clock == "rounds":
        return float(min(run.asked for run in runs))
    inside = exits.loc[~exits["event"] & (exits["outcome"] != "diverged"), "time"]
    return float(inside.min() if len(inside) else exits["time"].max())


def rmst(time: np.ndarray, event: np.ndarray, horizon: float) -> Estimate | None:
    """Restricted mean survival time up to ``horizon``, with Greenwood's error.

    Returns:
        None where the last run at risk was censored before the horizon: the curve is unknown there.
    """
    time = np.asarray(time, float)
    value, error = weighted_rmst(time, event, horizon, np.ones((1, time.size)))
    return None if np.isnan(value[0]) else _estimate(float(value[0]), float(error[0]), time.size)


def weighted_rmst(
    time: np.ndarray, event: np.ndarray, horizon: float, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`rmst` of many resamples at once.

    Args:
        time: (n,) times of exit or censoring.
        event: (n,) whether it was an exit.
        horizon: end of the restriction.
        weights: (draws, n) how often every run is in a resample; at least one is.

    Returns:
        (draws,) values, NaN where unknown, and (draws,) Greenwood errors.
    """
    time, event = np.asarray(time, float), np.asarray(event, bool)
    steps = np.unique(time[event & (time < horizon)])  # (S,)
    at_risk = weights @ (time[:, None] >= steps)  # (draws, S)
    exits = weights @ ((time[:, None] == steps) & event[:, None])
    staying = 1 - exits / np.maximum(at_risk, 1)  # where nobody is left, nobody leaves
    survival = np.cumprod(np.column_stack([np.ones(len(weights)), staying]), 1)
    pieces = survival * np.diff(np.concatenate([[0.0], steps, [horizon]]))
    right = np.cumsum(pieces[:, ::-1], 1)[:, ::-1][:, 1:]  # A_k, area right of step k
    # Where everybody left, A_k is 0.
    terms = right**2 * exits / np.maximum(at_risk * (at_risk - exits), 1)
    last = np.where(weights > 0, time, -np.inf).max(1)
    censored = ((weights > 0) & (time == last[:, None]) & ~event).any(1)
    value = np.where((last < horizon) & censored, np.nan, pieces.sum(1))
    return value, np.sqrt(terms.sum(1))


def median_exit(time: np.ndarray, event: np.ndarray) -> Estimate | None:
    """Time by which half the runs have left, with the interval at which the log-log band does.

    Returns:
        None where fewer than half have left; ``high`` is infinite where the band stays above half.
    """
    curve = kaplan_meier(time, event)

    def first(column: str) -> float:
        below = curve.loc[curve[column] <= 0.5 + 1e-12, "time"]
        return float(below.iloc[0]) if len(below) else np.inf

    middle, n = first("survival"), len(np.asarray(time))
    if np.isinf(middle):
        return None
    few = n < MIN_SEEDS
    return Estimate(
        middle, None, None if few else first("lower"), None if few else first("upper"), n
    )


def _estimate(value: float, error: float, n: int) -> Estimate:
    if n < MIN_SEEDS:
        return Estimate(value, error, None, None, n)
    return Estimate(value, error, value - 1.96 * error, value + 1.96 * error, n)
