"""Which recorded runs are equal: those whose configurations differ in nothing that acts.

Nothing that a configuration names is looked up or imported.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from envs.attacks.schedules import WITH_LENGTH, WITH_PERIOD
from envs.registry import shortest

SEEDS = ("seed", "world.seed", "world.model_seed")
"""Fields that make replicates of an arm, not another arm."""
_TOLD = "n_true audit chance_cost chance_limit cvar_share cvar_limit pointwise_limit".split()
_RECORD_ONLY = {"checkpoint_every", "keep_every", "samples_per_round"}
_RECORD_ONLY |= {f"evaluation.{name}" for name in (*_TOLD, "hacked_share")}
"""Fields that change what is written of a run and nothing that happens in it."""
ADDED: dict[str, list[Any]] = {"world.harm_domains": []}
"""Fields that earlier runs lack, with what they were then; an identity has them where they differ,
so that those runs keep theirs."""
_SPECS = {"attack.name", "defences", "feedback.behaviours"}


def identity(config: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """``config`` as text that is equal for equal runs: what cannot act is left out.

    Args:
        config: nested configuration, as recorded.
        without: dotted fields to leave out too.
    """
    known = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in acting(dict(leaves(config)))
        if key not in without and not (key in ADDED and list(value) == ADDED[key])
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
