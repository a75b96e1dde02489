"""The pool of a sweep on a Ray cluster: the same jobs, leases and result files on its nodes.

Every node sees the sweep's folder at the same path and has poisonloop installed. A run is one task
of ``threads`` cores, and of one card where it asks for one. A worker or node that dies takes down
the attempt that it was at: the task begins anew elsewhere and goes on from the last checkpoint, at
once where the owner of its lease is seen to be dead, after the lease's time where it is not.

Rounds are told through an actor on the driver's node, one call after another, so a run's end is
heard after its rounds. Where the driver dies, Ray ends its tasks, as the local pool's workers end.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from envs.usage import UsageError, blamed_on
from sim.pool import AGAIN, Job, claimed
from sim.sweep_progress import SweepListener

LOCAL = "local"
ATTEMPTS = 3
"""Times that a run is begun whose worker dies; one that needs too much memory kills each."""
PATIENCE = 10.0
"""Seconds for a cluster's address to answer."""
CARRIED = ("HF_", "TOKENIZERS_", "POISONLOOP_", "TRANSFORMERS_")
"""What the names of environment variables begin with that workers take over from the driver."""


def require_ray() -> Any:
    """The module ``ray``.

    Raises:
        ValueError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError(
            "backend='ray' needs Ray; allowed: local, or pip install 'poisonloop[ray]'"
        ) from None
    return ray


@contextmanager
def cluster(address: str, jobs: int | None) -> Iterator[Any]:
    """Ray, connected for the length of a block.

    Args:
        address: ``local`` for one started here, of ``jobs`` cores; ``auto`` for the one on this
            host, ``HOST:PORT`` for one that this host is part of.
        jobs: runs at a time, where the cluster is started here.

    Raises:
        ValueError: no Ray, or no cluster there.
    """
    ray = require_ray()
    carried = {k: v for k, v in os.environ.items() if k.startswith(CARRIED)}
    named: dict[str, Any] = {"address": address}
    if address == LOCAL:
        named |= {"num_cpus": jobs, "include_dashboard": False}
    allowed = "local, auto or HOST:PORT of a cluster that this host is part of (`ray start`)"
    with blamed_on(f"address={address!r} cannot be reached", allowed), warnings.catch_warnings():
        if address not in (LOCAL, "auto"):
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), PATIENCE).close()  # Ray would ask for ever
        warnings.simplefilter("ignore")
        ray.init(
            **named,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": carried},
        )
    try:
        yield ray
    finally:
        ray.shutdown()


class Mailbox:
    """Keeps what workers tell until the driver asks."""

    def __init__(self) -> None:
        self.told: list[tuple[Path, tuple[str, Any]]] = []

    def tell(self, path: Path, message: tuple[str, Any]) -> None:
        """Keep a message of the run in ``path``."""
        self.told.append((path, message))

    def heard(self) -> list[tuple[Path, tuple[str, Any]]]:
        """What was told since the last call."""
        told, self.told = self.told, []
        return told


class MailboxSender:
    """A worker's end of :class:`Mailbox`, with the method of a pipe."""

    def __init__(self, mailbox: Any, path: Path):
        self.mailbox, self.path = mailbox, path

    def send(self, message: tuple[str, Any]) -> None:
        """Tell ``message``, and wait until it is heard."""
        import ray

        ray.get(self.mailbox.tell.remote(self.path, message))


def attempt(job: Job, mailbox: Any, folder: str) -> tuple[str, Any]:
    """What a task does: one run, in the driver's working folder, or nothing if another is at it."""
    warnings.simplefilter("ignore", UserWarning)  # the driver has said what is unusual
    try:
        os.chdir(folder)
    except OSError as error:
        return "failed", f"{folder}: {error.strerror} on {os.uname().nodename}"
    return claimed(job, MailboxSender(mailbox, job.path))


def work_off(
    ray: Any, jobs: Sequence[Job], at_once: int | None, listener: SweepListener
) -> dict[Path, str]:
    """:func:`sim.pool.work_off` on the cluster that ``ray`` is connected to.

    Args:
        ray: of :func:`cluster`.
        jobs: the runs.
        at_once: runs at a time; as many as the cluster has cores for when None.
        listener: hears of every round and every end.

    Returns:
        Failures by path.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    task = ray.remote(attempt)
    failures: dict[Path, str] = {}
    waiting, at_work = [(0.0, job) for job in jobs], dict[Any, Job]()
    while waiting or at_work:
        now = time.monotonic()
        for ready, job in [one for one in waiting if one[0] <= now]:
            if at_once and len(at_work) >= at_once:
                break
            waiting.remove((ready, job))
            asked = task.options(**_needs(job)).remote(job, mailbox, os.getcwd())
            at_work[asked] = job
        if not at_work:
            time.sleep(max(0.0, min(ready for ready, _ in waiting) - now))
            continue
        ended, _ = ray.wait(list(at_work), timeout=0.5)
        for path, (_, row) in ray.get(mailbox.heard.remote()):
            listener.round(path, row)
        for result in ended:
            job = at_work.pop(result)
            kind, content = _outcome(ray, result)
            if kind == "elsewhere":
                waiting.append((time.monotonic() + AGAIN, job))
            elif kind == "done":
                listener.done(job.path, content)
            else:
                failures[job.path] = content
                listener.failed(job.path, content)
    return failures


def _needs(job: Job) -> dict[str, Any]:
    card = job.config["text"]["model"] and job.config["model"]["device"] == "cuda"
    cores = job.config["threads"]
    return {"num_cpus": cores, "num_gpus": int(bool(card)), "max_retries": ATTEMPTS - 1}


def _outcome(ray: Any, result: Any) -> tuple[str, Any]:
    try:
        return ray.get(result)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        return "failed", f"its worker died {ATTEMPTS} times (killed, or out of memory): {reason}"
