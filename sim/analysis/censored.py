"""Exit times that are known to lie in a bracket, that compete with other ends, that depend on rho.

* The exit of a run lies in (left, right], right infinite where it was never certified. The curve
  that makes such brackets likeliest is the nonparametric MLE of Turnbull (1976): it puts mass on
  some intervals and says nothing of where inside them. A run that was outside from the start has
  left by 0.
* Exit, collapse and divergence compete: a policy that has collapsed is not one that will exit later
  like the others, so censoring it (Kaplan-Meier) overstates exits. Aalen & Johansen (1978): the
  incidence of cause k grows at each time by S(t-) d_k / n, S the survival of all causes together.
* Dose-response: log T = a + slope * dose + sigma * W with W the standard minimum extreme value
  (Weibull, accelerated failure time), fitted to the brackets. A dose higher by .1 multiplies every
  exit time by exp(.1 * slope).

All three are fitted by lifelines. Simplified: runs are taken as independent, although runs of one
replicate share people and prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from envs.usage import UsageError, blamed_on
from sim.analysis.load import Run
from sim.analysis.survival import MIN_SEEDS, exit_clocks, exit_table

CAUSES = ("diverged", "exit", "collapse")
"""Ends that compete; of those at one time the first counts, as in ``envs.monitor.OUTCOMES``."""
SHOWN = ("exit", "collapse", "diverged")
"""The same in the order in which they are shown."""
DETECTED = "detected"
"""A further end where one asks for it: the attack is found out. Within a round votes come before
the update that makes the next policy, so at equal times it is first."""
STEP = 0.1
"""Increase of the dose that the acceleration factor is given for: ten points of rho."""


BEFORE = -1.0
"""Left end of the bracket of a run that was certified unsafe at 0: any time before."""
LOOSE = 1e3
"""Standard error of a slope from which on the fit has found no maximum."""


class DoseResponse(NamedTuple):
    """How exit times shrink with a dose."""

    slope: float  # of log time by dose
    error: float  # standard error of the slope
    p_value: float | None  # Wald; None below MIN_SEEDS runs at some dose, like all intervals
    factor: float  # exit times at a dose higher by STEP over those at a dose, exp(STEP * slope)
    low: float | None  # 95% interval of the factor
    high: float | None
    shape: float  # of the Weibull, 1 / sigma
    n: int  # runs
    exits: int  # of them with a finite bracket


def npmle(left: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """Turnbull's curve of brackets (left, right], right infinite where nothing was certified.

    Args:
        left: (runs,) last time certified safe, NaN where none was.
        right: (runs,) first time certified unsafe, 0 for runs outside from the start.

    Returns:
        Columns left, right, mass, survival: the intervals that hold mass, ascending, and the share
        still inside after each. Between the ends of an interval the curve is not determined. What
        had left by 0 is in the interval (``BEFORE``, 0].

    Raises:
        ValueError: no runs, or brackets that are not 0 <= left < right.
    """
    from lifelines import KaplanMeierFitter

    left, right = _brackets(left, right)
    ends = np.unique(np.concatenate([left, right[np.isfinite(right)]]))
    # lifelines takes its intervals as closed; a bracket does not hold its left end.
    tick = 1e-6 * (np.diff(ends).min() if ends.size > 1 else 1.0)
    with np.errstate(all="ignore"):  # a single interval makes it take log(0), to no effect
        fit = KaplanMeierFitter().fit_interval_censoring(left + tick, right, tol=1e-9)
    curve = fit.survival_function_.to_numpy(float)
    at = fit.survival_function_.index.to_numpy(float)
    drops = np.flatnonzero(curve[:, 0] - curve[:, 1] > 1e-9)
    return pd.DataFrame(
        {
            "left": ends[np.abs(ends[:, None] - (at[drops - 1] - tick)).argmin(0)],
            "right": at[drops],
            "mass": curve[drops, 0] - curve[drops, 1],
            "survival": curve[drops, 1],
        }
    )


def cause_table(
    runs: Iterable[Run], clock: str = "rounds", detected: str | None = None
) -> pd.DataFrame:
    """One row per run: run, arm, replicate, time, cause of its first end, or ``none``.

    Args:
        runs: finished runs.
        clock: as in :func:`sim.analysis.survival.exit_table`.
        detected: the detector of ``sim/detection.py`` whose detection ends a run too.

    Raises:
        ValueError: a run has not ended, or lacks the clock or the detector.
    """
    runs = list(runs)
    table = exit_table(runs, clock)
    by_path = {str(run.path): run for run in runs}
    ends = [
        _first_end(by_path[name], clock, time, detected)
        for name, time in zip(table["run"], table["time"], strict=True)
    ]
    times, causes = zip(*ends, strict=True)
    return table[["run", "arm", "replicate"]].assign(time=times, cause=causes)


def ends_compete(ends: pd.DataFrame) -> bool:
    """Whether a run of this :func:`cause_table` collapsed or diverged before any exit."""
    return bool(ends["cause"].isin(["collapse", "diverged"]).any())


def detection(run: Run, detector: str) -> dict[str, int] | None:
    """Clocks at which ``detector`` had found the attack of a finished run, None where it never did.

    Raises:
        ValueError: the run had no such detector.
    """
    known = run.summary.get("detected") or {}
    if detector not in known:
        raise UsageError(
            f"detector={detector!r} did not watch {str(run.path)!r}; "
            f"allowed: {', '.join(known) or 'runs in which annotators were watched'}"
        )
    return known[detector]


def _first_end(run: Run, clock: str, last: float, detector: str | None) -> tuple[float, str]:
    summary = run.summary
    known = {
        "diverged": summary.get("diverged_at"),
        "exit": exit_clocks(run),
        "collapse": summary.get("collapsed_at"),
    }
    times = {cause: float(when[clock]) for cause, when in known.items() if when}
    if summary["outcome"] == "diverged":
        rounds = run.column("round" if clock == "rounds" else f"clock/{clock}")
        times = {"diverged": float(rounds.max()), **times}  # what training made, no evaluation saw
    if detector and (found := detection(run, detector)):
        times[DETECTED] = float(found[clock])
    order = (DETECTED, *CAUSES)
    first = min(times, key=lambda cause: (times[cause], order.index(cause)), default="none")
    return times.get(first, last), first


def cumulative_incidence(time: np.ndarray, cause: Iterable[str]) -> pd.DataFrame:
    """Aalen-Johansen: the chance that a run has ended by each cause by each time.

    Args:
        time: (runs,) times of the end or of censoring.
        cause: (runs,) names in ``CAUSES``, ``DETECTED``, or ``none``.

    Returns:
        Columns cause, time, incidence, lower, upper (95%, log-log), 0 first. No interval below
        ``MIN_SEEDS`` runs, at incidence 0, or where all who were left ended at once.

    Raises:
        ValueError: no runs, or an unknown cause.
    """
    given = list(cause)
    ends = (*CAUSES, *([DETECTED] if DETECTED in given else []))
    time, codes = np.asarray(time, float), _codes(given, ends)
    if not time.size or time.shape != codes.shape:
        raise UsageError(f"runs: {time.size} times, {codes.size} causes; allowed: as many, over 0")
    if not (np.isfinite(time) & (time >= 0)).all():
        raise UsageError(f"time: {time.min()} to {time.max()}; allowed: 0 and above, finite")
    times, rank = np.unique(time, return_inverse=True)
    # Ties would be broken by random jitter, also past runs censored at that time. Ends come first.
    spread = np.where(codes > 0, rank + 2 - codes / (2 * len(ends)), rank + 2.0)
    return pd.concat(
        [_incidence(times, spread, codes, k, name) for k, name in enumerate(ends, 1)],
        ignore_index=True,
    )


def _codes(given: list[str], ends: tuple[str, ...]) -> np.ndarray:
    """0 for runs that did not end, 1, 2, ... for ``ends``."""
    names = ("none", *ends)
    if unknown := set(given) - set(names):
        raise UsageError(f"cause={min(unknown)!r}; allowed: {', '.join(names)}")
    return np.array([names.index(name) for name in given], int)


def _incidence(
    times: np.ndarray, spread: np.ndarray, codes: np.ndarray, code: int, name: str
) -> pd.DataFrame:
    from lifelines import AalenJohansenFitter

    incidence = np.zeros(times.size)
    bounds = np.full((times.size, 2), np.nan)
    if (codes == code).any():
        with np.errstate(all="ignore"):  # where all who were left ended at once
            fit = AalenJohansenFitter().fit(spread, codes, code)
        steps = fit.cumulative_density_
        at = np.searchsorted(steps.index.to_numpy(), np.arange(times.size) + 2.0, "right") - 1
        incidence = steps.to_numpy()[at, 0]
        if codes.size >= MIN_SEEDS:
            bounds = np.sort(fit.confidence_interval_.to_numpy(float)[at], 1)  # NaN stays NaN
    table = pd.DataFrame({"cause": name, "time": times, "incidence": incidence})
    table["lower"], table["upper"] = bounds.T
    start = pd.DataFrame([{"cause": name, "time": 0.0, "incidence": 0.0}])
    return table if times[0] == 0 else pd.concat([start, table], ignore_index=True)


def dose_response(dose: np.ndarray, left: np.ndarray, right: np.ndarray) -> DoseResponse:
    """The Weibull model of exit times by dose, from brackets (left, right].

    Args:
        dose: (runs,) for instance rho in [0, 1].
        left: (runs,) last time certified safe, 0 where none was.
        right: (runs,) first time certified unsafe, infinite where none was. Runs with 0, which were
            outside from the start, are left out: no dose made them leave.

    Raises:
        ValueError: fewer than two doses, no exit at all, bad brackets, or a fit that fails.
    """
    from lifelines import WeibullAFTFitter

    left, right = _brackets(left, right)
    dose = np.asarray(dose, float)
    if dose.shape == left.shape:
        dose, left, right = (values[right > 0] for values in (dose, left, right))
    doses, counts = np.unique(dose, return_counts=True)
    exits = int(np.isfinite(right).sum())
    if doses.size < 2 or not exits or dose.shape != left.shape:
        found = f"{doses.size} doses, {exits} exits, {dose.size} doses to {left.size} runs"
        raise UsageError(f"dose-response: {found}; allowed: two doses, one exit, a dose a run")
    data = pd.DataFrame({"dose": dose, "left": left, "right": right})
    with blamed_on("dose-response: no fit", "exit times that vary with the dose and within it"):
        fit = WeibullAFTFitter().fit_interval_censoring(data, "left", "right")
    row = fit.summary.loc[("lambda_", "dose")]
    slope, error = float(row["coef"]), float(row["se(coef)"])
    if not (np.isfinite(error) and 0 < error < LOOSE):
        raise UsageError(
            f"dose-response: the slope's error is {error:g}, so these brackets do not determine "
            "it; allowed: exit times that vary with the dose and within it"
        )
    enough = counts.min() >= MIN_SEEDS
    low, high = (float(np.exp(STEP * (slope + s * 1.96 * error))) for s in (-1, 1))
    return DoseResponse(
        slope=slope,
        error=error,
        p_value=float(row["p"]) if enough else None,
        factor=float(np.exp(STEP * slope)),
        low=low if enough else None,
        high=high if enough else None,
        shape=float(np.exp(fit.params_[("rho_", "Intercept")])),
        n=dose.size,
        exits=exits,
    )


def _brackets(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left ends, where nothing was certified safe 0 or what is before it, and right ends."""
    left, right = np.asarray(left, float), np.asarray(right, float)
    given = np.where(np.isnan(left), 0.0, left)
    left = np.where(np.isnan(left) & (right == 0), BEFORE, given)
    if not left.size or left.shape != right.shape or not ((given >= 0) & (left < right)).all():
        raise UsageError(f"brackets of {left.size} runs; allowed: 0 <= left < right, over 0 runs")
    return left, right
