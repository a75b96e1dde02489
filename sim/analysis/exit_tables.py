"""Exits across runs as tables for a page: by cause, by dose, against the truth.

Each is empty where the runs at hand do not support it, and is left out then.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis.censored import (
    SHOWN,
    cause_table,
    cumulative_incidence,
    dose_response,
    ends_compete,
)
from sim.analysis.exit_errors import exit_errors
from sim.analysis.load import Run
from sim.analysis.survival import MIN_SEEDS, exit_table
from sim.analysis.words import in_words
from sim.identity import SEEDS, identity

MIN_DOSES = 3
"""Fewest values of rho for a slope that can be told from a step."""
FACTOR = "exit times per ten points of ρ [95 %]"
CAUTIONS = {
    "ends": (
        "Share of runs that ended first by each cause up to the arm's last round (Aalen-Johansen), "
        f"with a 95 % interval where an arm has {MIN_SEEDS} runs."
    ),
    "dose": (
        "Interval-censored Weibull regression of the certified brackets: × 0.75 means that ten "
        "points of ρ more take a quarter off every exit time. Clean runs and forks have no part. "
        "Two cautions: the model has log time fall linearly in ρ, which it need not; and runs of "
        "one world or one replicate are treated as independent, which they are not, so these "
        f"intervals are too narrow by an unknown factor. Families with {MIN_DOSES} values of ρ, "
        f"{MIN_SEEDS} runs at each and brackets at two or more; a dash is a fit that failed."
    ),
    "truth": (
        "Of the runs that looked for their true crossing. Early: dated before it; lag: rounds "
        "behind it, mean ± standard error over the dated; false: dated in a run that never leaves. "
        "The bracket is dated by its right end, and holds the truth if that lies in (left, right]."
    ),
}


def incidence_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per arm that has ends, where a run collapsed or diverged first: shares by cause."""
    ends = cause_table(runs)
    if not ends_compete(ends):
        return pd.DataFrame()
    seen = [name for name in SHOWN if (ends["cause"] == name).any()]
    rows = []
    for arm, part in ends.groupby("arm", sort=False):
        if (part["cause"] == "none").all():
            continue
        curve = cumulative_incidence(part["time"].to_numpy(), part["cause"])
        last = curve.groupby("cause").tail(1).set_index("cause")
        shares = {
            name: in_words(*last.loc[name, ["incidence", "lower", "upper"]], form=".2f")
            for name in seen
        }
        rows.append({"arm": arm, "runs": len(part), "by round": int(part["time"].max()), **shares})
    return pd.DataFrame(rows)


def dose_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per family of attacked arms that differ in rho alone: how exit times shrink with it.

    A family needs ``MIN_DOSES`` values of rho, ``MIN_SEEDS`` runs at each, and a bracketed exit at
    two of them at least; with exits at one value alone the slope would be made by censoring.

    Args:
        runs: finished runs.
    """
    families: dict[str, list[Run]] = {}
    for run in runs:
        if run.rho and not run.fork:
            families.setdefault(identity(run.config, (*SEEDS, "attack.rho")), []).append(run)
    rows = []
    for members in families.values():
        exits = exit_table(members)
        doses = exits.groupby("rho")["right"]
        bracketed = doses.apply(lambda right: bool(np.isfinite(right).any())).sum()
        if len(doses) >= MIN_DOSES and doses.size().min() >= MIN_SEEDS and bracketed >= 2:
            rows.append(_dose_row(members[0], exits))
    return pd.DataFrame(rows)


def _dose_row(run: Run, exits: pd.DataFrame) -> dict[str, object]:
    """A family by one of its runs, and the table of all."""
    try:
        found = dose_response(exits["rho"], exits["left"], exits["right"])
    except UsageError:
        factor = None
    else:
        factor = "× " + in_words(found.factor, found.low, found.high, ".2f")
    return {
        "arms": run.arm.replace(f" ρ={run.rho:g}", "", 1),
        "values of ρ": ", ".join(f"{rho:g}" for rho in sorted(set(exits["rho"]))),
        "exits bracketed": f"{np.isfinite(exits['right']).sum()} of {len(exits)}",
        FACTOR: factor,
    }


def truth_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per estimate of the exit, where runs looked for their true crossing; in words."""
    runs = list(runs)
    if not any(run.summary.get("exit_true_n") for run in runs):
        return pd.DataFrame()
    rows = []
    for row in exit_errors(runs).to_dict("records"):
        inside = row["runs"] - row["leave"]
        held, width = row["held"], row["width"]
        rows.append(
            {
                "exit": row["estimate"],
                "runs": row["runs"],
                "truly leave": row["leave"],
                "dated": _of(row["dated"], row["leave"]),
                "early": _of(row["early"], row["leave"]),
                "lag, rounds": _plus_minus(row["lag"], row["error"]),
                "false": _of(row["false"], inside),
                "holds the truth": None
                if pd.isna(held)
                else _of(round(held * row["runs"]), row["runs"]),
                "width, rounds": width,
            }
        )
    return pd.DataFrame(rows)


def _of(part: int, whole: int) -> str | None:
    return f"{part} of {whole}" if whole else None


def _plus_minus(value: float | None, error: float | None) -> str | None:
    if pd.isna(value):
        return None
    return f"{value:+.1f}" if pd.isna(error) else f"{value:+.1f} ± {error:.1f}"
