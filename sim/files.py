"""Files and folders that are there whole or not at all, and written by one process at a time."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from envs.usage import Interrupted, UsageError


def dumps(value: Any) -> str:
    """Valid JSON: missing is null, NaN is an error, numpy scalars are numbers."""
    return json.dumps(value, allow_nan=False, default=lambda x: x.item())


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with all their columns; empty where a row has no such value."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds all of it or what it held before.

    Raises:
        Interrupted: the disk takes no more; names the path.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with told_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # half a file only takes room
            raise


def append(path: Path, data: bytes, sync: bool = False) -> None:
    """Add ``data`` at the end of ``path``; with ``sync`` it is on the disk when this returns.

    Raises:
        Interrupted: the disk takes no more; names the path, which may hold a part of ``data``.
    """
    with told_of(path):
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """A block that writes ``path``: if it fails, the message names that.

    Raises:
        Interrupted: it failed.
    """
    try:
        yield
    except OSError as error:
        raise Interrupted(f"{path}: {error.strerror}{remedy(error)}") from error


def remedy(error: OSError) -> str:
    """What to do about a failed write, with a leading semicolon; empty where nothing is known."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "; make room, what was recorded before can be continued" if full else ""


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[None]:
    """A block in which no other process writes ``folder``, which is called ``name``.

    Raises:
        ValueError: another process does.
    """
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UsageError(
            f"{name}={str(folder)!r} is being written by another process; allowed: wait for it"
        ) from None


def check_out(out: Path, name: str = "out") -> None:
    """Refuse a place where no directory can be made or filled, before anything is computed for it.

    Args:
        out: the directory.
        name: of the argument that it was given by.

    Raises:
        ValueError: names the place and the reason.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{name}={str(out)!r} is a file; allowed: a directory, or a new name")
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise UsageError(
            f"{name}={str(out)!r}: {error.strerror}; allowed: a place that can be written to"
        ) from None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out``, which takes its name when the block has filled it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        folder = Path(work) / "whole"
        folder.mkdir()
        yield folder
        os.rename(folder, out)
