"""Who is at work on a run of a sweep, so that drivers which share a folder never share a run.

A run's leases are files ``.leases/<run>.<n>``; the one with the largest number counts. Each holds
its owner and is touched every few seconds. One whose owner is dead (on this host), or that has not
been touched for long (on another), is taken over by making number n + 1, which only one process
can; an empty one is free. Numbers never begin anew, so nobody is deceived by what he saw a while
ago. Ages are the file system's own: clocks of hosts may differ.
"""

from __future__ import annotations

import contextlib
import glob
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
    """The right to work on one run, while :meth:`held`."""

    def __init__(self, folder: Path, run: str, number: int):
        self.folder, self.run, self.number = folder, run, number
        self.path = folder / f"{run}.{number}"

    @classmethod
    def claim(cls, folder: Path, run: str) -> Lease | None:
        """The lease of ``run``, or None while another process has it."""
        folder.mkdir(parents=True, exist_ok=True)
        known = _numbers(folder, run)
        last = known[-1] if known else 0
        if last and owner(folder, run) is not None:
            return None
        lease = cls(folder, run, last + 1)
        if not lease._make() or not lease.held():
            return None
        for number in known:
            (folder / f"{run}.{number}").unlink(missing_ok=True)
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
        return _numbers(self.folder, self.run)[-1:] == [self.number]

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


def owner(folder: Path, run: str) -> str | None:
    """``host:pid`` of the process that is at work on ``run``; None where there is none."""
    numbers = _numbers(folder, run)
    if not numbers:
        return None
    path = folder / f"{run}.{numbers[-1]}"
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


def _numbers(folder: Path, run: str) -> list[int]:
    found = (path.name.removeprefix(f"{run}.") for path in folder.glob(f"{glob.escape(run)}.*"))
    return sorted(int(number) for number in found if number.isdecimal())


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
