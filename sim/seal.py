"""JSON that carries its own checksum, so that a flipped bit in it is found and named.

The last entry of a sealed file is ``"checksum": "<16 hexadecimal digits>"``, of all before it. What
never had one is read as it is (older runs, files made by hand); what ends like one must fit.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from envs.usage import blamed_on
from sim.files import dumps, write_atomic

_END = re.compile(r'"[^"]{8}": "[^"]{16}"\s*\}\s*\Z')


def sealed(facts: dict[str, Any]) -> dict[str, Any]:
    """``facts`` with their checksum."""
    return {**facts, "checksum": _checksum(facts)}


def opened(text: str) -> dict[str, Any]:
    """The facts that ``text`` holds, without their checksum.

    Raises:
        ValueError: not a JSON object, or not what was sealed.
    """
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError("not an object")
    told = facts.pop("checksum", None)
    if told is None and _END.search(text) or told is not None and told != _checksum(facts):
        raise ValueError("its checksum does not fit")
    return facts


def write_sealed(path: Path, facts: dict[str, Any], indent: int | None = None) -> None:
    """Write ``facts`` and their checksum as JSON, whole or not at all."""
    plain = json.loads(dumps(sealed(facts)))
    write_atomic(path, (json.dumps(plain, indent=indent) + "\n").encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """What :func:`write_sealed` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    with blamed_on(f"{path.stem}={str(path)!r} is damaged", "the file as it was written"):
        return opened(path.read_bytes().decode())


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.blake2b(dumps(facts).encode(), digest_size=8).hexdigest()
