"""``poisonloop papers``: published experiments, run again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from envs.usage import UsageError
from sim import flags
from sim.config import Config
from sim.papers.plans import RATIOS, Asked, configs
from sim.papers.published import BATCH, PAIRS, PROMPTS, SAFE_RLHF, STAND_INS
from sim.resume import is_finished
from sim.studies import REPORT_WORLDS
from sim.sweep import plan
from sim.sweep_command import work

USAGE = """\
usage: poisonloop papers NAME [flags]

{experiments}

  poisonloop papers rosati-t1
  poisonloop papers rosati-f2 --learner dpo --ratios 0 .25 .5
  poisonloop papers rosati-t1 --model M --data beavertails pku-saferlhf --text.classifier DIR

Undefended attacks of Rosati et al. 2024 on recorded pairs, with the paper's numbers beside ours.
Without --model a harmful domain of the embedded world stands for each data set. With it a run has
the paper's sizes: {pairs} pairs in batches of {batch}, {prompts} evaluation prompts. It is a sweep
underneath: the same words continue a stopped one.

  --learner NAME ... these instead of its own; name(key=value) sets fields
  --ratios R ...     shares of reversed labels (rosati-f2)
  --worlds N ...     world seeds (default: {worlds})
  --seeds N          root seeds on every world (default 1)
  --pairs N          labelled pairs of a run (default {pairs})
  --model M          an aligned model: a directory or a hub id; --base B: the same, unaligned
  --data D ...       data sets, as `run` takes them
  --jobs N           runs at a time (default: one per core, {cores} here)
  --out DIR          folder of runs, tables and picture (default runs/NAME)
  --so-far           run nothing, tabulate the runs that have ended
  --dry-run, --status, --retry diverged, --any-code: as `poisonloop sweep`
  any other flag of `poisonloop run` but those of attack and start: one value, for every run
