"""Would another limit have said otherwise? Confirmed exits by the limit b on mean harm.

The monitor tests every limit of its curve tau(b) by an e-process of its own, each at level alpha.
A run that was stopped at its exit says nothing of higher limits: it might have reached them. One
that was stopped at a sustained exit, none confirmed, says nothing of those that it had not left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.load import Run, by_arm
from sim.analysis.survival import ended_unconfirmed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMN, ROW, MOST_ROWS = 0.62, 0.235, 60
"""Inches of a limit and of an arm's line; most arms that are shown."""


def exit_shares(runs: Iterable[Run]) -> pd.DataFrame:
    """Runs with a confirmed exit by arm and limit.

    Returns:
        Columns arm, limit, left, n, one row each where every run of the arm knows; a limit above
        that at which a run was stopped is not known, nor one that it had not left at a sustained
        exit which ended it unconfirmed.
    """
    rows = []
    for arm, members in by_arm(run for run in runs if run.summary.get("tau_b")).items():
        known = set.intersection(*({*_known(run)} for run in members))
        for limit in sorted(known, key=float):
            left = sum(run.summary["tau_b"][limit]["confirmed"] is not None for run in members)
            rows.append({"arm": arm, "limit": float(limit), "left": left, "n": len(members)})
    return pd.DataFrame(rows)


def _known(run: Run) -> list[str]:
    elsewhere = run.summary.get("exit_constraint") not in (None, "harm")
    if ended_unconfirmed(run) or elsewhere and run.ended_early:
        return [b for b, left in run.summary["tau_b"].items() if left["confirmed"]]
    short = run.summary["exit_confirmed"] is not None and run.ended_early
    return [b for b in run.summary["tau_b"] if not short or float(b) <= run.limit + 1e-9]


def limit_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per arm, one column per limit: runs that left it, of those there are."""
    shares = exit_shares(runs)
    if shares.empty or not shares["left"].any():
        return pd.DataFrame()
    words = shares["left"].astype(str) + " of " + shares["n"].astype(str)
    wide = shares.assign(words=words).pivot(index="arm", columns="limit", values="words")
    wide = wide.loc[list(dict.fromkeys(shares["arm"]))]
    return wide.rename(columns=lambda b: f"b = {b:g}").rename_axis(columns=None).reset_index()


@style.styled
def plot_limits(runs: Iterable[Run], ax: Axes | None = None) -> Axes:
    """Runs that left by limit, a row an arm; arms that left none have no row.

    Raises:
        ValueError: no run recorded exits by limit, or none left any.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    runs = list(runs)
    shares = exit_shares(runs)
    if shares.empty or not shares["left"].any():
        raise UsageError(f"runs: none of {len(runs)} left a limit; allowed: exits by limit (tau_b)")
    total = shares["arm"].nunique()
    sums = shares.groupby("arm", sort=False)["left"].sum()
    arms = list(sums[sums > 0].sort_values(ascending=False, kind="stable").index)[:MOST_ROWS]
    names, limits = style.short_names(arms), sorted(set(shares["limit"]))
    tall = [1 + names[arm].count("\n") for arm in arms]
    tops = np.cumsum([0, *tall])
    ax = style.axes(ax, COLUMN * len(limits) / 0.775, ROW * sum(tall) / 0.77)
    shades = LinearSegmentedColormap.from_list("", ["white", style.VERMILION])
    for row in shares[shares["arm"].isin(arms)].itertuples():
        x, y = limits.index(row.limit), tops[arms.index(row.arm)]
        share, height = row.left / row.n, tall[arms.index(row.arm)]
        tile = Rectangle((x - 0.5, y), 1, height, fc=shades(share), ec="white", lw=1.5)
        ax.add_patch(tile)
        ink = "white" if share > 0.8 else style.INK
        text = f"{row.left}/{row.n}"
        ax.text(x, y + height / 2, text, ha="center", va="center", fontsize=8.5, color=ink)
    for used in {run.limit for run in runs if run.summary} & set(limits):
        corner = (limits.index(used) - 0.5, 0)
        frame = Rectangle(corner, 1, tops[-1], fill=False, ec=style.INK, lw=1.6, clip_on=False)
        ax.add_patch(frame)
    ax.set(xlim=(-0.5, len(limits) - 0.5), ylim=(tops[-1], 0), xlabel="limit b on mean harm")
    ax.set_xticks(range(len(limits)), [f"{limit:g}" for limit in limits], fontsize=9)
    middles = (tops[:-1] + tops[1:]) / 2
    ax.set_yticks(middles, [names[arm] for arm in arms], fontsize=8.5, color=style.INK)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title("Who left, had the limit been another?")
    short = any(
        run.summary.get("exit_confirmed") and run.ended_early or ended_unconfirmed(run)
        for run in runs
    )
    stopped = " Empty: unknown, since a run was stopped at its exit." if short else ""
    rest = f" {total - len(arms)} more arms have no row." if total > len(arms) else ""
    style.caption(
        ax,
        "Runs with a confirmed exit, of n; every limit is tested at α by itself. Frame: the limit "
        f"of these runs.{stopped}{rest}",
    )
    return ax
