"""When did they leave? The confirmed exit dates it late; its bracket says what is known.

A panel an arm: the Kaplan-Meier curve of the confirmed exit, and Turnbull's curve of the brackets
(:func:`sim.analysis.censored.npmle`), which falls somewhere inside each box and is flat between
boxes. Where the Kaplan-Meier curve runs beyond a box, the confirmed exit lagged the certified one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.censored import npmle
from sim.analysis.incidence import MOST_PANELS
from sim.analysis.load import Run
from sim.analysis.panels import arm_panels, few_ticks
from sim.analysis.survival import exit_table, kaplan_meier
from sim.analysis.words import CLOCKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bracketed(exits: pd.DataFrame) -> list[str]:
    """Arms of an exit table with a certified exit, in order."""
    return list(dict.fromkeys(exits.loc[np.isfinite(exits["right"]), "arm"]))


@style.styled
def plot_brackets(runs: Iterable[Run], ax: Axes | None = None, clock: str = "rounds") -> Axes:
    """Both curves of every arm with a certified exit, of more than ``MOST_PANELS`` the first.

    Raises:
        ValueError: no exit was certified, or a run is unfinished or does not record the clock.
    """
    runs = list(runs)
    exits = exit_table(runs, clock)
    arms = bracketed(exits)
    if not arms:
        raise UsageError(f"runs: none of {len(exits)} has a bracket; allowed: a certified exit")
    more, arms = len(arms) - MOST_PANELS, arms[:MOST_PANELS]
    parts = {arm: exits[exits["arm"] == arm] for arm in arms}
    ax, panels = arm_panels(ax, parts, CLOCKS[clock], "share inside")
    learner = exits["run"].map({str(run.path): run.learner for run in runs})
    last = exits.groupby(learner)["time"].transform("max").clip(lower=1.0)
    for part, panel in zip(parts.values(), panels, strict=True):
        _curves(panel, part, float(last[part.index[0]]))
    style.corner_legend(ax, panels[0].get_legend_handles_labels()[0])
    ax.set_title("When did they leave?")
    rest = f" {more} more arms have no panel." if more > 0 else ""
    total = int(exits["arm"].isin(arms).sum())
    style.caption(
        ax,
        "Line: Kaplan-Meier curve of the confirmed exit. Boxes: brackets (last certified safe, "
        "first certified unsafe] of the runs together (Turnbull): the curve falls somewhere in a "
        "box and is flat between boxes. Runs that are not certified safe after a box may have left "
        "in it. "
        f"n = {total} runs in {len(arms)} arms with a certified exit.{rest}",
    )
    return ax


def _curves(panel: Axes, part: pd.DataFrame, horizon: float) -> None:
    steps = npmle(part["left"].to_numpy(), part["right"].to_numpy())
    # Mass right of the last certificate is that of runs that never left.
    steps = steps[np.isfinite(steps["right"])]
    tops = steps["survival"] + steps["mass"]
    panel.bar(
        steps["left"], steps["mass"], steps["right"] - steps["left"], steps["survival"],
        align="edge", color=style.AMBER, alpha=0.45, lw=0, label="certified exit, by bracket",
    )  # fmt: skip
    starts, ends = [0.0, *steps["right"]], [*steps["left"], horizon]
    levels = [*tops, steps["survival"].iloc[-1] if len(steps) else 1.0]
    panel.hlines(levels, starts, ends, color=style.AMBER, lw=1.8)
    curve = kaplan_meier(part["time"].to_numpy(), part["event"].to_numpy())
    panel.step(
        curve["time"], curve["survival"], where="post", color=style.BLUE, lw=1.8,
        label="confirmed exit",
    )  # fmt: skip
    panel.set(xlim=(0, horizon), ylim=(-0.02, 1.04), yticks=(0, 0.5, 1))
    few_ticks(panel)
