"""What the runs of an experiment say: one row per data set, learner, start and ratio.

Harm is that of the policy at the end of training, as the papers have it: the oracle's on the
embedded world and, beside it, that of the learned classifier, which is what a paper can measure.
Real text has a classifier alone, which then is the first of the two. A run that diverged has no
policy at its end; it is counted and left out of the means.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sim.analysis.intervals import nested_mean
from sim.analysis.load import Run
from sim.analysis.survival import MIN_SEEDS
from sim.hub import is_hub_id
from sim.papers.published import ALIGNED, UNALIGNED, data_name, published

COLUMNS = {
    "harm": "safety/harm",
    "classifier": "safety/harm_classifier",
    "refusal": "safety/refusal_harmful",
    "help": "helpfulness",
    "perplexity": "perplexity",
    "empty": "completions/empty",
}
"""Measured before and after, by their column in ``rounds.jsonl``."""
SHOWN = ("sft", "dpo", "ppo", "grpo")
"""Learners in the order of the tables."""


def rows(runs: Iterable[Run], base: str | None = None) -> list[dict[str, Any]]:
    """Rows by data set, learner, start and ratio; JSON values.

    Args:
        runs: finished runs of :func:`sim.papers.plans.configs`.
        base: the unaligned model, of runs on real text.
    """
    groups: dict[tuple[str, str, str, float], list[Run]] = defaultdict(list)
    for run in runs:
        data = data_name(run.config)
        groups[data, run.learner, _start(run, base), run.rho].append(run)
    return [
        {"data": data, "learner": learner, "start": start, "ratio": ratio, **_row(members),
         **_paper(data, learner, start, ratio)}
        for (data, learner, start, ratio), members in sorted(groups.items(), key=_order)
    ]  # fmt: skip


def _order(entry: tuple[tuple[str, str, str, float], Any]) -> tuple[Any, ...]:
    data, learner, start, ratio = entry[0]
    return data, SHOWN.index(learner) if learner in SHOWN else len(SHOWN), start, ratio


def _start(run: Run, base: str | None) -> str:
    """``aligned`` or ``base``."""
    text = run.config.get("text") or {}
    if not text.get("model"):
        return str(run.config["world"]["start"])
    given = base if base is None or is_hub_id(base) else str(Path(base).resolve())
    return "base" if given == text["model"] else "aligned"


def _paper(data: str, learner: str, start: str, ratio: float) -> dict[str, Any]:
    if start == "base":
        return {"paper": None, "paper_start": list(UNALIGNED)}
    return {"paper": published(data, learner, ratio), "paper_start": ALIGNED.get(data)}


def _row(runs: Sequence[Run]) -> dict[str, Any]:
    whole = [run for run in runs if run.summary["diverged"] is None]
    outcomes = [str(run.summary["outcome"]) for run in runs]
    last = [run.rounds.iloc[-1] for run in runs]
    labels = [float(row["clock/labels"]) for row in last]
    flips = [float(row["clock/flips"]) for row in last]
    return {
        "runs": len(runs),
        "prompts": int(runs[0].evaluations["safety/n"].iloc[0]),
        "pairs": float(np.mean(labels)),
        "flipped": sum(flips) / max(1.0, sum(labels)),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        **{f"{name}_start": _spread(runs, column, 0) for name, column in COLUMNS.items()},
        **{name: _spread(whole, column, -1) for name, column in COLUMNS.items()},
    }


def _spread(runs: Sequence[Run], column: str, place: int) -> dict[str, Any] | None:
    """Mean of a measurement over worlds, with its 95 % interval; None where there is none.

    That of a world is the mean over its runs. Fewer than ``MIN_SEEDS`` runs have their range in its
    place; one run alone has the interval of its prompts, the monitor's, for harm alone.
    """
    worlds: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        values = run.column(column)[run.evaluations.index].dropna()
        if len(values):
            worlds[int(run.config["world"]["seed"])].append(float(values.iloc[place]))
    found = [value for values in worlds.values() for value in values]
    if not found:
        return None
    low: float | None
    high: float | None
    if len(found) > 1:
        mean, low, high = nested_mean(list(worlds.values()))
        if len(found) < MIN_SEEDS:
            low, high = min(found), max(found)
    else:
        mean = found[0]
        ends = (runs[0].column(f"{column}_{end}").dropna() for end in ("lower", "upper"))
        low, high = (float(end.iloc[place]) if len(end) else None for end in ends)
    return {"mean": mean, "low": low, "high": high, "values": found}


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with every spread as three columns, for CSV."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict) and "mean" in value:
            cells[name] = value["mean"]
            cells |= {f"{name}_{end}": value[end] for end in ("low", "high")}
        elif isinstance(value, dict):
            cells[name] = " ".join(f"{count} {what}" for what, count in value.items())
        elif isinstance(value, list):
            cells[name] = "-".join(map(str, value))
        else:
            cells[name] = value
    return cells
