"""``poisonloop battery``: every defence against every learner, one table and one picture."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from envs.usage import UsageError
from sim import flags
from sim.battery.arms import UPDATES, arms, configs
from sim.checks import check, check_out
from sim.config import Config
from sim.studies import REPORT_WORLDS
from sim.sweep import plan, sweep
from sim.sweep_progress import sweep_progress

USAGE = """\
usage: poisonloop battery [flags]

Every registered defence, and the papers' strengths and lists, under every learner while everybody
reverses every preference that concerns harm. Type it again to continue a stopped battery.

  --defence a b+c    these instead of all; + joins a list
  --learner NAME ... these instead of all
  --worlds N ...     world seeds (default: {worlds})
  --seeds N          root seeds on every world (default 1)
  --updates N        optimizer steps of the policy (default {updates})
  --mechanisms       instead of the runs: does each defence do what it says (worlds as above)
  --no-cost          time nothing; factors that an earlier command measured are shown
  --any-code         go on with runs that another version or commit of poisonloop began
  --jobs N           runs at a time (default: one per core, {cores} here)
  --out DIR          folder of the runs, the table and the picture (default runs/battery)
"""


def command(words: list[str]) -> int:
    """Run, or continue, the battery that ``words`` describe; 1 when a run failed."""
    _, options = flags.read(words)
    if "--help" in options:
        facts = {"worlds": " ".join(map(str, REPORT_WORLDS)), "updates": UPDATES}
        print(USAGE.format(cores=os.cpu_count(), **facts), end="")
        return 0
    out = Path(flags.take(options, "--out") or "runs/battery")
    jobs = flags.positive(options, "--jobs", os.cpu_count() or 1)
    updates = flags.positive(options, "--updates", UPDATES)
    seeds = range(flags.positive(options, "--seeds", 1))
    worlds = [flags.to_whole("--worlds", w) for w in options.pop("--worlds", [])]
    named = options.pop("--defence", [])
    if options.pop("--mechanisms", None) is not None:
        return _mechanisms(named, worlds or REPORT_WORLDS, jobs, out)
    lists = arms(named)
    learners = options.pop("--learner", [])
    priced = "--no-cost" not in options
    options.pop("--no-cost", None)
    any_code = options.pop("--any-code", None) is not None
    if options:
        raise UsageError(flags.unknown_flag(next(iter(options)), ["--defence", "--learner"]))
    asked = configs(lists, learners, worlds or REPORT_WORLDS, seeds, updates)
    check_out(out)
    places = {str(run.path) for run in plan(asked, out)}
    for config in {config.defences: config for config in asked}.values():
        check(config)
    print(f"{len(asked)} runs, {updates} optimizer steps each, {jobs} at a time: {out}/")
    began = time.perf_counter()
    try:
        with sweep_progress() as listener:
            table = sweep(asked, out, jobs, listener, any_code)
        prices = _costs(asked if priced else [], out)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    mine = [run for run in table["runs"] if run["path"] in places]  # the folder may hold others
    failed = [run for run in mine if run["failure"]]
    _finish([run["path"] for run in mine if not run["failure"]], prices, updates, out)
    for run in failed:
        print(f"Failed:   {run['path']}: {run['failure']}")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes for what was not there before")
    return 1 if failed else 0


def _costs(asked: Sequence[Config], out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Cost factors of every arm with an acting defence, on its first world; in ``costs.json``."""
    from rich.progress import track

    from envs.registry import brief
    from sim.battery.cost import cost
    from sim.defended import offline_prefix
    from sim.files import dumps, write_atomic

    file = out / "costs.json"
    known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
    priced: dict[str, Config] = {}
    for config in asked:
        if len(offline_prefix(config.defences)) < len(config.defences):
            name = " + ".join(map(brief, config.defences))
            priced.setdefault(f"{config.learner_name}: {name}", config)
    missing = [name for name in priced if name not in known]
    if missing:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # alone, to be timed
            found = pool.map(cost, [priced[name] for name in missing])
            for name, value in track(zip(missing, found, strict=True), "Timing", len(missing)):
                known[name] = value
                write_atomic(file, dumps(known).encode())
    named = {tuple(name.split(": ", 1)): value for name, value in known.items()}
    return {(defence, learner): value for (learner, defence), value in named.items()}


def _mechanisms(named: Sequence[str], worlds: Sequence[int], jobs: int, out: Path) -> int:
    """Measure what each defence is meant to move; ``mechanisms.md`` and ``.json``."""
    from rich.progress import track

    from sim.battery.mechanisms import MECHANISMS, measure
    from sim.battery.table import mechanism_markdown
    from sim.files import dumps, write_atomic

    if unknown := sorted(set(named) - set(MECHANISMS)):
        raise UsageError(f"--defence {unknown[0]}; allowed: {', '.join(MECHANISMS)}")
    asked = configs([()], ["dpo"], worlds)
    attacked = [config for config in asked if config.attack.rho]
    names = [name for name in (named or MECHANISMS) for _ in attacked]
    repeated = attacked * (len(names) // len(attacked))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = list(track(pool.map(measure, names, repeated), "Measuring", len(names)))
    text = mechanism_markdown(found)
    write_atomic(out / "mechanisms.json", dumps(found).encode())
    write_atomic(out / "mechanisms.md", text.encode())
    print(f"{text}\nTable:    {out / 'mechanisms.md'}")
    return 0


def _finish(
    paths: Sequence[str], prices: dict[tuple[str, str], dict[str, Any]], updates: int, out: Path
) -> None:
    from sim.analysis.load import load_runs
    from sim.battery.plot import plot_battery
    from sim.battery.rows import rows
    from sim.battery.table import markdown, print_rows
    from sim.files import dumps, write_atomic

    found = rows(load_runs(paths), prices, updates)
    write_atomic(out / "battery.json", dumps(found).encode())
    write_atomic(out / "battery.md", markdown(found, updates).encode())
    picture = plot_battery(found, updates, out / "battery.png")
    print_rows(found, updates)
    print(f"Table:    {out / 'battery.md'}, {out / 'battery.json'}\nPicture:  {picture}")
