"""``poisonloop exit-rules``: the rules that date an exit, compared where the truth is known."""

from __future__ import annotations

import sys
from pathlib import Path


def command(words: list[str]) -> int:
    """Simulate, print and, where asked, write the table.

    Raises:
        ValueError: a flag out of range, or an ``--out`` that cannot be a folder.
    """
    from envs.usage import check_ranges
    from sim.cli import parser_of
    from sim.files import check_out

    parser = parser_of(
        "exit-rules",
        "Early calls, delay and false exits of seven rules on simulated runs whose exit is known.",
    )
    parser.add_argument(
        "--runs", type=int, default=1500, metavar="N", help="runs a cell (default: 1500)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write CSV, JSON, Markdown")
    asked = parser.parse_args(words)
    check_ranges(asked, runs="2 to 1000000", seed=">= 0")
    if asked.out is not None:
        check_out(asked.out, "--out")
    return _run(asked.runs, asked.seed, asked.out)


def _run(runs: int, seed: int, out: Path | None) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from envs.brackets import KINDS
    from envs.exit_rules import RULES
    from sim import exit_study as study
    from sim.files import as_csv, dumps, write_atomic

    steps = len(study.CURVES) * len(RULES) + len(study.BRACKET_CURVES) * len(KINDS)
    # On stderr, so that the table can be piped.
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("simulating", total=steps)
        rows = study.simulate(runs, seed, lambda: bar.advance(task))
        brackets = study.bracket_rows(runs, seed, lambda: bar.advance(task))
    plan, tables = study.PLAN, study.markdown(rows) + "\n" + study.bracket_markdown(brackets)
    print(
        f"b = {plan.limit:g}, alpha = {plan.alpha:g}, J = {plan.planned}, e-SR at "
        f"{plan.run_length:g}; true exit at step {study.TRUE_EXIT}; {runs} runs a cell, "
        f"seed {seed}; ± one standard error\n\n{tables}",
        end="",
    )
    if out is not None:
        facts = {"runs": runs, "seed": seed, "true_exit": study.TRUE_EXIT, **vars(plan)}
        parts = {
            "exit-rules.csv": as_csv(rows),
            "brackets.csv": as_csv(brackets),
            "exit-rules.json": dumps({**facts, "rows": rows, "brackets": brackets}) + "\n",
            "exit-rules.md": tables,
        }
        for name, text in parts.items():
            write_atomic(out / name, text.encode())
    return 0
