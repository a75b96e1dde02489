"""The card of a defence: what it holds against whom, as one picture, one file and one table.

    harm at end    mean harm on harmful prompts after the last round, over seeds
    help gained    helpfulness at the end less that at the start
    retained       help gained, as a share of what clean, undefended twins of the seeds gained
    holds          safe in every run, and at least half retained (``sim.analysis.retained``)
    time           median seconds of a round, as a multiple of the undefended arm's under the same
                   attacker; runs that share a machine disturb each other, so take it roughly

Intervals (95 %) are Student's over seeds from three of them on. With fewer they tell the error of
the finite evaluation prompts alone: Wilson's for harm, normal for the difference in help.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import pandas as pd

from sim.analysis import style
from sim.analysis.load import Run, load_run
from sim.analysis.retained import clean_twins, holds, learning_retained
from sim.record import dumps, write_atomic
from sim.score.command import STANDARD, Arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_SEEDS = 3
"""Seeds from which on the spread between them is taken for the error."""
Z = 1.959964
NAME = 18
"""Characters on one line of a defence's name."""
COLUMNS_AT = ((0.05, 0.31), (0.60, 0.18), (0.81, 0.18))
"""Left end and width of the three pictures of a learner; names stand in the gap."""
COLUMNS = (
    "learner", "attacker", "defence", "harm\nat end", "help\ngain", "learning\nretained",
    "exit at\nround", "holds", "time",
)  # fmt: skip


def write_card(paths: Mapping[Arm, Sequence[Path]], name: str, out: Path) -> list[Path]:
    """Write ``card.json`` and ``card.png`` from run directories, and print the table.

    Args:
        paths: finished runs by arm.
        name: what the defence is called.
        out: folder of the card.
    """
    runs = {arm: [load_run(path) for path in members] for arm, members in paths.items()}
    rows = card_rows(runs)
    print_card(rows)
    file = out / "card.json"
    write_atomic(file, (dumps({"defence": name, "rows": rows}) + "\n").encode())
    return [draw(runs, rows, name, out / "card.png"), file]


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
    files = [run.path / "timings.jsonl" for run in runs]
    lines = [line for f in files if f.is_file() for line in f.read_text().splitlines()]
    seconds = [json.loads(line).get("seconds") for line in lines]
    known = [value for value in seconds if value is not None]
    return median(known) if known else None


def interval(runs: Sequence[Run], field: str) -> list[float] | None:
    """Mean, lower and upper end of a figure of the summaries; None where no run has it."""
    known = [run for run in runs if run.summary.get(field) is not None]
    values = [float(run.summary[field]) for run in known]
    if not values:
        return None
    middle = mean(values)
    if len(values) >= MIN_SEEDS:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        low, high = middle - half, middle + half
    elif field == "harm_end":
        low, high = _wilson(middle, sum(run.config["evaluation"]["n_harm"] for run in known))
    else:
        prompts = sum(run.config["evaluation"]["n_help"] for run in known)
        ends = [
            mean(float(run.summary[f"help_{end}"]) for run in known) for end in ("start", "end")
        ]
        half = Z * math.sqrt(sum(end * (1 - end) for end in ends) / prompts)
        low, high = middle - half, middle + half
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
    wide_console().print(table)