"""


RUNNING = ("--jobs", "--any-code", "--retry", "--backend", "--address", "--track")
"""Flags that say how runs are run, not which."""


class Experiment(NamedTuple):
    """One table or figure."""

    what: str
    learners: tuple[str, ...]
    ratios: tuple[float, ...]
    data: tuple[str, ...]
    unaligned: bool
    evaluations: int


EXPERIMENTS = {
    "rosati-t1": Experiment(
        "harm before and after every label is reversed, by learner, on two data sets",
        ("sft", "dpo", "ppo", "grpo"),
        (1.0,),
        tuple(STAND_INS),
        False,
        5,
    ),
    "rosati-f2": Experiment(
        "harm against the share of reversed labels, from an aligned and an unaligned model",
        ("sft", "dpo", "ppo"),
        RATIOS,
        (SAFE_RLHF,),
        True,
        1,
    ),
}


def command(words: list[str]) -> int:
    """Run, continue or list the experiments; 1 when a run failed.

    Raises:
        ValueError: an unknown experiment or flag, or a bad value.
    """
    name, options = flags.read(words)
    if "--help" in options:
        facts = {"pairs": PAIRS, "batch": BATCH, "prompts": PROMPTS, "cores": os.cpu_count()}
        worlds = " ".join(map(str, REPORT_WORLDS))
        print(USAGE.format(experiments=_listed(), worlds=worlds, **facts), end="")
        return 0
    if name is None and not options:
        print(_listed())
        return 0
    if name not in EXPERIMENTS:
        raise UsageError(f"papers={name!r}; allowed: {', '.join(EXPERIMENTS)}")
    base = next(iter(options.get("--base", ())), None)
    if options.pop("--so-far", None) is not None:
        return _so_far(name, base, options)
    planned: list[Config] = []

    def chosen(rest: flags.Options) -> list[Config]:
        asked = _asked(EXPERIMENTS[name], rest)
        planned.extend(configs(asked, rest))
        return planned

    def finish(table: dict[str, Any], out: Path) -> int:
        places = {str(run.path) for run in plan(planned, out)}
        mine = [run for run in table["runs"] if run["path"] in places]  # the folder may hold others
        done = [run["path"] for run in mine if not run["failure"]]
        if done:
            _write(name, done, base, out)
        failed = [run for run in mine if run["failure"]]
        for run in failed:
            print(f"Failed:   {run['path']}: {run['failure']}")
        return 1 if failed else 0

    return work(options, f"runs/{name}", chosen, finish, ["papers", *words])


def _so_far(name: str, base: str | None, options: flags.Options) -> int:
    """Tables of the runs that have ended, whatever the others do.

    Raises:
        ValueError: none has.
    """
    out = Path(flags.take(options, "--out") or f"runs/{name}")
    for flag in RUNNING:  # how the others run is of no concern
        options.pop(flag, None)
    runs = plan(configs(_asked(EXPERIMENTS[name], options), options), out)
    done = [str(run.path) for run in runs if is_finished(run.path, run.config)]
    if not done:
        raise UsageError(f"out={str(out)!r} has no finished run of {name}; allowed: one that has")
    print(f"{len(done)} of {len(runs)} runs have ended: {out}/")
    _write(name, done, base, out)
    return 0


def _listed() -> str:
    return "\n".join(f"  {name:<18} {known.what}" for name, known in EXPERIMENTS.items())


def _asked(known: Experiment, options: flags.Options) -> Asked:
    """Take the flags of an experiment out of ``options``.

    Raises:
        ValueError: a bad value, or data and models that do not belong together.
    """
    for flag in ("--learner", "--ratios", "--worlds", "--data"):
        if options.get(flag) == []:
            raise UsageError(f"{flag} has no value; allowed: one or more")
    model, base = flags.take(options, "--model"), flags.take(options, "--base")
    data = tuple(options.pop("--data", ()))
    if bool(model) != bool(data):
        raise UsageError(
            f"model={model!r} with data={list(data)}; allowed: --model with --data D ..., or "
            "neither for the embedded world"
        )
    worlds = [flags.to_whole("--worlds", world) for world in options.pop("--worlds", [])]
    if worlds and model:
        raise UsageError(f"worlds={worlds} with --model; allowed: --seeds N (text has no world)")
    given = options.pop("--ratios", None)
    if given and len(known.ratios) == 1:
        several = ", ".join(name for name, other in EXPERIMENTS.items() if len(other.ratios) > 1)
        raise UsageError(f"--ratios {' '.join(given)}; allowed: with {several} (here it is 1)")
    return Asked(
        learners=tuple(options.pop("--learner", known.learners)),
        ratios=known.ratios if given is None else tuple(map(_share, given)),
        data=data or known.data,
        worlds=tuple(worlds) or REPORT_WORLDS,
        seeds=flags.positive(options, "--seeds", 1),
        pairs=flags.positive(options, "--pairs", PAIRS),
        model=model,
        base=base,
        unaligned=known.unaligned,
        evaluations=known.evaluations,
    )


def _share(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"--ratios {value}; allowed: numbers from 0 to 1") from None


def _write(name: str, paths: Sequence[str], base: str | None, out: Path) -> None:
    """Table, data and picture of an experiment from its run directories."""
    from sim.analysis.load import load_runs
    from sim.files import as_csv, dumps, write_atomic
    from sim.papers.plot import plot_flips
    from sim.papers.rows import flat, rows
    from sim.papers.table import markdown

    found = rows(load_runs(paths), base)
    text = markdown(name, found)
    print(text)
    write_atomic(out / f"{name}.json", (dumps(found) + "\n").encode())
    write_atomic(out / f"{name}.csv", as_csv(map(flat, found)).encode())
    write_atomic(out / f"{name}.md", text.encode())
    print(f"Table:    {out / name}.md, {name}.csv, {name}.json")
    if name == "rosati-f2":
        print(f"Picture:  {plot_flips(found, out / f'{name}.png')}")
    print(f"Report:   poisonloop report {out}")
