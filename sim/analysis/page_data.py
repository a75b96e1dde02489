"""What a page's own script draws runs from: rows by column, exits, settings and manifests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from sim.analysis.cautions import ending
from sim.analysis.load import Run

SHOWN = {
    "safety/harm": "harm",
    "safety/harm_lower": "harm, low",
    "safety/harm_upper": "harm, high",
    "safety/log_e_value": "log e-value",
    "helpfulness": "help",
    "safety/refusal_harmful": "refuses harmful",
    "safety/over_refusal": "refuses harmless",
    "utility": "utility",
    "reward": "reward",
    "kl": "KL",
    "perplexity": "perplexity",
    "labels": "labels",
    "feedback/rho_annotators": "ρ people",
    "feedback/rho_labels": "ρ votes",
    "feedback/rho_flips": "ρ flipped",
    "feedback/rho_risk_flips": "ρ flipped at risk",
    "feedback/rho_post": "ρ trained wrong",
}
"""Columns of ``rounds.jsonl`` that a run's page shows, and what it calls them."""
MOST_ROWS = 60_000
"""Rounds over all runs beyond which only those with an evaluation are embedded."""


def run_data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One entry per run, as JSON values, in the order of ``runs``."""
    whole = sum(len(run.rounds) for run in runs) <= MOST_ROWS
    return [_entry(run, whole) for run in runs]


EXITS = ("sustained", "naive", "confirmed", "true")
"""Exits that get a ring, the widest first, so that none hides another."""


def _entry(run: Run, whole: bool) -> dict[str, Any]:
    rows = run.rounds if whole else run.evaluations
    columns = {words: _numbers(run.column(name)[rows.index]) for name, words in SHOWN.items()}
    known = {
        words: values for words, values in columns.items() if any(v is not None for v in values)
    }
    bracket = run.summary.get("bracket")
    return {
        "title": run.title,
        "arm": run.arm,
        "replicate": run.replicate,
        "path": str(run.path),
        "outcome": run.summary.get("outcome", "unfinished"),
        "words": ending(run),
        "limit": run.limit,
        "needed": 1 / run.level,
        "began": run.began,
        "exits": {kind: run.exit_round(kind) for kind in EXITS},
        "bracket": bracket and [bracket[0] or 0, bracket[1]],
        "round": [int(value) for value in rows["round"]],
        "columns": known,
        "manifest": json.dumps(run.manifest, ensure_ascii=False, separators=(",", ":")),
    }


def _numbers(values: pd.Series) -> list[float | None]:
    """Four significant digits; missing and infinite values are None."""
    finite = values.abs() < float("inf")
    return [
        float(f"{value:.4g}") if known else None
        for value, known in zip(values, finite, strict=True)
    ]


def as_json(values: Iterable[Any] | dict[str, Any]) -> str:
    """Compact JSON."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
