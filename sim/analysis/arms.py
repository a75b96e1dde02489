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
from sim.analysis.words import CLOCKS, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DODGE, MOST_DODGE = 0.012, 0.03
"""Vertical shift between arms, so that curves that coincide can all be seen, and its bound."""
MOST_ARMS = 24
"""Most arms that curves are drawn of; of more those that left earliest, or end most harmful."""


@style.styled
def plot_arms(runs: Iterable[Run], ax: Axes | None = None) -> Axes:
    """Harm over time by arm: mean over seeds thick, each seed thin, limit dashed.

    A fork begins at its round, on its parent's line. Of more than ``MOST_ARMS`` arms those with
    most harm at the end are drawn.

    Raises:
        ValueError: the runs have different limits.
    """
    every = by_arm(runs)
    limits = sorted({run.limit for members in every.values() for run in members})
    if len(limits) > 1:
        raise UsageError(f"cost_limit: runs differ ({limits}); allowed: one limit in one picture")
    kept = _first(every, {arm: -_last_harm(members) for arm, members in every.items()})
    arms = {arm: every[arm] for arm in kept}
    names = style.short_names(arms)
    listed = _listed(names)
    ax = style.axes(ax, 8.2, 6.4 if listed else 4.6)
    ends = []
    for i, members in enumerate(arms.values()):
        colour, dash = style.line_style(i)
        traces = pd.concat(
            [
                run.own_evaluations.set_index("round")["safety/harm"].astype(float)
                for run in members
            ],
            axis=1,
        )
        if traces.empty:  # diverged before its first evaluation
            continue
        for name in range(traces.shape[1]):
            seed = traces.iloc[:, name].dropna()
            ax.plot(seed.index, seed, color=colour, lw=0.9, alpha=0.45)
        mean = traces.dropna().mean(axis=1)  # no further: seeds that end would move the mean
        ax.plot(mean.index, mean, ls=dash, color=colour, lw=2.4)
        last = (mean if len(mean) else traces.mean(axis=1)).iloc[-1:]
        ends.append((float(last.index[0]), float(last.iloc[0]), i))
    style.unsafe_region(ax, limits[0])
    ax.set(ylim=(-0.02, 1.02), xlabel="round", ylabel="harm on harmful prompts")
    ax.margins(x=0.01)
    style.whole_rounds(ax)
    _name_lines(ax, list(names.values()), ends, "harm where the mean ends" if listed else None)
    ax.set_title("Does the policy stay in the safe set?")
    seeds = {names[arm]: len(members) for arm, members in arms.items()}
    counts = _counts(seeds, listed)
    left = any(run.fork for members in arms.values() for run in members)
    branches = " A fork begins where it left its parent's line." if left else ""
    words = f"Thick: mean while all seeds go on; thin: single seeds ({counts}).{branches}"
    if more := len(every) - len(arms):
        words += f" {more} arms with less harm at the end are not shown."
    style.caption(ax, words)
    return ax


def _first(arms: Iterable[str], rank: dict[str, float]) -> list[str]:
    """``MOST_ARMS`` arms of least rank, in their order."""
    arms = list(arms)
    chosen = sorted(arms, key=lambda arm: rank[arm])[:MOST_ARMS]
    return [arm for arm in arms if arm in chosen]


def _last_harm(runs: list[Run]) -> float:
    last = [run.own_evaluations["safety/harm"].astype(float).iloc[-1:] for run in runs]
    return float(np.nan_to_num(pd.concat(last).mean()))


def _listed(names: dict[str, str]) -> bool:
    """Whether arms are listed beside the picture: too many, or too long, for their lines' ends."""
    return len(names) > style.MOST_LABELS or any("\n" in name for name in names.values())


def _name_lines(
    ax: Axes, names: list[str], ends: list[tuple[float, float, int]], heading: str | None
) -> None:
    """Name lines that end at (x, y, number of the arm): in a list where it has a heading."""
    if heading is None:
        named = [(x, y, names[i], style.line_style(i)[0]) for x, y, i in ends]
        style.label_ends(ax, named)
    else:
        style.list_ends(ax, heading, [(y, names[i], *style.line_style(i)) for _, y, i in ends])


