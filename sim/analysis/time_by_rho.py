"""The dose and what it does: time in the safe set against rho, a panel a learner, by defence.

"rho" can mean several things (README): the share of malicious people that was asked for, or one of
the five shares that every round logs. Time is the restricted mean to the confirmed exit as a share
of the horizon, or the occupancy, which is known only of runs that went on after their exit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.cells import ASKED, MEASURES, cells, lines
from sim.analysis.load import Run
from sim.analysis.panels import columns_of
from sim.analysis.survival import MIN_SEEDS
from sim.analysis.words import RHO, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = {ASKED: "of malicious people", **RHO}
"""What x can be, in words."""
APART, MOST_APART = 0.014, 0.1
"""Between defences at one rho, and between the first and last, as shares of the axis; else their
intervals would cover each other."""
MOST_LINES = 14
WIDTH, ALONE, HEIGHT, GAP = 3.1, 5.4, 2.7, 0.9
"""Inches of a panel's place, of one alone, of its height and the space below."""
TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)


def doses(runs: Iterable[Run], measure: str = "inside") -> pd.DataFrame:
    """Cells of the learners that were attacked at two values of rho at least."""
    table = cells(runs, measure)
    if table.empty:
        return table
    table = table[table["value"].notna()]
    several = table[table["rho"] > 0].groupby("learner")["rho"].nunique()
    return table[table["learner"].isin(several[several > 1].index)]


