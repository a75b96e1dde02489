"""What runs of one experiment are called: by their attack, their defences, and what else differs.

Runs that differ in seeds only are replicates of one arm, and runs that differ in nothing that acts
are one run, wherever they lie. Names are made from the recorded configurations as they stand;
nothing that a configuration names is looked up or imported.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from envs.attacks.schedules import WITH_LENGTH, WITH_PERIOD
from envs.registry import brief, shortest

SEEDS = ("seed", "world.seed", "world.model_seed")
"""Fields that make replicates of an arm, not another arm."""
FORK = ("fork.at", "fork.before")
"""Fields that a run has which was forked: where, and what was otherwise until then."""
_NAMED = {"learner.name", "attack.name", "attack.rho", "defences", *FORK, *SEEDS}
_TOLD = "n_true audit chance_cost chance_limit cvar_share cvar_limit pointwise_limit".split()
_RECORD_ONLY = {"checkpoint_every", "keep_every", "samples_per_round"}
_RECORD_ONLY |= {f"evaluation.{name}" for name in (*_TOLD, "hacked_share")}
"""Fields that change what is written of a run and nothing that happens in it."""
_ADDED: dict[str, list[Any]] = {"world.harm_domains": []}
"""Fields that earlier runs lack, with what they were then; an identity has them where they differ,
so that those runs keep theirs."""
_SPECS = {"attack.name", "defences", "feedback.behaviours"}


def arm_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One name per configuration; equal names are replicates.

    Learners are named where they differ. Settings are compared within a learner, since learners
    have different ones, and only where they act.
    """
    fields = [{**_ADDED, **dict(leaves(config))} for config in configs]
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


def identity(config: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """``config`` as text that is equal for equal runs: what cannot act is left out.

    Args:
        config: nested configuration, as recorded.
        without: dotted fields to leave out too.
    """
    known = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in acting(dict(leaves(config)))
        if key not in without and not (key in _ADDED and list(value) == _ADDED[key])
    }
    return json.dumps(known, sort_keys=True)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested configuration by dotted path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def acting(known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flat fields that make a difference to what happens, with specs in their shortest form.

    Left out are an attack that nobody carries out, the times that its schedule does not use, a stop
    or gold questions that nobody asked for, the embedded world of a run on real text and the
    reverse, and what is only recorded.
    """
    unused = _unused(known)
    for key, value in known.items():
        if key not in unused and key.partition(".")[0] not in unused:
            yield key, _shortest(value) if key in _SPECS else value


def _unused(known: Mapping[str, Any]) -> set[str]:
    """Fields and whole sections of ``known`` that cannot act."""
    unused = {*_RECORD_ONLY, "world" if known.get("text.model") else "text"}
    if not known.get("evaluation.stop_on_sustained"):
        unused |= {"evaluation.stop_on_sustained", "evaluation.sustained"}
    if not (known.get("feedback.gold_share") or known.get("feedback.gold_harmful")):
        unused |= {"feedback.gold_share", "feedback.gold_harmful"}
    if not known.get("attack.rho") or shortest(str(known.get("attack.name"))) == "none":
        return {*unused, "attack"}
    schedule = known.get("attack.schedule", "constant")
    if schedule == "constant":
        unused.add("attack.start")
    if schedule not in WITH_LENGTH:
        unused.add("attack.length")
    if schedule not in WITH_PERIOD:
        unused.add("attack.period")
    return unused


def _shortest(specs: Any) -> Any:
    """A spec or several, as recorded: a string or a list of strings."""
    if isinstance(specs, str):
        return shortest(specs)
    return [shortest(spec) for spec in specs]
