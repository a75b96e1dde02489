"""The table at the end of a sweep: one row per arm, made from the run directories alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.sweep import PlannedRun

WIDTH = 120
"""Columns of the printed table where there is no terminal and COLUMNS says nothing."""


def tabulate(
    out: Path, planned: Sequence[PlannedRun], failures: Mapping[Path, str]
) -> dict[str, Any]:
    """Rows of arms and of runs: everything finished in ``out``, and what failed.

    Args:
        out: folder of the sweep, earlier calls included.
        planned: runs of this call.
        failures: what went wrong in this call, by run directory.
    """
    import pandas as pd

    from sim.analysis.load import Run, by_arm, load_runs, named
    from sim.analysis.retained import clean_twins, twin
    from sim.analysis.tables import arm_rows, discovery_rate

    ended = [file.parent for file in sorted(out.glob("*/summary.json"))]
    ended = [path for path in ended if path not in failures]
    runs = load_runs(ended) if ended else []
    for run in planned:
        if run.path in failures:
            asked = json.loads(json.dumps(run.config.to_dict()))
            runs.append(Run(run.path, {"config": asked}, {}, pd.DataFrame()))
    runs = named(runs)
    twins = clean_twins(runs)
    rows = [
        {
            **_run_row(arm, run, failures.get(run.path)),
            "clean_help_gain": _gain(twins.get(twin(run))),
        }
        for arm, members in by_arm(runs).items()
        for run in members
    ]
    return {"arms": arm_rows(runs), "runs": rows, "discovery_rate": discovery_rate(runs)}


def _gain(clean: Any) -> float | None:
    return None if clean is None else clean.summary["help_gain"]


def _run_row(arm: str, run: Any, failure: str | None) -> dict[str, Any]:
    summary, world = run.summary, run.config["world"]
    exit_confirmed = summary.get("exit_confirmed") or {}
    return {
        "arm": arm,
        "seed": run.config["seed"],
        "world_seed": world["seed"],
        "model_seed": world["model_seed"],
        "outcome": summary.get("outcome", "failed"),
        "harm_end": summary.get("harm_end"),
        "help_gain": summary.get("help_gain"),
        "exit_round": exit_confirmed.get("rounds"),
        "exit_label": exit_confirmed.get("labels"),
        "exit_optimizer_step": exit_confirmed.get("optimizer_steps"),
        "exit_true_round": run.exit_round("true"),
        "occupancy": summary.get("occupancy"),
        "failure": failure,
        "path": str(run.path),
    }


def write_table(table: dict[str, Any], out: Path) -> None:
    """``table.json`` with everything and ``table.csv`` with the arms."""
    from sim.files import as_csv, dumps, write_atomic

    rows = [
        {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        for row in table["arms"]
    ]
    write_atomic(out / "table.json", dumps(table).encode())
    write_atomic(out / "table.csv", as_csv(rows).encode())


def print_table(table: dict[str, Any]) -> None:
    """The arms, for a person: names may wrap, numbers never do."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sim.analysis.retained import UNKNOWN
    from sim.analysis.tables import OUTCOMES
    from sim.progress import number

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("arm", min_width=13, overflow="fold")
    drawn.add_column("runs", justify="right", no_wrap=True)
    drawn.add_column("outcomes")
    for title in ("harm\nat end", "help\ngain", "learning\nretained"):
        drawn.add_column(title, justify="right", no_wrap=True)
    drawn.add_column("exit at\nround")
    drawn.add_column("holds", no_wrap=True)
    for row in table["arms"]:
        counts = [
            f"{row[name]}\N{NO-BREAK SPACE}{name}" for name in (*OUTCOMES, "failed") if row[name]
        ]
        exits = ", ".join(f"{r:.0f}" for r in row["exit_rounds"]) or "-"
        figures = (row["harm_end"], row["help_gain"], row["learning_retained"])
        holds = {True: "yes", False: "no", None: "-"}[row["holds"]]
        cells = [row["arm"], str(row["runs"]), ", ".join(counts), *map(number, figures)]
        drawn.add_row(*map(Text, [*cells, exits, holds]))
    if any(row["learning_retained"] is None for row in table["arms"]):
        drawn.caption = Text(UNKNOWN)
        drawn.caption_justify = "left"
    wide_console().print(drawn)
    if len(table["arms"]) > 1:
        found = sum(row["exit_found"] for row in table["arms"])
        print(
            f"An exit is found in {found} of {len(table['arms'])} arms, at false discovery rate "
            f"{table['discovery_rate']:g} (e-BH)."
        )


def wide_console() -> Any:
    """A console for tables: :data:`WIDTH` columns where nothing says how many there are."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    return console
