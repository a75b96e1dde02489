"""``poisonloop bench``: prints and writes how fast a round is, how it grows and what it keeps."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

EXCLUDES = {
    "growth": ("preset", "against", "model", "shape", "memory", "repetitions"),
    "memory": ("preset", "against", "model", "repetitions", "threads"),
    "model": ("shape",),
}
"""Flags that have no meaning beside the first."""


def main(argv: list[str]) -> int:
    """The command; returns the exit code, 1 where two sides did not do the same work.

    Raises:
        ValueError: a bad flag value.
    """
    from envs.usage import UsageError, check_ranges
    from sim.bench.shapes import SHAPES, shape_of
    from sim.cli import parser_of
    from sim.presets import preset

    parser = parser_of("bench", "Seconds per stage of one GRPO round, against the machine and TRL.")
    parser.add_argument("preset", nargs="?", default="default", help="which configuration")
    parser.add_argument("--against", choices=["trl"], help="what to run beside it")
    parser.add_argument("--model", metavar="DIR", help="a causal language model; needs --data")
    parser.add_argument("--data", metavar="FILE", help="prompts for --model")
    parser.add_argument("--shape", metavar="SIZE", help=f"random policy: {', '.join(SHAPES)}")
    parser.add_argument("--growth", type=Path, metavar="PNG", help="draw how time grows instead")
    parser.add_argument("--memory", action="store_true", help="memory by part instead")
    parser.add_argument("--vocabulary", type=int, default=32000, metavar="V", help="with --memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=9, metavar="N", help="rounds counted")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="torch threads")
    asked = parser.parse_args(argv)
    check_ranges(asked, repetitions=">= 1", threads="1 to 1024", vocabulary="16 to 1000000")
    if asked.shape:
        shape_of(asked.shape)
    preset(asked.preset)
    for name, others in EXCLUDES.items():
        clash = [o for o in others if getattr(asked, o) != parser.get_default(o)]
        if getattr(asked, name) and clash:
            raise UsageError(f"--{name} with {', '.join(clash)}; allowed: without")
    if (asked.model is None) != (asked.data is None):
        raise UsageError("--model and --data; allowed: both or neither")
    result = _growth(asked) if asked.growth else _memory(asked) if asked.memory else _rounds(asked)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0 if all(result.get("same_work", {"": True}).values()) else 1


def _rounds(asked: argparse.Namespace) -> dict[str, Any]:
    from envs.usage import UsageError
    from sim.bench.measure import bench
    from sim.bench.shapes import shape_of, with_random_policy
    from sim.bench.table import show
    from sim.presets import preset
    from sim.progress import quiet_loading
    from sim.scenario import make_scenario

    quiet_loading()
    config = preset(asked.preset)
    if config.learner_name != "grpo":
        raise UsageError(f"preset={asked.preset!r} learns by {config.learner_name}; allowed: grpo")
    if asked.model:
        config = replace(config, text=replace(config.text, model=asked.model, data=asked.data))
    scenario = make_scenario(config, progress=True)
    with TemporaryDirectory() as folder:
        if asked.shape:
            scenario = with_random_policy(scenario, shape_of(asked.shape), Path(folder))
        result = bench(config, scenario, asked.repetitions, asked.threads, asked.against)
    show(result)
    return result


def _growth(asked: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console

    from sim.bench.growth import growth
    from sim.bench.growth_plot import plot_growth
    from sim.bench.machine import describe, matmul_rate
    from sim.config import Config
    from sim.scenario import make_scenario
    from sim.threads import torch_threads

    make_scenario(Config(), progress=True)  # builds missing models once
    console, curves = Console(), {}
    with torch_threads(asked.threads):
        machine = describe(asked.threads, matmul_rate())
    for name, curve in growth(asked.threads, console.print):
        curves[name] = curve
        if curve["exponent"] is not None:
            console.print(f"{curve['label']}: seconds grow as its power {curve['exponent']:.2f}")
    console.print(f"Figure:   {plot_growth(curves, asked.growth)}")
    return {"machine": machine, "growth": curves}


def _memory(asked: argparse.Namespace) -> dict[str, Any]:
    from sim.bench.memory import memory
    from sim.bench.table import show_memory
    from sim.progress import quiet_loading

    quiet_loading()
    result = memory(asked.shape or "100m", asked.vocabulary)
    show_memory(result)
    return result