@style.styled
def plot_time_by_rho(
    runs: Iterable[Run], ax: Axes | None = None, x: str = ASKED, measure: str = "inside"
) -> Axes:
    """Time inside against rho, one panel per learner, one line per defence.

    Args:
        runs: runs; those that have not ended, and forks, are left out.
        ax: axes to put the panels on; a new figure's by default.
        x: ``asked``, or one of the five logged shares (keys of ``sim.analysis.words.RHO``).
        measure: ``inside`` or ``occupancy``, as in :func:`sim.analysis.cells.cells`.

    Raises:
        ValueError: no learner was attacked at two values of rho, or an unknown x or measure.
    """
    for name, value, allowed in (("x", x, SHARES), ("measure", measure, MEASURES)):
        if value not in allowed:
            raise UsageError(f"{name}={value!r}; allowed: {', '.join(allowed)}")
    runs = list(runs)
    table = doses(runs, measure)
    if table.empty:
        raise UsageError(f"runs: {len(runs)}; allowed: a learner attacked at two values of rho")
    learners = sorted(set(table["learner"]))
    found = {learner: lines(table[table["learner"] == learner]) for learner in learners}
    keys = list(dict.fromkeys(key for part in found.values() for key in part))[:MOST_LINES]
    apart = min(APART, MOST_APART / len(keys)) * np.sqrt(table[x].max())
    columns = columns_of(len(learners))
    rows = -(-len(learners) // columns)
    ax = style.axes(
        ax, (columns * WIDTH if columns > 1 else ALONE) / 0.775, rows * (HEIGHT + GAP) / 0.77
    )
    panels = style.panels(ax, len(learners), columns, 0.88, HEIGHT / (HEIGHT + GAP))
    for i, (panel, learner) in enumerate(zip(panels, learners, strict=True)):
        for number, key in enumerate(keys):
            if key in found[learner]:
                shift = apart * (number - (len(keys) - 1) / 2)
                _draw(panel, found[learner][key], x, number, shift)
        _finish(panel, table, x)
        panel.set_title(learner)
        panel.tick_params(labelleft=i % columns == 0)
        panel.set_xlabel(f"ρ: share {SHARES[x]}")
        if i % columns == 0:
            panel.set_ylabel("time in the safe set")
    _legend(ax, keys, rows * (HEIGHT + GAP))
    style.caption(ax, _words(table, measure, runs))
    return ax


def _draw(panel: Axes, part: pd.DataFrame, x: str, number: int, shift: float) -> None:
    """One line; hollow where the runs are too few for an interval."""
    colour, dash = style.line_style(number)
    part = part[part[x].notna()]
    at = np.sqrt(part[x].to_numpy()) + shift
    y, few = part["value"].to_numpy(), part["n"].to_numpy() < MIN_SEEDS
    panel.plot(at, y, ls=dash, color=colour, lw=1.8, zorder=3)
    panel.vlines(at, part["low"], part["high"], color=colour, lw=3, alpha=0.35, zorder=2)
    mark = style.MARKERS[number % len(style.MARKERS)]
    for chosen, face in ((few, "white"), (~few, colour)):
        panel.plot(at[chosen], y[chosen], mark, ms=6, mfc=face, mec=colour, mew=1.3, zorder=4)


def _finish(panel: Axes, table: pd.DataFrame, x: str) -> None:
    """Axes: the root of rho, which spreads small shares and has a 0; ticks at what was asked."""
    values = sorted(set(table[x].dropna())) if x == ASKED else list(TICKS)
    top = table[x].max()
    values = [value for value in values if value <= top or x == ASKED]
    ticks: list[float] = []
    for value in values:  # those that would touch the one before have no number
        if not ticks or np.sqrt(value) - np.sqrt(ticks[-1]) > 0.085 * np.sqrt(top):
            ticks.append(value)
    panel.set_xticks(np.sqrt(ticks), [f"{value:g}".replace("0.", ".") for value in ticks])
    panel.tick_params(axis="x", labelsize=8.5)
    panel.set_xticks(np.sqrt(values), minor=True)
    panel.set_xlim(-0.06 * np.sqrt(top), 1.06 * np.sqrt(top))
    panel.set(ylim=(-0.03, 1.05), yticks=(0, 0.25, 0.5, 0.75, 1))
    panel.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
    panel.grid(axis="y", color=style.LIGHT, lw=0.7, zorder=0)


def _legend(ax: Axes, keys: list[tuple[str, str]], height: float) -> None:
    """Defences in rows over the first panels' names, and the title over them."""
    from matplotlib.lines import Line2D

    several = len({attack for _, attack in keys}) > 1
    handles = []
    for number, (defence, attack) in enumerate(keys):
        colour, dash = style.line_style(number)
        mark = style.MARKERS[number % len(style.MARKERS)]
        words = f"{attack}: {defence}" if several else defence
        handles.append(Line2D([], [], color=colour, ls=dash, marker=mark, lw=2, label=words))
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1 - (GAP - 0.3) / height),
        ncols=min(4, len(keys)), borderaxespad=0, columnspacing=1.4,
    )  # fmt: skip
    above = 0.3 + 0.24 * -(-len(keys) // 4) + 0.08
    ax.set_title("How long does the policy stay in the safe set?", y=1 - (GAP - above) / height)


def _whole(table: pd.DataFrame) -> list[str]:
    """What points at 100 % mean, in sentences."""
    words = []
    stayed = table[table["left"] == 0]
    if (fewest := stayed["n"].min()) >= MIN_SEEDS:
        still = 100 * (1 - 0.05 ** (1 / fewest))
        words.append(
            f"Where none of {fewest} runs left, at most {still:.0f} % of such runs would (95 %)."
        )
    if late := int(((table["left"] > 0) & (table["value"] >= 1)).sum()):
        points = "One point" if late == 1 else f"{late} points"
        words.append(f"{points} at 100 %: out by the last round.")
    return words


def _words(table: pd.DataFrame, measure: str, runs: list[Run]) -> str:
    fewest, most, worlds = table["n"].min(), table["n"].max(), int(table["worlds"].max())
    rounds = " or ".join(sorted({f"{horizon:g}" for horizon in table["horizon"]}))
    inside = f"Restricted mean time to the confirmed exit, as a share of {rounds} rounds"
    occupied = "Share of a run that the policy was inside and fluent, also after an exit"
    bars = f"n = {span(table['n'])} runs a point, {worlds} world{'s' * (worlds > 1)}"
    bars += f"; hollow: fewer than {MIN_SEEDS} runs, no bar" if fewest < MIN_SEEDS else ""
    bars += "; bars: 95 %, bootstrap over worlds, then seeds" if most >= MIN_SEEDS else ""
    words = [
        f"{inside if measure == 'inside' else occupied}. {bars}. "
        "Square-root scale of ρ; points at one ρ are set apart."
    ]
    if measure == "occupancy":
        words.append("Points of which a run was stopped at its exit are left out.")
    else:
        words += _whole(table)
    if waiting := sum(not run.summary for run in runs):
        words.append(f"{waiting} runs have not ended and are left out.")
    return " ".join(words)
