"""What a person sees while a sweep goes on: runs done of runs asked, and each run at work."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sim.progress import describe, number, side


class SweepListener:
    """Hears of every run of a sweep; the defaults say nothing."""

    def begin(self, totals: Mapping[Path, int], finished: int) -> None:
        """The sweep begins.

        Args:
            totals: rounds of every run still to do, by its directory.
            finished: runs that an earlier sweep left finished.
        """

    def round(self, path: Path, row: dict[str, Any]) -> None:
        """One row of a run's ``rounds.jsonl``."""

    def done(self, path: Path, summary: dict[str, Any]) -> None:
        """A run ended."""

    def failed(self, path: Path, reason: str) -> None:
        """A run failed; the sweep goes on."""


def ending(summary: dict[str, Any]) -> str:
    """A run's end in a few words."""
    if summary["outcome"] == "diverged":  # its policy has no end to be measured
        return f"diverged in round {summary['diverged']['round']}"
    return (
        f"{summary['outcome']}, harm {number(summary['harm_end'])}, "
        f"help {summary['help_gain']:+.2f}"
    )


class PlainSweep(SweepListener):
    """A line per finished run."""

    def begin(self, totals: Mapping[Path, int], finished: int) -> None:
        """Remember how many there are."""
        self.count, self.total = finished, finished + len(totals)

    def done(self, path: Path, summary: dict[str, Any]) -> None:
        """Say how the run ended."""
        self._line(path, ending(summary))

    def failed(self, path: Path, reason: str) -> None:
        """Say why the run failed."""
        self._line(path, f"FAILED, {reason}")

    def _line(self, path: Path, text: str) -> None:
        self.count += 1
        print(f"[{self.count}/{self.total}] {path.name}: {text}", flush=True)


class BarSweep(PlainSweep):
    """A bar over all rounds, and a line for every run at work."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TimeRemainingColumn

        from sim.progress import text_column

        self.bar: Any = Progress(
            text_column(lambda task: (task.fields["name"], "bold")),
            BarColumn(bar_width=16),
            TimeRemainingColumn(compact=True),
            text_column(lambda task: task.fields["figures"]),
        )

    def begin(self, totals: Mapping[Path, int], finished: int) -> None:
        """Draw the bar of the whole sweep."""
        super().begin(totals, finished)
        self.totals = dict(totals)
        self.at: dict[Path, int] = {}
        self.whole = self.bar.add_task("", total=sum(totals.values()), name="all runs", figures=())
        self.bar.start()

    def round(self, path: Path, row: dict[str, Any]) -> None:
        """Advance the run's line and the whole."""
        if path not in self.at:
            total = self.totals[path]
            self.at[path] = self.bar.add_task("", total=total, name=path.name, figures=())
        text, inside = describe(row)
        style = "red" if inside is False else "green"
        shown = {"figures": (f"{side(inside)}  {text}", style)} if inside is not None else {}
        self.bar.update(self.at[path], completed=row["round"], **shown)
        self.bar.advance(self.whole)

    def _line(self, path: Path, text: str) -> None:
        self.count += 1
        if path in self.at:
            self.bar.remove_task(self.at.pop(path))
        self.bar.console.print(f"[{self.count}/{self.total}] {path.name}: {text}", markup=False)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self.bar.stop()


@contextmanager
def sweep_progress() -> Iterator[SweepListener]:
    """The listener that fits where stdout goes."""
    if not sys.stdout.isatty():
        yield PlainSweep()
        return
    bar = BarSweep()
    try:
        yield bar
    finally:
        bar.stop()
