"""How early, how late, how often wrongly do the rules of :mod:`envs.exit_rules` date an exit?

Runs of a known mean cost, evaluated every 5 of 200 steps (J = 40), b = .20, alpha = .05:

* ``rise``: C(t) = .06 + .64 / (1 + exp(-(t - 100) / 15)). It passes b at step 80.9, so the first
  evaluated policy that is truly out is that of step 85, the true exit.
* ``flat``: C = .12 or .195 throughout. There is no exit; every alarm is false.

Early is the share of rising runs called out before step 85. Delay is the mean number of steps from
85 to the call over the rising runs that were not early. A bracket covers if step 85 lies in it. All
rules see the same draws, Bernoulli and independent over checkpoints, as fresh evaluation prompts
give them; errors are those of a simulation of so many runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from envs.brackets import KINDS, brackets
from envs.exit_rules import NEVER, RULES, Plan, date
from envs.rng import stream

STEPS = np.arange(5, 201, 5)
PLAN = Plan(limit=0.20, alpha=0.05, planned=len(STEPS))
RISE = 0.06 + 0.64 / (1 + np.exp(-(STEPS - 100) / 15))
TRUE_EXIT = int(STEPS[np.flatnonzero(PLAN.limit < RISE)[0]])
SIZES, FLAT, FLAT_SIZE = (16, 64, 256), (0.12, 0.195), 64


class Curve(NamedTuple):
    """Mean costs and the draws at each of its checkpoints."""

    name: str
    means: np.ndarray  # (J,)
    n: int


CURVES = (
    *(Curve("rise", RISE, n) for n in SIZES),
    *(Curve(f"flat {cost:g}", np.full(len(STEPS), cost), FLAT_SIZE) for cost in FLAT),
)


def simulate(runs: int, seed: int, told: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """One row per curve and rule: shares and delay with their standard errors.

    Args:
        runs: simulated runs a curve.
        seed: root seed of the draws.
        told: called after every curve and rule.

    Returns:
        Rows with cell, n, rule, runs; rising curves add early, delay, unconfirmed and dated (runs
        that the delay is a mean over), flat ones false_exit; errors under the name with ``_se``.
    """
    rows = []
    for curve in CURVES:
        rng = stream(seed, "exit rules", curve.name, curve.n)
        costs = [rng.random((runs, curve.n)) < mean for mean in curve.means]
        for rule in RULES:
            found = {"cell": curve.name, "n": curve.n, "rule": rule, "runs": runs}
            rows.append({**found, **_measured(curve, date(rule, costs, PLAN))})
            told()
    return rows


def _measured(curve: Curve, dates: np.ndarray) -> dict[str, Any]:
    called = dates != NEVER
    if curve.name != "rise":
        return _share("false_exit", called)
    steps = STEPS[dates]
    early = called & (steps < TRUE_EXIT)
    delays = steps[called & ~early] - TRUE_EXIT
    return {
        **_share("early", early),
        "delay": float(delays.mean()) if delays.size else None,
        "delay_se": float(delays.std(ddof=1) / np.sqrt(delays.size)) if delays.size > 1 else None,
        "dated": int(delays.size),
        **_share("unconfirmed", ~called),
    }


def _share(name: str, where: np.ndarray) -> dict[str, float]:
    share = float(where.mean())
    return {name: share, f"{name}_se": float(np.sqrt(share * (1 - share) / where.size))}


BRACKET_CURVES = tuple(Curve("rise", RISE, n) for n in (64, 128, 256))


def bracket_rows(
    runs: int, seed: int, told: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """One row per size and kind of bracket on the rising curve.

    Returns:
        Rows with n, bracket, runs; left, right, width (steps; step 0 where nothing was certified
        safe, 200 where nothing unsafe) and coverage, each with its error under ``_se``.
    """
    rows = []
    for curve in BRACKET_CURVES:
        rng = stream(seed, "brackets", curve.n)
        costs = [rng.random((runs, curve.n)) < mean for mean in curve.means]
        for kind in KINDS:
            left, right = brackets(kind, costs, PLAN)
            low = np.where(left == NEVER, 0, STEPS[left])
            high = np.where(right == NEVER, STEPS[-1], STEPS[right])
            ends = {"left": low, "right": high, "width": high - low}
            means = {name: float(v.mean()) for name, v in ends.items()}
            errors = {f"{k}_se": float(v.std(ddof=1) / np.sqrt(runs)) for k, v in ends.items()}
            covers = (low < TRUE_EXIT) & (high >= TRUE_EXIT)
            found = {"n": curve.n, "bracket": kind, "runs": runs}
            rows.append({**found, **means, **errors, **_share("coverage", covers)})
            told()
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, one line a rule; each value with its standard error."""
    by = {(row["cell"], row["n"], row["rule"]): row for row in rows}
    heads = [f"n = {curve.n}: early | delay" for curve in CURVES if curve.name == "rise"]
    heads += [f"false exit, C = {cost:g}, n = {FLAT_SIZE}" for cost in FLAT]
    head = " | ".join(["rule", *heads])
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for rule, known in RULES.items():
        cells = (_values(by[curve.name, curve.n, rule]) for curve in CURVES)
        lines.append(
            " | ".join([f"| {known.says}", *(v for values in cells for v in values)]) + " |"
        )
    return "\n".join(lines) + "\n"


def bracket_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of :func:`bracket_rows` as a table."""
    lines = ["| bracket | n | mean ends, steps | width | coverage |", "|---|---|---|---|---|"]
    for row in rows:
        ends = f"({row['left']:.1f}, {row['right']:.1f}]"
        width = f"{row['width']:.1f} ± {row['width_se']:.1f}"
        kind = {"clopper_pearson": "Clopper–Pearson"}.get(row["bracket"], row["bracket"])
        lines.append(
            f"| {kind} | {row['n']} | {ends} | {width} | {_in_words(row, 'coverage', 3)} |"
        )
    return "\n".join(lines) + "\n"


def _values(row: dict[str, Any]) -> Iterator[str]:
    for name, digits in (("early", 3), ("delay", 1), ("false_exit", 3)):
        if name in row:
            yield _in_words(row, name, digits)


def _in_words(row: dict[str, Any], name: str, digits: int) -> str:
    value, error = row[name], row[f"{name}_se"]
    if value is None:
        return "–"
    if name != "delay" and value in (0.0, 1.0):
        # No error can be estimated from runs that all agree: the rule of three bounds it.
        bound = min(1.0, 3 / row["runs"])
        return f"0 (< {bound:.3f})" if value == 0 else f"1 (> {1 - bound:.3f})"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
