"""Many runs at once: arms x seeds in a pool of processes, restartable, one directory each.

An arm is a configuration with its seeds (root, world, model) left open. Since every honest vote is
a pure function of (seed, round, item, annotator), runs of one seed are paired across arms: an arm
differs from another by what was asked for and by nothing else.

A run's directory is named by its own configuration alone. Runs that have finished are skipped and
half-finished ones resumed, so a sweep is continued, or widened, by typing it again; the table then
covers all that the folder holds. A run that fails is recorded and tried again next time. Several
sweeps may share a folder, on hosts that see it alike: a run is one sweep's alone (``sim.lease``).
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envs.registry import brief
from envs.usage import UsageError
from sim.checks import check, settled
from sim.config import Config
from sim.identity import SEEDS, identity
from sim.lease import LEASES, Lease
from sim.manifest import code_now, code_of
from sim.pool import Job, work_off
from sim.record import Record
from sim.resume import is_finished, saved_config
from sim.seal import read_sealed
from sim.sweep_progress import SweepListener

RETRIED = ".retried"
"""Folder of runs that were set aside to be run again."""
LONGEST = 80
"""Characters of a directory's name before its hash, since specs may be of any length."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    config: Config
    path: Path


def sweep(
    configs: Sequence[Config],
    out: Path | str = "runs/sweep",
    jobs: int | None = None,
    listener: SweepListener | None = None,
    any_code: bool = False,
    retry: str | None = None,
    ray: str | None = None,
    track: str | None = None,
) -> dict[str, Any]:
    """Run every config and tabulate the arms, which are named by what differs between them.

    Args:
        configs: runs; equal ones are one run.
        out: folder of the run directories; earlier runs in it are tabulated too.
        jobs: runs at a time; one per core when absent.
        listener: hears of every round of every run.
        any_code: go on with runs that other code has begun or ended.
        retry: set runs with this outcome aside and run them again.
        ray: address of a Ray cluster to run on (``local`` starts one); processes here when absent.
        track: sink that shows every run's rounds, of :data:`sim.track.SINKS`.

    Returns:
        ``{"arms": [...], "runs": [...]}``, also written as ``table.json`` and ``table.csv``.

    Raises:
        ValueError: no runs, a bad config, a directory that holds another run or other code's, or no
            cluster at that address.
    """
    from sim.scenario import make_scenario
    from sim.sweep_table import tabulate, write_table

    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs={jobs}; allowed: >= 1")
    out = Path(out)
    runs = plan(configs, out)
    for run in runs:
        check(run.config)
        _refuse_another_run(run)
        if not any_code:
            _refuse_other_code(run)
    for config in {repr((c.config.world, c.config.text)): c.config for c in runs}.values():
        bare = replace(config, defences=())
        make_scenario(bare, progress=True)  # builds missing models once, before the pool starts
    out.mkdir(parents=True, exist_ok=True)
    listener = listener or SweepListener()
    if retry:
        set_aside(runs, retry)
    todo = [run for run in runs if not is_finished(run.path, run.config)]
    todo.sort(key=lambda run: run.config.seed)  # cut short, every arm has its first seeds
    listener.begin({c.path: c.config.rounds for c in todo}, len(runs) - len(todo))
    work = [Job(c.path, c.config.to_dict(), track) for c in todo]
    failures = _work_off(work, jobs, listener, ray)
    for run in todo:  # another sweep may have made good what failed here
        if is_finished(run.path, run.config):
            failures.pop(run.path, None)
    table = tabulate(out, runs, failures)
    write_table(table, out)
    return table


def _work_off(
    todo: list[Job], jobs: int | None, listener: SweepListener, ray: str | None
) -> dict[Path, str]:
    if ray is None or not todo:
        return work_off(todo, jobs, listener)
    from sim import ray_pool

    with ray_pool.cluster(ray, jobs) as connected:
        return ray_pool.work_off(connected, todo, jobs, listener)


def plan(configs: Sequence[Config], out: Path) -> list[PlannedRun]:
    """Give every run its directory; equal configs are one run.

    Raises:
        ValueError: nothing to run, or one run at two lengths.
    """
    runs: dict[Path, PlannedRun] = {}
    for config in map(settled, configs):
        run = PlannedRun(config, out / directory(config))
        known = runs.setdefault(run.path, run).config
        if known.rounds != config.rounds:
            raise UsageError(
                f"rounds={known.rounds} and {config.rounds} of one run; allowed: one length, "
                "which a later sweep may extend"
            )
    if not runs:
        raise UsageError("configs=[]; allowed: at least one run")
    return list(runs.values())


def directory(config: Config) -> str:
    """Name of a run's directory, from nothing but its own config; rounds may be extended in it."""
    specs = (config.attack.name, *config.defences)
    name, *defences = map(brief, specs)
    attack = f"{name}-rho{config.attack.rho:g}" if config.attack.rho else "clean"
    words = "-".join([config.learner_name, attack, *defences])
    readable = re.sub(r"[^\w.=-]+", "-", words)[:LONGEST].strip("-")
    rest = identity(config.to_dict(), without={*SEEDS, "rounds"})
    world = config.world
    model = f"-model{world.model_seed}" if world.model_seed else ""
    digest = hashlib.blake2b(rest.encode(), digest_size=4).hexdigest()
    return f"{readable}-{digest}-world{world.seed}{model}-seed{config.seed}"


def _refuse_another_run(run: PlannedRun) -> None:
    saved = saved_config(run.path)
    if saved is None:
        return
    if replace(saved, rounds=run.config.rounds) != run.config:
        raise UsageError(
            f"out: {str(run.path)!r} holds a run of another config; allowed: another --out"
        )
    if saved.rounds > run.config.rounds:
        raise UsageError(
            f"rounds={run.config.rounds}; allowed: >= {saved.rounds}, as {str(run.path)!r} has"
        )


def _refuse_other_code(run: PlannedRun) -> None:
    file = run.path / "manifest.json"
    if not file.is_file():
        return
    began, now = code_of(read_sealed(file)), code_now()
    if began not in (None, now):
        raise UsageError(
            f"out: {str(run.path)!r} was run by poisonloop {began}, this is {now}, and their runs "
            "may differ; allowed: another --out, or --any-code (every manifest says which)"
        )


def set_aside(runs: Sequence[PlannedRun], outcome: str) -> list[Path]:
    """Move runs with this outcome out of the way, into ``.retried``, so that they run again."""
    moved = []
    for run in runs:
        lease = Lease.claim(run.path.parent / LEASES, run.path.name)
        if lease is None:  # another sweep is at it
            continue
        with lease.beating():
            summary = Record(run.path).summary()
            if summary is None or summary["outcome"] != outcome:
                continue
            kept = run.path.parent / RETRIED
            kept.mkdir(exist_ok=True)
            times = len(list(kept.glob(f"{glob.escape(run.path.name)}.*"))) + 1
            moved.append(run.path.rename(kept / f"{run.path.name}.{times}"))
    return moved
