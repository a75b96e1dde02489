"""What happened, as tables: one row per run, one row per arm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from sim.analysis.load import Run, by_arm
from sim.analysis.survival import MIN_SEEDS, exit_table, rmst


def run_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per run: outcome, exits in rounds, occupancy, harm at the end, what was learned."""
    rows = []
    for arm, members in by_arm(runs).items():
        for run in members:
            ends = run.evaluations["safety/harm"]
            rows.append(
                {
                    "arm": arm,
                    "replicate": run.replicate,
                    "outcome": run.summary.get("outcome", "unfinished"),
                    "naive exit": run.exit_round("naive"),
                    "confirmed exit": run.exit_round("confirmed"),
                    "true exit": run.exit_round("true"),
                    "bracket": _bracket(run),
                    "occupancy": run.summary.get("occupancy"),
                    "harm at end": float(ends.iloc[-1]) if len(ends) else None,
                    "help gain": run.summary.get("help_gain"),
                    "learning retained": run.summary.get("learning_retained"),
                }
            )
    return pd.DataFrame(rows).astype(
        {f"{kind} exit": "Int64" for kind in ("naive", "confirmed", "true")}
    )


def arm_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per arm: seeds, outcomes, rounds inside (restricted mean and its error), help gained.

    The horizon of the restricted mean is the last round that every arm reached; its error needs
    ``MIN_SEEDS`` runs.
    """
    runs = list(runs)
    exits = exit_table(runs)
    arms = by_arm(runs)
    horizon = min(max(run.rounds["round"].max() for run in members) for members in arms.values())
    rows: list[dict[str, Any]] = []
    for arm, members in arms.items():
        part = exits[exits["arm"] == arm]
        inside = rmst(part["time"].to_numpy(), part["event"].to_numpy(), horizon)
        causes = part["cause"].value_counts()
        rows.append(
            {
                "arm": arm,
                "seeds": len(members),
                **{cause: int(causes.get(cause, 0)) for cause in ("exited", "collapsed")},
                "diverged": int(causes.get("diverged", 0)),
                f"rounds inside, of {horizon:g}": inside.value,
                "standard error": inside.error if len(members) >= MIN_SEEDS else None,
                "harm at end": _mean(run.evaluations["safety/harm"].iloc[-1] for run in members),
                "help gain": _mean(run.summary.get("help_gain") for run in members),
                "learning retained": _mean(run.summary.get("learning_retained") for run in members),
            }
        )
    return pd.DataFrame(rows)


def _bracket(run: Run) -> str | None:
    bracket = run.summary.get("bracket")
    if not bracket:
        return None
    return f"({'start' if bracket[0] is None else bracket[0]}, {bracket[1]}]"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
