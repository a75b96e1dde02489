"""``poisonloop score``: is this defence one, does it hold, and does it survive who knows of it?

First the contract, on a random two-layer model. Then paired runs under the default attack, beside
nothing, the null control ``freeze``, and two published defences; then attackers who adapt: sampling
at a higher temperature, stopping at the exit, a threefold learning rate, twice the rounds. What an
undefended run loses to the same attacker stands beside each. All runs are sweeps into one folder,
so a stopped command is typed again, and further learners or seeds join the card.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from envs.registry import absolute
from envs.usage import UsageError, check_ranges
from sim.checks import check, check_out
from sim.cli import parser_of
from sim.config import Config
from sim.flags import chosen_learner
from sim.presets import preset
from sim.score.arms import Arm, arms, short
from sim.score.folder import CardRun, on_card, planned_runs, refuse_another_card, refuse_other_code


def score(words: list[str]) -> int:
    """Run the contract and the arms; 1 where the contract is broken or a run failed."""
    parser = parser_of("score", __doc__.partition("\n")[0].partition(": ")[2])
    parser.add_argument("defence", help="name, module:Class or path/to/file.py:Class(alpha=2)")
    parser.add_argument("--learner", nargs="+", default=["dpo", "grpo"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=20, help="of every run (default 20)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds 0 to N-1 (default 2)")
    parser.add_argument("--rho", type=float, default=0.4, help="share of adversaries (default .4)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per core)")
    parser.add_argument("--out", type=Path, help="default runs/score-<defence>")
    asked = parser.parse_args(words)
    check_ranges(asked, seeds=">= 1", rounds=">= 1", rho="> 0, <= 1")
    jobs = os.cpu_count() or 1 if asked.jobs is None else asked.jobs
    check_ranges({"jobs": jobs}, jobs=">= 1")
    spec = absolute(asked.defence)
    base = replace(preset("demo"), rounds=asked.rounds)
    base = replace(base, evaluation=replace(base.evaluation, n_true=0))
    bases = {name: replace(base, learner=chosen_learner(base, name)) for name in asked.learner}
    refuse_twice(bases)
    planned = {a: c for known in bases.values() for a, c in arms(known, spec, asked.rho).items()}
    for config in planned.values():
        check(config)
    letters = (c if c.isalnum() else "-" for c in short(spec))
    out = asked.out or Path("runs") / f"score-{''.join(letters)}"
    check_out(out)
    refuse_another_card(planned, spec, out)
    refuse_other_code(spec, out)
    if not keeps_contract(spec, list(dict.fromkeys(c.learner_name for c in bases.values()))):
        return 1
    failed = _measure(planned_runs(planned, range(asked.seeds), out), jobs, out)
    every = on_card(planned, base, spec, out)
    _finish([run for run in every if str(run[2]) not in failed], short(spec), out)
    for run, failure in failed.items():
        print(f"Failed:   {run}: {failure}")
    return 1 if failed else 0


def refuse_twice(bases: Mapping[str, Config]) -> None:
    """Refuse two settings of one learner, whose arms a card could not tell apart.

    Raises:
        ValueError: names the second.
    """
    known: dict[str, Config] = {}
    for typed, config in bases.items():
        if known.setdefault(config.learner_name, config) != config:
            raise UsageError(f"learner={typed!r} is there already; allowed: each learner once")


def keeps_contract(spec: str, learners: list[str]) -> bool:
    """Print every check of the contract; whether none is broken."""
    import torch

    from sim.progress import quiet_loading
    from sim.score.contract import contract

    quiet_loading()
    torch.set_num_threads(1)
    verdicts = contract(spec, learners)
    words = {True: "passed", False: "FAILED", None: "left out"}
    for verdict in verdicts:
        reason = f": {verdict.reason}" if verdict.reason else ""
        print(f"contract {verdict.learner} {verdict.check}: {words[verdict.passed]}{reason}")
    broken = sum(verdict.passed is False for verdict in verdicts)
    if broken:
        checks = f"{broken} check{'s' * (broken > 1)}"
        print(f"poisonloop: {checks} failed, so no run was started", file=sys.stderr)
    return not broken


def _measure(runs: Sequence[CardRun], jobs: int, out: Path) -> dict[str, str]:
    """Run what has not run yet; what failed, by run directory."""
    from sim.sweep import sweep
    from sim.sweep_progress import sweep_progress

    print(f"{len(runs)} runs, {jobs} at a time: {out}/")
    failed: dict[str, str] = {}
    for place in dict.fromkeys(path.parent for _, _, path in runs):
        with sweep_progress() as listener:
            arms = [c for _, c, path in runs if path.parent == place]
            table = sweep(arms, place, jobs, listener, any_code=True)
        failed |= {run["path"]: run["failure"] for run in table["runs"] if run["failure"]}
    return failed


def _finish(runs: Sequence[CardRun], name: str, out: Path) -> None:
    """Write the card of finished runs, if any is under attack."""
    from sim.score.card import write_card

    kept: dict[Arm, list[Path]] = {}
    for arm, _, path in runs:
        kept.setdefault(arm, []).append(path)
    if any(arm.hostile for arm in kept):
        for file in write_card(kept, name, out):
            print(file)
