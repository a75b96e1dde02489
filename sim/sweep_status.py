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
    from sim.sweep import PlannedRun

STATES = ("finished", "diverged", "running", "stopped", "failed", "waiting")


class Standing(NamedTuple):
    """Where one run stands."""

    run: PlannedRun
    state: str  # one of STATES
    rounds: int  # recorded
    note: str


def standing(run: PlannedRun) -> Standing:
    """Where ``run`` stands now."""
    path = run.path
    rounds = _rounds(path)
    if is_finished(path, run.config):
        outcome = str(read_sealed(path / "summary.json")["outcome"])
        state = "diverged" if outcome == "diverged" else "finished"
        return Standing(run, state, rounds, outcome)
    if (by := owner(path.parent / LEASES, path.name)) is not None:
        return Standing(run, "running", rounds, by)
    error = error_file(path)
    if error.is_file():
        return Standing(run, "failed", rounds, error.read_text().strip().splitlines()[-1])
    return Standing(run, "stopped" if rounds else "waiting", rounds, "")


def error_file(path: Path) -> Path:
    """Where the failure of the run in ``path`` is told in full."""
    return path.with_name(f"{path.name}.error.txt")


def _rounds(path: Path) -> int:
    rows = path / "rounds.jsonl"
    return max(0, rows.read_bytes().count(b"\n") - 1) if rows.is_file() else 0


def seconds_left(standings: Sequence[Standing], jobs: int) -> float | None:
    """Seconds until all runs have their rounds, ``jobs`` at a time; None if unmeasured.

    By the mean of the rounds that each learner's runs have recorded; a learner without any takes
    the mean of all.
    """
    measured: dict[str, list[float]] = defaultdict(list)
    for one in standings:
        known = [seconds for _, seconds in timings.read(one.run.path)]
        measured[one.run.config.learner_name] += known
    every = [seconds for of in measured.values() for seconds in of]
    if not every:
        return None
    left = 0.0
    for one in standings:
        known = measured[one.run.config.learner_name] or every
        if one.state not in ("finished", "diverged"):
            left += (one.run.config.rounds - one.rounds) * sum(known) / len(known)
    return left / jobs


def print_status(standings: Sequence[Standing], jobs: int, every: bool) -> None:
    """Counts, what is not simply finished or waiting (or every run), and the time that is left."""
    for one in standings:
        if every or one.state not in ("finished", "waiting"):
            done = f"{one.rounds}/{one.run.config.rounds} rounds"
            print(f"{one.state:>9}  {done:>15}  {one.run.path.name}  {one.note}".rstrip())
    counts = Counter(one.state for one in standings)
    print(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
    left = seconds_left(standings, jobs)
    if left is None:
        print("time: no round has been measured here yet")
    else:
        print(f"time: about {_spoken(left)} at {jobs} runs at a time, by the rounds recorded here")


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
