"""What pictures and tables call what a run records, and how they write numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

CLOCKS = {
    "rounds": "round",
    "labels": "labels consumed",
    "optimizer_steps": "optimizer steps",
    "malicious_labels": "malicious labels",
    "flips": "flipped labels",
    "tokens": "tokens served",
}
RHO = {
    "feedback/rho_annotators": "of people",
    "feedback/rho_labels": "of votes cast",
    "feedback/rho_flips": "of votes flipped",
    "feedback/rho_risk_flips": "of risk-relevant votes flipped",
    "feedback/rho_post": "of training targets wrong",
}
"""The five shares that "ρ" can mean, as direct labels."""


def span(counts: Iterable[int]) -> str:
    """The least and the largest of ``counts``; one number where they are equal."""
    known = sorted(set(counts))
    return f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


def in_words(value: float, low: float | None, high: float | None, form: str = "g") -> str:
    """A value and its interval where it has one; an infinite end is open."""
    if low is None or high is None or math.isnan(low):
        return f"{value:{form}}"
    end = "∞)" if math.isinf(high) else f"{high:{form}}]"
    return f"{value:{form}} [{low:{form}}, {end}"
