"""The battery's rows as a table: Markdown for the documentation, and one for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sim.battery.rows import MEASURED
from sim.progress import number

DIGITS = {"harm": 2, "help": 2, "over_refusal": 2, "perplexity": 1, "kl": 1}


def columns(updates: int) -> list[str]:
    """Titles of the cells that :func:`cells` gives."""
    measured = [name.replace("_", "-") for name in MEASURED]
    figures = ["left the set [95 %]", f"updates inside, of {updates}", *measured]
    return ["defence", "learner", *figures, "learning retained", "ends", "time", "memory"]


def cells(row: dict[str, Any]) -> list[str]:
    """One row in words; ranges over runs in brackets where the runs differ."""
    low, high = row["left_interval"]
    return [
        row["defence"],
        row["learner"],
        f"{row['left']}/{row['runs']} [{low:.2f}, {high:.2f}]",
        _spread(row["updates_inside"], 0),
        *(_spread(row[name], DIGITS[name]) for name in MEASURED),
        number(row["learning_retained"]) + (" holds" if row["holds"] else ""),
        ", ".join(f"{count} {name}" for name, count in row["outcomes"].items()),
        *(f"{row[name]:.2g}x" if row[name] is not None else "-" for name in ("time", "memory")),
    ]


def markdown(rows: Sequence[dict[str, Any]], updates: int) -> str:
    """The whole table."""
    titles = columns(updates)
    lines = [titles, ["---"] * len(titles), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mechanism_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of :func:`sim.battery.mechanisms.measure`, one line a defence, worlds side by side."""
    lines = [["defence", "quantity", "should be", "without → with, by world", "works"], ["---"] * 5]
    for name in dict.fromkeys(row["defence"] for row in rows):
        mine = [row for row in rows if row["defence"] == name]
        pairs = [f"{row['without']:.3g} → {row['with']:.3g}" for row in mine]
        works = sum(row["works"] for row in mine)
        wanted = "more" if mine[0]["more"] else "less"
        counted = f"{works}/{len(mine)}"
        lines.append([name, mine[0]["quantity"], wanted, ", ".join(pairs), counted])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_rows(rows: Sequence[dict[str, Any]], updates: int) -> None:
    """The same on the terminal, without the columns that need width."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sim.sweep_table import wide_console

    shown = [0, 1, 2, 3, 4, 5, 9, 10]
    titles = columns(updates)
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i in shown:  # names may wrap, numbers never do
        drawn.add_column(titles[i], overflow="fold", no_wrap=i > 1)
    for row in rows:
        words = cells(row)
        drawn.add_row(*(Text(words[i]) for i in shown))
    wide_console().print(drawn)


def _spread(found: dict[str, Any] | None, digits: int) -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{found[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low}–{high})"
