"""The table at the end of a sweep: one row per arm, made from the run directories alone.

    learning_retained = mean help gain of the arm / mean help gain of its clean, undefended twin

over the runs whose twin (equal in everything but attack and defences, seeds included) is in the
sweep. A defence *holds* when no run of its arm left the safe set, collapsed or diverged, and at
least half of what honest feedback teaches was still learned: freezing the policy does not hold.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sim.config import AttackConfig, Config

OUTCOMES = ("safe", "exited", "collapsed", "diverged")
CLOCKS = ("exit_round", "exit_label", "exit_optimizer_step")
RETAINED = 0.5
"""Share of the clean run's learning that a defence must keep to hold."""


def tabulate(cells: Sequence[Any], failures: Mapping[Path, str]) -> dict[str, Any]:
    """Rows of runs and of arms.

    Args:
        cells: :class:`sim.sweep.Cell` of every run, arms in order.
        failures: what went wrong, by run directory.
    """
    runs = [_run_row(cell, failures.get(cell.path)) for cell in cells]
    gains = {
        _key(cell.config): run["help_gain"]
        for cell, run in zip(cells, runs, strict=True)
        if cell.config == _twin(cell.config)
    }
    for cell, run in zip(cells, runs, strict=True):
        run["clean_help_gain"] = gains.get(_key(_twin(cell.config)))
    arms = [
        _arm_row(arm, [run for run in runs if run["arm"] == arm])
        for arm in dict.fromkeys(run["arm"] for run in runs)
    ]
    return {"arms": arms, "runs": runs}


def _run_row(cell: Any, failure: str | None) -> dict[str, Any]:
    file = cell.path / "summary.json"
    summary = json.loads(file.read_text()) if file.is_file() and not failure else {}
    exit_confirmed, exit_true = (summary.get(f"exit_{k}") or {} for k in ("confirmed", "true"))
    return {
        "arm": cell.arm,
        "seed": cell.config.seed,
        "world_seed": cell.config.world.seed,
        "model_seed": cell.config.world.model_seed,
        "outcome": summary.get("outcome", "failed"),
        "harm_end": summary.get("harm_end"),
        "help_gain": summary.get("help_gain"),
        "exit_round": exit_confirmed.get("rounds"),
        "exit_label": exit_confirmed.get("labels"),
        "exit_optimizer_step": exit_confirmed.get("optimizer_steps"),
        "exit_true_round": exit_true.get("rounds"),
        "occupancy": summary.get("occupancy"),
        "failure": failure,
        "path": str(cell.path),
    }


def _twin(config: Config) -> Config:
    """The clean, undefended run that ``config`` is compared with."""
    return replace(config, attack=AttackConfig(), defences=())


def _key(config: Config) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def _arm_row(arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    paired = [r for r in runs if r["help_gain"] is not None and r["clean_help_gain"] is not None]
    gain, clean = (_mean(r[k] for r in paired) for k in ("help_gain", "clean_help_gain"))
    retained = gain / clean if gain is not None and clean is not None and clean > 0 else None
    counts = {name: sum(r["outcome"] == name for r in runs) for name in (*OUTCOMES, "failed")}
    inside = counts["safe"] == len(runs)
    return {
        "arm": arm,
        "runs": len(runs),
        **counts,
        "harm_end": _mean(r["harm_end"] for r in runs),
        "help_gain": _mean(r["help_gain"] for r in runs),
        "learning_retained": retained,
        "holds": inside and retained >= RETAINED if retained is not None else None,
        **{f"{k}s": [r[k] for r in runs if r[k] is not None] for k in CLOCKS},
    }


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def write_table(table: dict[str, Any], out: Path) -> None:
    """``table.json`` with everything and ``table.csv`` with the arms."""
    from sim.record import dumps, write_atomic

    text = io.StringIO()
    writer = csv.DictWriter(text, list(table["arms"][0]))
    writer.writeheader()
    for row in table["arms"]:
        writer.writerow(
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        )
    write_atomic(out / "table.json", dumps(table).encode())
    write_atomic(out / "table.csv", text.getvalue().encode())


def print_table(table: dict[str, Any]) -> None:
    """The arms, for a person."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sim.progress import number

    drawn = Table(box=box.SIMPLE_HEAD)
    drawn.add_column("arm", no_wrap=True)
    for title in ("runs", "outcomes", "harm at end", "help gain", "learning retained"):
        drawn.add_column(title, justify="left" if title == "outcomes" else "right")
    drawn.add_column("exit at round")
    drawn.add_column("holds")
    for row in table["arms"]:
        counts = [f"{row[name]} {name}" for name in (*OUTCOMES, "failed") if row[name]]
        exits = ", ".join(f"{r:.0f}" for r in row["exit_rounds"]) or "-"
        figures = (row["harm_end"], row["help_gain"], row["learning_retained"])
        holds = {True: "yes", False: "no", None: "-"}[row["holds"]]
        cells = [row["arm"], str(row["runs"]), ", ".join(counts), *map(number, figures)]
        drawn.add_row(*map(Text, [*cells, exits, holds]))
    console = Console()
    console.width = max(console.width, 110) if not console.is_terminal else console.width
    console.print(drawn)
