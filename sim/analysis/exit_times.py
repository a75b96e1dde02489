"""What it takes to push a policy out: labels of attackers, or another clock, at the confirmed exit.

A row an arm, a mark a run: filled where it left, an open arrow where it had not by its end. The
bar is the Kaplan-Meier median, which counts those that had not; of arms of which fewer than half
left there is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.load import Run
from sim.analysis.survival import MIN_SEEDS, Estimate, exit_table, median_exit
from sim.analysis.words import CLOCKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTACKERS_OWN = ("malicious_labels", "flips")
"""Clocks that stand still without an attack: clean arms have no part."""
MOST_ROWS = 60
ROW = 0.23


def has_clock(runs: Iterable[Run], clock: str) -> bool:
    """Whether some run has ended and all that have recorded ``clock``."""
    known = [run for run in runs if run.summary]
    name = "round" if clock == "rounds" else f"clock/{clock}"
    return bool(known) and all(run.column(name).notna().any() for run in known)


def left_table(runs: Iterable[Run], clock: str = "malicious_labels") -> pd.DataFrame:
    """The exit table of arms of which a run left; without clean ones on the attackers' clocks."""
    table = exit_table(runs, clock)
    if clock in ATTACKERS_OWN:
        table = table[table["rho"] > 0]
    return table[table["arm"].isin(table.loc[table["event"], "arm"])]


@style.styled
def plot_exit_times(
    runs: Iterable[Run], ax: Axes | None = None, clock: str = "malicious_labels"
) -> Axes:
    """Exits by arm on ``clock``, earliest median first; of more than ``MOST_ROWS`` the first.

    Raises:
        ValueError: no run left, or a run is unfinished or does not record the clock.
    """
    table = left_table(runs, clock)
    if table.empty:
        raise UsageError("runs: none left the safe set; allowed: a run with a confirmed exit")
    groups = {arm: part for arm, part in table.groupby("arm", sort=False)}
    medians = {arm: median_exit(p["time"], p["event"]) for arm, p in groups.items()}
    arms = sorted(groups, key=lambda arm: _rank(medians[arm], groups[arm]))[:MOST_ROWS]
    names = style.short_names(arms)
    lines = [1 + names[arm].count("\n") for arm in arms]
    ax = style.axes(ax, 7.6, max(1.6, ROW * (sum(lines) + 0.6)) / 0.77)
    heights = np.cumsum(lines) - np.array(lines) / 2
    for y, arm in zip(heights, arms, strict=True):
        _row(ax, y, groups[arm], medians[arm])
    ax.set_yticks(heights, [names[arm] for arm in arms], fontsize=8.5, color=style.INK)
    ax.set(ylim=(sum(lines) + 0.2, -0.2), xlabel=f"{CLOCKS[clock]} at the confirmed exit")
    shown = table.loc[table["arm"].isin(arms), "time"]
    positive = shown[shown > 0]
    if len(positive) == len(shown) and positive.max() > 8 * positive.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=style.LIGHT, lw=0.7)
    ax.set_axisbelow(True)
    style.title(ax, f"{CLOCKS[clock].capitalize()} to exit")
    rest = len(groups) - len(arms)
    hidden = f" {rest} more arms are not shown." if rest else ""
    style.caption(
        ax,
        "Mark: a run that left, or a number of them; open arrow: not by its end. Bar: Kaplan-Meier "
        "median, where half or more left; line: its 95 % interval (log-log) from "
        f"{MIN_SEEDS} runs on, cut at the last run. n = {len(shown)} runs in {len(arms)} arms of "
        f"which a run left.{hidden}",
    )
    return ax


def clock_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per arm of which a run left: the median exit on every clock, with its interval."""
    runs = list(runs)
    rows: dict[str, dict[str, object]] = {}
    for clock in (clock for clock in CLOCKS if has_clock(runs, clock)):
        for arm, part in left_table(runs, clock).groupby("arm", sort=False):
            left = f"{int(part['event'].sum())} of {len(part)}"
            row = rows.setdefault(str(arm), {"arm": arm, "left": left})
            median = median_exit(part["time"], part["event"])
            row[CLOCKS[clock]] = median and median.in_words(",.0f")
    return pd.DataFrame(list(rows.values()))


def _rank(median: Estimate | None, part: pd.DataFrame) -> tuple[float, float]:
    return (median.value if median else np.inf, float(part["time"].mean()))


def _row(ax: Axes, y: float, part: pd.DataFrame, median: Estimate | None) -> None:
    if median:
        if median.low is not None and median.high is not None:
            ax.hlines(y, median.low, min(median.high, part["time"].max()), color=style.GREY, lw=1.4)
        ax.plot([median.value] * 2, [y - 0.36, y + 0.36], color=style.INK, lw=2.4, zorder=2)
    for (at, exited), runs in part.groupby(["time", "event"]):
        both = not exited and ((part["time"] == at) & part["event"]).any()
        high = y - 0.3 * both  # above those that left at that time
        mark, face, edge = ("o", style.VERMILION, "white") if exited else (">", "white", style.BLUE)
        several = len(runs) > 1  # at one time: a larger mark, with their number
        ax.plot(at, high, mark, ms=8.5 if several else 5, mfc=face, mec=edge, mew=0.9, zorder=3)
        if several:
            options: dict[str, Any] = {"textcoords": "offset points", "zorder": 4, "va": "center"}
            inside = {"ha": "center", "fontsize": 6, "color": "white"}
            beside = {"ha": "left", "fontsize": 7, "color": style.BLUE}
            shift = (0, -0.3) if exited else (5, -0.3)
            options |= inside if exited else beside
            ax.annotate(str(len(runs)), (at, high), shift, **options)
