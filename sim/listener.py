"""Who is told how a run goes. Progress bars are listeners; so is silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Listener:
    """Hears of every round; the defaults say nothing."""

    def start(self, config: Any, done: int, total: int) -> None:
        """Rounds begin; ``done`` of ``total`` are already there."""

    def round(self, row: dict[str, Any]) -> None:
        """One row of ``rounds.jsonl``."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The run's summary."""


class Silent(Listener):
    """Says nothing."""


class Several(Listener):
    """Tells each of ``listeners``, in their order."""

    def __init__(self, listeners: Sequence[Listener]):
        self.listeners = listeners

    def start(self, config: Any, done: int, total: int) -> None:
        """Rounds begin."""
        for listener in self.listeners:
            listener.start(config, done, total)

    def round(self, row: dict[str, Any]) -> None:
        """One row."""
        for listener in self.listeners:
            listener.round(row)

    def finish(self, summary: dict[str, Any]) -> None:
        """The run's summary."""
        for listener in self.listeners:
            listener.finish(summary)
