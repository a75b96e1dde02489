"""Small multiples: how many in a row, and a panel an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING

from sim.analysis import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
PANEL, LINE = 1.2, 0.17
"""Inches that an arm's panel is high, and a line of its name over it."""


def columns_of(count: int) -> int:
    """Panels in a row; four make a square."""
    return 2 if count == 4 else min(COLUMNS, count)


def arm_panels(
    ax: Axes | None, parts: Mapping[str, Sized], xlabel: str, ylabel: str
) -> tuple[Axes, list[Axes]]:
    """A panel for each of ``parts``, runs by arm, with its name and number; on ``ax`` or a new one.

    Returns:
        The axes and the panels on them; those at the edges have labels.
    """
    names = style.short_names(parts)
    head = LINE * (max(name.count("\n") for name in names.values()) + 2)  # and the number of runs
    tall = PANEL + head + 0.3
    # .77: share inside the margins
    ax = style.axes(ax, 8.8, -(-len(parts) // COLUMNS) * tall / 0.77)
    panels = style.panels(ax, len(parts), COLUMNS, 0.86, PANEL / tall)
    for i, (panel, (arm, part)) in enumerate(zip(panels, parts.items(), strict=True)):
        panel.set_title(f"{names[arm]}\nn = {len(part)}", fontsize=8.5, fontweight="normal")
        panel.tick_params(labelsize=8.5, labelleft=i % COLUMNS == 0)
        if i % COLUMNS == 0:
            panel.set_ylabel(ylabel, fontsize=8.5)
        if i + COLUMNS >= len(parts):
            panel.set_xlabel(xlabel, fontsize=8.5)
    return ax, panels


def few_ticks(panel: Axes) -> None:
    """At most four whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
