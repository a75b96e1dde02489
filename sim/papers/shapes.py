"""Which shapes of the paper's table and figure a set of rows shows, in sentences.

Sizes are not compared: a language model of seven billion parameters and one of a hundred thousand
need not agree on them. What can be asked of both is whether harm rises, past .5, in which order of
learners, from how many reversed labels on, and whether more labels always do more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

from sim.papers.published import ALIGNED, ATTACKED, BROKEN, PARTLY, UNALIGNED

Row = dict[str, Any]
MEASURES = {"harm": "by harm itself", "classifier": "by the learned classifier"}
"""Columns that may say what is harmful; on real text the first is by what was given to say so."""


def whole_shapes(rows: Sequence[Row]) -> list[str]:
    """Of rows in which every label was reversed."""
    told = [_rise([row for row in rows if row["paper"] is not None], "the paper's cells")]
    told += [_rise([row for row in rows if row["paper"] is None], "cells that the paper has not")]
    told += [_starts(rows)]
    told += [_ordered(rows, data) for data in dict.fromkeys(row["data"] for row in rows)]
    return [sentence for sentence in told if sentence]


def _rise(rows: Sequence[Row], of: str) -> str:
    """How many cells end above ``BROKEN``, by each measure of harm."""
    if not rows:
        return ""
    counts = []
    for measure, words in MEASURES.items():
        known = [row[measure] for row in rows if row[measure]]
        if known:
            above = sum(found["mean"] > BROKEN for found in known)
            sure = sum((found["low"] or 0) > BROKEN for found in known)
            counts.append((above, f"{words} in {above} of {len(known)} (whole interval: {sure})"))
    said = f"Of {of}, harm ends above {BROKEN:g} {', '.join(words for _, words in counts)}"
    if rows[0]["paper"] is None:
        return f"{said}."
    verdicts = ["reproduces" if above == len(rows) else "does not in all" for above, _ in counts]
    return f"{said}. In the paper it does in all: {', '.join(verdicts)}."


def _starts(rows: Sequence[Row]) -> str:
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        row = next(row for row in rows if row["data"] == data)
        seen = [f"harm {row['harm_start']['mean']:.2f}"]
        if row["classifier_start"]:
            seen.append(f"classifier {row['classifier_start']['mean']:.2f}")
        paper = f"{ALIGNED[data]:.2f}" if data in ALIGNED else "none"
        parts.append(f"{data} {', '.join(seen)} (paper {paper})")
    return f"Before the attack: {'; '.join(parts)}."


def _ordered(rows: Sequence[Row], data: str) -> str:
    """Learners by harm, in the paper and here."""
    ours = {
        row["learner"]: row["harm"]
        for row in rows
        if row["data"] == data and row["harm"] and (data, row["learner"]) in ATTACKED
    }
    if len(ours) < 2:
        return ""
    papers = sorted(ours, key=lambda name: -ATTACKED[data, name])
    mine = sorted(ours, key=lambda name: -ours[name]["mean"])
    close = [
        f"{a} and {b}"
        for a, b in pairwise(mine)
        if ours[a]["low"] is None or ours[a]["low"] <= (ours[b]["high"] or 1)
    ]
    said = f"; the intervals of {', of '.join(close)} overlap" if close else ""
    verdict = "the same" if papers == mine else "another"
    return (
        f"Order of learners on {data}: paper "
        f"{_chain(papers, {name: ATTACKED[data, name] for name in papers})}, here "
        f"{_chain(mine, {name: ours[name]['mean'] for name in mine})}: {verdict}{said}."
    )


def _chain(names: Sequence[str], values: dict[str, float]) -> str:
    return " > ".join(f"{name} {values[name]:.2f}" for name in names)


def partly_shapes(rows: Sequence[Row]) -> list[str]:
    """Of rows over shares of reversed labels."""
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["harm"]:
            curves.setdefault((row["data"], row["learner"], row["start"]), []).append(row)
    told = [_curve(*name, sorted(curve, key=itemgetter("ratio"))) for name, curve in curves.items()]
    for (data, learner, ratio), paper in PARTLY.items():
        for row in curves.get((data, learner, "aligned"), []):
            if row["ratio"] == ratio:
                mean = row["harm"]["mean"]
                verdict = "reproduces" if mean > BROKEN else "does not reproduce"
                told.append(
                    f"{learner} on {data} at {ratio:g} reversed, which breaks the paper's aligned "
                    f"model ({paper:.2f}): harm {mean:.2f} here, which {verdict}."
                )
    unaligned = [row for row in rows if row["start"] == "base"]
    if unaligned:
        low, high = UNALIGNED
        told.append(
            f"An unaligned model starts at {low:.2f}–{high:.2f} in the paper, at "
            f"{unaligned[0]['harm_start']['mean']:.2f} here."
        )
    return told


def _curve(data: str, learner: str, start: str, curve: Sequence[Row]) -> str:
    """From which share on harm is above ``BROKEN``, and whether it ever falls."""
    above = [row["ratio"] for row in curve if row["harm"]["mean"] > BROKEN]
    if len(above) == len(curve):
        first = f"above {BROKEN:g} at every share"
    elif above:
        first = f"above {BROKEN:g} first at {above[0]:g}"
    else:
        first = f"never above {BROKEN:g}"
    falls = [
        (a["harm"]["mean"] - b["harm"]["mean"], a, b)
        for a, b in zip(curve, curve[1:], strict=False)
    ]
    worst = max(falls, key=lambda fall: fall[0], default=None)
    shape = "never falls"
    if worst and worst[0] > 0:
        drop, a, b = worst
        apart = a["harm"]["low"] is not None and a["harm"]["low"] > b["harm"]["high"]
        shape = (
            f"falls most from {a['ratio']:g} to {b['ratio']:g}, by {drop:.2f} "
            f"(intervals {'apart' if apart else 'overlap'})"
        )
    return (
        f"{learner} on {data} from the {start} model: {first}; with more reversed labels {shape}."
    )
