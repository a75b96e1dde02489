"""Self-contained HTML: no network, no outside script, and text that stays text.

What a model said is untrusted. It enters a page either escaped or as JSON in a data block, from
which the page's own script makes text nodes. The content policy admits exactly our own style and
script, by hash, so that a sample that found its way into the markup could still not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd

_FOLDER = Path(__file__).with_name("assets")
SCRIPTS = ("page.js", "charts.js", "runs.js", "samples.js")


def page(title: str, body: str, data: Mapping[str, str]) -> str:
    """A whole document; ``body`` is markup, ``data`` JSON by the name under which scripts read it.

    The scripts are ours (``SCRIPTS``), the same on every page.
    """
    style = (_FOLDER / "page.css").read_text()
    script = "\n".join((_FOLDER / name).read_text() for name in SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    blocks = (
        # No "<" in a data block: neither "</script" nor "<!--" can end or confuse it.
        f'<script type="application/json" id="{name}">' + text.replace("<", "\\u003c") + "</script>"
        for name, text in data.items()
    )
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
        body,
        *blocks,
        f"<script>{script}</script>",
    ]
    return "\n".join([*parts, "</body></html>\n"])


def section(name: str, title: str, body: str) -> str:
    """A part of the page that its contents link to."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def contents(entries: Sequence[tuple[str, str]]) -> str:
    """Links to sections, as (name, title)."""
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in entries)
    return f'<nav aria-label="Contents" id="contents"><ol>{links}</ol></nav>'


def quiet(words: str) -> str:
    """A remark."""
    return f'<p class="quiet">{escape(words)}</p>'


def listed(words: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in words) + "</ul>"


def command(line: str) -> str:
    """A command line to copy."""
    return f'<p class="command"><code tabindex="0">{escape(line)}</code></p>'


def table(frame: pd.DataFrame, links: Sequence[str] = (), caption: str = "") -> str:
    """A data frame as an HTML table in a box of its own; missing values are dashes.

    Args:
        frame: numbers stand right, words left.
        links: where the first cell of each row leads, if anywhere.
        caption: what a screen reader says of it.
    """
    right = [_is_number(frame[name]) for name in frame]
    whole = [_counts(frame[name]) for name in frame]

    def cell(value: object, column: int, row: int) -> str:
        text = f"{value:g}" if whole[column] and pd.notna(value) else _plain(value)
        if column == 0 and links:
            text = f'<a href="{escape(links[row])}">{text}</a>'
        return f"<td{' class=n' if right[column] else ''}>{text}</td>"

    head = "".join(
        f'<th scope="col"{" class=n" if number else ""}>{escape(str(name))}</th>'
        for name, number in zip(frame.columns, right, strict=True)
    )
    rows = (
        "<tr>" + "".join(cell(value, i, number) for i, value in enumerate(row)) + "</tr>"
        for number, row in enumerate(frame.itertuples(index=False))
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _is_number(column: pd.Series) -> bool:
    return all(_plain(value)[:1] in "-+×0123456789" for value in column.dropna())


def _counts(column: pd.Series) -> bool:
    """Whether floats are counts of something, or halves of counts."""
    known = column.dropna()
    return column.dtype.kind == "f" and (known.abs() > 1).any() and bool((known % 0.5 == 0).all())


def _plain(value: object) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else escape(str(value))


def figure(name: str, title: str, image: bytes, words: str, line: str) -> str:
    """An SVG, embedded on a card, with the command that draws it anew.

    Args:
        name: by which the command knows it.
        title: heading.
        image: the SVG.
        words: what it shows, for those who do not see it.
        line: the command.
    """
    data = base64.b64encode(image).decode()
    return (
        f'<figure id="figure-{name}"><h3 class="unseen">{escape(title)}</h3>'
        '<div class="card" tabindex="0">'
        f'<img class="picture" src="data:image/svg+xml;base64,{data}" '
        f'alt="{escape(f"{title}. {words}")}"></div>'
        f"<figcaption>{command(line)}</figcaption></figure>"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
