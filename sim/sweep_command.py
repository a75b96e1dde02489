"""``poisonloop sweep``: the flags of ``run``, any of which may be given several values."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.monitor import OUTCOMES
from envs.usage import Interrupted, UsageError
from sim import flags
from sim.analysis.arm_names import arm_names
from sim.announcement import announce_idle
from sim.checks import check
from sim.config import Config
from sim.files import check_out
from sim.presets import PRESETS
from sim.progress import counted
from sim.studies import STUDIES
from sim.sweep import plan, sweep
from sim.sweep_file import ENDINGS, from_sweep_file, is_sweep_file
from sim.sweep_progress import sweep_progress
from sim.sweep_status import print_status, standing
from sim.sweep_table import print_table
from sim.track import check_track

USAGE = """\
usage: poisonloop sweep [PRESET | FILE | STUDY] [flags of `poisonloop run`, of one value or more]

  poisonloop sweep --rho 0 .05 .1 .2 --learner grpo dpo --seeds 4
  poisonloop sweep grid.yaml --jobs 8       (these flags as `rho: [0, .05]`, `seeds: 4`, ...)
  poisonloop sweep demo --rho .4 --defence none refusal_loss freeze small_lr+refusal_loss
  poisonloop sweep --study demo --out runs/demo

Every combination is a run; runs of one seed share prompts and honest votes across arms. Type the
command again to continue a stopped sweep, or with more values to widen it: runs that DIR holds are
not run again, and table and report cover all of them.

  --seeds N        seeds 0 to N-1, from --seed where that is given (or list them: --seed 0 3 7)
  --jobs N         runs at a time (default: one per core, {cores} here)
  --backend ray    on a Ray cluster; --address auto or HOST:PORT (default: one started here)
  --out DIR        folder of the run directories (default runs/sweep)
  --config FILE    YAML or JSON, read before the flags
  --defence a+b    a stack within one arm; `none` is no defence
  --study NAME     a named set of arms instead of combinations: {studies}
  --status         only say how far every run is, and how long the rest may take
  --dry-run        only list the runs
  --retry diverged set runs with this outcome aside (into DIR/.retried) and run them again
  --track NAME     show rounds elsewhere too: tensorboard (RUN/tensorboard)
  --any-code       go on with runs that another version or commit of poisonloop began

Several sweeps, on one host or on many that see DIR, work off one set of runs: none is shared.

