"""Pictures that compare arms: harm traces by arm, and survival in the safe set across seeds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.load import Run, by_arm
from sim.analysis.survival import MIN_SEEDS, exit_table, kaplan_meier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DODGE = 0.012
"""Vertical shift between arms, so that curves that coincide can all be seen."""
CLOCKS = {
    "rounds": "round",
    "labels": "labels consumed",
    "optimizer_steps": "optimizer steps",
    "malicious_labels": "malicious labels",
    "flips": "flipped labels",
}


@style.styled
def plot_arms(runs: Iterable[Run], ax: Axes | None = None) -> Axes:
    """Harm over time by arm: mean over seeds thick, each seed thin, limit dashed.

    Raises:
        ValueError: the runs have different limits.
    """
    ax = style.axes(ax, 8.2, 4.6)
    arms = by_arm(runs)
    limits = sorted({run.limit for members in arms.values() for run in members})
    if len(limits) > 1:
        raise UsageError(f"cost_limit: runs differ ({limits}); allowed: one limit in one picture")
    ends = []
    for i, (arm, members) in enumerate(arms.items()):
        colour, dash = style.line_style(i)
        traces = pd.concat(
            [run.evaluations.set_index("round")["safety/harm"].astype(float) for run in members],
            axis=1,
        )
        if traces.empty:  # diverged before its first evaluation
            continue
        for name in range(traces.shape[1]):
            seed = traces.iloc[:, name].dropna()
            ax.plot(seed.index, seed, color=colour, lw=0.9, alpha=0.45)
        mean = traces.dropna().mean(axis=1)  # no further: seeds that end would move the mean
        ax.plot(mean.index, mean, dash, color=colour, lw=2.4)
        last = traces.iloc[-1].mean()
        ends.append((float(traces.index[-1]), float(last), arm, colour))
    style.unsafe_region(ax, limits[0])
    ax.set(ylim=(-0.02, 1.02), xlabel="round", ylabel="harm on harmful prompts")
    ax.margins(x=0.01)
    style.whole_rounds(ax)
    style.label_ends(ax, ends)
    ax.set_title("Does the policy stay in the safe set?")
    seeds = {arm: len(members) for arm, members in arms.items()}
    style.caption(ax, f"Thick: mean while all seeds go on; thin: single seeds ({_counts(seeds)}).")
    return ax


@style.styled
def plot_survival(runs: Iterable[Run], ax: Axes | None = None, clock: str = "rounds") -> Axes:
    """Kaplan-Meier curves of the confirmed exit by arm, censoring marked, numbers at risk below."""
    ax = style.axes(ax, 8.2, 4.2)
    table = exit_table(runs, clock)
    horizon = max(1.0, table["time"].max())
    arms = list(dict.fromkeys(table["arm"]))
    ends = []
    for i, arm in enumerate(arms):
        colour, dash = style.line_style(i)
        part = table[table["arm"] == arm]
        curve = kaplan_meier(part["time"].to_numpy(), part["event"].to_numpy())
        x, y = curve["time"].to_numpy(), curve["survival"].to_numpy() - DODGE * i
        ax.step(x, y, dash, where="post", color=colour, lw=2.2)
        if len(part) >= MIN_SEEDS and part["event"].any():
            ax.fill_between(
                curve["time"], curve["lower"], curve["upper"], step="post",
                color=colour, alpha=0.13, lw=0,
            )  # fmt: skip
        marks = curve[curve["censored"] > 0]
        ax.plot(marks["time"], marks["survival"] - DODGE * i, "|", color=colour, ms=11, mew=2)
        ends.append((horizon, float(y[-1]), arm, colour))
    ax.set(ylim=(-0.03, 1.06), xlim=(0, horizon * 1.01), ylabel="share of seeds still inside")
    style.label_ends(ax, ends)
    style.whole_rounds(ax)
    ax.set_xlabel(CLOCKS[clock])
    _at_risk(ax, table, arms, horizon)
    ax.set_title("Time in the safe set until a confirmed exit")
    seeds = {arm: int((table["arm"] == arm).sum()) for arm in arms}
    few = min(seeds.values()) < MIN_SEEDS
    band = f"bands need {MIN_SEEDS} seeds and are left out" if few else "bands: 95%, log-log"
    odd = (table["cause"].isin(["collapsed", "diverged"])).sum()
    broken = f" {odd} run(s) collapsed or diverged." if odd else ""
    style.caption(
        ax,
        f"Kaplan-Meier, arms shifted by {DODGE:g} to be seen apart; a curve ends with its "
        f"last run; tick: run ended inside (censored). {_counts(seeds)}; {band}.{broken}",
        below=58 + 14 * len(arms),
    )
    return ax


def _at_risk(ax: Axes, table: pd.DataFrame, arms: list[str], horizon: float) -> None:
    """Numbers at risk under the axis, one line per arm, at the axis' own ticks."""

    def write(x: float, line: int, text: str, colour: str, **options: Any) -> None:
        ax.annotate(
            text, (x, 0), xycoords=ax.get_xaxis_transform(), xytext=(0, -42 - 14 * line),
            textcoords="offset points", color=colour, fontsize=8.5, va="center",
            annotation_clip=False, **options,
        )  # fmt: skip

    write(0, 0, "runs at risk", style.GREY, ha="left")
    for i, arm in enumerate(arms):
        colour, _ = style.line_style(i)
        times = table.loc[table["arm"] == arm, "time"].to_numpy()
        for tick in (t for t in ax.get_xticks() if 0 <= t <= horizon):
            write(tick, i + 1, str(int(np.sum(times >= tick))), colour, ha="center")
        write(1.045 * horizon, i + 1, arm, colour, ha="left")


def _counts(seeds: dict[str, int]) -> str:
    if len(set(seeds.values())) == 1:
        return f"n = {next(iter(seeds.values()))} per arm"
    return ", ".join(f"{arm}: n = {n}" for arm, n in seeds.items())
