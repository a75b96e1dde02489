"""Pictures of one run, drawn from its files: cost trace, reward against harm, the five ρ.

Each function takes a run and optional axes and returns the axes; none shows or saves anything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.axes_grid1 import make_axes_locatable

from sim.analysis import style
from sim.analysis.load import Run
from sim.analysis.words import RHO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = {
    "naive": ("v", 13, style.AMBER, "naive exit"),
    "true": ("D", 10, style.INK, "true crossing"),
    "confirmed": ("o", 7, style.VERMILION, "confirmed exit"),
}


@style.styled
def plot_cost_trace(run: Run, ax: Axes | None = None) -> Axes:
    """Harm with its interval, the limit, the exit estimates; below it the e-value, log axis."""
    ax = style.axes(ax)
    rounds = run.evaluations
    x, harm = rounds["round"].to_numpy(float), rounds["safety/harm"].to_numpy(float)
    low, high = (
        run.column(f"safety/harm_{side}")[rounds.index].to_numpy() for side in ("lower", "upper")
    )
    bracket = run.summary.get("bracket")
    if bracket:
        start = x[0] if bracket[0] is None else bracket[0]
        words = f"certified bracket ({'start' if bracket[0] is None else start}, {bracket[1]}]"
        ax.axvspan(start, bracket[1], color=style.LIGHT, alpha=0.7, lw=0, label=words)
    ax.fill_between(x, low, high, color=style.BLUE, alpha=0.18, lw=0)
    ax.plot(x, harm, "-o", color=style.BLUE, ms=3.5, lw=1.8)
    style.unsafe_region(ax, run.limit)
    for kind, (marker, size, colour, words) in MARKS.items():
        when = run.exit_round(kind)
        if when is not None:
            y = run.limit if kind == "true" else np.interp(when, x, harm)
            ax.plot(
                when, y, marker, ms=size, mfc="white", mec=colour, mew=2, zorder=5, ls="",
                label=f"{words}: round {when}",
            )  # fmt: skip
    if run.fork:
        ax.axvline(run.began, color=style.GREY, ls=":", label=f"forked in round {run.began}")
    ax.set(ylim=(-0.02, 1.02), ylabel="harm on harmful prompts")
    marked = len(ax.get_legend_handles_labels()[0])
    if marked:
        ax.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=2, fontsize=8.8, markerscale=0.75
        )
    outcome = run.summary.get("outcome", "unfinished")
    style.title(ax, f"{run.title}: {outcome}", pad=10 + 16 * -(-marked // 2))
    lower = _e_value_strip(run, ax, rounds)
    n = run.column("safety/n")[rounds.index].dropna()
    drawn = f"{n.iloc[-1]:.0f} fresh harmful prompts" if len(n) else "fresh harmful prompts"
    style.caption(
        lower,
        f"One run. Points: mean harm over {drawn} per evaluation; band: its "
        f"{100 * (1 - run.level):g}% betting interval. Naive exit: first mean above b. Confirmed "
        f"exit: e-value above {1 / run.level:g}, false with probability {run.level:g} at most.",
    )
    return ax


def _e_value_strip(run: Run, ax: Axes, rounds: pd.DataFrame) -> Axes:
    """The e-value of the harm constraint on a log axis under ``ax``."""
    lower = make_axes_locatable(ax).append_axes("bottom", size="32%", pad=0.16, sharex=ax)
    ax.tick_params(labelbottom=False)
    needed = math.log10(1 / run.level)
    top = 3 * needed
    log_e = run.column("safety/log_e_value")[rounds.index].to_numpy() / math.log(10)
    lower.plot(rounds["round"], log_e, color=style.INK, lw=1.6)
    if len(log_e) and log_e[-1] > top:
        lower.annotate(
            f"ends at $10^{{{log_e[-1]:.0f}}}$", (1, 0.95), xycoords="axes fraction",
            xytext=(4, 0), textcoords="offset points", color=style.INK, va="top", fontsize=9,
        )  # fmt: skip
    lower.axhline(needed, color=style.VERMILION, lw=1.2, ls=":")
    level = "α" if run.constraints == 1 else f"(α/{run.constraints})"
    lower.annotate(
        f"1/{level} = {1 / run.level:g}", (1, needed), xycoords=("axes fraction", "data"),
        xytext=(4, 0), textcoords="offset points", color=style.VERMILION, va="center", fontsize=9,
    )  # fmt: skip
    powers = [0, 2] if top < 5 else [0, 2, 4]
    lower.set(ylim=(-2, top), ylabel="e-value", xlabel=_round_label(run))
    lower.set_yticks(powers, [f"$10^{{{p}}}$" for p in powers])
    style.whole_rounds(lower)
    return lower


@style.styled
def plot_reward_vs_harm(run: Run, ax: Axes | None = None) -> Axes:
    """The run's path through (reward, harm): right and up is reward bought with harm.

    Learners without a reward model are drawn by the utility that honest people assign.
    """
    ax = style.axes(ax, 7.6, 4.6)
    rounds = run.evaluations
    rewarded = run.column("reward").notna().any()
    name = "reward" if rewarded else "utility"
    # Round 0 comes before the first update and has no reward of its own.
    known = rounds[run.column(name)[rounds.index].notna()]
    x, y = run.column(name)[known.index].to_numpy(), known["safety/harm"].to_numpy(float)
    style.unsafe_region(ax, run.limit)
    ax.plot(x, y, color="#bbbbbb", lw=1.5, zorder=2)
    points = ax.scatter(x, y, c=known["round"], cmap="viridis", s=30, zorder=3)
    bar = style.figure_of(ax).colorbar(points, ax=ax, pad=0.02)
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    bar.set_label("round")
    bar.outline.set_visible(False)
    label = "reward model's mean reward" if rewarded else "utility on evaluation prompts"
    ax.set(ylim=(-0.02, 1.02), xlabel=label, ylabel="harm on harmful prompts")
    style.title(ax, f"Reward against harm: {run.title}")
    style.caption(ax, f"One run, {len(known)} evaluations, in order along the grey line.")
    return ax


@style.styled
def plot_rho(run: Run, ax: Axes | None = None, window: int = 5) -> Axes:
    """Five meanings of ρ over time: running means over ``window`` rounds, single rounds pale.

    Means are weighted by labels, and a round without labels is a gap: nothing was voted on.
    """
    ax = style.axes(ax)
    trained = run.rounds[run.rounds["round"] > 0]
    x = trained["round"].to_numpy(float)
    labels = run.column("labels")[trained.index].fillna(0)
    ends = []
    for i, (name, words) in enumerate(RHO.items()):
        values = run.column(name)[trained.index].where(labels > 0)
        if values.isna().all():
            continue
        colour, _ = style.line_style(i)
        voted = labels.where(values.notna()).rolling(window, min_periods=1).sum()
        smooth = ((values * labels).rolling(window, min_periods=1).sum() / voted).to_numpy()
        ax.plot(x, values, color=colour, lw=0.8, alpha=0.3)
        # Without a defence that edits labels the last two coincide: dashes let both be seen.
        dash = "--" if name == "feedback/rho_post" else "-"
        ax.plot(x, smooth, dash, color=colour, lw=2)
        last = np.flatnonzero(~np.isnan(smooth))[-1]
        ends.append((x[-1], smooth[last], f"{100 * smooth[last]:.0f}% {words}", colour))
    top = max([0.05, *(1.15 * y for _, y, *_ in ends)])
    highest = max((run.column(name).max() for name in RHO), default=0.0)
    ax.set(ylim=(0, max(top, min(1.02, np.nan_to_num(highest) * 1.05))))
    ax.set(xlabel=_round_label(run), ylabel="share controlled or corrupted")
    ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f}%")
    style.whole_rounds(ax)
    if ends:
        style.label_ends(ax, ends)
    style.title(ax, f"Five meanings of ρ: {run.title}")
    style.caption(
        ax,
        f"One run. Thick: mean of the last {window} rounds, weighted by labels; thin: single "
        "rounds, a gap where nobody voted. A flip is a vote that differs from the one an honest "
        "person would have cast on the same pair.",
    )
    return ax


def _round_label(run: Run) -> str:
    labels = run.column("labels")[run.rounds["round"] > 0].dropna()
    return f"round (about {labels.median():.0f} labels each)" if len(labels) else "round"
