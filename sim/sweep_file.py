"""A sweep as a file: the flags of ``poisonloop sweep`` as YAML or JSON, lists where they vary.

For instance, with flags that are typed beside it winning::

    preset: smoke
    rho: [0, .1, .4]
    defence: [none, refusal_loss, lisa+freeze]
    evaluation: {n_harm: 256}
    seeds: 3
"""

from __future__ import annotations

from typing import Any

from envs.usage import UsageError
from sim.config_file import read_fields
from sim.flags import Options, spelled

NAMED = ("--attack", "--attack.name", "--defence")
"""Flags whose value may be null, which they call ``none``."""
ENDINGS = (".yaml", ".yml", ".json")


def is_sweep_file(word: str | None) -> bool:
    """Whether ``word`` is meant as a file rather than as a preset's name."""
    return word is not None and word.endswith(ENDINGS)


def from_sweep_file(path: str) -> tuple[str | None, Options]:
    """The preset and every flag's values.

    Raises:
        ValueError: no such file, not a mapping, or a value that is neither plain nor a list.
    """
    fields = read_fields(path, "sweep")
    named = fields.pop("preset", None)
    if named is not None and not isinstance(named, str):
        raise UsageError(f"preset={named!r} in {path!r}; allowed: a preset's name")
    flags = _flags(fields, "--")
    names = [flag for flag, _ in flags]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name[2:]} twice in {path!r}; allowed: one of them")
    return named, dict(flags)


def _flags(fields: dict[str, Any], prefix: str) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for name, value in fields.items():
        words = str(name).replace("_", "-")
        if isinstance(value, dict):
            found += _flags(value, f"{prefix}{words}.")
        else:
            values = value if isinstance(value, list) else [value]
            if any(isinstance(v, list | dict) for v in values):
                raise UsageError(f"{name}={value!r}; allowed: a value or a list of values")
            flag = spelled(f"{prefix}{words}")
            nothing = "none" if flag in NAMED else "None"
            found.append((flag, [nothing if v is None else str(v) for v in values]))
    return found
