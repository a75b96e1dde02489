"""Pictures as SVG for a page, and as the files that people ask for by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from envs.usage import UsageError
from sim.analysis import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png", ".pdf")


def svg(ax: Axes) -> bytes:
    """The figure of ``ax`` as SVG, cropped, without a background; equal for equal figures."""
    buffer = io.BytesIO()
    _write(ax, buffer, "svg", transparent=True)
    return buffer.getvalue()


def words_under(ax: Axes) -> str:
    """What the captions of the figure say, on one line."""
    from matplotlib.text import Text

    texts = style.figure_of(ax).findobj(Text)
    captions = [t for t in texts if isinstance(t, Text) and t.get_gid() == style.CAPTION]
    return " ".join(" ".join(text.get_text().split()) for text in captions)


def write(ax: Axes, path: Path) -> Path:
    """Write the figure of ``ax`` in the format that ``path`` ends with.

    Raises:
        ValueError: another ending than one of ``FORMATS``.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"--out {str(path)!r}; allowed with --figure: {', '.join(FORMATS)}")
    if path.suffix == ".png":
        return style.save(ax, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        _write(ax, file, path.suffix.removeprefix("."))
    return path


def _write(ax: Axes, file: IO[bytes], kind: str, **more: Any) -> None:
    from matplotlib import rc_context

    dated = {"Date": None} if kind == "svg" else {"CreationDate": None}
    with rc_context({"svg.hashsalt": "poisonloop", "svg.fonttype": "path"}):
        style.figure_of(ax).savefig(
            file, format=kind, bbox_inches="tight", pad_inches=0.12, metadata=dated, **more
        )
