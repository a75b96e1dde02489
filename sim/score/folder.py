"""The folder of a card: where its runs lie, whose they are, and what else stands on the card.

One folder is one card: of one defence, one attack and share of adversaries, and one length. Later
commands may add learners and seeds to it, and those that were asked for before stay on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.usage import UsageError
from sim.checks import settled
from sim.config import Config
from sim.manifest import plugin_hashes
from sim.resume import is_finished, saved_config
from sim.score.arms import LONG, Arm, arms
from sim.seal import read_sealed
from sim.sweep import directory

USUAL, LONGER = "runs", "longer"
"""Folders of the runs: one cannot hold a run at two lengths."""
CardRun = tuple[Arm, Config, Path]


def folder(out: Path, arm: Arm) -> Path:
    """Where the runs of ``arm`` lie."""
    return out / (LONGER if arm.attacker == LONG else USUAL)


def planned_runs(planned: Mapping[Arm, Config], seeds: range, out: Path) -> list[CardRun]:
    """Every run: its arm, its config as recorded, its directory."""
    found = [(arm, settled(replace(c, seed=seed))) for arm, c in planned.items() for seed in seeds]
    return [(arm, c, folder(out, arm) / directory(c)) for arm, c in found]


def saved(out: Path) -> dict[Path, Config]:
    """The config of every run in ``out``, finished or not.

    Raises:
        ValueError: a damaged manifest.
    """
    places = sorted(out.glob(f"{USUAL}/*")) + sorted(out.glob(f"{LONGER}/*"))
    known = {place: saved_config(place) for place in places}
    return {place: config for place, config in known.items() if config is not None}


def refuse_another_card(planned: Mapping[Arm, Config], spec: str, out: Path) -> None:
    """Refuse a folder whose runs are not of the card that is asked for.

    Args:
        planned: its runs under seed 0.
        spec: the defence, with its path in full.
        out: the folder.

    Raises:
        ValueError: the runs there have another attack, length, world, defence or learner settings.
    """
    for path, config in saved(out).items():
        wrong = _difference(planned, spec, config, longer=path.parent.name == LONGER)
        if wrong is not None:
            field, asked, found = wrong
            raise UsageError(
                f"{field}={asked!r} with out={str(out)!r}, whose runs are of {found!r}; "
                "allowed: the same, or another --out"
            )


def _difference(
    planned: Mapping[Arm, Config], spec: str, config: Config, longer: bool
) -> tuple[str, Any, Any] | None:
    """What the saved ``config`` has and the card's runs have not: a field, and both values."""
    like = next(c for a, c in planned.items() if a.hostile and (a.attacker == LONG) == longer)
    pairs: dict[str, tuple[Any, Any]] = {"rounds": (like.rounds, config.rounds)}
    pairs["world.seed"] = (like.world.seed, config.world.seed)
    if config.attack.rho:  # a clean twin has neither
        pairs["rho"] = (like.attack.rho, config.attack.rho)
        pairs["attack"] = (like.attack.name, config.attack.name)
    if longer and config.defences:  # no baseline meets an attacker who adapts
        pairs["defence"] = (spec, config.defences[0])
    known = [c.learner for c in planned.values() if c.learner_name == config.learner_name]
    if known and config.learner not in known:
        pairs["learner"] = (known[0], config.learner)
    if longer and like.rounds != config.rounds:  # said as it is typed
        pairs["rounds"] = (like.rounds // 2, config.rounds // 2)
    return next(((field, *both) for field, both in pairs.items() if both[0] != both[1]), None)


def refuse_other_code(spec: str, out: Path) -> None:
    """Refuse a folder with runs of another version of the file that is scored.

    Raises:
        ValueError: names the run.
    """
    for path, config in saved(out).items():
        if config.defences != (spec,):
            continue
        began = read_sealed(path / "manifest.json").get("plugin_hashes")
        if began != plugin_hashes(config):
            raise UsageError(
                f"out={str(out)!r}: {path.name} was run with other code of {spec}; "
                "allowed: another --out, or delete that folder"
            )


def on_card(planned: Mapping[Arm, Config], base: Config, spec: str, out: Path) -> list[CardRun]:
    """The finished runs of the card: of the learners and seeds asked for, and of those before.

    Args:
        planned: the runs that are asked for, under seed 0.
        base: what all runs of the card share.
        spec: the defence.
        out: the folder.
    """
    before = list(saved(out).values())
    asked = {config.learner_name for config in planned.values()}
    usual: dict[str, Config] = {}
    for config in sorted(before, key=lambda config: config.learner.lr):  # last: the threefold rate
        usual.setdefault(config.learner_name, replace(base, learner=config.learner))
    rho = next(config.attack.rho for arm, config in planned.items() if arm.hostile)
    shown = {
        arm: config
        for name, known in usual.items()
        if name not in asked
        for arm, config in arms(known, spec, rho).items()
    }
    seeds = range(1 + max((config.seed for config in before), default=-1))
    every = planned_runs({**shown, **planned}, seeds, out)
    return [run for run in every if is_finished(run[2], run[1])]
