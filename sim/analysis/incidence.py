"""How runs end first, by arm: small multiples of the cumulative incidence of exit and other ends.

Ends compete (:mod:`sim.analysis.censored`). Where no run collapses or diverges before it exits,
incidence is the survival curve upside down and says nothing that :func:`plot_survival` does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.censored import SHOWN, cause_table, cumulative_incidence
from sim.analysis.load import Run
from sim.analysis.panels import arm_panels, few_ticks
from sim.analysis.words import CLOCKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDS = dict(zip(SHOWN, (style.VERMILION, style.AMBER, style.INK), strict=True))
"""Ends in the order in which they are stacked, and their colours."""
MOST_PANELS = 18


def by_cause(ends: pd.DataFrame) -> pd.DataFrame:
    """Incidence of one arm: a row per time, a column per end in the order of ``ENDS``."""
    curve = cumulative_incidence(ends["time"].to_numpy(), ends["cause"])
    return curve.pivot(index="time", columns="cause", values="incidence")[list(ENDS)]


@style.styled
def plot_incidence(runs: Iterable[Run], ax: Axes | None = None, clock: str = "rounds") -> Axes:
    """Share of runs that ended first by exit, collapse or divergence, stacked, a panel an arm.

    Arms of which no run ended have no panel; of more than ``MOST_PANELS`` those in which most
    collapsed or diverged are shown.

    Raises:
        ValueError: no run ended, or a run is unfinished or does not record the clock.
    """
    ends = cause_table(runs, clock)
    arms, left_out = _chosen(ends)
    if not arms:
        raise UsageError(f"runs: none of {len(ends)} ended; allowed: runs with an exit or collapse")
    ends = ends[ends["arm"].isin(arms)]
    horizon = max(1.0, ends["time"].max())
    parts = {arm: ends[ends["arm"] == arm] for arm in arms}
    ax, panels = arm_panels(ax, parts, CLOCKS[clock], "share of runs")
    for part, panel in zip(parts.values(), panels, strict=True):
        _stack(panel, by_cause(part), horizon)
    _legend(ax, ends)
    ax.set_title("How runs end first")
    more = f" {left_out} more arms with ends are in the table only." if left_out else ""
    style.caption(
        ax,
        "Aalen-Johansen incidence, stacked: white is the share that goes on, hatched where no run "
        "of the arm is left to tell. What ends a run first counts: a collapsed policy is no later "
        f"exit. n = {len(ends)} runs in {len(arms)} arms; without arms where no run ended.{more}",
    )
    return ax


def _chosen(ends: pd.DataFrame) -> tuple[list[str], int]:
    """Arms to show, in reading order, and how many more have ends."""
    ended = ends[ends["cause"] != "none"]
    arms = list(dict.fromkeys(ended["arm"]))
    rare = ended[ended["cause"] != "exit"].groupby("arm").size()
    first = sorted(arms, key=lambda arm: -rare.get(arm, 0))[:MOST_PANELS]
    return [arm for arm in arms if arm in first], len(arms) - len(first)


def _stack(panel: Axes, curve: pd.DataFrame, horizon: float) -> None:
    time, shares = curve.index.to_numpy(float), curve.to_numpy().T  # (ends, times)
    if shares[:, -1].sum() > 1 - 1e-9:  # nobody is left, so nothing changes any more
        time = np.append(time, horizon)
        shares = np.column_stack([shares, shares[:, -1]])
    tops = np.cumsum(shares, 0)
    for share, top, colour in zip(shares, tops, ENDS.values(), strict=True):
        panel.fill_between(time, top - share, top, step="post", color=colour, lw=0, alpha=0.75)
    if time[-1] < horizon:
        panel.axvspan(time[-1], horizon, fc="white", ec=style.LIGHT, hatch="////", lw=0)
    panel.set(xlim=(0, horizon), ylim=(0, 1), yticks=(0, 0.5, 1))
    few_ticks(panel)


def _legend(ax: Axes, ends: pd.DataFrame) -> None:
    from matplotlib.patches import Patch

    seen = [name for name in ENDS if (ends["cause"] == name).any()]
    style.corner_legend(ax, [Patch(color=ENDS[k], alpha=0.75, label=k) for k in seen])
