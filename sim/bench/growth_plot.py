"""The growth curves as one picture of small panels, each beside a line of linear growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sim.analysis.style import BLUE, GREY, VERMILION, styled

COLUMNS = 4
TITLES = {"processes": "seconds a run", "rounds": "seconds a round, in a long run"}


@styled
def plot_growth(curves: dict[str, Any], path: Path) -> Path:
    """Draw every axis of ``sim.bench.growth.growth``; returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * COLUMNS, 6.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(-(-len(curves) // COLUMNS), COLUMNS, squeeze=False).flatten()
    for ax in grid[len(curves) :]:
        ax.set_axis_off()
    for ax, (name, curve) in zip(grid, curves.items(), strict=False):
        _panel(ax, name, curve)
    figure.supxlabel(
        "Blue, left: median seconds. Red, right: MiB resident at the peak. Dotted: linear growth.",
        fontsize=9,
        color=GREY,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _panel(ax: Any, name: str, curve: dict[str, Any]) -> None:
    """One axis: seconds, memory beside them, and what linear growth would be."""
    from matplotlib.ticker import FixedLocator, NullLocator

    points = curve["points"]
    x, y = ([point[key] for point in points] for key in ("value", "seconds"))
    held = [point["resident_mib"] for point in points]
    if curve["exponent"] is None:  # a level line, or fewer seconds, is hoped for
        ax.set_ylim(0, 1.25 * max(y))
    else:
        ax.set(xscale="log", yscale="log", ylim=(min(y) / 1.6, max(y) * 1.6))
        ax.plot(x, [y[-1] * v / x[-1] for v in x], color=GREY, lw=1, ls=":")
        ticks = y if max(y) > 2 * min(y) else [min(y), max(y)]  # labels must not lie on each other
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_yticklabels([f"{seconds:.2g}" for seconds in ticks])
    if curve["exponent"] is not None or name == "processes":
        ax.xaxis.set_major_locator(FixedLocator(x))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([_short(value) for value in x])
    ax.plot(x, y, color=BLUE, marker="o", ms=4)
    ax.set_xlabel(curve["label"])
    ax.set_title(TITLES.get(name, "seconds a round"), fontsize=10)
    if None not in held:
        beside = ax.twinx()
        beside.plot(x, held, color=VERMILION, marker="s", ms=3, lw=1)
        beside.set_ylim(0, 1.25 * max(held))
        beside.tick_params(axis="y", colors=VERMILION, labelsize=8)
        beside.spines["right"].set_visible(True)


def _short(value: float) -> str:
    """A count in four characters: 10000 is 10k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"
