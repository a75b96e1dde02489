"""How far a sweep is, and how long the rest may take, from its directories alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sim import timings
from sim.lease import LEASES, owner
from sim.resume import is_finished
from sim.seal import read_sealed

if TYPE_CHECKING:
    from sim.sweep import Cell

STATES = ("finished", "diverged", "running", "stopped", "failed", "waiting")


class Standing(NamedTuple):
    """Where one cell stands."""

    cell: Cell
    state: str  # one of STATES
    rounds: int  # recorded
    note: str


def standing(cell: Cell) -> Standing:
    """Where ``cell`` stands now."""
    path = cell.path
    rounds = _rounds(path)
    if is_finished(path, cell.config):
        outcome = str(read_sealed(path / "summary.json")["outcome"])
        state = "diverged" if outcome == "diverged" else "finished"
        return Standing(cell, state, rounds, outcome)
    if (by := owner(path.parent / LEASES, path.name)) is not None:
        return Standing(cell, "running", rounds, by)
    error = error_file(path)
    if error.is_file():
        return Standing(cell, "failed", rounds, error.read_text().strip().splitlines()[-1])
    return Standing(cell, "stopped" if rounds else "waiting", rounds, "")


def error_file(path: Path) -> Path:
    """Where the failure of the run in ``path`` is told in full."""
    return path.with_name(f"{path.name}.error.txt")


def _rounds(path: Path) -> int:
    rows = path / "rounds.jsonl"
    return max(0, rows.read_bytes().count(b"\n") - 1) if rows.is_file() else 0


def seconds_left(cells: Sequence[Standing], jobs: int) -> float | None:
    """Seconds until all ``cells`` have their rounds, ``jobs`` at a time; None if unmeasured.

    By the mean of the rounds that each learner's cells have recorded; a learner without any takes
    the mean of all.
    """
    measured: dict[str, list[float]] = defaultdict(list)
    for one in cells:
        known = [seconds for _, seconds in timings.read(one.cell.path)]
        measured[one.cell.config.learner_name] += known
    every = [seconds for of in measured.values() for seconds in of]
    if not every:
        return None
    left = 0.0
    for one in cells:
        known = measured[one.cell.config.learner_name] or every
        if one.state not in ("finished", "diverged"):
            left += (one.cell.config.rounds - one.rounds) * sum(known) / len(known)
    return left / jobs


def print_status(cells: Sequence[Standing], jobs: int, every: bool) -> None:
    """Counts, what is not simply finished or waiting (or every cell), and the time that is left."""
    for one in cells:
        if every or one.state not in ("finished", "waiting"):
            done = f"{one.rounds}/{one.cell.config.rounds} rounds"
            print(f"{one.state:>9}  {done:>15}  {one.cell.path.name}  {one.note}".rstrip())
    counts = Counter(one.state for one in cells)
    print(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
    left = seconds_left(cells, jobs)
    if left is None:
        print("time: no round has been measured here yet")
    else:
        print(f"time: about {_spoken(left)} at {jobs} runs at a time, by the rounds recorded here")


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
