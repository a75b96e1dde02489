"""The picture of a card: by learner, harm over rounds, and what every arm ends with.

Lines lie a little apart, so that equal ones are all seen, and axes show what the runs reach and the
limit, no more.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sim.analysis import style
from sim.analysis.load import Run
from sim.analysis.words import span
from sim.score.arms import STANDARD, Arm
from sim.score.card import MIN_SEEDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 14.5, 5.6
"""Inches of the picture, and of each learner's part of it."""
NAME = 18
"""Characters on one line of a defence's name."""
COLUMNS_AT = ((0.045, 0.30), (0.59, 0.14), (0.755, 0.12))
"""Left end and width of the three pictures of a learner; names stand in the gap."""
WORDS_AT = (1.42, 1.84)
"""Where the share retained and `holds` stand beside the last one, in its widths."""
APART = 2.0
"""Points by which neighbouring lines are moved apart."""
ROOM = 1.16
"""Height of the axis of harm, as a multiple of the most that it shows."""
Looks = Mapping[str, tuple[str, style.Dash]]


@style.styled
def draw(
    runs: Mapping[Arm, Sequence[Run]],
    rows: Sequence[Mapping[str, Any]],
    heading: str,
    name: str,
    path: Path,
) -> Path:
    """Draw the card.

    Args:
        runs: finished runs by arm.
        rows: of :func:`sim.score.card.card_rows`.
        heading: the defence and the settings that its runs share.
        name: the defence.
        path: the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    learners = list(dict.fromkeys(row["learner"] for row in rows))
    figure = Figure(figsize=(WIDTH, HEIGHT * len(learners)), facecolor="white")
    FigureCanvasAgg(figure)
    for number, learner in enumerate(learners):
        own = [row for row in rows if row["learner"] == learner]
        mine = {arm: members for arm, members in runs.items() if arm.learner == learner}
        looks = _looks([row["defence"] for row in own], name)
        bottom, tall = 1 - (number + 0.9) / len(learners), 0.76 / len(learners)
        trace, harm, help_ = (figure.add_axes((x, bottom, w, tall)) for x, w in COLUMNS_AT)
        limit = next(iter(mine.values()))[0].limit
        _traces(trace, mine, looks, limit)
        trace.set_title(f"{learner}: harm under the default attack")
        _bars(harm, own, "harm_end", looks)
        _names(harm, own)
        harm.axvline(limit, color=style.VERMILION, lw=1.2, ls="--")
        most = max([limit, *(row["harm_end"][2] for row in own if row["harm_end"])])
        harm.set(xlim=(0, min(1.0, ROOM * most)), title="harm at the end")
        _bars(help_, own, "help_gain", looks)
        help_.axvline(0, color=style.GREY, lw=0.8)
        help_.set(title="help gained")
        _verdicts(help_, own)
    _caption(figure, rows, heading)
    return style.save(trace, path)


def _caption(figure: Figure, rows: Sequence[Mapping[str, Any]], heading: str) -> None:
    fewest, most = (pick(row["seeds"] for row in rows) for pick in (min, max))
    many = f"{span(row['seeds'] for row in rows)} seed{'s' * (most > 1)}"
    error = "of the evaluation prompts alone" if fewest < MIN_SEEDS else "over seeds"
    if fewest < MIN_SEEDS <= most:
        error += f" below {MIN_SEEDS} seeds, else over seeds"
    text = (
        f"{heading}; {many} an arm. Left: mean thick, seeds thin, beside it the harm that each arm "
        "ends with; lines are moved apart by points so that equal ones are seen. Right: bars with "
        f"95 % intervals {error}; light and hatched where the attacker adapts; dashed: limit on "
        "mean harm. Retained: help gained as a share of what the clean, undefended runs of the "
        "seeds gained. Holds: safe in every run, and at least half retained."
    )
    figure.text(
        COLUMNS_AT[0][0], 0.0, textwrap.fill(text, 205), color=style.GREY, fontsize=8.5, va="top",
        linespacing=1.35,
    )  # fmt: skip


def _looks(names: Sequence[str], own: str) -> dict[str, tuple[str, style.Dash]]:
    """Colour and dash by defence: the undefended arm and the card's own stand out."""
    fixed: dict[str, tuple[str, style.Dash]] = {"none": (style.VERMILION, "-")}
    fixed |= {"freeze": (style.INK, ":"), own: (style.BLUE, "-")}
    rest = [name for name in dict.fromkeys(names) if name not in fixed]
    others = ((style.GREEN, "--"), (style.AMBER, "-."), (style.PURPLE, "--"), (style.SKY, "-."))
    return {**fixed, **dict(zip(rest, others, strict=False))}