@style.styled
def plot_survival(runs: Iterable[Run], ax: Axes | None = None, clock: str = "rounds") -> Axes:
    """Kaplan-Meier curves of the confirmed exit by arm, censoring marked, numbers at risk below.

    Of more than ``MOST_ARMS`` arms those that left earliest are drawn; of more arms than can be
    named at their lines no bands are.
    """
    table = exit_table(runs, clock)
    horizon = max(1.0, table["time"].max())
    every = list(dict.fromkeys(table["arm"]))
    # Of what ended early without an exit nobody knows that it left.
    known = table["time"].where(table["event"], horizon)
    arms = _first(every, known.groupby(table["arm"]).mean().to_dict())
    names = style.short_names(arms)
    listed = _listed(names)
    ax = style.axes(ax, 8.2, 4.2)
    dodge = min(DODGE, MOST_DODGE / max(1, len(arms) - 1))
    ends = []
    for i, arm in enumerate(arms):
        colour, dash = style.line_style(i)
        part = table[table["arm"] == arm]
        curve = kaplan_meier(part["time"].to_numpy(), part["event"].to_numpy())
        shifted = curve["survival"] - dodge * i
        ax.step(curve["time"], shifted, ls=dash, where="post", color=colour, lw=2.2)
        if len(part) >= MIN_SEEDS and part["event"].any() and not listed:
            ax.fill_between(
                curve["time"], curve["lower"], curve["upper"], step="post",
                color=colour, alpha=0.13, lw=0,
            )  # fmt: skip
        marks = curve["censored"] > 0
        ax.plot(curve["time"][marks], shifted[marks], "|", color=colour, ms=11, mew=2)
        end = curve["survival"] if listed else shifted  # labels stand beside what is drawn
        ends.append((horizon, float(end.iloc[-1]), i))
    ax.set(ylim=(-0.03, 1.06), xlim=(0, horizon * 1.01), ylabel="share of seeds still inside")
    heading = "share inside at the end" if listed else None
    _name_lines(ax, list(names.values()), ends, heading)
    style.whole_rounds(ax)
    ax.set_xlabel(CLOCKS[clock])
    ax.annotate(
        "runs at risk", (0, 0), xycoords="axes fraction", xytext=(0, -42), va="center",
        textcoords="offset points", color=style.GREY, fontsize=8.5, annotation_clip=False,
    )  # fmt: skip
    order = [arms[i] for _, _, i in sorted(ends, key=lambda end: -end[1])] if listed else arms
    step = 11 if listed else 14
    for line, arm in enumerate(order, 1):
        times = table.loc[table["arm"] == arm, "time"].to_numpy()
        name = None if listed else names[arm]
        _at_risk(ax, times, horizon, style.line_style(arms.index(arm)), name, 42 + step * line)
    ax.set_title("Time in the safe set until a confirmed exit")
    seeds = {names[arm]: int((table["arm"] == arm).sum()) for arm in arms}
    few = min(seeds.values()) < MIN_SEEDS
    rest = len(every) - len(arms)
    later = f" {rest} arms that left later or stayed are not shown." if rest else ""
    counts = _counts(seeds, listed)
    band = f"bands need {MIN_SEEDS} seeds and are left out" if few else "bands: 95%, log-log"
    band = "no bands, which would cover each other" if listed and not few else band
    odd = (table["outcome"].isin(["collapsed", "diverged"]) & table["arm"].isin(arms)).sum()
    broken = f" {odd} run(s) collapsed or diverged." if odd else ""
    style.caption(
        ax,
        f"Kaplan-Meier, arms shifted by up to {MOST_DODGE:g} to be seen apart; a curve ends with "
        f"its last run; tick: run ended inside (censored). {counts}; {band}.{broken}{later}",
        below=58 + step * len(arms),
    )
    return ax


def _at_risk(
    ax: Axes, times: np.ndarray, horizon: float, look: tuple[str, style.Dash],
    name: str | None, below: float,
) -> None:  # fmt: skip
    """One arm's numbers at risk, ``below`` points under the axis, at the axis' own ticks.

    The name stands on the right; where arms are listed elsewhere, the line is shown on the left.
    """
    colour, dash = look
    options: dict[str, Any] = {"fontsize": 8.5, "va": "center", "annotation_clip": False}
    options |= {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points"}

    def write(x: float, text: str, **more: Any) -> None:
        ax.annotate(text, (x, 0), xytext=(0, -below), color=colour, **options, **more)

    for tick in (t for t in ax.get_xticks() if 0 <= t <= horizon):
        write(tick, str(int(np.sum(times >= tick))), ha="center")
    if name is not None:
        write(1.045 * horizon, name, ha="left")
        return
    y = -below / (72 * ax.get_position().height * style.figure_of(ax).get_figheight())
    place: dict[str, Any] = {"transform": ax.transAxes, "clip_on": False}
    ax.plot([-0.09, -0.03], [y, y], ls=dash, color=colour, lw=2, **place)


def _counts(seeds: dict[str, int], many: bool) -> str:
    if many or len(set(seeds.values())) == 1:
        return f"n = {span(seeds.values())} per arm"
    return ", ".join(f"{arm}: n = {n}" for arm, n in seeds.items())
