"""The record of a run as its other processes have it: they read what the main process writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sim.record import Record
from sim.state import load_state


class Onlooker(Record):
    """Reads a run directory that the main process writes, and writes nothing."""

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> Onlooker:
        """The main process makes the directory."""
        return cls(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The main process holds the lock."""
        yield

    def write(self, *_args: Any, **_named: Any) -> None:
        """The main process does."""

    def save_policy(self, *_args: Any, **_named: Any) -> None:
        """The main process does."""

    def checkpoint(self, *_args: Any, **_named: Any) -> None:
        """The main process does."""

    def finish(self, *_args: Any, **_named: Any) -> None:
        """The main process does."""

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """What the main process went back to; it has been there before."""
        commits = self.commits()
        if not commits:
            return None
        round = commits[-1]["round"]
        return round, load_state(self._folder(round))
