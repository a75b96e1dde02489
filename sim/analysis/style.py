"""How every picture looks: dark on white, colours that stay apart for colour-blind readers.

Colours are those of Okabe & Ito (2008). Every picture carries a caption that says what the band is
and how many draws or runs are behind it.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, LIGHT = "#222222", "#5f5f5f", "#d9d9d9"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b4619a"
SKY, AMBER = "#56b4e9", "#c78500"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, AMBER, SKY, INK)
DASHES = ("-", "--", "-.", ":")
"""Line styles that tell arms apart once the colours are used up; more dots come after these."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One each for :data:`CYCLE`, so that arms can be told apart without colours."""
WRAP = 36
"""Characters on one line of an arm's name."""
MOST_LABELS = 8
"""Most lines that are named at their ends; the names of more would lie on each other."""
CAPTION = "caption"
"""Mark of the text under a picture, by which a page finds its words."""
Dash = str | tuple[int, tuple[float, ...]]
RC: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 10.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


P = ParamSpec("P")
R = TypeVar("R")


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """Decorator: draw under our settings and leave the caller's alone."""

    @functools.wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(RC):
            return plot(*args, **kwargs)

    return drawn


def axes(ax: Axes | None, width: float = 7.6, height: float = 4.6) -> Axes:
    """``ax`` itself, or the axes of a new figure that leaves pyplot's global state alone."""
    if ax is not None:
        return ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def panels(ax: Axes, count: int, columns: int, width: float, height: float) -> list[Axes]:
    """``count`` small axes on ``ax``, row by row; they fill these shares of their places."""
    ax.set_axis_off()
    cell = 1 / -(-count // columns)
    places = (divmod(i, columns) for i in range(count))
    size = (width / columns, height * cell)
    return [ax.inset_axes((j / columns, 1 - (i + 1) * cell, *size)) for i, j in places]


def figure_of(ax: Axes) -> Figure:
    """The figure that ``ax`` is drawn on."""
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes were removed from their figure"
    return figure


def whole_rounds(ax: Axes) -> None:
    """Ticks of the x axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def line_style(index: int) -> tuple[str, Dash]:
    """Colour and dash of the ``index``-th arm; no two arms have both in common."""
    turn, hue = divmod(index, len(CYCLE))
    if turn < len(DASHES):
        return CYCLE[hue], DASHES[turn]
    return CYCLE[hue], (0, (6.0, 1.5, *(1.0, 1.5) * (turn - 2)))


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What pictures call arms: wrapped; where one is long, without the words that all share."""
    names = list(names)
    parted = {name: name.split() for name in names}
    if len(names) > 1 and max(map(len, names)) > WRAP:
        shared = set.intersection(*map(set, parted.values())) - {"+"}
        parted = {k: [w for w in words if w not in shared] or words for k, words in parted.items()}
    joined = {name: " ".join(words).removeprefix("+ ") for name, words in parted.items()}
    plain = {name: text.replace(": + ", ": ").removesuffix(":") for name, text in joined.items()}
    return {name: textwrap.fill(text, WRAP) for name, text in plain.items()}


def title(ax: Axes, text: str, pad: float | None = None) -> None:
    """Bold heading, wrapped so that a long name does not widen the picture."""
    ax.set_title(textwrap.fill(text, 2 * WRAP), pad=pad)


def caption(ax: Axes, text: str, below: float = 38.0) -> None:
    """Grey text under ``ax``, wrapped to its width; ``below`` is the distance in points."""
    figure = figure_of(ax)
    width = ax.get_position().width * figure.get_figwidth()
    ax.annotate(
        textwrap.fill(text, max(40, int(width * 16))), (0, 0), xycoords="axes fraction",
        xytext=(0, -below), textcoords="offset points", va="top", ha="left", fontsize=8.5,
        color=GREY, linespacing=1.35, annotation_clip=False, gid=CAPTION,
    )  # fmt: skip


def unsafe_region(ax: Axes, limit: float) -> None:
    """Tint what lies above the limit, and say so."""
    ax.axhspan(limit, 1.02, color=VERMILION, alpha=0.06, lw=0, zorder=0)
    ax.axhline(limit, color=VERMILION, lw=1.2, ls="--", zorder=1)
    ax.annotate(
        f"outside the safe set: mean harm above b = {limit:g}", (0.012, 0.985),
        xycoords="axes fraction", va="top", color=VERMILION, fontsize=9,
    )  # fmt: skip


def list_ends(ax: Axes, heading: str, ends: list[tuple[float, str, str, Dash]]) -> None:
    """List lines beside ``ax``, highest end first, where labels at their ends would collide.

    Args:
        ax: axes with the lines.
        heading: what the values are.
        ends: one entry (end value, name, colour, dash) per line.
    """
    from matplotlib.lines import Line2D

    ordered = sorted(ends, key=lambda end: -end[0])
    ax.legend(
        [Line2D([], [], color=colour, ls=dash, lw=2) for _, _, colour, dash in ordered],
        [f"{value:.2f}  " + name.replace("\n", "\n          ") for value, name, *_ in ordered],
        title=heading, alignment="left", loc="upper left", bbox_to_anchor=(1.01, 1.02),
        borderaxespad=0, fontsize=8.5, title_fontsize=8.5, labelcolor="linecolor",
        handlelength=4, labelspacing=0.3,
    )  # fmt: skip


def corner_legend(ax: Axes, handles: Sequence[Artist]) -> None:
    """What the marks of all panels on ``ax`` are, over their right end."""
    options: dict[str, Any] = {"bbox_to_anchor": (0.96, 1), "borderaxespad": 0.4, "fontsize": 9.5}
    ax.legend(handles=handles, loc="lower right", ncols=len(handles), **options)


def label_ends(ax: Axes, ends: list[tuple[float, float, str, str]], gap: float = 0.055) -> None:
    """Write labels at line ends (x, y, text, colour), moved apart vertically where they collide.

    Args:
        ax: axes whose limits are final.
        ends: one entry per line.
        gap: least distance between labels, as a share of the axes' height.
    """
    low, high = ax.get_ylim()
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    heights = [(ends[i][1] - low) / (high - low) for i in order]
    for _ in range(50):  # push neighbours apart symmetrically until all fit
        for k in range(len(heights) - 1):
            overlap = gap - (heights[k + 1] - heights[k])
            if overlap > 1e-6:
                heights[k] -= overlap / 2
                heights[k + 1] += overlap / 2
        shift = max(0.0, 0.03 - min(heights, default=1.0))
        shift -= max(0.0, max(heights, default=0.0) + shift - 1.0)  # as low as the top demands
        heights = [h + shift for h in heights]
    right = max((x for x, *_ in ends), default=0.0)
    for i, h in zip(order, heights, strict=True):
        _, _, text, colour = ends[i]
        ax.annotate(
            text, (right, low + h * (high - low)), xytext=(6, 0), textcoords="offset points",
            color=colour, va="center", fontsize=9.5, annotation_clip=False,
        )  # fmt: skip


def label_points(
    ax: Axes,
    places: np.ndarray,
    labels: list[str],
    colours: list[str],
    inches: tuple[float, float],
    size: float = 7.5,
) -> None:
    """Write short labels beside points, pushed apart until none covers another or a point.

    Args:
        ax: axes whose limits are final.
        places: (n, 2) points in data coordinates.
        labels: n texts of a few characters.
        colours: n colours.
        inches: width and height of ``ax``.
        size: of the font, in points.
    """
    limits = np.array([ax.get_xlim(), ax.get_ylim()])
    points = (places - limits[:, 0]) / np.diff(limits, axis=1)[:, 0] * np.array(inches) * 72
    half = np.array([[0.36 * size * len(text), 0.55 * size] for text in labels])
    at, n = points + half + 2, len(labels)
    apart = half[:, None] + np.vstack(
        [half, np.full_like(half, 2.6)]
    )  # least distances, (n, 2n, 2)
    itself = np.hstack([np.eye(n, dtype=bool), np.zeros((n, n), bool)])
    later = np.sign(np.arange(n)[:, None] - np.arange(2 * n) + 0.5)[..., None]
    for _ in range(500):
        gap = at[:, None] - np.vstack([at, points])  # (n, 2n, 2)
        overlap = apart - np.abs(gap)
        hit = (overlap > 0).all(2) & ~itself
        if not hit.any():
            break
        short = np.eye(2, dtype=bool)[overlap.argmin(2)]  # along the shorter way out
        side = np.where(gap == 0, later, np.sign(gap))  # of two at one place the later goes up
        push = np.where(hit[..., None] & short, side * (overlap + 0.2) / 2, 0)
        at = at + push.sum(1).clip(-size, size)
    for text, colour, place, offset in zip(labels, colours, places, at - points, strict=True):
        far = np.hypot(*offset) > 2 * size
        line = {"arrowstyle": "-", "color": LIGHT, "lw": 0.8, "shrinkA": 0, "shrinkB": 1}
        ax.annotate(
            text, tuple(place), tuple(offset), textcoords="offset points", ha="center",
            va="center", fontsize=size, color=colour, annotation_clip=False,
            arrowprops=line if far else None,
        )  # fmt: skip


def save(ax: Axes, path: Path) -> Path:
    """Write the figure of ``ax`` as PNG, cropped to its content."""
    figure = figure_of(ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=RC["savefig.dpi"], bbox_inches="tight", pad_inches=0.15)
    return path
