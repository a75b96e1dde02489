"""The battery as one picture: how long each defence keeps each learner in the safe set.

A bar is the share of the updates that the policy spent inside, mean over runs, with a tick for
every run. Its colour says how runs that were inside to the end ended: holding (harm within the
limit, and at least half of what honest feedback teaches was learned), safe without learning, above
the limit by too little to confirm an exit, or collapsed. Runs that left the set have the colour of
leaving whatever else became of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.analysis.retained import RETAINED
from sim.analysis.style import AMBER, BLUE, GREY, INK, LIGHT, PURPLE, SKY, VERMILION, styled
from sim.analysis.words import span

FATES = {
    "holds": (BLUE, "holds: safe, and learns"),
    "idle": (AMBER, "safe, but learns less than half"),
    "above": (SKY, "above the limit at the end, no exit confirmed"),
    "unknown": (GREY, "safe; what it learned is unknown"),
    "mixed": (VERMILION, "left the safe set in at least one run"),
    "broken": (PURPLE, "collapsed or diverged"),
}


def fate(row: dict[str, Any]) -> str:
    """Which of :data:`FATES` a row has; the worst that happened to any of its runs."""
    if row["left"]:
        return "mixed"
    if set(row["outcomes"]) - {"safe"}:
        return "broken"
    if row["holds"]:
        return "holds"
    retained = row["learning_retained"]
    if retained is None:
        return "unknown"
    return "idle" if retained < RETAINED else "above"


@styled
def plot_battery(rows: Sequence[dict[str, Any]], updates: int, path: Path) -> Path:
    """Draw defences downwards and learners side by side; returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(row["defence"] for row in rows))
    learners = sorted({row["learner"] for row in rows})
    known = {(row["defence"], row["learner"]): row for row in rows}
    size = (max(9.0, 3.2 + 2.2 * len(learners)), 1.5 + 0.27 * len(names))
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(learners), sharey=True, squeeze=False)[0]
    for ax, learner in zip(panels, learners, strict=True):
        for place, name in enumerate(names):
            if (name, learner) in known:
                _bar(ax, place, known[name, learner], updates)
        ax.set(xlim=(0, 1.02 * updates), title=learner, xlabel="updates inside")
        ax.set_yticks(range(len(names)), names, fontsize=8.5, color=INK)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    shown = [kind for kind in FATES if any(fate(row) == kind for row in rows)]
    handles = [Patch(color=FATES[kind][0], label=FATES[kind][1]) for kind in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8.5)
    each = span(row["runs"] for row in rows)
    figure.supxlabel(
        f"Everybody reverses every preference that concerns harm. Runs per bar: {each}; "
        "white ticks: single runs;\na run ends at its confirmed exit.",
        fontsize=8.5,
        color=GREY,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _bar(ax: Any, place: int, row: dict[str, Any], updates: int) -> None:
    """One defence under one learner."""
    inside = row["updates_inside"]
    ax.barh(place, updates, height=0.7, color=LIGHT, alpha=0.5)
    ax.barh(place, inside["mean"], height=0.7, color=FATES[fate(row)][0])
    for end in inside["runs"]:
        ax.plot([end, end], [place - 0.3, place + 0.3], color="white", lw=1.2)