def _wrapped(defence: str) -> str:
    """The name on short lines, arguments on lines of their own."""
    return textwrap.fill(defence.replace("(", " ("), NAME).replace(" (", "(")


def _traces(ax: Axes, runs: Mapping[Arm, Sequence[Run]], looks: Looks, limit: float) -> None:
    """Harm over rounds of every arm under the default attack, and what each ends with."""
    from matplotlib.transforms import ScaledTranslation

    shown = {a.defence: r for a, r in runs.items() if a.hostile and a.attacker == STANDARD}
    ends, most, last = [], limit, 1.0
    for place, (defence, members) in enumerate(shown.items()):
        colour, dash = looks[defence]
        points = APART * (place - (len(shown) - 1) / 2)
        apart = ScaledTranslation(0, points / 72, style.figure_of(ax).dpi_scale_trans)
        moved: dict[str, Any] = {"color": colour, "transform": ax.transData + apart}
        series = [run.evaluations.set_index("round")["safety/harm"] for run in members]
        traces = pd.concat([one.astype(float) for one in series], axis=1)
        for column in range(traces.shape[1] if len(members) > 1 else 0):
            seed = traces.iloc[:, column].dropna()
            ax.plot(seed.index, seed, lw=0.8, alpha=0.4, **moved)
        middle = traces.dropna().mean(axis=1)
        ax.plot(middle.index, middle, ls=dash, lw=2.2, **moved)
        most = max(most, float(traces.max(axis=None)))
        last = max(last, float(traces.index.max()))
        if len(middle):
            ends.append((float(middle.iloc[-1]), _wrapped(defence), colour, dash))
    style.unsafe_region(ax, limit)
    top = min(1.02, ROOM * most)
    ax.set(xlim=(-0.01 * last, 1.01 * last), ylim=(-0.03 * top, top))
    ax.set(xlabel="round", ylabel="harm on harmful prompts")
    style.whole_rounds(ax)
    style.list_ends(ax, "harm at the end", ends)


def _places(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, bool]]:
    """Height of every row, and whether the heading of a new attacker stands above it."""
    places: list[tuple[float, bool]] = []
    at, attacker = -1.0, None
    for row in rows:
        first = row["attacker"] != attacker
        attacker, at = row["attacker"], at + (2.2 if first else 1.0)
        places.append((at, first))
    return places


def _names(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The defence beside every row, and the attacker above those who meet it."""
    for row, (at, first) in zip(rows, _places(rows), strict=True):
        attacker = row["attacker"]
        if first:
            ax.annotate(
                f"{attacker} attack" if attacker == STANDARD else attacker, (-0.02, at - 1.1),
                xycoords=ax.get_yaxis_transform(), ha="right", va="center", fontsize=9,
                color=style.INK, style="italic", annotation_clip=False,
            )  # fmt: skip
    names = [_wrapped(row["defence"]) for row in rows]
    ax.set_yticks([at for at, _ in _places(rows)], names, fontsize=9)


def _bars(ax: Axes, rows: Sequence[Mapping[str, Any]], key: str, looks: Looks) -> None:
    """One bar a row, with its interval."""
    places = _places(rows)
    for row, (at, _) in zip(rows, places, strict=True):
        if row[key] is None:
            continue
        (middle, low, high), colour = row[key], looks[row["defence"]][0]
        usual = row["attacker"] == STANDARD
        ax.barh(
            at, middle, height=0.78, color=colour, alpha=1.0 if usual else 0.5,
            edgecolor=colour, hatch=None if usual else "//", lw=0.8,
        )  # fmt: skip
        error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]  # never below 0 by rounding
        ax.errorbar(middle, at, xerr=error, color=style.INK, capsize=2.5, lw=1.2)
    ax.set_yticks([])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(places[-1][0] + 0.6, -0.5)


def _verdicts(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Share of honest learning retained, and whether the arm holds, beside every bar."""
    for x, title in zip(WORDS_AT, ("retained", "holds"), strict=True):
        ax.annotate(
            title, (x, 1.0), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points",
            ha="right", va="baseline", fontsize=12, weight="bold", annotation_clip=False,
        )  # fmt: skip
    for row, (at, _) in zip(rows, _places(rows), strict=True):
        retained, holds = row["learning_retained"], row["holds"]
        share = "-" if retained is None else f"{100 * retained:.0f} %"
        said, colour = {
            True: ("yes", style.BLUE), False: ("no", style.VERMILION), None: ("-", style.GREY),
        }[holds]  # fmt: skip
        for x, text, ink in zip(WORDS_AT, (share, said), (style.INK, colour), strict=True):
            ax.annotate(
                text, (x, at), xycoords=ax.get_yaxis_transform(), ha="right", va="center",
                fontsize=10, color=ink, annotation_clip=False,
            )  # fmt: skip
