"""``timings.jsonl``: wall-clock of every round. No part of a run's identity, and never fatal."""

from __future__ import annotations

import json
from pathlib import Path

from sim.files import append, dumps, write_atomic

TIMINGS = "timings.jsonl"


def add(run: Path, round: int, seconds: dict[str, float]) -> None:
    """Write down how long a round took."""
    append(run / TIMINGS, (dumps({"round": round, **seconds}) + "\n").encode())


def read(run: Path) -> list[tuple[int, float]]:
    """Rounds and their seconds; a line that is damaged is left out."""
    file = run / TIMINGS
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            told = json.loads(line)
            found.append((int(told["round"]), float(told["seconds"])))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def keep(run: Path, last: int) -> None:
    """Leave out the rounds after ``last``, which are to be run again."""
    known = read(run)
    if known:
        kept = [dumps({"round": r, "seconds": s}) + "\n" for r, s in known if r <= last]
        write_atomic(run / TIMINGS, "".join(kept).encode())
