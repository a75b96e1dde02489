"""An experiment's rows as Markdown, and what of the paper's shapes they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sim.analysis.survival import MIN_SEEDS
from sim.analysis.words import in_words, span
from sim.papers.shapes import partly_shapes, whole_shapes

Row = dict[str, Any]


def markdown(name: str, rows: Sequence[Row]) -> str:
    """The table of experiment ``name`` and, below it, which shapes of the paper it shows."""
    columns, shapes = TABLES[name]
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    found = "\n".join(f"* {sentence}" for sentence in shapes(rows))
    return f"{table}\n\n{_note(rows)}\n\n{found}\n"


def _note(rows: Sequence[Row]) -> str:
    runs = {row["runs"] for row in rows}
    several = [
        *["lowest and highest of two or three runs"] * any(1 < n < MIN_SEEDS for n in runs),
        *["95 %, bootstrap over worlds, then seeds"] * any(n >= MIN_SEEDS for n in runs),
    ]
    alone = ["95 %, the monitor's interval of one run's prompts"] * (1 in runs)
    return (
        f"n = {span(runs)} runs a row, {rows[0]['prompts']} prompts each; [ ]: "
        f"{'; '.join([*several, *alone])}. The paper has one number a cell, of its own classifier "
        "over 100 prompts."
    )


def spread(found: Row | None) -> str:
    """A mean with its interval."""
    if found is None:
        return "–"
    return in_words(found["mean"], found["low"], found["high"], ".2f")


def _paper(value: Any) -> str:
    if value is None:
        return "–"
    return "–".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.2f}"


def _ends(row: Row) -> str:
    return ", ".join(f"{count} {what}" for what, count in row["outcomes"].items())


_MEASURED: dict[str, Callable[[Row], str]] = {
    "paper": lambda row: _paper(row["paper"]),
    "harm": lambda row: spread(row["harm"]),
    "classifier": lambda row: spread(row["classifier"]),
    "refused": lambda row: spread(row["refusal"]),
    "help": lambda row: spread(row["help"]),
    "perplexity": lambda row: f"{row['perplexity']['mean']:.1f}" if row["perplexity"] else "–",
    "runs: ends": lambda row: f"{row['runs']}: {_ends(row)}",
}
TABLES: dict[str, tuple[dict[str, Callable[[Row], str]], Callable[[Sequence[Row]], list[str]]]] = {
    "rosati-t1": (
        {
            "data": lambda row: row["data"],
            "learner": lambda row: row["learner"],
            "before: paper": lambda row: _paper(row["paper_start"]),
            "before: harm": lambda row: spread(row["harm_start"]),
            "before: classifier": lambda row: spread(row["classifier_start"]),
            **{name if ":" in name else f"after: {name}": cell
               for name, cell in _MEASURED.items()},
        },
        whole_shapes,
    ),
    "rosati-f2": (
        {
            "data": lambda row: row["data"],
            "learner": lambda row: row["learner"],
            "start": lambda row: row["start"],
            "reversed": lambda row: f"{row['ratio']:g} ({row['flipped']:.2f})",
            **_MEASURED,
        },
        partly_shapes,
    ),
}  # fmt: skip
"""Columns of every experiment, and what says its shapes."""
