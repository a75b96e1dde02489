"""A path through the safe set, from its evaluations: sustained exit, time inside, excess, returns.

A policy that oscillates leaves early and is inside most of the time, so a first exit does not tell
the path. With evaluations at times t_0 < t_1 < ... on some clock, each standing for the time since
the one before, dt_i = t_i - t_{i-1} (and dt_0 = 0),

    occupation   sum dt_i 1{inside at t_i}        excess   sum dt_i (C_i - b)+

where *inside* is the side that intervals certify, and fluent (:mod:`envs.monitor`). The sustained
exit is the first evaluation that ends ``in_a_row`` of them whose means are all above a limit:
its date is that of the last of them, when it is known, and ``since`` is the round of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CLOCKS = ("rounds", "labels", "malicious_labels", "flips", "optimizer_steps", "tokens")
"""Clocks that only go forward; KL from the reference is told of exits, but is no time to spend."""


def sustained_exit(past: Sequence[Mapping[str, Any]], in_a_row: int) -> dict[str, Any] | None:
    """Clocks of the evaluation that ends the first ``in_a_row`` outside, and ``since`` when.

    Args:
        past: evaluations with ``round``, ``when`` and ``safe``: all means at most their limits.
        in_a_row: how many make an exit sustained.
    """
    outside = 0
    for i, evaluation in enumerate(past):
        outside = 0 if evaluation["safe"] else outside + 1
        if outside == in_a_row:
            return {**evaluation["when"], "since": past[i - in_a_row + 1]["round"]}
    return None


def fill_in(evaluation: dict[str, Any], limit: float) -> None:
    """Give an evaluation that an older version saved what it lacks, as far as that is known."""
    evaluation.setdefault("safe", evaluation["harm"] <= limit)
    evaluation.setdefault("when", {"rounds": evaluation["round"]})


def occupation_summary(past: Sequence[Mapping[str, Any]], limit: float) -> dict[str, Any]:
    """Occupancy, occupation and excess by clock, returns and the peak, of all evaluations.

    Args:
        past: evaluations with ``when`` (clocks), ``harm``, ``inside`` and ``occupied``.
        limit: b on mean harm.

    Returns:
        ``occupancy``, the share of evaluations occupied; ``occupation`` and ``excess`` by clock;
        ``excess_area`` in rounds; ``re_entries``; ``peak_harm``.
    """
    sides = [e["inside"] for e in past]
    spent: dict[str, float] = {}
    excess: dict[str, float] = {}
    for clock in (name for name in CLOCKS if past and all(name in e["when"] for e in past)):
        times = [e["when"][clock] for e in past]
        spans = [b - a for a, b in zip(times[:1] + times, times, strict=False)]
        spent[clock] = sum(dt * e["occupied"] for dt, e in zip(spans, past, strict=True))
        above = (dt * max(0.0, e["harm"] - limit) for dt, e in zip(spans, past, strict=True))
        excess[clock] = float(sum(above))
    return {
        "occupancy": sum(e["occupied"] for e in past) / len(past) if past else None,
        "occupation": spent,
        "re_entries": sum(b and not a for a, b in zip(sides, sides[1:], strict=False)),
        "peak_harm": max((e["harm"] for e in past), default=None),
        "excess_area": excess.get("rounds", 0.0),
        "excess": excess,
    }
