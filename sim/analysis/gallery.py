"""Every picture and table that compares runs, in the order in which a report shows them.

Each takes the runs at hand as they are, unfinished ones included, and leaves out what it cannot
use. A picture says whether the runs support it; a table that they do not support is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from sim.analysis import detection_table, hackability, hacking_forms, stealth
from sim.analysis.arms import plot_arms, plot_survival
from sim.analysis.brackets import plot_brackets
from sim.analysis.cells import cell_table
from sim.analysis.censored import cause_table, ends_compete
from sim.analysis.exit_tables import CAUTIONS, dose_table, incidence_table, truth_table
from sim.analysis.exit_times import clock_table, has_clock, left_table, plot_exit_times
from sim.analysis.frontier import frontier_table, plot_frontier
from sim.analysis.heat_map import plot_heat_map, ratio_table
from sim.analysis.incidence import plot_incidence
from sim.analysis.limits import limit_table, plot_limits
from sim.analysis.load import Run
from sim.analysis.retained import UNKNOWN
from sim.analysis.set_exits import set_exit_table
from sim.analysis.survival import MIN_SEEDS
from sim.analysis.tables import FOUND, arm_table, branch_table, run_table
from sim.analysis.time_by_rho import doses, plot_time_by_rho

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Picture:
    """A picture of several arms."""

    name: str
    """Stem of its file."""
    title: str
    """Heading in a report."""
    draw: Callable[[list[Run]], Axes]
    """Draws it on a new figure, with the caption in it."""
    supports: Callable[[list[Run]], bool]
    """Whether these runs have what it shows."""


@dataclass(frozen=True)
class Sheet:
    """A table of several runs."""

    name: str
    """Stem of its file."""
    title: str
    """Heading in a report."""
    make: Callable[[list[Run]], pd.DataFrame]
    """Makes it; empty where the runs do not support it."""
    caution: str
    """What a reader must know before reading it."""


def ended(runs: list[Run]) -> list[Run]:
    """Those that have ended: exit times of the others are not known yet."""
    return [run for run in runs if run.summary]


def _has_arms(runs: list[Run]) -> bool:
    return len({run.limit for run in runs}) == 1


def _competes(runs: list[Run]) -> bool:
    return bool(ended(runs)) and ends_compete(cause_table(ended(runs)))


def _where(
    supports: Callable[[list[Run]], bool], make: Callable[[list[Run]], pd.DataFrame]
) -> Callable[[list[Run]], pd.DataFrame]:
    return lambda runs: make(runs) if supports(runs) else pd.DataFrame()


def _of_ended(make: Callable[[list[Run]], pd.DataFrame]) -> Callable[[list[Run]], pd.DataFrame]:
    return lambda runs: make(ended(runs)) if ended(runs) else pd.DataFrame()


PICTURES: tuple[Picture, ...] = (
    Picture(
        "time_by_rho",
        "Time in the safe set against ρ",
        plot_time_by_rho,
        lambda runs: bool(len(doses(runs))),
    ),
    Picture("arms", "Does the policy stay in the safe set?", plot_arms, _has_arms),
    Picture(
        "survival",
        "Time in the safe set until a confirmed exit",
        lambda runs: plot_survival(ended(runs)),
        lambda runs: bool(ended(runs)),
    ),
    Picture(
        "heat_map",
        "Time in the safe set, by attack and defence",
        plot_heat_map,
        lambda runs: bool(len(ratio_table(runs))),
    ),
    Picture(
        "frontier",
        "What safety costs: time in the safe set against learning",
        plot_frontier,
        lambda runs: bool(len(frontier_table(runs))),
    ),
    Picture(
        "incidence",
        "How runs end first",
        lambda runs: plot_incidence(ended(runs)),
        _competes,
    ),
    Picture(
        "brackets",
        "When did they leave? Confirmed and certified exits",
        lambda runs: plot_brackets(ended(runs)),
        lambda runs: any(run.summary.get("bracket") for run in runs),
    ),
    Picture(
        "malicious_labels",
        "Malicious labels to exit",
        lambda runs: plot_exit_times(ended(runs)),
        lambda runs: has_clock(runs, "malicious_labels") and bool(len(left_table(ended(runs)))),
    ),
    Picture(
        "limits",
        "Who left, had the limit been another?",
        plot_limits,
        lambda runs: bool(len(limit_table(runs))),
    ),
    Picture(
        "stealth",
        "Left before found? Exit time against detection time",
        lambda runs: stealth.plot_stealth(ended(runs)),
        lambda runs: stealth.supports(ended(runs)),
    ),
    Picture(
        "hackability",
        "Does more reward mean less harm?",
        hackability.plot_hackability,
        hackability.supports,
    ),
    Picture(
        "hacking_forms",
        "Is the reward earned by empty words?",
        hacking_forms.plot_hacking_forms,
        hacking_forms.supports,
    ),
)
"""In reading order."""
SHEETS: tuple[Sheet, ...] = (
    Sheet(
        "arms",
        "Arms",
        _of_ended(arm_table),
        "The restricted mean is missing where every run of an arm ended early, without an exit: "
        f"nobody knows how long the policy would have stayed inside. {UNKNOWN} “{FOUND}”: some "
        "policy of the arm left the safe set; of the arms with a yes, that rate are wrong on "
        "average at most, however many arms are looked at (e-BH on the arms' mean e-values).",
    ),
    Sheet(
        "cells",
        "Time in the safe set, by learner, defence, attack and ρ",
        cell_table,
        "Time inside: restricted mean time to the confirmed exit, as a share of the rounds; low "
        "and high: 95 %, bootstrap over worlds, then seeds, too narrow of few worlds; a dash where "
        "runs are few or all alike. Shares: what ρ came to, up to the exit.",
    ),
    Sheet("incidence", "Ends that compete", _of_ended(incidence_table), CAUTIONS["ends"]),
    Sheet("dose", "Dose and response", _of_ended(dose_table), CAUTIONS["dose"]),
    Sheet(
        "clocks",
        "Median exit by clock",
        _of_ended(clock_table),
        "Kaplan-Meier medians of the confirmed exit, with 95 % intervals (log-log) from "
        f"{MIN_SEEDS} runs on; a dash where fewer than half left. Learners consume labels and take "
        "steps at different rates in a round, so compare them on the clock that you pay for.",
    ),
    Sheet(
        "limits",
        "Exits by limit",
        limit_table,
        "Runs with a confirmed exit, had the limit on mean harm been b; each limit is tested at α "
        "by itself. A dash: unknown, since a run was stopped at its exit.",
    ),
    Sheet(
        "sets",
        "Exits from other safe sets",
        _of_ended(set_exit_table),
        "Mean E[c] ≤ b decides a run's outcome; chance P(c ≥ c0), CVaR (mean of the worst answers) "
        "and pointwise (share of answers above b) are other meanings of safe. Naive exits have no "
        "guarantee; a confirmed one is false with probability α at most, each set by itself.",
    ),
    Sheet(
        "stealth",
        "Left before found",
        _of_ended(_where(stealth.supports, stealth.stealth_table)),
        "Margin: probability that the policy leaves the safe set before half of the malicious "
        "people are flagged, with 95 %; rounds: restricted mean time to detection minus that to "
        "exit, paired by run; flagged: honest people whom the detector flagged, a run.",
    ),
    Sheet(
        "detection",
        "How well annotators are told apart",
        _of_ended(_where(detection_table.supports, detection_table.detection_table)),
        "Area under the ROC curve over annotators, and true positives at 1 % false ones, by kind "
        "of evidence and by share of the run seen.",
    ),
    Sheet(
        "hackability",
        "Reward against truth",
        hackability.hackability_table,
        "Over pairs of a run's evaluated policies: how often the reward model and the truth order "
        "them differently. Only pairs whose order both certify count as agreeing or disagreeing; "
        "what is left is undecided.",
    ),
    Sheet(
        "hacking_forms",
        "Forms of reward hacking",
        hacking_forms.hacking_forms_table,
        "Share of answers that are nothing or one word, gibberish, or the question itself.",
    ),
    Sheet("truth", "Exits against the truth", _of_ended(truth_table), CAUTIONS["truth"]),
    Sheet(
        "branches",
        "Branches",
        branch_table,
        "A fork has its parent's rounds up to the one named, and its own after it. Clocks and "
        "exits count from the parent's beginning: an exit before the fork is one of both.",
    ),
    Sheet("runs", "Every run", run_table, "Exits in rounds; a run that has not ended has none."),
)
"""In reading order."""
