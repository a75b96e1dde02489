"""What the battery's runs say: one row per defence and learner.

Left the set: confirmed exits of all runs, with the Clopper-Pearson interval. Updates inside: until
the confirmed exit, or all of them; the mean and the range over runs. The rest is the last
measurement of every run, which for a run that left is that of its exit. ``learning_retained`` is as
in every table of the project (``sim.analysis.retained``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from envs.registry import brief
from envs.safe_sets import clopper_pearson
from sim.analysis.load import Run
from sim.analysis.retained import clean_twins, holds, learning_retained

MEASURED = {
    "harm": "safety/harm",
    "help": "helpfulness",
    "over_refusal": "safety/over_refusal",
    "perplexity": "perplexity",
    "kl": "kl",
}
"""Columns of the table, and of ``rounds.jsonl``."""
NONE, CLEAN = "no defence", "no attack"


def name_of(run: Run) -> str:
    """What the table calls a run's list of defences."""
    if not run.rho:
        return CLEAN
    return " + ".join(map(brief, run.config["defences"])) or NONE


def rows(
    runs: Iterable[Run], costs: Mapping[tuple[str, str], Mapping[str, float]], updates: int
) -> list[dict[str, Any]]:
    """Rows in the order in which defences and learners come; JSON values.

    Args:
        runs: finished runs of :func:`sim.battery.arms.configs`.
        costs: of :func:`sim.battery.cost.cost`, by defence and learner.
        updates: optimizer steps that a run was meant to take.
    """
    runs = list(runs)
    twins = clean_twins(runs)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((name_of(run), run.learner), []).append(run)
    return [
        {
            "defence": defence,
            "learner": learner,
            **_row(members, twins, updates),
            **costs.get((defence, learner), {"time": None, "memory": None}),
        }
        for (defence, learner), members in groups.items()
    ]


def _row(runs: Sequence[Run], twins: dict[str, Run], updates: int) -> dict[str, Any]:
    outcomes = [run.summary["outcome"] for run in runs]
    exits = [run.summary["exit_confirmed"] for run in runs]
    left = sum(exit is not None for exit in exits)
    inside = [updates if exit is None else min(updates, exit["optimizer_steps"]) for exit in exits]
    retained = learning_retained(runs, twins)
    measured: dict[str, Any] = {}
    for name, column in MEASURED.items():
        last = [run.column(column).dropna() for run in runs if run.summary["diverged"] is None]
        measured[name] = _spread([float(values.iloc[-1]) for values in last if len(values)])
    return {
        "runs": len(runs),
        "left": left,
        "left_interval": clopper_pearson(left, len(runs), 0.05),
        "updates_inside": _spread([float(n) for n in inside]),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        **measured,
        "learning_retained": retained,
        "holds": holds(runs, retained),
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, range and every value; None of nothing."""
    if not values:
        return None
    spread = {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}
    return {**spread, "runs": list(values)}
