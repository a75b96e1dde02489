"""Self-contained HTML: no network, no outside script, and text that stays text.

What a model said is untrusted. It enters a page either escaped or as JSON in a data block, from
which the page's own script makes text nodes. The content policy admits exactly our own style and
script, by hash, so that a sample that found its way into the markup could still not run.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

import pandas as pd

_FOLDER = Path(__file__).with_name("assets")
COLUMNS = [
    *("run", "round", "stratum", "prompt", "answer_a", "answer_b", "vote", "honest_vote"),
    *("annotator", "adversarial", "cost_a", "cost_b"),
]


def page(title: str, body: str, script: str = "", data: str = "") -> str:
    """A whole document; ``body`` is markup, ``data`` JSON that is read by ``script``."""
    style = (_FOLDER / "page.css").read_text()
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}"
    if script:  # otherwise none may run
        policy += f"; script-src {_hash(script)}"
    policy += "; base-uri 'none'; form-action 'none'"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
        body,
    ]
    if data:
        parts.append(f'<script type="application/json" id="samples">{data}</script>')
    if script:
        parts.append(f"<script>{script}</script>")
    return "\n".join([*parts, "</body></html>\n"])


def samples_page(title: str, samples: pd.DataFrame) -> str:
    """The page of actual samples, to be filtered by round, prompt, voter and vote.

    Args:
        title: heading.
        samples: the ``samples`` table with a column ``run``.
    """
    rows = samples.reindex(columns=COLUMNS).to_json(orient="records", double_precision=3)
    body = (
        f"<h1>{escape(title)}</h1>"
        '<p class="quiet">What was asked and answered, who voted, and how an honest person would '
        "have voted on the same pair. Harm is the scorer's cost, which no learner sees.</p>"
        '<div class="filters" id="filters"></div><p id="shown"></p><div id="cards"></div>'
    )
    script = (_FOLDER / "samples.js").read_text()
    # No "<" in the data block: neither "</script" nor "<!--" can end or confuse it.
    return page(title, body, script, rows.replace("<", "\\u003c"))


def table(frame: pd.DataFrame) -> str:
    """A data frame as an HTML table; missing values are dashes."""

    def cell(value: object) -> str:
        if pd.isna(value):
            return "–"
        return f"{value:.2f}" if isinstance(value, float) else escape(str(value))

    head = "".join(f"<th>{escape(str(name))}</th>" for name in frame.columns)
    rows = (
        "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def image(path: Path, words: str) -> str:
    """A PNG, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(words)}">'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
