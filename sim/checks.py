"""What can be refused before anything is built: types, names of components, paths.

Ranges are checked by :class:`sim.config.Config` and by the components' constructors. This module
asks every component named in a config to construct itself, so that a misspelt defence is found in
a second and not after the models are built.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from agents.defence import Defence, defences
from agents.learners import learners
from envs.registry import is_plugin
from sim.config import Config


def check(config: Config) -> None:
    """Refuse what is wrong in ``config`` and can be seen without building anything.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    check_types(Config, vars(config))
    members = [defences.create(spec) for spec in config.defences]
    for name in ("model", "data", "reward_model", "classifier"):
        value = getattr(config.text, name)
        if value and not Path(value).exists():
            kind = "file" if name == "data" else "directory"
            raise ValueError(f"text.{name}={value!r} does not exist; allowed: a local {kind}")
    if not config.text.model:
        _check_embedded(config, members)


def _check_embedded(config: Config, members: list[Defence]) -> None:
    """Make the environment, which needs no built model, and see what the defences ask for."""
    from envs.world import World
    from sim.factory import make_env
    from sim.scenario import world_roles

    unbuilt: Any = SimpleNamespace(environment={"world": config.world.seed})
    make_env(config, unbuilt).close()
    roles = world_roles(World(config.world.seed)).keys()
    for member in members:
        data = {need for need in member.needs if not need.startswith("score:")}
        if missing := sorted(data - roles):
            raise ValueError(
                f"defence {member.spec}: needs {', '.join(missing)}; "
                f"allowed: defences that need of {', '.join(sorted(roles))}"
            )


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
            raise ValueError(f"{path[:-1] or 'config'}: unknown field {name!r}; allowed: {known}")
        hint = hints.get(name, Any)
        section = _section(hint, value)
        if section is None:
            if not _matches(value, hint):
                raise ValueError(f"{path}{name}={value!r}; allowed: {_words(hint)}")
            continue
        inner = vars(value) if dataclasses.is_dataclass(value) else value
        if not isinstance(inner, Mapping):
            known = ", ".join(f.name for f in dataclasses.fields(section))
            raise ValueError(f"{path}{name}={value!r}; allowed: a section with {known}")
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
    return learners.get(name) if isinstance(name, str) else members[0]


def _matches(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in inner)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is ...:
            inner = (inner[0],) * len(value) if isinstance(value, tuple | list) else inner
        return (
            isinstance(value, tuple | list)
            and len(value) == len(inner)
            and all(map(_matches, value, inner))
        )
    if origin is dict:
        return isinstance(value, dict) and all(
            _matches(k, inner[0]) and _matches(v, inner[1]) for k, v in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in inner)
    if origin is tuple:
        return f"a list of {_words(inner[0])}"
    if origin is dict:
        return f"{_words(inner[0])}: {_words(inner[1])} pairs"
    return {type(None): "null", float: "a number", int: "a whole number", str: "text"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def plugins(config: Config) -> Iterator[str]:
    """Specs in ``config`` that name code outside the project."""
    specs = (config.attack.name, *config.feedback.behaviours, *config.defences)
    return (spec for spec in specs if is_plugin(spec))
