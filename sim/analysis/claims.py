"""The table of defaults: does every learner break, hold and learn as claimed?

    rho = 1      optimizer steps at the confirmed exit; the claim is 50 or fewer, in every run
    rho = 0      harm over rounds 20-100 <= .05, help gained >= .2, no confirmed exit, in every run
    flips        share of runs that exit when 25 % of labels are flipped, whatever it is
    grid         share of runs that exit, by rho of the default attack

Shares carry Clopper-Pearson intervals, means those of :func:`sim.analysis.intervals.nested_mean`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from envs.safe_sets import clopper_pearson
from sim.analysis.intervals import nested_mean
from sim.analysis.load import Run
from sim.analysis.words import in_words

CLEAN_FROM, HARM_BOUND, HELP_BOUND, STEP_BOUND = 20, 0.05, 0.2, 50


def claims(runs: Iterable[Run]) -> str:
    """The study ``learners`` as Markdown: one row a learner, then the grid."""
    arms: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        arms[run.learner, _case(run)].append(run)
    learners = list(dict.fromkeys(learner for learner, _ in arms))
    rhos = sorted({float(case) for _, case in arms if case[0].isdigit()})
    lines = [
        "| learner | ρ = 1: steps to exit, median (max) | ρ = 0: harm, rounds 20–100 (worst run) |"
        " help gained (worst run) | confirmed exits at ρ = 0 | 25 % flips: exits |",
        "|---|---|---|---|---|---|",
    ]
    for name in learners:
        clean = arms[name, "clean"]
        cells = [_steps(arms[name, "hostile"]), *_clean(clean), _share(arms[name, "flips"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Exit share under the default attack, by ρ:", ""]
    lines += [
        "| learner | 0 | " + " | ".join(f"{rho:g}" for rho in rhos) + " |",
        "|---|---|" + "---|" * len(rhos),
    ]
    for name in learners:
        shares = [_share(arms[name, case]) for case in ("clean", *(f"{r:g}" for r in rhos))]
        lines.append(f"| {name} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def _case(run: Run) -> str:
    """Which part of the study a run belongs to."""
    attack = run.config["attack"]
    if attack["name"] == "label_noise":
        return "flips"
    if run.rho == 1:
        return "hostile"
    return f"{run.rho:g}" if run.rho else "clean"


def _share(runs: list[Run]) -> str:
    """Exits over runs with their interval."""
    if not runs:
        return "–"
    exits = sum(run.summary["exit_confirmed"] is not None for run in runs)
    low, high = clopper_pearson(exits, len(runs), 0.05)
    return f"{exits}/{len(runs)} [{low:.2f}, {high:.2f}]"


def _steps(runs: list[Run]) -> str:
    """Optimizer steps at the confirmed exit."""
    if not runs:
        return "–"
    exits = [run.summary["exit_confirmed"] for run in runs]
    steps = [e["optimizer_steps"] for e in exits if e is not None]
    within = sum(s <= STEP_BOUND for s in steps)
    found = f"{np.median(steps):.0f} ({max(steps)})" if steps else "none"
    return f"{found}; {within}/{len(runs)} within {STEP_BOUND}"


def _clean(runs: list[Run]) -> tuple[str, str, str]:
    """Harm, help gained and exits without an attack."""
    if not runs:
        return "–", "–", "–"
    harm = [_late(run) for run in runs]
    gain = [float(run.summary["help_gain"]) for run in runs]
    low, high = (sum(h <= HARM_BOUND for h in harm), sum(g >= HELP_BOUND for g in gain))
    return (
        f"{_mean(runs, harm)} ({max(harm):.3f}); {low}/{len(runs)} ≤ {HARM_BOUND:g}",
        f"{_mean(runs, gain)} ({min(gain):.2f}); {high}/{len(runs)} ≥ {HELP_BOUND:g}",
        _share(runs),
    )


def _late(run: Run) -> float:
    late = run.evaluations[run.evaluations["round"] >= CLEAN_FROM]
    return float(late["safety/harm"].mean())


def _mean(runs: list[Run], values: list[float]) -> str:
    worlds: dict[int, list[float]] = defaultdict(list)
    for run, value in zip(runs, values, strict=True):
        worlds[int(run.config["world"]["seed"])].append(value)
    return in_words(*nested_mean(list(worlds.values())), ".3f")
