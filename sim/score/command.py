"""``poisonloop score``: is this defence one, does it hold, and does it survive who knows of it?

First the contract, on a random two-layer model. Then paired runs under the default attack, beside
nothing, the null control ``freeze``, and two published defences; then attackers who adapt: sampling
at a higher temperature, stopping at the exit, a threefold learning rate, twice the rounds. What an
undefended run loses to the same attacker stands beside each. All runs are sweeps into one folder,
so a stopped command is typed again.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from envs.registry import absolute, brief
from envs.usage import UsageError, check_ranges
from sim.checks import check, check_out, settled
from sim.cli import parser_of
from sim.config import DEFAULT_ATTACK, AttackConfig, Config
from sim.flags import chosen_learner
from sim.presets import preset

BASELINES = {
    "none": (),
    "freeze": ("freeze",),
    "refusal_loss": ("refusal_loss",),
    "lisa": ("lisa",),
}
"""Arms that stand beside the defence in every card."""
STANDARD, EARLY, LONG = "default", "early stopping", "rounds x2"
ATTACKERS = (STANDARD, "temperature 1.5", EARLY, "learner.lr x3", LONG)
"""The default attacker, then those who adapt."""


class Arm(NamedTuple):
    """Which runs of a card belong together."""

    learner: str
    defence: str
    attacker: str
    hostile: bool = True


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
    spec = absolute(asked.defence)
    name = short(spec)
    out = asked.out or Path("runs") / f"score-{''.join(c if c.isalnum() else '-' for c in name)}"
    base = replace(preset("demo"), rounds=asked.rounds)
    base = replace(base, evaluation=replace(base.evaluation, n_true=0))
    bases = [replace(base, learner=chosen_learner(base, learner)) for learner in asked.learner]
    plans = [arms(config, spec, asked.rho) for config in bases]
    planned = {arm: config for plan in plans for arm, config in plan.items()}
    for config in planned.values():
        check(config)
    check_out(out)
    if not keeps_contract(spec, list(dict.fromkeys(config.learner_name for config in bases))):
        return 1
    refuse_other_code(planned, range(asked.seeds), out)
    return _measure(planned, range(asked.seeds), out, asked.jobs, name)


def short(spec: str) -> str:
    """``spec`` without the file or module of its class, as a card calls it."""
    target, paren, arguments = brief(spec).partition("(")
    return f"{target.rpartition(':')[2]}{paren}{arguments}"


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
        print(f"poisonloop: {broken} checks failed, so no run was started", file=sys.stderr)
    return not broken


def arms(base: Config, spec: str, rho: float) -> dict[Arm, Config]:
    """The runs of one learner by arm, under seed 0.

    The defence and the undefended policy meet every attacker, the other baselines the default one.
    Clean, undefended twins tell what there was to learn; who stops early needs none of its own.
    """
    learner, mine = base.learner_name, short(spec)
    found: dict[Arm, Config] = {}
    for attacker in ATTACKERS:
        clean = adapted(base, attacker)
        hostile = replace(clean, attack=AttackConfig(DEFAULT_ATTACK, rho=rho))
        known = BASELINES if attacker == STANDARD else {"none": ()}
        if attacker != EARLY:
            found[Arm(learner, "none", attacker, hostile=False)] = clean
        for name, specs in {**known, mine: (spec,)}.items():
            found[Arm(learner, name, attacker)] = replace(hostile, defences=specs)
    return found


def adapted(base: Config, attacker: str) -> Config:
    """``base`` as ``attacker`` of :data:`ATTACKERS` trains it."""
    if attacker == "temperature 1.5":
        return replace(base, sampler=replace(base.sampler, temperature=1.5))
    if attacker == EARLY:
        return replace(base, evaluation=replace(base.evaluation, stop_on_exit=True))
    if attacker == "learner.lr x3":
        return replace(base, learner=replace(base.learner, lr=3 * base.learner.lr))
    return replace(base, rounds=2 * base.rounds) if attacker == LONG else base


def folder(out: Path, arm: Arm) -> Path:
    """Where the runs of ``arm`` lie: one folder cannot hold a run at two lengths."""
    return out / ("longer" if arm.attacker == LONG else "runs")


def cells(planned: dict[Arm, Config], seeds: range, out: Path) -> list[tuple[Arm, Config, Path]]:
    """Every run: its arm, its config as recorded, its directory."""
    from sim.sweep import directory

    found = [(arm, settled(replace(c, seed=seed))) for arm, c in planned.items() for seed in seeds]
    return [(arm, c, folder(out, arm) / directory(c)) for arm, c in found]


def refuse_other_code(planned: dict[Arm, Config], seeds: range, out: Path) -> None:
    """Refuse a folder with runs of another version of the file that is scored.

    Raises:
        ValueError: names the run.
    """
    from sim.manifest import plugin_hashes

    for _, config, path in cells(planned, seeds, out):
        file = path / "manifest.json"
        if not file.is_file():
            continue
        if json.loads(file.read_text()).get("plugin_hashes") != plugin_hashes(config):
            raise UsageError(
                f"out={str(out)!r}: {path.name} was run with other code of "
                f"{', '.join(config.defences)}; allowed: another --out, or delete that folder"
            )


def _measure(
    planned: dict[Arm, Config], seeds: range, out: Path, jobs: int | None, name: str
) -> int:
    from sim.score.card import write_card
    from sim.sweep import sweep
    from sim.sweep_progress import sweep_progress

    runs = cells(planned, seeds, out)
    print(f"{len(runs)} runs, {jobs or os.cpu_count()} at a time: {out}/")
    failed: list[dict[str, Any]] = []
    for place in dict.fromkeys(folder(out, arm) for arm in planned):
        with sweep_progress() as listener:
            table = sweep([c for _, c, path in runs if path.parent == place], place, jobs, listener)
        failed += [run for run in table["runs"] if run["failure"]]
    broken = {run["path"] for run in failed}
    done = {arm: [path for a, _, path in runs if a == arm] for arm in planned}
    kept = {arm: [p for p in paths if str(p) not in broken] for arm, paths in done.items()}
    for path in write_card({arm: paths for arm, paths in kept.items() if paths}, name, out):
        print(path)
    for run in failed:
        print(f"Failed:   {run['path']}: {run['failure']}")
    return 1 if failed else 0
