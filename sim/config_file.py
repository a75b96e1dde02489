"""Configs as YAML or JSON files: what ``--config`` reads and ``--print-config`` writes.

Files are read by YAML's safe loader (JSON is YAML), never by one that constructs objects, and may
give only some of the fields: the rest are the preset's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from envs.usage import UsageError, blamed_on
from sim.checks import check_types
from sim.config import Config, from_dict
from sim.seal import read_sealed


def from_file(base: Config, path: str) -> Config:
    """``base`` with the fields that a YAML or JSON file gives.

    Raises:
        ValueError: no such file, not a mapping, unknown fields, or values of another type.
    """
    return checked(_merged(base.to_dict(), _numbers(read_fields(path))))


def read_fields(path: str, name: str = "config") -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds; of a run's ``manifest.json`` its config.

    Args:
        path: of the file.
        name: of the argument that it was given by.

    Raises:
        ValueError: no such file, not a mapping, or a key that stands there twice.
    """
    told = f"{name}={path!r}"
    try:
        values = yaml.load(Path(path).read_text(), _Loader)  # noqa: S506, a safe loader
    except OSError as error:
        raise UsageError(f"{told}: {error.strerror}; allowed: a readable file") from None
    except _Repeated as error:
        raise UsageError(f"{told} has {error.args[0]!r} twice; allowed: every key once") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{told} is not valid YAML or JSON: {reason}") from None
    if isinstance(values, dict) and "git" in values:  # a manifest
        values = values.get("config")
    if not isinstance(values, dict):
        held = "nothing" if values is None else type(values).__name__
        raise UsageError(f"{told} holds {held}; allowed: fields: values")
    return values


class _Repeated(yaml.YAMLError):
    """A key that a mapping has twice."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which would let the last of two equal keys win; here that is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The next mapping.

        Raises:
            YAMLError: a key stands there twice.
        """
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise _Repeated(key)
        return node


def from_manifest(path: Path) -> Config:
    """The config of the run whose ``manifest.json`` is at ``path``.

    Raises:
        ValueError: it is damaged.
    """
    with blamed_on(f"manifest={str(path)!r} is damaged", "what a run wrote"):
        return checked(read_sealed(path)["config"])


def checked(values: dict[str, Any]) -> Config:
    """The config that ``values`` spell, types compared.

    Raises:
        ValueError: unknown fields, or values of another type.
    """
    check_types(Config, values)
    return from_dict(values)


def _numbers(value: Any) -> Any:
    """``value`` with 1e-4 a number, which YAML 1.1 reads as text for want of a dot."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, section by section; another learner starts from its own defaults."""
    if "name" in new and new["name"] != old.get("name") and "lr" in old:
        return new
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merged(old[key], value) if both else value
    return merged


def to_yaml(config: Config) -> str:
    """Text that ``--config`` reads back to an equal config."""
    return yaml.safe_dump(json.loads(json.dumps(config.to_dict())), sort_keys=False)
