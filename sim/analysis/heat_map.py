"""What a defence buys, under every attack: restricted means against those without it, as a map.

A cell is the restricted mean time to the confirmed exit with the defence over that without it,
under the same attack, rho and learner. The ratio is bounded, since time is restricted: a defence
that no run left shows the horizon over the undefended mean, whatever it would have held beyond.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.cells import BARE, CLEAN, cells
from sim.analysis.load import Run
from sim.analysis.words import CLOCKS, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL, GAP, LINE, WIDEST = 0.86, 0.16, 0.235, 9.0
"""Inches of a cell's width, between learners, of a row, and of learners side by side."""
STRONGEST = np.log(8)
"""Log ratio from which on colours do not deepen."""


def ratio_table(runs: Iterable[Run], clock: str = "rounds") -> pd.DataFrame:
    """The cells of attacked learners with a column ``ratio``; empty where no defence was attacked.

    Clean cells are in it where a defence has one.

    Returns:
        Columns of :func:`sim.analysis.cells.cells`, ``ratio`` (1 without a defence, NaN where there
        is no undefended twin or a mean is unknown), ``twin``, whether there is one, and ``paired``,
        whether it has as many runs.
    """
    table = cells(runs, clock=clock)
    if table.empty:
        return table
    defended = table[table["defence"] != table["bare"]]
    if not (defended["rho"] > 0).any():
        return table[:0]
    keys = ["learner", "attack", "rho"]
    bare = table[table["defence"] == table["bare"]].set_index([*keys, "defence"])[["value", "n"]]
    places = pd.MultiIndex.from_frame(table[[*keys, "bare"]])
    shown = set(map(tuple, defended[keys].to_numpy()))
    twins = bare.reindex(places)
    return table.assign(
        twin=places.isin(bare.index),
        ratio=table["value"].to_numpy() / twins["value"].to_numpy(),
        paired=table["n"].to_numpy() == twins["n"].to_numpy(),
    )[[place in shown for place in map(tuple, table[keys].to_numpy())]]


@style.styled
def plot_heat_map(runs: Iterable[Run], ax: Axes | None = None, clock: str = "rounds") -> Axes:
    """Defences downwards, attacks to the right, learners side by side; numbers in the cells.

    Raises:
        ValueError: no defence was attacked, or a run does not record the clock.
    """
    table = ratio_table(runs, clock)
    if table.empty:
        raise UsageError("runs: no defended run under attack; allowed: at least one")
    names = sorted(dict.fromkeys(table["defence"]), key=lambda name: not name.startswith(BARE))
    attacks = set(table["attack"]) - {CLEAN}
    places = {
        learner: sorted(set(zip(part["attack"], part["rho"], strict=True)), key=_order)
        for learner, part in table.groupby("learner")
    }
    several = len(attacks) > 1
    beside = _side_by_side({name: CELL * len(found) for name, found in places.items()})
    width = max(sum(CELL * len(places[name]) + GAP for name in row) for row in beside) - GAP
    head = 1.3 if several else 0.6  # inches under a row of panels
    tall = LINE * len(names)
    height = len(beside) * (tall + head) - head
    ax = style.axes(ax, width / 0.775, height / 0.77)
    ax.set_axis_off()
    for i, row in enumerate(beside):
        left, bottom = 0.0, height - tall - i * (tall + head)
        for learner in row:
            wide = CELL * len(places[learner])
            corner = (left / width, bottom / height, wide / width, tall / height)
            panel = ax.inset_axes(corner)
            _fill(panel, table[table["learner"] == learner], names, places[learner])
            _name(panel, places[learner], several)
            panel.set_title(learner, fontsize=10.5)
            shown = [] if left else names
            panel.set_yticks(range(len(shown)), shown, fontsize=8.5, color=style.INK)
            left += wide + GAP
    ax.set_title("Time in the safe set, against no defence", pad=26)
    under = f" Attack: {min(attacks)}." if len(attacks) == 1 else ""
    lone = " Grey, with the mean: no undefended twin here." if not table["twin"].all() else ""
    if not (table["paired"] | ~table["twin"]).all():
        lone += " Where n differs from the undefended cell's, a ratio compares other seeds too."
    style.caption(
        ax,
        "×: restricted mean time to the confirmed exit over that of the same learner under the "
        f"same attack without a defence, whose row has the mean itself (clock: {CLOCKS[clock]}). "
        f"Blue: longer; red: shorter. Small: runs that left of those of the cell, "
        f"n = {span(table['n'])}.{under}{lone}",
        below=72 * (head - 0.3) + 8,
    )
    return ax


def _side_by_side(widths: dict[str, float]) -> list[list[str]]:
    """Learners in rows that are no wider than they may be."""
    rows: list[list[str]] = [[]]
    for name, width in widths.items():
        if rows[-1] and sum(widths[other] + GAP for other in rows[-1]) + width > WIDEST:
            rows.append([])
        rows[-1].append(name)
    return rows


def _factor(ratio: float) -> str:
    """A ratio, with as many digits as its size deserves."""
    digits = 2 if ratio < 0.995 else 1 if ratio < 9.95 else 0
    return f"×{ratio:.{digits}f}"


def _order(place: tuple[str, float]) -> tuple[bool, str, float]:
    attack, rho = place
    return (attack != CLEAN, attack, rho)


def _fill(
    panel: Axes, table: pd.DataFrame, names: list[str], columns: list[tuple[str, float]]
) -> None:
    """Tiles and their numbers."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.patches import Rectangle

    shades = LinearSegmentedColormap.from_list("", [style.VERMILION, "white", style.BLUE], 257)
    for cell in table.to_dict("records"):
        x = columns.index((cell["attack"], cell["rho"]))
        y = names.index(cell["defence"])
        bare = cell["defence"] == cell["bare"] or not cell["twin"]
        inside = cell["value"] * cell["horizon"]
        depth = 0.0
        if np.isnan(inside) or np.isnan(cell["ratio"]) and cell["twin"]:
            text = "?"
        elif bare:
            text = f"{inside:.3g}"
        else:
            text = _factor(cell["ratio"])
            depth = float(np.clip(np.log(max(cell["ratio"], 1e-9)) / STRONGEST, -1, 1))
        face = shades(0.5 + 0.5 * depth) if cell["twin"] else style.LIGHT
        panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=face, ec="white", lw=1.5))
        ink = "white" if np.dot(to_rgb(face), (0.3, 0.59, 0.11)) < 0.52 else style.INK
        panel.text(x - 0.02, y, text, ha="right", va="center", fontsize=8.5, color=ink)
        left = f"{cell['left']}/{cell['n']}"
        panel.text(x + 0.08, y, left, ha="left", va="center", fontsize=7, color=ink)
    panel.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(names) - 0.5, -0.5))


def _name(panel: Axes, columns: list[tuple[str, float]], several: bool) -> None:
    """Columns by rho, and by attack where there are several; no frame."""
    words = [CLEAN if attack == CLEAN else f"ρ = {rho:g}" for attack, rho in columns]
    if several:
        words = [
            word if attack == CLEAN else f"{attack} {word}"
            for word, (attack, _) in zip(words, columns, strict=True)
        ]
    turn: dict[str, Any] = (
        {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if several else {}
    )
    panel.set_xticks(range(len(columns)), words, fontsize=8.5, **turn)
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
