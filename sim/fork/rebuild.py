"""The state of a round whose checkpoint is gone, had by running the recorded rounds again.

A run is a pure function of its config: on one machine its bytes repeat. So the rounds are run again
from the last checkpoint before them, or from the start, and every row is compared with the recorded
one. At the end the whole state is compared with the hash that ``commits.jsonl`` has of it, where
that round had a checkpoint once. If anything differs (another processor, thread count, version or
code; a GPU; vLLM) there is no fork, rather than one from something else.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.usage import UsageError
from sim.config import Config
from sim.files import dumps, new_folder
from sim.listener import Listener
from sim.record import Record
from sim.resume import saved_config
from sim.run import run
from sim.seal import write_sealed


def nearest(parent: Path, at: int) -> int | None:
    """The round to run again from: the last one up to ``at`` whose state is kept, None: the start.

    Raises:
        ValueError: the way from there to ``at`` is none that could be run again.
    """
    manifest = Record(parent).manifest()
    kept = Record(parent).checkpoints()
    known = max((round for round in kept if round <= at), default=None)
    if known == at:
        return known
    began = manifest.get("fork", {}).get("at", 0)
    replanned = max((end for end in manifest.get("extended_at", []) if end < at), default=0)
    reason = None
    if began and known is None:
        reason = f"is a fork that begins in round {began}"
    elif replanned > (known or 0):
        reason = f"was extended in round {replanned}"
    if reason:
        rounds = ", ".join(map(str, kept)) or "none"
        raise UsageError(
            f"at={at}: {str(parent)!r} {reason}, so its rounds cannot be run again to there; "
            f"allowed: a round whose checkpoint is kept ({rounds}), or another parent"
        )
    return known


def rebuild(parent: Path, config: Config, at: int, out: Path) -> None:
    """Run rounds of ``parent`` again in ``out``, until it has a checkpoint of round ``at``.

    Args:
        parent: a run directory.
        config: its config.
        at: a round that it committed.
        out: a new directory, or one in which the same was begun and killed.

    Raises:
        ValueError: what comes out is not what was recorded.
    """
    manifest = Record(parent).manifest()
    ends = [*manifest.get("extended_at", []), config.rounds]
    again = replace(
        config,
        rounds=next(end for end in ends if at <= end),  # which the monitor had planned for
        checkpoint_every=math.gcd(at, config.checkpoint_every),
        keep_every=0,
    )
    begun = nearest(parent, at)
    if saved_config(out) != again:
        shutil.rmtree(out, ignore_errors=True)
        if begun is not None:
            graft(parent, begun, out, manifest | {"config": again.to_dict()})
    if at not in Record(out).checkpoints():
        print(f"round {at} has no checkpoint: running rounds {(begun or 0) + 1} to {at} again")
        listener = _Comparison(parent, at)
        with suppress(_Reached):
            run(again, out, resume=(out / "manifest.json").is_file(), listener=listener)
    _compare_states(parent, out, at)


def graft(source: Path, round: int, out: Path, manifest: dict[str, Any], state: Any = None) -> None:
    """Make the run directory ``out`` from what ``source`` recorded up to ``round``.

    So exits, occupancy and the true crossing are those of the whole path.

    Args:
        source: a run directory with a checkpoint of ``round``.
        round: where ``out`` will go on.
        out: a new directory.
        manifest: what it says of itself.
        state: what its one checkpoint holds, the source's own if None.

    Raises:
        ValueError: a file of ``source`` is damaged or gone.
    """
    known = Record(source)
    with new_folder(out) as folder:
        write_sealed(folder / "manifest.json", manifest, indent=1)
        record = Record(folder)
        record.adopt(known, round)
        record.checkpoint(round, known.state(round) if state is None else state)


class _Reached(Exception):
    """The round that was asked for is there."""


class _Comparison(Listener):
    """Compares every row with the recorded one, and ends the run in round ``at``."""

    def __init__(self, parent: Path, at: int):
        self.parent, self.at = parent, at
        record = Record(parent)
        rows = record.journal.rows(record.commits()[-1])
        assert rows is not None, "the parent was checked"
        lines = rows.decode().splitlines()[: at + 1]
        self.recorded = {json.loads(line)["round"]: line for line in lines}

    def start(self, config: Any, done: int, total: int) -> None:
        """Run nothing where the start is what was asked for."""
        if done == self.at:
            raise _Reached

    def round(self, row: dict[str, Any]) -> None:
        """Refuse a row that is not the recorded one."""
        came, round = dumps(row), row["round"]
        if came != self.recorded[round]:
            old, new = json.loads(self.recorded[round]), json.loads(came)
            name = next(k for k in {**old, **new} if old.get(k) != new.get(k))
            what = f"{name} is {new.get(name)}, {old.get(name)} was recorded"
            raise _other(self.parent, self.at, f"round {round}: {what}")
        if round == self.at:
            raise _Reached


def _compare_states(parent: Path, out: Path, at: int) -> None:
    """Refuse a state that is not the one that the parent had."""
    commits = [{c["round"]: c for c in Record(run).commits()} for run in (parent, out)]
    length = commits[1][at]["rounds"][0]
    rows = [(run / "rounds.jsonl").read_bytes()[:length] for run in (parent, out)]
    if rows[0] != rows[1]:
        raise _other(parent, at, "rounds.jsonl differs")
    if at not in commits[0]:
        return
    place = f"checkpoints/round-{at:06d}/"
    was, came = ({n: f for n, f in c[at]["files"].items() if n.startswith(place)} for c in commits)
    if was != came:
        raise _other(parent, at, "the state after it differs")


def _other(parent: Path, at: int, what: str) -> UsageError:
    kept = ", ".join(map(str, Record(parent).checkpoints())) or "none"
    return UsageError(
        f"at={at}: running {str(parent)!r} again comes to something else here ({what}); allowed: a "
        f"round whose checkpoint is kept ({kept}; --keep-every N keeps more of a new run), or the "
        "machine and versions that its manifest names"
    )
