"""The two append-only files of a run, ``rounds.jsonl`` and ``commits.jsonl``, each written twice.

Checkpoints of long ago are gone, so a row or a commit that is lost could not be had again: the
second writing, in ``.copy/``, stands in for the first wherever that is cut or damaged. What is
right is told by the checksum in every commit, and by the hash of all rows that it holds.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sim.files import append, dumps, told_of, write_atomic
from sim.seal import opened, sealed

ROUNDS, COMMITS = "rounds.jsonl", "commits.jsonl"
COPY = ".copy"
"""Folder of the second writing."""

NOTHING: dict[str, Any] = {"round": 0, "rounds": [0, hashlib.blake2b(digest_size=16).hexdigest()]}
"""A commit before the first."""


class Journal:
    """Rows and commits of the run directory ``path``."""

    def __init__(self, path: Path):
        self.path = path
        self._hash = hashlib.blake2b(digest_size=16)
        self._length = 0

    def _both(self, name: str) -> list[Path]:
        return [self.path / name, self.path / COPY / name]

    def row(self, row: dict[str, Any]) -> None:
        """Append a row."""
        line = (dumps(row) + "\n").encode()
        for file in self._both(ROUNDS):
            append(file, line)
        self._hash.update(line)
        self._length += len(line)

    def commit(self, round: int, files: dict[str, Any]) -> None:
        """Vouch for the rows until ``round``, and for ``files``: length and hash by name."""
        for file in self._both(ROUNDS):
            with told_of(file), open(file, "rb") as rows:
                os.fsync(rows.fileno())
        rows_hash = [self._length, self._hash.copy().hexdigest()]
        line = _line({"round": round, "rounds": rows_hash, "files": files})
        for file in self._both(COMMITS):
            append(file, line, sync=True)

    def commits(self) -> list[dict[str, Any]]:
        """What was committed: round, length and hash of every file, in order."""
        texts = [f.read_bytes() for f in self._both(COMMITS) if f.is_file()]
        return max(map(_commits, dict.fromkeys(texts)), key=len, default=[])

    def rows(self, commit: dict[str, Any]) -> bytes | None:
        """The rows that ``commit`` vouches for, None if they are damaged or gone."""
        length, digest = commit["rounds"]
        for file in self._both(ROUNDS):
            head = file.read_bytes()[:length] if file.is_file() else b""
            if hashlib.blake2b(head, digest_size=16).hexdigest() == digest:
                return head
        return None

    def later(self, commit: dict[str, Any]) -> bytes:
        """What follows the rows of ``commit``; nothing vouches for it yet, its end may be cut."""
        length = commit["rounds"][0]
        tails = [f.read_bytes()[length:] for f in self._both(ROUNDS) if f.is_file()]
        return max(tails, key=len, default=b"")

    def go_back(self, rows: bytes, commits: list[dict[str, Any]]) -> None:
        """Stand where ``rows`` are all rows and ``commits`` all commits."""
        for file in self._both(ROUNDS):
            write_atomic(file, rows)
        self._hash = hashlib.blake2b(rows, digest_size=16)
        self._length = len(rows)
        for file in self._both(COMMITS):
            write_atomic(file, b"".join(map(_line, commits)))


def _line(commit: dict[str, Any]) -> bytes:
    return (dumps(sealed(commit)) + "\n").encode()


def _commits(text: bytes) -> list[dict[str, Any]]:
    """The commits in ``text`` until the first that is damaged."""
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            found.append(opened(line.decode()))
        except ValueError:
            break
    return found
