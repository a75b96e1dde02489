"""The growth curves as one picture of small panels, each beside a line of linear growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sim.analysis.style import BLUE, GREY, VERMILION, styled


@styled
def plot_growth(curves: dict[str, Any], path: Path) -> Path:
    """Draw every axis of ``sim.bench.growth.growth``; returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 4
    figure = Figure(figsize=(3.3 * columns, 6.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).flatten()
    for ax in grid[len(curves) :]:
        ax.set_axis_off()
    for ax, (name, curve) in zip(grid, curves.items(), strict=False):
        x = [point["value"] for point in curve["points"]]
        y = [point["seconds"] for point in curve["points"]]
        held = [point["resident_mib"] for point in curve["points"]]
        if curve["exponent"] is None:  # a level line, or fewer seconds, is hoped for
            ax.set_ylim(0, 1.25 * max(y))
        else:
            ax.set(xscale="log", yscale="log")
            ax.plot(x, [y[-1] * v / x[-1] for v in x], color=GREY, lw=1, ls=":")
        ax.plot(x, y, color=BLUE, marker="o", ms=4)
        ax.set_xlabel(curve["label"])
        ax.set_title("seconds a run" if name == "processes" else "seconds a round", fontsize=10)
        if None not in held:
            beside = ax.twinx()
            beside.plot(x, held, color=VERMILION, marker="s", ms=3, lw=1)
            beside.set_ylim(0, 1.25 * max(held))
            beside.tick_params(axis="y", colors=VERMILION, labelsize=8)
            beside.spines["right"].set_visible(True)
    figure.supxlabel(
        "blue, left: median seconds; red, right: resident MiB; dotted: linear growth "
        "through the last point",
        fontsize=9,
        color=GREY,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
