"""Harm against the share of reversed labels, for both starts: the picture of ``rosati-f2``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from sim.analysis.style import BLUE, GREY, INK, VERMILION, styled
from sim.analysis.words import span
from sim.papers.published import BROKEN

STARTS = {"aligned": (BLUE, "o"), "base": (VERMILION, "s")}
BEFORE = -0.2
"""Where on the axis of shares the models stand before training."""
SHIFT = {"aligned": -0.006, "base": 0.006}
"""Keeps the error bars of two starts from lying on each other."""


@styled
def plot_flips(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw learners side by side, a line of panels for every data set; returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = list(dict.fromkeys(row["data"] for row in rows))
    learners = list(dict.fromkeys(row["learner"] for row in rows))
    size = (max(6.5, 3.6 * len(learners)), 1.3 + 3.1 * len(data))
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(data), len(learners), sharex=True, sharey=True, squeeze=False)
    for line, name in zip(panels, data, strict=True):
        for ax, learner in zip(line, learners, strict=True):
            mine = [row for row in rows if (row["data"], row["learner"]) == (name, learner)]
            ax.set_title(learner if len(data) == 1 else f"{learner}, {name}")
            _panel(ax, mine)
        line[0].set_ylabel("harm after training")
    for ax in panels[-1]:
        ax.set_xlabel("share of labels reversed")
    known: dict[str, Any] = {}
    for ax in panels.flat:
        known |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=3, fontsize=8.5)
    words = (
        f"{', '.join(data)}; {span(row['runs'] for row in rows)} runs a point, "
        f"{rows[0]['prompts']} prompts each, {rows[0]['pairs']:.0f} recorded pairs a run. "
        "Bars: 95 % bootstrap over worlds, then seeds; dotted: the learned classifier's harm of "
        "the same answers; black: the paper's numbers for llama2-7b, where it gives any."
    )
    figure.supxlabel(textwrap.fill(words, int(15 * size[0])), fontsize=8.5, color=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _panel(ax: Any, rows: Sequence[dict[str, Any]]) -> None:
    """One learner: a line for every start."""
    ax.axhline(BROKEN, color=GREY, lw=0.8, ls="--", zorder=0)
    for start, (colour, marker) in STARTS.items():
        curve = sorted(
            (r for r in rows if r["start"] == start and r["harm"]), key=itemgetter("ratio")
        )
        if not curve:
            continue
        begun, x = curve[0], [row["ratio"] + SHIFT[start] for row in curve]
        y = [row["harm"]["mean"] for row in curve]
        ax.plot(BEFORE, begun["harm_start"]["mean"], marker, mfc="white", color=colour)
        ax.errorbar(x, y, _bars(curve), color=colour, marker=marker, ms=4, lw=1.6, elinewidth=1.1,
                    label=f"{start} start")  # fmt: skip
        judged = [row for row in curve if row["classifier"]]
        if judged:
            ax.plot(
                [row["ratio"] for row in judged],
                [row["classifier"]["mean"] for row in judged],
                ":", color=colour, lw=1.2, label=f"{start} start, by the classifier",
            )  # fmt: skip
        _papers(ax, curve)
    ticks = {BEFORE: "before", 0: "0", 0.25: ".25", 0.5: ".5", 0.75: ".75", 1: "1"}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set(xlim=(BEFORE - 0.06, 1.05), ylim=(-0.03, 1.05))


def _papers(ax: Any, curve: Sequence[dict[str, Any]]) -> None:
    """The paper's numbers beside a curve."""
    known = [(row["ratio"], row["paper"]) for row in curve if row["paper"] is not None]
    began = curve[0]["paper_start"]
    if isinstance(began, list):
        began = sum(began) / len(began)
    if began is not None:
        known.append((BEFORE, began))
    if known:
        label = "paper (llama2-7b)"
        ax.plot(*zip(*known, strict=True), "D", color=INK, ms=5, ls="none", label=label, zorder=5)


def _bars(curve: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Lengths of the error bars below and above; 0 where a point has no interval."""
    ends = []
    for side in ("low", "high"):
        found = [row["harm"] for row in curve]
        ends.append([0.0 if h[side] is None else max(0.0, abs(h["mean"] - h[side])) for h in found])
    return ends
