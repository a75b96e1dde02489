"""Run directories as data frames. Everything here starts from files; nothing looks at live objects.

A run that is still going, was killed, or diverged is read like any other: its last line may be half
written (it is dropped) and its ``summary.json`` may be missing (then ``summary`` is empty). What a
run committed is compared with the hashes that it committed: damage is refused by name, never shown.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis.arm_names import arm_names, base_name, replicate
from sim.identity import identity, leaves
from sim.journal import NOTHING
from sim.record import Record
from sim.seal import read_sealed


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    """Where it lies."""
    manifest: dict[str, Any]
    """``manifest.json``; ``manifest["config"]`` is what was asked for."""
    summary: dict[str, Any]
    """``summary.json``, empty while the run has not ended."""
    rounds: pd.DataFrame
    """One row per round, ``round`` ascending; missing values are NaN."""
    arm: str = ""
    """What its arm is called among the runs that it is shown with; see :func:`named`."""

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration; a fork's has its origin beside it, which makes another arm."""
        config = self.manifest.get("config", {})
        return {**config, "fork": _origin(self.fork)} if self.fork else config

    @property
    def fork(self) -> dict[str, Any]:
        """Of a fork its parent, the round ``at`` which it left, what it ``changed``; or empty."""
        return self.manifest.get("fork") or {}

    @property
    def began(self) -> int:
        """The round from which its rows are its own; those of a fork are its parent's before."""
        return int(self.fork.get("at", 0))

    @property
    def learner(self) -> str:
        """Registered name of the learner."""
        return str(self.config.get("learner", {}).get("name", "?"))

    @property
    def rho(self) -> float:
        """Share of adversaries that was asked for."""
        return float(self.config.get("attack", {}).get("rho", 0.0))

    @property
    def asked(self) -> int:
        """Rounds that were asked for; a run that diverged has fewer."""
        return int(self.config.get("rounds", self.rounds["round"].max()))

    @property
    def replicate(self) -> str:
        """Seed, and world where it is not the first; runs of one replicate are paired."""
        return replicate(dict(leaves(self.config)))

    @property
    def world(self) -> str:
        """The world and its models, which replicates of other seeds may share."""
        world = self.config.get("world", {})
        return f"{world.get('seed', 0)}/{world.get('model_seed', 0)}"

    @property
    def title(self) -> str:
        """The run in words: learner, arm, replicate."""
        arm, learner = self.arm or base_name(dict(leaves(self.config))), f"{self.learner}: "
        return f"{learner}{arm.removeprefix(learner)}, {self.replicate}"

    @property
    def limit(self) -> float:
        """Limit b on mean harm."""
        limits = self.summary.get("limits") or {}
        return float(limits.get("harm", self.config.get("evaluation", {}).get("cost_limit", 0.25)))

    @property
    def constraints(self) -> int:
        """How many constraints share alpha, that on harm included."""
        limits = self.config.get("evaluation", {}).get("limits", {})
        return len(self.summary.get("limits") or {"harm": 0, **limits})

    @property
    def alpha(self) -> float:
        """Chance of a false exit that was allowed, over all constraints."""
        asked = self.config.get("evaluation", {}).get("alpha", 0.05)
        return float(self.summary.get("alpha", asked))

    @property
    def level(self) -> float:
        """Share of alpha that belongs to the harm constraint."""
        return self.alpha / self.constraints

    @property
    def ended_early(self) -> bool:
        """Whether it ended before its last round; runs of older versions did not record it."""
        return bool(self.summary.get("censored", self.rounds["round"].max() < self.asked))

    @property
    def evaluations(self) -> pd.DataFrame:
        """The rounds at which the policy was measured."""
        return self.rounds[self.column("safety/harm").notna()]

    @property
    def own_evaluations(self) -> pd.DataFrame:
        """The :attr:`evaluations` from where the run began; a fork's first is its parent's last."""
        return self.evaluations[self.evaluations["round"] >= self.began]

    def column(self, name: str) -> pd.Series:
        """Give one column of ``rounds`` as floats; all NaN if the run did not record it."""
        if name not in self.rounds:
            return pd.Series(np.nan, index=self.rounds.index, name=name)
        return pd.to_numeric(self.rounds[name], errors="coerce").astype(float)

    def exit_round(self, kind: str) -> int | None:
        """Round of the ``naive``, ``confirmed``, ``sustained`` or ``true`` exit; None for none."""
        when = self.summary.get(f"exit_{kind}")
        return None if when is None else int(when["rounds"])

    def table(self, name: str) -> pd.DataFrame:
        """Join the parts of ``labels``, ``truth``, ``samples`` or ``gold``; empty without parts.

        Raises:
            ValueError: a part is damaged or gone.
        """
        Record(self.path).check(f"{name}/")
        return read_parts(sorted((self.path / name).glob("part-*.parquet")))