@style.styled
def draw(
    runs: Mapping[Arm, Sequence[Run]], rows: Sequence[Mapping[str, Any]], name: str, path: Path
) -> Path:
    """Harm over rounds on the left, harm and help gained at the end on the right, by learner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    learners = list(dict.fromkeys(row["learner"] for row in rows))
    figure = Figure(figsize=(13.5, 5.6 * len(learners)), facecolor="white")
    FigureCanvasAgg(figure)
    for number, learner in enumerate(learners):
        own = [row for row in rows if row["learner"] == learner]
        mine = {arm: members for arm, members in runs.items() if arm.learner == learner}
        looks = _looks([row["defence"] for row in own], name)
        bottom, tall = 1 - (number + 0.9) / len(learners), 0.76 / len(learners)
        trace, harm, help_ = (figure.add_axes((x, bottom, w, tall)) for x, w in COLUMNS_AT)
        _traces(trace, mine, looks)
        trace.set_title(f"{learner}: harm under the default attack")
        _bars(harm, own, "harm_end", looks)
        harm.axvline(next(iter(mine.values()))[0].limit, color=style.VERMILION, lw=1.2, ls="--")
        harm.set(xlim=(0, 1), title="harm at the end")
        _bars(help_, own, "help_gain", looks)
        help_.axvline(0, color=style.GREY, lw=0.8)
        help_.set(yticklabels=[], title="help gained")
    seeds = max(row["seeds"] for row in rows)
    error = "over seeds" if seeds >= MIN_SEEDS else "of the evaluation prompts alone"
    figure.text(
        COLUMNS_AT[0][0], 0.0, f"{name}: {seeds} seed{'s' * (seeds > 1)} an arm. Left: mean thick, "
        f"seeds thin. Right: bars with 95 % intervals {error}; light and hatched where the "
        "attacker adapts; dashed: limit on mean harm.", color=style.GREY, fontsize=8.5, va="top",
    )  # fmt: skip
    return style.save(trace, path)


def _looks(names: Sequence[str], own: str) -> dict[str, tuple[str, style.Dash]]:
    """Colour and dash by defence: the undefended arm and the card's own stand out."""
    fixed: dict[str, tuple[str, style.Dash]] = {"none": (style.VERMILION, "-")}
    fixed |= {"freeze": (style.BLACK, ":"), own: (style.BLUE, "-")}
    rest = [name for name in dict.fromkeys(names) if name not in fixed]
    others = ((style.GREEN, "--"), (style.AMBER, "-."), (style.PURPLE, "--"), (style.SKY, "-."))
    return {**fixed, **dict(zip(rest, others, strict=False))}


def _traces(ax: Axes, runs: Mapping[Arm, Sequence[Run]], looks: Mapping[str, Any]) -> None:
    shown = {a.defence: r for a, r in runs.items() if a.hostile and a.attacker == STANDARD}
    ends = []
    for defence, members in shown.items():
        (colour, dash), name = looks[defence], textwrap.fill(defence, NAME)
        series = [run.evaluations.set_index("round")["safety/harm"] for run in members]
        traces = pd.concat([one.astype(float) for one in series], axis=1)
        for column in range(traces.shape[1] if len(members) > 1 else 0):
            seed = traces.iloc[:, column].dropna()
            ax.plot(seed.index, seed, color=colour, lw=0.8, alpha=0.4)
        middle = traces.dropna().mean(axis=1)
        ax.plot(middle.index, middle, color=colour, ls=dash, lw=2.4)
        if len(middle):
            ends.append((float(middle.index[-1]), float(middle.iloc[-1]), name, colour))
    style.unsafe_region(ax, next(iter(shown.values()))[0].limit)
    ax.set(ylim=(-0.02, 1.02), xlabel="round", ylabel="harm on harmful prompts")
    ax.margins(x=0.01)
    style.whole_rounds(ax)
    style.label_ends(ax, ends)


def _bars(ax: Axes, rows: Sequence[Mapping[str, Any]], key: str, looks: Mapping[str, Any]) -> None:
    """One bar a row, under a heading for every attacker."""
    names: dict[float, str] = {}
    at, attacker = -1.0, None
    for row in rows:
        at += 1
        if row["attacker"] != attacker:
            attacker = row["attacker"]
            ax.annotate(
                f"{attacker} attack" if attacker == STANDARD else attacker, (0.99, at),
                xycoords=ax.get_yaxis_transform(), ha="right", va="center", fontsize=8.5,
                color=style.GREY, style="italic",
            )  # fmt: skip
            at += 0.8
        names[at] = textwrap.fill(row["defence"], NAME)
        if row[key] is None:
            continue
        (middle, low, high), colour = row[key], looks[row["defence"]][0]
        usual = attacker == STANDARD
        ax.barh(
            at, middle, height=0.78, color=colour, alpha=1.0 if usual else 0.5,
            edgecolor=colour, hatch=None if usual else "//", lw=0.8,
        )  # fmt: skip
        error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]  # never below 0 by rounding
        ax.errorbar(middle, at, xerr=error, color=style.INK, capsize=2.5, lw=1.2)
    ax.set_yticks(list(names), list(names.values()))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(at + 0.6, -0.6)
