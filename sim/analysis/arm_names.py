"""What runs of one experiment are called: by their attack, their defences, and what else differs.

Runs that differ in seeds only are replicates of one arm, and runs that differ in nothing that acts
are one run, wherever they lie (:mod:`sim.identity`). Names are made from the recorded
configurations as they stand; nothing that a configuration names is looked up or imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from envs.registry import brief
from sim.identity import ADDED, SEEDS, acting, leaves

FORK = ("fork.at", "fork.before")
"""Fields that a run has which was forked: where, and what was otherwise until then."""
_NAMED = {"learner.name", "attack.name", "attack.rho", "defences", *FORK, *SEEDS}


def arm_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One name per configuration; equal names are replicates.

    Learners are named where they differ. Settings are compared within a learner, since learners
    have different ones, and only where they act.
    """
    fields = [{**ADDED, **dict(leaves(config))} for config in configs]
    learners = [known.get("learner.name") for known in fields]
    values: dict[tuple[Any, str], set[str]] = {}
    for learner, known in zip(learners, fields, strict=True):
        for key, value in acting(known):
            values.setdefault((learner, key), set()).add(repr(value))
    several = len(set(learners)) > 1
    names = []
    for learner, known in zip(learners, fields, strict=True):
        more = [
            f"{key}={value}"
            for key, value in acting(known)
            if key not in _NAMED and len(values[learner, key]) > 1
        ]
        name = " ".join([base_name(known), *more])
        names.append(f"{learner}: {name}" if several else name)
    befores: dict[str, set[Any]] = {}
    for name, known in zip(names, fields, strict=True):
        befores.setdefault(name, set()).add(known.get("fork.before"))
    return [
        f"{name} (before: {known['fork.before']})" if len(befores[name]) > 1 else name
        for name, known in zip(names, fields, strict=True)
    ]


def base_name(known: Mapping[str, Any]) -> str:
    """Attack and defences, from the flat fields of a configuration; of a fork, since when."""
    known = dict(acting(known))
    rho = known.get("attack.rho")
    attack = f"{brief(str(known.get('attack.name')))} ρ={rho:g}" if rho else "clean"
    at = known.get("fork.at")
    fork = "" if at is None else f" from round {at}"
    return " + ".join([attack, *map(brief, known.get("defences", []))]) + fork


def replicate(known: Mapping[str, Any]) -> str:
    """Which replicate of its arm a run is, in words; runs of one replicate are paired."""
    known = dict(acting(known))
    words = [f"seed {known.get('seed', 0)}"]
    if known.get("world.seed"):
        words.append(f"world {known['world.seed']}")
    if known.get("world.model_seed"):
        words.append(f"models {known['world.model_seed']}")
    return ", ".join(words)
