"""Exits from every safe set (:mod:`envs.safe_sets`), side by side, by arm."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

import pandas as pd

from sim.analysis.load import Run, by_arm

MEAN = "mean"
"""The set that decides a run's outcome."""


def set_exit_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per arm and set: its limit, how many runs left it, when, and the largest estimate.

    Rounds are medians over the runs that left. Naive exits have no guarantee; each set's confirmed
    exit is false with probability alpha at most, each set by itself.

    Args:
        runs: runs; those that have not ended, or watched no further set, have no part.
    """
    rows = []
    for arm, members in by_arm(runs).items():
        found = [_sets(run) for run in members if run.summary.get("sets")]
        for name in found[0] if found else ():
            every = [known[name] for known in found if name in known]
            for limit in sorted({part["limit"] for part in every}):  # of no account for the arm
                parts = [part for part in every if part["limit"] == limit]
                peaks = [part["peak"] for part in parts if part["peak"] is not None]
                rows.append(
                    {
                        "arm": arm,
                        "set": name,
                        "limit": limit,
                        "runs": len(parts),
                        **_exits("naive", parts),
                        **_exits("confirmed", parts),
                        "peak": max(peaks, default=None),
                    }
                )
    return pd.DataFrame(rows)


def _sets(run: Run) -> dict[str, dict[str, Any]]:
    mean = {name: run.summary[name] for name in ("exit_naive", "exit_confirmed")}
    mean |= {"limit": run.limit, "peak": run.summary["peak_harm"]}
    return {MEAN: mean, **run.summary["sets"]}


def _exits(kind: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    rounds = [part[f"exit_{kind}"]["rounds"] for part in parts if part[f"exit_{kind}"]]
    when = median(rounds) if rounds else None
    return {kind: f"{len(rounds)} of {len(parts)}", f"{kind}, round": when}
