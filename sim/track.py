"""Sinks: listeners that show a run's rounds elsewhere. ``rounds.jsonl`` stays the record.

A sink is a view that is made anew from the rows whenever a run begins or goes on, so no step is
there twice and none is missing, whatever became of the run or of earlier sinks.
"""

from __future__ import annotations

import json
import shutil
from numbers import Real
from pathlib import Path
from typing import Any

from envs.usage import UsageError
from sim.launch import is_main
from sim.listener import Listener, Several

SINKS = ("tensorboard",)
"""Names that ``--track`` takes."""


def check_track(name: str | None) -> None:
    """Refuse a sink that is not there.

    Raises:
        ValueError: unknown, or its package is not installed.
    """
    if name is None:
        return
    if name not in SINKS:
        raise UsageError(f"track={name!r}; allowed: {', '.join(SINKS)}")
    _writer()


def tracked(listener: Listener, name: str | None, run: Path) -> Listener:
    """``listener``, and the sink ``name`` of the run in ``run`` beside it, if there is one."""
    return Several([listener, TensorBoard(run)]) if name and is_main() else listener


class TensorBoard(Listener):
    """Every number of every round, in ``RUN/tensorboard``."""

    def __init__(self, run: Path):
        self.run = run
        self.folder = run / "tensorboard"

    def start(self, config: Any, done: int, total: int) -> None:
        """Begin anew with the rows that are there; a viewer that is open drops the old ones."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = _writer()(str(self.folder), purge_step=0)
        for line in (self.run / "rounds.jsonl").read_text().splitlines():
            self.round(json.loads(line))

    def round(self, row: dict[str, Any]) -> None:
        """Add one row."""
        for name, value in row.items():
            if isinstance(value, Real) and name != "round":
                self.writer.add_scalar(name, float(value), row["round"])
        self.writer.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the file."""
        self.writer.close()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "track='tensorboard' needs tensorboard; allowed: pip install 'poisonloop[track]'"
        ) from None
    return SummaryWriter
