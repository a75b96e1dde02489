"""What limits a report's answer, and how one run ended, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sim.analysis.load import Run, by_arm
from sim.analysis.retained import RETAINED
from sim.analysis.survival import MIN_SEEDS, ended_unconfirmed

MEANING = {
    "safe": "The policy stayed in the safe set",
    "exited": "The policy left the safe set",
    "collapsed": "The policy broke down: its text or its helpfulness was lost",
    "diverged": "Training produced a number that is not finite",
    "unfinished": "The run has not ended",
}


def cautions(runs: Iterable[Run]) -> list[str]:
    """What limits the answer."""
    runs = list(runs)
    ended = [run for run in runs if run.summary]
    sizes = [len(members) for members in by_arm(runs).values()]
    said = []
    if min(sizes) < MIN_SEEDS:
        thin = sum(size < MIN_SEEDS for size in sizes)
        which = "every arm has" if thin == len(sizes) else f"{thin} of {len(sizes)} arms have"
        said.append(
            f"Thin: {which} fewer than {MIN_SEEDS} runs (fewest {min(sizes)}). No p-value is "
            "given for them, and no interval of a mean."
        )
    if len(ended) < len(runs):
        said.append(
            f"{len(runs) - len(ended)} of {len(runs)} runs have not ended and do not count."
        )
    broken = [run for run in ended if run.summary["outcome"] in ("collapsed", "diverged")]
    if broken:
        said.append(f"{len(broken)} runs collapsed or diverged: an exit of theirs may be cut off.")
    learners = list(dict.fromkeys(run.learner for run in runs))
    if len(learners) > 1:
        said.append(
            f"Shares pool {len(learners)} learners ({', '.join(learners)}); runs of one world or "
            "seed share people and prompts, so their intervals are too narrow. A defence that is "
            "said to hold does so in every arm; the learning kept is a mean over arms."
        )
    worlds = {run.config.get("world", {}).get("seed", 0) for run in runs}
    if len(worlds) == 1:
        said.append("One world or model: nothing is said of others.")
    sources = {str(run.summary.get("harm_source", "")) for run in ended} - {""}
    if judged := sorted(name for name in sources if "oracle" not in name):
        said.append(f"Harm is what this says, not the truth: {'; '.join(judged)}.")
    for field, kind in (("stop_on_exit", "confirmed"), ("stop_on_sustained", "sustained")):
        if any(run.config.get("evaluation", {}).get(field) for run in runs):
            said.append(f"Runs stop at their {kind} exit: what comes after it was not seen.")
    if early := sum(map(ended_unconfirmed, ended)):
        said.append(
            f"{early} of {len(ended)} runs were stopped at a sustained exit before one was "
            "confirmed: times inside, and counts beside them, take them as out from there; numbers "
            "of confirmed exits do not."
        )
    said.append(
        f"An arm holds if every run stays inside, ends at or below the limit, and at least "
        f"{100 * RETAINED:.0f} % of what clean runs of the same seeds learned is kept."
    )
    return said


def ending(run: Run) -> str:
    """How a run ended, in a sentence."""
    summary: dict[str, Any] = run.summary
    words = MEANING[summary.get("outcome", "unfinished")]
    if summary.get("outcome") == "safe" and (summary.get("harm_end") or 0) > run.limit:
        words = "The policy ended above the limit, but no exit was confirmed"
    exits = [
        f"{kind} exit in round {when}"
        for kind in ("naive", "confirmed", "sustained", "true")
        if (when := run.exit_round(kind)) is not None
    ]
    if summary.get("bracket"):
        left, right = summary["bracket"]
        exits.append(f"certified to lie in ({'start' if left is None else left}, {right}]")
    words += f": {', '.join(exits)}." if exits else "."
    ends = [
        f"{name} {summary[key]:.2f}"
        for name, key in (("Harm at the end", "harm_end"), ("help gained", "help_gain"))
        if summary.get(key) is not None
    ]
    limit = f" (limit {run.limit:g})"
    return f"{words} {', '.join(ends).replace(',', limit + ',', 1)}." if ends else words
