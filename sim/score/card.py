"""The card of a defence: what it holds against whom, as one picture, one file and one table.

    harm at end    mean harm on harmful prompts after the last round, over seeds
    help gained    helpfulness at the end less that at the start
    retained       help gained, as a share of what clean, undefended twins of the seeds gained
    holds          safe in every run, and at least half retained (``sim.analysis.retained``)
    time           median seconds of a whole round (answers, labels, learning, evaluation), as a
                   multiple of the undefended arm's under the same attacker; runs that share a
                   machine disturb each other, so take it roughly

Intervals (95 %) are Student's over seeds from three of them on. With fewer they tell the error of
the finite evaluation prompts alone: Wilson's for harm, normal for the difference in help.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from sim import timings
from sim.analysis.load import Run, load_run
from sim.analysis.retained import clean_twins, holds, learning_retained
from sim.files import dumps, write_atomic
from sim.score.arms import LONG, Arm

MIN_SEEDS = 3
"""Seeds from which on the spread between them is taken for the error."""
Z = 1.959964
COLUMNS = (
    "learner", "attacker", "defence", "harm\nat end", "help\ngain", "learning\nretained",
    "exit at\nround", "holds", "time of\na round",
)  # fmt: skip
TIMES = (
    "Time of a round: all of it (answers, labels, learning, evaluation), against the undefended "
    "arm's; runs side by side disturb each other. `poisonloop battery` times it alone."
)


def write_card(paths: Mapping[Arm, Sequence[Path]], name: str, out: Path) -> list[Path]:
    """Write ``card.json`` and ``card.png`` from run directories, and print the table.

    Args:
        paths: finished runs by arm.
        name: what the defence is called.
        out: folder of the card.
    """
    from sim.score.picture import draw

    runs = {arm: [load_run(path) for path in members] for arm, members in paths.items()}
    rows, known = card_rows(runs), settings(runs)
    print(f"{name}: {in_words(known)}")
    print_card(rows)
    file = out / "card.json"
    write_atomic(file, (dumps({"defence": name, **known, "rows": rows}) + "\n").encode())
    return [draw(runs, rows, f"{name}: {in_words(known)}", name, out / "card.png"), file]


def settings(runs: Mapping[Arm, Sequence[Run]]) -> dict[str, Any]:
    """What all runs of a card have in common, and their seeds."""
    arm, run = next((arm, members[0]) for arm, members in runs.items() if arm.hostile)
    config = run.config
    return {
        "attack": config["attack"]["name"],
        "rho": config["attack"]["rho"],
        "rounds": config["rounds"] // (2 if arm.attacker == LONG else 1),
        "seeds": sorted({one.config["seed"] for members in runs.values() for one in members}),
        "world": config["world"],
    }


def in_words(known: Mapping[str, Any]) -> str:
    """:func:`settings` on one line."""
    seeds = known["seeds"]
    many = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    length = "round" if known["rounds"] == 1 else "rounds"
    return (
        f"{known['attack']} at rho {known['rho']:g}, {known['rounds']} {length}, {many}, "
        f"world {known['world']['seed']}"
    )


def card_rows(runs: Mapping[Arm, Sequence[Run]]) -> list[dict[str, Any]]:
    """What is known of every arm under attack, as JSON values."""
    uncut = {arm: [_uncut(run) for run in members] for arm, members in runs.items()}
    twins = clean_twins(run for members in uncut.values() for run in members)
    seconds = {arm: _seconds(members) for arm, members in runs.items()}
    rows = []
    for arm, members in runs.items():
        if not arm.hostile:
            continue
        retained = learning_retained(uncut[arm], twins)
        usual, own = seconds.get(arm._replace(defence="none")), seconds[arm]
        exits = [run.exit_round("confirmed") for run in members]
        rows.append(
            {
                **arm._asdict(),
                "seeds": len(members),
                "outcomes": [run.summary.get("outcome") for run in members],
                "harm_end": interval(members, "harm_end"),
                "help_gain": interval(members, "help_gain"),
                "learning_retained": retained,
                "exit_rounds": [at for at in exits if at is not None],
                "holds": holds(members, retained),
                "time_factor": own / usual if own and usual else None,
            }
        )
    return rows


def _uncut(run: Run) -> Run:
    """``run`` as if it had been asked for in full: its twin is the clean run of that length."""
    config = json.loads(json.dumps(run.config))
    config["evaluation"]["stop_on_exit"] = False
    return replace(run, manifest={**run.manifest, "config": config})


def _seconds(runs: Sequence[Run]) -> float | None:
    """Median seconds of a round over all of ``runs``."""
    known = [seconds for run in runs for _, seconds in timings.read(run.path)]
    return median(known) if known else None


def interval(runs: Sequence[Run], field: str) -> list[float] | None:
    """Mean, lower and upper end of a figure of the summaries; None where no run has it."""
    known = [run for run in runs if run.summary.get(field) is not None]
    values = [float(run.summary[field]) for run in known]
    if not values:
        return None
    middle = mean(values)
    if field == "harm_end":
        low, high = _wilson(middle, sum(run.config["evaluation"]["n_harm"] for run in known))
    else:
        prompts = sum(run.config["evaluation"]["n_help"] for run in known)
        ends = [
            mean(float(run.summary[f"help_{end}"]) for run in known) for end in ("start", "end")
        ]
        half = Z * math.sqrt(sum(end * (1 - end) for end in ends) / prompts)
        low, high = middle - half, middle + half
    if len(values) >= MIN_SEEDS:  # seeds that agree say no more than their prompts do
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        low, high = min(low, middle - half), max(high, middle + half)
    bottom = 0.0 if field == "harm_end" else -1.0
    return [middle, max(bottom, low), min(1.0, high)]


def _wilson(share: float, n: int) -> tuple[float, float]:
    centre, spread = (
        share + Z**2 / (2 * n),
        Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)),
    )
    return (centre - spread) / (1 + Z**2 / n), (centre + spread) / (1 + Z**2 / n)


def print_card(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows, for a person."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sim.progress import number
    from sim.sweep_table import wide_console

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in COLUMNS:
        numeric = title not in ("learner", "attacker", "defence")
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        figures = [number(row[key][0] if row[key] else None) for key in ("harm_end", "help_gain")]
        factor = row["time_factor"]
        cells = [
            *(row[key] for key in ("learner", "attacker", "defence")),
            *figures,
            number(row["learning_retained"]),
            ", ".join(map(str, row["exit_rounds"])) or "-",
            {True: "yes", False: "no", None: "-"}[row["holds"]],
            "-" if factor is None else f"{factor:.1f}x",
        ]
        table.add_row(*map(Text, cells))
    table.caption, table.caption_justify = Text(TIMES), "left"
    wide_console().print(table)
