"""What a person sees while a run goes on.

A listener hears of every round (:mod:`sim.listener`). On a terminal it draws a bar; elsewhere it
prints a plain line about every tenth of the run. Values are drawn as rich ``Text``: nothing that a
model or a plug-in said is ever read as markup.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sim.listener import Listener


def quiet_loading() -> None:
    """Turn off the bars that transformers draws for every model it loads."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def number(value: float | None, digits: int = 2) -> str:
    """``value`` with two digits, a dash when it is missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def counted(n: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def describe(row: dict[str, Any]) -> tuple[str, bool | None]:
    """A round's figures in words; whether the policy is in the safe set, None when unmeasured."""
    inside = row.get("safety/in_safe_set")
    parts = []
    if row.get("safety/harm") is not None:
        low, high = row.get("safety/harm_lower"), row.get("safety/harm_upper")
        parts.append(f"harm {number(row['safety/harm'])} [{number(low)}, {number(high)}]")
        parts.append(f"refusal {number(row.get('safety/refusal_harmful'))}")
    if row.get("reward") is not None:
        parts.append(f"reward {number(row['reward'])}")
    if row.get("helpfulness") is not None:
        parts.append(f"help {number(row['helpfulness'])}")
    return "  ".join(parts), inside


def side(inside: bool | None) -> str:
    """In or out of the safe set, in words."""
    return {True: "in the safe set", False: "OUT of the safe set", None: ""}[inside]


class PlainProgress(Listener):
    """A line for about every tenth of the rounds, for logs and pipes."""

    def start(self, config: Any, done: int, total: int) -> None:
        """Say what begins."""
        self.total = total
        self.every = max(1, round(total / 10))
        self.inside: bool | None = None
        since = f" from round {done}" if done else ""
        print(f"training {counted(total, 'round')}{since} of {config.learner_name}", flush=True)

    def round(self, row: dict[str, Any]) -> None:
        """Print the rounds that are due, and every change of side."""
        text, inside = describe(row)
        changed = inside is not None and inside != self.inside
        self.inside = self.inside if inside is None else inside
        if changed or row["round"] % self.every == 0 or row["round"] == self.total:
            print(f"round {row['round']}/{self.total}  {text}  {side(inside)}".rstrip(), flush=True)


class BarProgress(Listener):
    """A bar with the last measured figures beside it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar: Any = Progress(
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=16),
            TimeRemainingColumn(compact=True),
            text_column(_figures),
        )

    def start(self, config: Any, done: int, total: int) -> None:
        """Draw the bar."""
        self.task = self.bar.add_task("", total=total, completed=done, row={})
        self.bar.start()

    def round(self, row: dict[str, Any]) -> None:
        """Advance; rounds without an evaluation keep the last figures."""
        shown = {"row": row} if row.get("safety/harm") is not None else {}
        self.bar.update(self.task, completed=row["round"], **shown)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self.bar.stop()


def text_column(say: Callable[[Any], tuple[Any, ...]]) -> Any:
    """A column of a progress bar: ``say`` gives the words and their style for a task."""
    from rich.progress import ProgressColumn
    from rich.table import Column
    from rich.text import Text

    class Words(ProgressColumn):
        """Plain words, never markup."""

        def render(self, task: Any) -> Text:
            """What ``say`` makes of the task."""
            return Text(*say(task))

    return Words(table_column=Column(no_wrap=True))


def _figures(task: Any) -> tuple[str, str]:
    text, inside = describe(task.fields["row"])
    return f"{side(inside)}  {text}", "red" if inside is False else "green"


@contextmanager
def progress() -> Iterator[Listener]:
    """The listener that fits where stdout goes."""
    if not sys.stdout.isatty():
        yield PlainProgress()
        return
    bar = BarProgress()
    try:
        yield bar
    finally:
        bar.stop()
