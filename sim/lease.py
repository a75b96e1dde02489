"""Who is at work on a cell of a sweep, so that drivers which share a folder never share a cell.

A cell's leases are files ``.leases/<cell>.<n>``; the one with the largest number counts. Each holds
its owner and is touched every few seconds. One whose owner is dead (on this host), or that has not
been touched for long (on another), is taken over by making number n + 1, which only one process
can; an empty one is free. Numbers never begin anew, so nobody is deceived by what he saw a while
ago. Ages are the file system's own: clocks of hosts may differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEASES = ".leases"
"""Folder of a sweep's leases."""
BEAT = 5.0
"""Seconds between two touches."""
STALE = 60.0
"""Seconds without a touch after which an owner on another host counts as dead."""


class Lease:
    """The right to work on one cell, while :meth:`held`."""

    def __init__(self, folder: Path, cell: str, number: int):
        self.folder, self.cell, self.number = folder, cell, number
        self.path = folder / f"{cell}.{number}"

    @classmethod
    def claim(cls, folder: Path, cell: str) -> Lease | None:
        """The lease of ``cell``, or None while another process has it."""
        folder.mkdir(parents=True, exist_ok=True)
        known = _numbers(folder, cell)
        last = known[-1] if known else 0
        if last and owner(folder, cell) is not None:
            return None
        lease = cls(folder, cell, last + 1)
        if not lease._make() or not lease.held():
            return None
        for number in known:
            (folder / f"{cell}.{number}").unlink(missing_ok=True)
        return lease

    def _make(self) -> bool:
        """Write the file with its owner in it, if there is none."""
        with tempfile.NamedTemporaryFile("w", dir=self.folder, prefix=".new-") as new:
            pid = os.getpid()
            json.dump({"host": socket.gethostname(), "pid": pid, "born": _born(pid)}, new)
            new.flush()
            os.fsync(new.fileno())
            try:
                os.link(new.name, self.path)
            except FileExistsError:
                return False
        return True

    def held(self) -> bool:
        """Whether nobody has taken it over."""
        return _numbers(self.folder, self.cell)[-1:] == [self.number]

    @contextmanager
    def beating(self) -> Iterator[None]:
        """A block at whose end the lease is free, and that touches it until then."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT):
                with contextlib.suppress(OSError):  # a full or absent disk: the next one may do
                    os.utime(self.path)

        thread = threading.Thread(target=beat, daemon=True, name="lease")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with contextlib.suppress(OSError):
                os.truncate(self.path, 0)


def owner(folder: Path, cell: str) -> str | None:
    """``host:pid`` of the process that is at work on ``cell``; None where there is none."""
    numbers = _numbers(folder, cell)
    if not numbers:
        return None
    path = folder / f"{cell}.{numbers[-1]}"
    try:
        text, touched = path.read_text(), path.stat().st_mtime
    except FileNotFoundError:  # taken over or freed at this moment
        return None
    if not text:
        return None
    fresh = _now(folder) - touched < STALE
    try:
        told = json.loads(text)
        name = f"{told['host']}:{told['pid']}"
        if told["host"] == socket.gethostname() and told["born"] is not None:
            return name if _born(told["pid"]) == told["born"] else None  # stopped is not dead
    except (ValueError, KeyError, TypeError):  # a disk that lost what was written
        name = "unknown"
    return name if fresh else None


def _numbers(folder: Path, cell: str) -> list[int]:
    found = (path.name.removeprefix(f"{cell}.") for path in folder.glob(f"{_plain(cell)}.*"))
    return sorted(int(number) for number in found if number.isdecimal())


def _plain(name: str) -> str:
    """``name`` with nothing in it that a pattern would read."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _now(folder: Path) -> float:
    """The time by the clock that dates files in ``folder``."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as new:
            return os.stat(new.name).st_mtime
    except OSError:  # who may not write may still look
        return time.time()


def _born(pid: int) -> str | None:
    """When a process began, in ticks since this host did; None if it is dead or cannot be asked."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"
