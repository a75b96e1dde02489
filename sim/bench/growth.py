"""How time and memory grow: one axis at a time from the embedded default.

    prompts B, responses K, annotators    the embedded policy; whole rounds
    tokens T, parameters                  policies of random weights, whose answers are always T
                                          words; people find them all equally useless and skip, so
                                          the reward model rests
    rounds                                one long run with its records, by its place in the run
    processes                             equal runs through the sweeps' pool, per hour

Every point is measured in a process of its own, so that its peak is its own. ``exponent`` is the
slope of log seconds over log value between an axis' last two points: above 1 grows worse than
linearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from sim.config import Config, EvaluationConfig
from sim.listener import Listener

ROUNDS, WINDOW = 1000, 100
"""Length of the long run, and the rounds of each of its points."""


class Point(NamedTuple):
    """One measured place on an axis."""

    value: float
    seconds: float  # of one round; of one run for processes
    peak_mib: float | None


class Axis(NamedTuple):
    """What grows, where it is measured, and how."""

    label: str
    values: tuple[Any, ...]
    measure: Callable[[Any, int], list[Point]]


def growth(threads: int, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure every axis; JSON values.

    Args:
        threads: torch threads of every process.
        tell: hears of every point.
    """
    curves = {}
    for name, axis in AXES.items():
        points: list[Point] = []
        for value in axis.values:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                points += alone.submit(axis.measure, value, threads).result()
            last = points[-1]
            tell(f"{axis.label}: {last.value:g}, {last.seconds:.3f} s")
        curves[name] = {
            "label": axis.label,
            "points": [point._asdict() for point in points],
            "exponent": exponent(points),
        }
    return curves


def exponent(points: list[Point]) -> float:
    """Slope of log seconds over log value between the last two points."""
    a, b = points[-2:]
    return math.log(b.seconds / a.seconds) / math.log(b.value / a.value)


def _rounds(config: Config, threads: int, shape: str | None = None, n: int = 5) -> Point:
    """Median seconds of ``n`` warm rounds, and the peak of this process; the value is left open."""
    import numpy as np
    import torch

    from sim.bench.machine import read_memory, reset_peak
    from sim.bench.rounds import OurRounds
    from sim.bench.shapes import shape_of, with_random_policy
    from sim.progress import quiet_loading
    from sim.scenario import make_scenario

    quiet_loading()
    torch.set_num_threads(threads)
    scenario = make_scenario(config)
    with TemporaryDirectory() as folder:
        if shape:
            scenario = with_random_policy(scenario, shape_of(shape), Path(folder))
        rounds = OurRounds(config, scenario)
    for _ in range(2):
        rounds()
    reset_peak()
    seconds = [rounds()["round"] for _ in range(n)]
    return Point(0.0, float(np.median(seconds)), read_memory().peak)


def _people(**fields: Any) -> Config:
    default = Config()
    return replace(default, feedback=replace(default.feedback, **fields))


def prompts(value: int, threads: int) -> list[Point]:
    """B prompts a round."""
    return [_rounds(_people(batch=value), threads)._replace(value=value)]


def responses(value: int, threads: int) -> list[Point]:
    """K answers to a prompt."""
    return [_rounds(_people(responses=value), threads)._replace(value=value)]


def annotators(value: int, threads: int) -> list[Point]:
    """People in the pool."""
    return [_rounds(_people(annotators=value), threads)._replace(value=value)]


def tokens(value: int, threads: int) -> list[Point]:
    """T words an answer."""
    default = Config()
    config = replace(default, sampler=replace(default.sampler, max_new_tokens=value))
    return [_rounds(config, threads, "100k")._replace(value=value)]


def parameters(shape: str, threads: int) -> list[Point]:
    """Parameters of the policy's layers."""
    from sim.bench.shapes import shape_of

    width, layers = shape_of(shape)
    value = 10.0 * layers * width**2
    return [_rounds(Config(), threads, shape, n=3)._replace(value=value)]


def rounds(value: int, threads: int) -> list[Point]:
    """One run of ``value`` short rounds, records and checkpoints included, window by window."""
    import numpy as np

    from sim.bench.machine import read_memory
    from sim.progress import quiet_loading
    from sim.run import run

    class Clock(Listener):
        """Notes memory at every round; seconds are in the run's own timings."""

        def __init__(self) -> None:
            self.resident: list[float | None] = []

        def round(self, row: dict[str, Any]) -> None:
            """One more round."""
            self.resident.append(read_memory().now)

    quiet_loading()
    length, clock = value, Clock()
    config = replace(
        _people(batch=8, responses=2),
        rounds=length,
        threads=threads,
        evaluation=EvaluationConfig(every=length, n_harm=8, n_help=8, n_true=0),
    )
    with TemporaryDirectory() as folder:
        run(config, Path(folder) / "run", listener=clock)
        seconds = _timings(Path(folder) / "run")
    ends = range(WINDOW, length + 1, WINDOW)
    return [
        Point(float(end), float(np.median(seconds[end - WINDOW : end])), clock.resident[end - 1])
        for end in ends
    ]


def _timings(path: Path) -> list[float]:
    import json

    lines = (path / "timings.jsonl").read_text().splitlines()
    return [row["seconds"] for row in map(json.loads, lines) if "seconds" in row]


def processes(value: int, threads: int) -> list[Point]:
    """Seconds a run when ``value`` processes work off eight equal short runs."""
    import time

    from sim.presets import preset
    from sim.sweep import sweep

    runs = [replace(preset("smoke"), seed=seed, threads=threads) for seed in range(8)]
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        sweep(runs, folder, jobs=value)
        return [Point(value, (time.perf_counter() - began) / len(runs), None)]


AXES = {
    "prompts": Axis("prompts B", (16, 64, 256, 1024), prompts),
    "responses": Axis("responses K", (2, 4, 8, 16), responses),
    "tokens": Axis("tokens T", (12, 24, 48, 96), tokens),
    "parameters": Axis("policy parameters", ("100k", "1m", "3m", "10m"), parameters),
    "annotators": Axis("annotators", (100, 1_000, 10_000, 100_000), annotators),
    "rounds": Axis("round of a long run", (ROUNDS,), rounds),
    "processes": Axis("processes", (1, 2), processes),
}