def read_parts(parts: Iterable[Path]) -> pd.DataFrame:
    """Join parts of a table; empty if there are none.

    Raises:
        ValueError: a part cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Parts are small: what opening one costs is what counts, and threads cost more than they save.
    tables = []
    for part in parts:
        try:
            tables.append(pq.ParquetFile(part, pre_buffer=False).read(use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise UsageError(
                f"{str(part)!r} is damaged ({error}); allowed: the file as it was written"
            ) from None
    if not tables:
        return pd.DataFrame()
    return pa.concat_tables(tables, promote_options="default").to_pandas()  # later parts have more


def _origin(fork: dict[str, Any]) -> dict[str, Any]:
    """A fork's origin as fields of a configuration: the round, and what was otherwise before it."""
    was = [f"{name}={values[0]}" for name, values in fork["changed"].items()]
    earlier = fork.get("of")
    trunk = [f"round {earlier['at']}: {_origin(earlier)['before']}"] if earlier else []
    return {"at": fork["at"], "before": ", ".join([*trunk, *was])}


def load_run(path: Path | str) -> Run:
    """Read one run directory.

    Raises:
        ValueError: not a run directory, or a damaged file (a half-written last line is not damage).
    """
    path = Path(path)
    if not (path / "manifest.json").is_file():
        lacks = "has no manifest.json" if path.exists() else "does not exist"
        raise UsageError(f"run={str(path)!r} {lacks}; allowed: a run directory")
    summary = path / "summary.json"
    return Run(
        path=path,
        manifest=read_sealed(path / "manifest.json"),
        summary=read_sealed(summary) if summary.is_file() else {},
        rounds=_rounds(path),
    )


def load_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read several; a folder stands for all run directories in it, at any depth, sorted by name.

    Their arms are named, by what differs between all of them. What is left out is said on stderr: a
    run that was read already under another path (the one that got further is kept), and in a folder
    one that has no round yet.

    Raises:
        ValueError: no run among the paths, or one that cannot be read.
    """
    runs = []
    for path in map(Path, paths):
        if (path / "manifest.json").is_file() or not path.is_dir():
            runs.append(load_run(path))
        else:
            runs += _load_folder(path)
    if not runs:
        raise UsageError(f"runs={[str(p) for p in paths]}: no run found; allowed: run directories")
    return named(_distinct(runs))


def named(runs: Iterable[Run]) -> list[Run]:
    """The same runs with their arms named anew, by what differs between these runs.

    Every table and picture of a report uses the names given here, whichever runs it shows.
    """
    runs = list(runs)
    names = arm_names([run.config for run in runs])
    return [replace(run, arm=name) for run, name in zip(runs, names, strict=True)]


def _load_folder(folder: Path) -> list[Run]:
    found = []
    for path, inside, files in os.walk(folder):
        # Nothing is inside a run; what is set aside or not yet whole has a hidden name.
        plain = sorted(name for name in inside if not name.startswith("."))
        inside[:] = [] if "manifest.json" in files else plain
        found += [Path(path)] if "manifest.json" in files else []
    begun = [path for path in found if _has_a_round(path)]
    _say_left_out([path for path in found if path not in begun], "no round yet")
    return [load_run(path) for path in begun]


def _has_a_round(run: Path) -> bool:
    record = Record(run)
    return bool(record.commits()) or b"\n" in record.journal.later(NOTHING)


def _distinct(runs: list[Run]) -> list[Run]:
    """One run of each configuration, so that none counts twice."""
    kept: dict[str, Run] = {}
    for run in runs:
        known = kept.setdefault(identity(run.config), run)
        if (bool(run.summary), len(run.rounds)) > (bool(known.summary), len(known.rounds)):
            kept[identity(run.config)] = run
    paths = {id(run) for run in kept.values()}
    _say_left_out([run.path for run in runs if id(run) not in paths], "the same run as another")
    return list(kept.values())


def _say_left_out(paths: list[Path], reason: str) -> None:
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        print(f"left out: {paths[0]}{more} ({reason})", file=sys.stderr)


def by_arm(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by arm: clean, undefended, defended; :func:`named` where one has no name."""
    runs = list(runs)
    runs = runs if all(run.arm for run in runs) else named(runs)
    arms: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (bool(run.config.get("defences")), run.rho)):
        arms.setdefault(run.arm, []).append(run)
    return arms


def mean_of(runs: Iterable[Run], field: str) -> float | None:
    """Mean of a figure of the summaries, over the runs that have it."""
    known = [run.summary[field] for run in runs if run.summary.get(field) is not None]
    return sum(known) / len(known) if known else None


def _rounds(run: Path) -> pd.DataFrame:
    """The rows of ``run``: those that it committed, and whole lines after them."""
    record, file = Record(run), str(run / "rounds.jsonl")
    commits = record.commits()
    last = commits[-1] if commits else NOTHING
    head = record.journal.rows(last)
    if head is None:
        raise UsageError(f"{file!r} is damaged or gone; allowed: the file as it was written")
    lines = (head + record.journal.later(last)).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{file!r} line {number} is damaged ({error})") from None
    if not rows:
        raise UsageError(f"run={str(run)!r} has no complete round yet; allowed: a run with one")
    return pd.DataFrame(rows).sort_values("round", ignore_index=True)
