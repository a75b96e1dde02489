"""What was actually said: which recorded comparisons a page holds, and how they enter it.

A page takes at most ``MOST`` comparisons and ``MOST_TEXT`` characters, divided evenly among runs.
Of a run with more, every k-th round is kept, beginning with its first, k as small as fits; of a
round that is itself too long, its first comparisons. The run directories hold everything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sim.analysis.load import Run, read_parts
from sim.record import Record

MOST, MOST_TEXT = 20_000, 6_000_000
TEXTS = ["prompt", "answer_a", "answer_b"]
COLUMNS = [
    *("run", "round", "stratum", *TEXTS, "vote", "honest_vote"),
    *("annotator", "adversarial", "cost_a", "cost_b"),
]


class Samples(NamedTuple):
    """Comparisons for a page."""

    rows: pd.DataFrame
    """``COLUMNS``; ``run`` is the place of the run among those given."""
    rounds: int
    """Recorded rounds that are on the page."""
    recorded: int
    """Rounds that were recorded."""


def collect(runs: Sequence[Run]) -> Samples:
    """Read the comparisons of ``runs`` that a page holds; of several a fork has its own alone.

    Raises:
        ValueError: a part is gone, or one that is read is damaged.
    """
    tables, rounds, recorded = [], 0, 0
    for place, run in enumerate(runs):
        since = run.began if len(runs) > 1 else 0
        record = Record(run.path)
        record.check_there("samples/")
        parts = [part for part in sorted((run.path / "samples").glob("part-*.parquet"))]
        parts = [part for part in parts if _round(part) > since]  # a part holds the round before
        if not parts:
            continue
        kept, most = _thinned(parts, MOST // len(runs), MOST_TEXT // len(runs))
        record.check(tuple(f"samples/{part.name}" for part in kept))
        frame = read_parts(kept)
        frame = frame[frame["round"] >= since]  # a delay puts earlier rounds into a part
        frame = frame[frame.groupby("round").cumcount() < most]
        tables.append(frame.assign(run=place))
        rounds += len(kept)
        recorded += len(parts)
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return Samples(rows.reindex(columns=COLUMNS), rounds, recorded)


def _round(part: Path) -> int:
    return int(part.stem.partition("-")[2])


def _thinned(parts: list[Path], rows: int, characters: int) -> tuple[list[Path], int]:
    """The parts of a run that fit, and how many comparisons of each."""
    first = read_parts(parts[len(parts) // 2 : len(parts) // 2 + 1])
    count = max(1, len(first))
    text = max(1, int(first[TEXTS].map(len).to_numpy().sum())) / count if len(first) else 1
    most = max(1, min(rows, int(characters / text)))
    step = -(-len(parts) * count // most)
    return parts[:: max(1, step)], most


def as_json(rows: pd.DataFrame) -> str:
    """Columns as JSON lists, one per name."""
    parts = [
        f"{json.dumps(name)}:{rows[name].to_json(orient='values', double_precision=3)}"
        for name in COLUMNS
    ]
    return "{" + ",".join(parts) + "}"


def told(samples: Samples) -> str:
    """What is here and what was left out, in words."""
    words = f"{len(samples.rows):,} recorded comparisons from {samples.rounds:,} rounds."
    left = samples.recorded - samples.rounds
    if not left:
        return words
    return (
        f"{words} {left:,} of {samples.recorded:,} recorded rounds are left out, so that the page "
        f"stays quick: it takes {MOST:,} comparisons at most, divided evenly among runs, and of a "
        "run with more every k-th round. The run directories hold all."
    )