presets: {presets}
"""


def command(words: list[str]) -> int:
    """Run the sweep that ``words`` describe; 1 when a run failed."""
    preset, options = flags.read(words)
    if is_sweep_file(preset):
        preset, filed = from_sweep_file(str(preset))
        options = flags.over(filed, options)
    if preset in STUDIES and preset not in PRESETS:
        studies = [str(preset), *options.get("--study", [])]  # two are refused
        preset, options = None, {**options, "--study": studies}
    if "--help" in options:
        lists = {"studies": ", ".join(STUDIES), "presets": ", ".join(PRESETS)}
        print(USAGE.format(cores=os.cpu_count(), **lists), end="")
        return 0
    if preset not in (None, *PRESETS):
        raise UsageError(
            f"sweep={preset!r}; allowed: a preset ({', '.join(PRESETS)}), a study "
            f"({', '.join(STUDIES)}), or a file that ends in {', '.join(ENDINGS)}"
        )
    claimed = options.get("--study") == ["learners"]

    def chosen(rest: flags.Options) -> list[Config]:
        if "--study" in rest:
            return study(preset, rest)
        configs = grid(preset, rest)
        announce_idle(configs)
        return configs

    def finish(table: dict[str, Any], out: Path) -> int:
        print_table(table)
        if claimed:
            _print_claims(table, out)
        return _finish(table, out)

    return work(options, "runs/sweep", chosen, finish, ["sweep", *words])


def work(
    options: flags.Options,
    home: str,
    chosen: Callable[[flags.Options], list[Config]],
    finish: Callable[[dict[str, Any], Path], int],
    words: list[str],
) -> int:
    """Take a sweep's own flags out of ``options`` and run what the rest asks for.

    Args:
        options: flags with their values.
        home: the folder where ``--out`` names none.
        chosen: makes the runs of the other flags.
        finish: given the table and the folder, says what came out; its result is returned.
        words: what was typed, to be typed again.
    """
    out = Path(flags.take(options, "--out") or home)
    asked, ray = flags.whole(options, "--jobs"), _ray_address(options)
    jobs = (os.cpu_count() or 1) if asked is None else asked
    if jobs < 1:
        raise UsageError(f"jobs={jobs}; allowed: >= 1")
    check_out(out)
    if (out / "manifest.json").is_file():
        raise UsageError(f"out={str(out)!r} is a run; allowed: a folder of runs, or a new name")
    only = [flag for flag in ("--status", "--dry-run") if flags.switch(options, flag)]
    track = flags.take(options, "--track")
    check_track(track)
    retried, any_code = flags.take(options, "--retry"), flags.switch(options, "--any-code")
    if retried not in (None, *OUTCOMES):
        raise UsageError(f"retry={retried!r}; allowed: {', '.join(OUTCOMES)}")
    configs = chosen(options)
    planned = plan(configs, out)
    for run in planned if "--dry-run" in only else []:
        check(run.config)
    arms = set(arm_names([run.config.to_dict() for run in planned]))
    rounds = {run.config.rounds for run in planned}
    lengths = " or ".join(map(str, sorted(rounds)))
    far = ray not in (None, "local") and asked is None
    said = f"all that fit into the Ray cluster {ray}" if far else jobs
    each = "1 round" if lengths == "1" else f"{lengths} rounds"
    runs = f"{counted(len(planned), 'run')} in {counted(len(arms), 'arm')}, {each} each"
    print(f"{runs}, {said} at a time: {out}/")
    if only:
        print_status([standing(run) for run in planned], jobs, every="--dry-run" in only)
        return 0
    again = shlex.join(["poisonloop", *words])
    try:
        with sweep_progress() as listener:
            most = None if far else jobs
            table = sweep(configs, out, most, listener, any_code, retried, ray, track)
    except KeyboardInterrupt:
        print(f"stopped; continue with: {again}", file=sys.stderr)
        return 130
    except Interrupted as error:
        raise Interrupted(f"{error}\ncontinue with: {again}") from error
    return finish(table, out)


def _ray_address(options: flags.Options) -> str | None:
    """Take ``--backend`` and ``--address`` out of ``options``; None for processes of this host.

    Raises:
        ValueError: another backend, an address without Ray, or Ray is not installed.
    """
    backend = flags.take(options, "--backend") or "local"
    address = flags.take(options, "--address")
    if backend not in ("local", "ray"):
        raise UsageError(f"backend={backend!r}; allowed: local, ray")
    if backend == "local":
        if address:
            raise UsageError(f"address={address!r} with backend='local'; allowed: --backend ray")
        return None
    from sim.ray_pool import LOCAL, require_ray

    require_ray()
    return address or LOCAL


def _print_claims(table: dict[str, Any], out: Path) -> None:
    from sim.analysis.claims import claims
    from sim.analysis.load import load_runs

    text = claims(load_runs([run["path"] for run in table["runs"] if run["failure"] is None]))
    (out / "claims.md").write_text(text)
    print(text)


def _finish(table: dict[str, Any], out: Path) -> int:
    from sim.analysis.report import write_report

    done = [Path(run["path"]) for run in table["runs"] if run["failure"] is None]
    print(f"Table:    {out / 'table.csv'}, {out / 'table.json'}")
    if done:
        files = write_report(done, out)
        drawn = [str(path) for path in files if path.suffix == ".png"]
        print(f"Pictures: {', '.join(drawn[:3])}")
        print(f"Report:   {files[0]}")
    failed = [run for run in table["runs"] if run["failure"]]
    for run in failed:
        print(f"Failed:   {run['path']}: {run['failure']}")
    return 1 if failed else 0


def chosen_seeds(options: flags.Options) -> list[int]:
    """Take ``--seed`` and ``--seeds`` out of ``options``.

    Raises:
        ValueError: not whole numbers, or ``--seeds`` with a list of seeds.
    """
    count = flags.whole(options, "--seeds")
    listed = [flags.to_whole("--seed", value) for value in options.pop("--seed", ["0"])]
    if count is None:
        return list(dict.fromkeys(listed))
    if len(listed) != 1 or count < 1:
        raise UsageError(f"--seeds {count} with --seed {listed}; allowed: >= 1 from one first seed")
    return list(range(listed[0], listed[0] + count))


def grid(preset: str | None, options: flags.Options) -> list[Config]:
    """Every combination of the flags that have several values, under every seed."""
    options = dict(options)
    file, seeds = flags.take(options, "--config"), chosen_seeds(options)
    known = flags.paths(flags.build(preset, {}, file))
    axes = {
        flag: values
        for flag, values in options.items()
        if len(values) > 1 and not isinstance(known.get(flags.SHORT.get(flag, flag)), tuple | dict)
    }
    arms = [
        flags.build(
            preset, {**options, **dict(zip(axes, ([v] for v in chosen), strict=True))}, file
        )
        for chosen in itertools.product(*axes.values())
    ]
    return [replace(config, seed=seed) for config in arms for seed in seeds]


def study(preset: str | None, options: flags.Options) -> list[Config]:
    """The runs of a named study, which sets everything itself.

    Raises:
        ValueError: unknown study, or further flags.
    """
    options = dict(options)
    name = flags.take(options, "--study")
    if name not in STUDIES:
        raise UsageError(f"study={name!r}; allowed: {', '.join(STUDIES)}")
    further = [*options, *([preset] if preset else [])]
    if further:
        raise UsageError(
            f"{further[0]} with --study {name}, which sets its runs itself; allowed: --out, "
            "--jobs, --status, --dry-run, --retry, --any-code, --backend, --address, --track"
        )
    return STUDIES[name]()
