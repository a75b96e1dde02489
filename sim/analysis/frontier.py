"""What safety costs: time in the safe set against what the policy still learned, by defence.

Learning retained is that of :mod:`sim.analysis.retained`; where the clean twins are not at hand,
help gained stands for it. Nothing beats a defence on the frontier on both at once; freezing the
policy is far right and at the bottom.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.cells import BARE, cells
from sim.analysis.load import Run
from sim.analysis.words import span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEARNED = {"retained": "learning retained", "gain": "help gained"}
WIDTH, HEIGHT, GAP, COLUMNS = 4.0, 3.0, 0.85, 2
"""Inches of a panel's place, of its height and the space below; panels in a row."""
FILLED = 0.86
"""Share of its place that a panel fills."""
FLOOR = -0.2
"""Least value with a place of its own; collapsed policies can have lost several times as much."""


def frontier_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Cells of one attack per learner, with a column ``efficient``; empty without defences.

    The attack is that under which most defences ran, at the highest rho of equals. Of cells where
    some lack what others have retained, only these are kept; where all lack it, ``retained`` is NaN
    and ``gain`` counts.
    """
    table = cells(runs)
    table = table[(table["rho"] > 0) & table["value"].notna()] if len(table) else table
    parts = []
    for _, part in table.groupby("learner") if len(table) else ():
        places = part.groupby(["attack", "rho"])["defence"].nunique().reset_index()
        best = places.sort_values(["defence", "rho"], kind="stable").iloc[-1]
        part = part[(part["attack"] == best["attack"]) & (part["rho"] == best["rho"])]
        if best["defence"] > 1:
            parts.append(part)
    if not parts:
        return table[:0]
    table = pd.concat(parts, ignore_index=True)
    column = "retained" if table["retained"].notna().any() else "gain"
    table = table[table[column].notna()].assign(learned=table[column], measure=column)
    flags = [_efficient(part) for _, part in table.groupby("learner")]
    return table.assign(efficient=pd.concat(flags)) if flags else table


def _efficient(part: pd.DataFrame) -> pd.Series:
    """Whether no other cell has as much of both and more of one."""
    both = part[["value", "learned"]].to_numpy()
    no_less = (both[None] >= both[:, None]).all(2)  # (i, j): j has at least what i has
    more = (both[None] > both[:, None]).any(2)
    return pd.Series(~(no_less & more).any(1), part.index)


@style.styled
def plot_frontier(runs: Iterable[Run], ax: Axes | None = None) -> Axes:
    """A panel a learner, a numbered point a defence, the frontier as a line.

    Raises:
        ValueError: no learner was attacked under two defences, none counted as one.
    """
    table = frontier_table(runs)
    if table.empty:
        raise UsageError("runs: no learner under one attack with and without a defence")
    learners = sorted(set(table["learner"]))
    names = sorted(dict.fromkeys(table["defence"]), key=lambda name: not name.startswith(BARE))
    columns = min(COLUMNS, len(learners))
    rows = -(-len(learners) // columns)
    ax = style.axes(ax, columns * WIDTH / 0.775, rows * (HEIGHT + GAP) / 0.77)
    panels = style.panels(ax, len(learners), columns, FILLED, HEIGHT / (HEIGHT + GAP))
    low = max(FLOOR, min(0.0, table["learned"].min()))
    high = table["learned"].max()
    room = 0.08 * (high - low)
    for i, (panel, learner) in enumerate(zip(panels, learners, strict=True)):
        part = table[table["learner"] == learner]
        panel.set(xlim=(0, 1.12), ylim=(low - room, high + room))
        _points(panel, part.assign(learned=part["learned"].clip(FLOOR)), names)
        cell = part.iloc[0]
        panel.set_title(f"{learner}: {cell['attack']} ρ = {cell['rho']:g}", fontsize=10)
        panel.set_xticks((0, 0.25, 0.5, 0.75, 1))
        panel.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        panel.set_xlabel(f"time in the safe set, of {cell['horizon']:g} rounds")
        if i % columns == 0:
            panel.set_ylabel(LEARNED[cell["measure"]])
        panel.grid(color=style.LIGHT, lw=0.6)
        panel.set_axisbelow(True)
    _key(ax, names, rows * (HEIGHT + GAP))
    ax.set_title("What does safety cost?", y=1 - (GAP - 0.36) / (rows * (HEIGHT + GAP)))
    sunk = f" ▾: {FLOOR:g} or less." if (table["learned"] <= FLOOR).any() else ""
    style.caption(
        ax,
        "Restricted mean time to the confirmed exit against "
        f"{LEARNED[table['measure'].iloc[0]]}, means over n = {span(table['n'])} runs a defence. "
        "Blue: no run left; red: some did. Line: the frontier, beyond which no defence here has "
        f"more of both. Differences within the runs' spread are not findings.{sunk}",
    )
    return ax


def _points(panel: Axes, part: pd.DataFrame, names: list[str]) -> None:
    front = part[part["efficient"]].sort_values(["value", "learned"])
    panel.plot(front["value"], front["learned"], color=style.GREY, lw=1, ls=":", zorder=2)
    colours = np.where(part["left"] > 0, style.VERMILION, style.BLUE)
    for low, mark in ((False, "o"), (True, "v")):
        chosen = (part["learned"] <= FLOOR).to_numpy() == low
        at = part[chosen]
        panel.scatter(at["value"], at["learned"], c=colours[chosen], s=26, lw=0, marker=mark)
    numbers = [str(names.index(name) + 1) for name in part["defence"]]
    places = part[["value", "learned"]].to_numpy(float)
    style.label_points(panel, places, numbers, list(colours), (FILLED * WIDTH, HEIGHT))


def _key(ax: Axes, names: list[str], height: float) -> None:
    """What the numbers mean, right of the panels."""
    words = "\n".join(f"{k:>2}  {name}" for k, name in enumerate(names, 1))
    ax.annotate(
        words, (1, 1 - (GAP - 0.2) / height), xycoords="axes fraction", va="top", fontsize=8,
        color=style.INK, linespacing=1.45, annotation_clip=False,
    )  # fmt: skip
