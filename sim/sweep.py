"""Many runs at once: arms x seeds in a pool of processes, restartable, one directory each.

An arm is a configuration with its seeds (root, world, model) left open. Since every honest vote is
a pure function of (seed, round, item, annotator), runs of one seed are paired across arms: an arm
differs from another by what was asked for and by nothing else.

Runs that have finished are skipped and half-finished ones resumed, so a sweep is continued, or
widened, by typing it again. A run that fails is recorded and tried again next time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim.config import AttackConfig, Config
from sim.pool import Job, work_off
from sim.resume import is_finished, saved_config
from sim.sweep_progress import SweepListener

SEEDS = {"seed", "world.seed", "world.model_seed"}
"""Fields that make replicates of an arm, not another arm."""
_NAMED = {"learner.name", "attack.name", "attack.rho", "defences"}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    arm: str
    config: Config
    path: Path


def sweep(
    configs: Sequence[Config] | Mapping[str, Sequence[Config]],
    out: Path | str = "runs/sweep",
    jobs: int | None = None,
    listener: SweepListener | None = None,
) -> dict[str, Any]:
    """Run every config and tabulate the arms.

    Args:
        configs: runs, or runs by the name of their arm; unnamed arms are named by what differs.
        out: folder of the run directories; may hold earlier runs of the same sweep.
        jobs: processes at once; one per core when absent.
        listener: hears of every round of every run.

    Returns:
        ``{"arms": [...], "runs": [...]}``, also written as ``table.json`` and ``table.csv``.

    Raises:
        ValueError: no runs, a bad config, or a directory that holds another run or is in use.
    """
    from filelock import FileLock, Timeout

    from sim.checks import check
    from sim.scenario import make_scenario
    from sim.sweep_table import tabulate, write_table

    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs={jobs}; allowed: >= 1")
    out = Path(out)
    cells = plan(configs, out)
    for cell in cells:
        check(cell.config)
        _refuse_another_run(cell)
    for config in {repr((c.config.world, c.config.text)): c.config for c in cells}.values():
        make_scenario(config, progress=True)  # builds missing models once, before the pool starts
    out.mkdir(parents=True, exist_ok=True)
    listener = listener or SweepListener()
    try:
        with FileLock(out / ".lock", timeout=0):
            todo = [cell for cell in cells if not is_finished(cell.path, cell.config)]
            todo.sort(key=lambda cell: cell.config.seed)  # cut short, every arm has its first seeds
            listener.begin({c.path: c.config.rounds for c in todo}, len(cells) - len(todo))
            failures = work_off([Job(c.path, c.config.to_dict()) for c in todo], jobs, listener)
            table = tabulate(cells, failures)
            write_table(table, out)
    except Timeout:
        raise ValueError(f"out={str(out)!r} is in use by another sweep; allowed: wait") from None
    return table


def plan(configs: Sequence[Config] | Mapping[str, Sequence[Config]], out: Path) -> list[Cell]:
    """Name every run and give it a directory; equal configs are one run.

    Raises:
        ValueError: nothing to run, or one name for two runs.
    """
    if isinstance(configs, Mapping):
        named = [(arm, canonical(c)) for arm, members in configs.items() for c in members]
    else:
        plain = [canonical(config) for config in configs]
        named = list(zip(arm_names(plain), plain, strict=True))
    cells: dict[Path, Cell] = {}
    for arm, config in named:
        path = out / f"{slug(arm)}-{_replicate(config)}"
        if path in cells and cells[path].config != config:
            raise ValueError(f"arm={arm!r} names two different runs; allowed: one name each")
        cells[path] = Cell(arm, config, path)
    if not cells:
        raise ValueError("configs=[]; allowed: at least one run")
    return list(cells.values())


def canonical(config: Config) -> Config:
    """``config``, naming no attack where rho is 0, since none acts."""
    return config if config.attack.rho else replace(config, attack=AttackConfig())


def arm_names(configs: Sequence[Config]) -> list[str]:
    """Learner, attack, defences, and whatever else differs between runs of one learner."""
    fields = [dict(_leaves(config.to_dict())) for config in configs]
    values: dict[tuple[str, str], set[str]] = {}
    for config, known in zip(configs, fields, strict=True):
        for key, value in known.items():
            if not key.startswith("attack.") or config.attack.rho:
                values.setdefault((config.learner_name, key), set()).add(repr(value))
    names = []
    for config, known in zip(configs, fields, strict=True):
        attack = config.attack
        acts = f"{attack.name} rho={attack.rho:g}" if attack.rho else "clean"
        more = [
            f"{key}={value}"
            for key, value in known.items()
            if len(values.get((config.learner_name, key), ())) > 1 and key not in SEEDS | _NAMED
        ]
        names.append(
            " ".join([" + ".join([f"{config.learner_name} {acts}", *config.defences]), *more])
        )
    return names


def slug(arm: str) -> str:
    """An arm's name as part of a directory's."""
    return re.sub(r"[^\w.=-]+", "-", arm.replace(" + ", "-")).strip("-")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _replicate(config: Config) -> str:
    world = config.world
    model = f"-model{world.model_seed}" if world.model_seed else ""
    return f"world{world.seed}{model}-seed{config.seed}"


def _refuse_another_run(cell: Cell) -> None:
    saved = saved_config(cell.path)
    if saved is None:
        return
    if replace(saved, rounds=cell.config.rounds) != cell.config:
        raise ValueError(
            f"out: {str(cell.path)!r} holds a run of another config; allowed: another --out"
        )
    if saved.rounds > cell.config.rounds:
        raise ValueError(
            f"rounds={cell.config.rounds}; allowed: >= {saved.rounds}, as {str(cell.path)!r} has"
        )
