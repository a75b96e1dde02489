"""``poisonloop bench``: prints and writes where the time of a round goes."""

from __future__ import annotations

import json
from pathlib import Path


def main(argv: list[str]) -> int:
    """The command; returns the exit code.

    Raises:
        ValueError: a bad flag value.
    """
    from sim.cli import parser_of

    parser = parser_of("bench", "Seconds per stage of one GRPO round, against the machine and TRL.")
    parser.add_argument("preset", nargs="?", default="default", help="which configuration")
    parser.add_argument("--against", choices=["trl"], help="what to run beside it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=9, metavar="N", help="rounds counted")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="torch threads")
    asked = parser.parse_args(argv)
    from envs.usage import UsageError, check_ranges

    check_ranges(asked, repetitions=">= 1", threads="1 to 1024")
    from sim.bench.measure import bench
    from sim.bench.table import show
    from sim.presets import preset
    from sim.progress import quiet_loading
    from sim.scenario import make_scenario

    quiet_loading()
    config = preset(asked.preset)
    if config.learner_name != "grpo":
        raise UsageError(f"preset={asked.preset!r} learns by {config.learner_name}; allowed: grpo")
    scenario = make_scenario(config, progress=True)
    result = bench(config, scenario, asked.repetitions, asked.threads, asked.against)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    show(result)
    return 0 if all(result.get("same_work", {"": True}).values()) else 1
