"""Worker processes that work off runs one after another and tell of every round.

Processes are spawned, not forked: a forked torch may hang. Each has a pipe of its own, so a process
that dies (killed, out of memory) takes down the one run that it was at: that run is recorded as
failed, another process takes its place, and the rest go on. A worker whose parent is gone ends at
once, in the middle of a round if need be, so that the next sweep finds nobody in its directories.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sim.lease import LEASES, Lease
from sim.listener import Listener
from sim.sweep_progress import SweepListener
from sim.sweep_status import error_file

AGAIN = 2.0
"""Seconds until a run that another sweep is at work on is asked for again."""


class Job(NamedTuple):
    """One run to do: where, the dict of its config, and the sink that shows its rounds."""

    path: Path
    config: dict[str, Any]
    track: str | None = None


class Sender(Protocol):
    """Where a worker tells of its rounds."""

    def send(self, message: tuple[str, Any], /) -> None:
        """Tell ``message``, a kind and its content."""


class Worker:
    """A process, the end of its pipe, and the job it is at."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        """Start on ``job``."""
        self.job = job
        self.pipe.send(job)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def work_off(jobs: Sequence[Job], at_once: int | None, listener: SweepListener) -> dict[Path, str]:
    """Do every job, each in one of so many processes.

    Args:
        jobs: the runs.
        at_once: runs at a time; one per core when None.
        listener: hears of every round and every end.

    Returns:
        Failures by path.
    """
    failures: dict[Path, str] = {}
    waiting, elsewhere = deque(jobs), deque[tuple[float, Job]]()
    workers = [Worker() for _ in range(min(at_once or os.cpu_count() or 1, len(jobs)))]
    try:
        while True:
            while elsewhere and elsewhere[0][0] <= time.monotonic():
                waiting.append(elsewhere.popleft()[1])
            for worker in workers:
                if worker.job is None and waiting:
                    worker.give(waiting.popleft())
            busy = [worker for worker in workers if worker.job]
            if not busy and not elsewhere:
                return failures
            ready = wait_for([worker.pipe for worker in busy], AGAIN if elsewhere else None)
            for worker in (w for w in busy if w.pipe in ready):
                job, (kind, content) = worker.job, _hear(worker)
                assert job, "an idle worker has nothing to say"
                if kind == "round":
                    listener.round(job.path, content)
                elif kind == "done":
                    listener.done(job.path, content)
                elif kind == "elsewhere":
                    elsewhere.append((time.monotonic() + AGAIN, job))
                else:
                    failures[job.path] = content
                    listener.failed(job.path, content)
                if not worker.process.is_alive():
                    worker.stop()
                    workers[workers.index(worker)] = Worker()
    finally:
        for worker in workers:
            worker.stop()


def _hear(worker: Worker) -> tuple[str, Any]:
    """One message of ``worker``, which has no job after one that is not of a round."""
    try:
        kind, content = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        kind, content = "failed", f"its process ended with code {code} (killed, or out of memory)"
    if kind != "round":
        worker.job = None
    return kind, content


class _LeaseLost(Exception):
    """This process was taken for dead, and another goes on with its run."""


class _Relay(Listener):
    """Sends a run's rounds through the pipe, as long as the run is this process's."""

    def __init__(self, pipe: Sender, lease: Lease):
        self.pipe = pipe
        self.lease = lease

    def round(self, row: dict[str, Any]) -> None:
        """Pass the row on.

        Raises:
            _LeaseLost: the lease is another's.
        """
        if not self.lease.held():
            raise _LeaseLost
        self.pipe.send(("round", row))


def serve(pipe: Connection) -> None:
    """What a worker process does: jobs, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", UserWarning)  # the parent has said what is unusual
    try:
        while True:
            pipe.send(claimed(pipe.recv(), pipe))
    except (EOFError, BrokenPipeError):
        return


def _end_with_parent() -> None:
    """Wait for the parent's death, then die as by kill -9, which a run directory survives."""
    parent = multiprocessing.parent_process()
    assert parent, "a worker is spawned by a pool"
    parent.join()
    os._exit(1)


def claimed(job: Job, pipe: Sender) -> tuple[str, Any]:
    """Do one job, unless another process is at it; what came of it, and of its rounds by ``pipe``.

    Returns:
        ``("done", summary)``, ``("failed", reason)``, or ``("elsewhere", None)`` where another
        sweep is at work on it.
    """
    try:
        lease = Lease.claim(job.path.parent / LEASES, job.path.name)
    except OSError as error:
        return "failed", f"{type(error).__name__}: {error}"
    if lease is None:
        return "elsewhere", None
    with lease.beating():
        try:
            return _do(job, _Relay(pipe, lease))
        except _LeaseLost:
            return "elsewhere", None


def _do(job: Job, relay: Listener) -> tuple[str, Any]:
    """Run or resume one job; a failure is told in a line, and in full beside the directory."""
    from sim.config import from_dict
    from sim.progress import quiet_loading
    from sim.resume import is_finished
    from sim.run import run
    from sim.seal import read_sealed
    from sim.track import tracked

    quiet_loading()
    told = error_file(job.path)
    try:
        config = from_dict(job.config)
        if is_finished(job.path, config):
            return "done", read_sealed(job.path / "summary.json")
        resume = (job.path / "manifest.json").is_file()
        summary = run(config, job.path, resume=resume, listener=tracked(relay, job.track, job.path))
    except (BrokenPipeError, _LeaseLost):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        try:
            told.write_text(traceback.format_exc())
        except OSError:  # a full disk
            return "failed", reason
        return "failed", f"{reason} (see {told})"
    told.unlink(missing_ok=True)
    return "done", summary
