"""How time and memory grow: one axis at a time from the embedded default.

    prompts B, responses K, annotators    the embedded policy; whole rounds
    tokens T, parameters                  policies of random weights that never end an answer;
                                          people find them all equally useless and skip, so the
                                          reward model rests
    rounds                                one long run with its records, by its place in the run
    processes                             equal runs through the sweeps' pool, per hour

Every point is measured in a process of its own, so that its peak is its own. ``exponent`` is the
slope of log seconds over log value between an axis' last two points: above 1 grows worse than
linearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from sim.config import Config, EvaluationConfig
from sim.listener import Listener

POINTS = 10
"""Stretches of the long run that are told apart."""
NEVER = -1
"""A token that no model says."""


class Point(NamedTuple):
    """One measured place on an axis."""

    value: float
    seconds: float  # of one round; of one run for processes
    resident_mib: float | None  # the peak; for rounds of a long run, what is held


class Axis(NamedTuple):
    """What grows, where it is measured, and how."""

    label: str
    values: tuple[Any, ...]
    measure: Callable[[Any, int], list[Point]]
    flat: bool = False  # a level line, or fewer seconds, is hoped for


def growth(
    threads: int, tell: Callable[[str], None] = lambda text: None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure axis after axis; yields names with JSON values.

    Args:
        threads: torch threads of every process but those of a pool, which have one each.
        tell: hears of every point.
    """
    for name, axis in AXES.items():
        points: list[Point] = []
        for value in axis.values:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                points += alone.submit(axis.measure, value, threads).result()
            last = points[-1]
            tell(f"{axis.label}: {last.value:g}, {last.seconds:.3f} s")
        yield (
            name,
            {
                "label": axis.label,
                "points": [point._asdict() for point in points],
                "exponent": None if axis.flat else exponent(points),
            },
        )


def exponent(points: list[Point]) -> float:
    """Slope of log seconds over log value between the last two points."""
    a, b = points[-2:]
    return math.log(b.seconds / a.seconds) / math.log(b.value / a.value)


def _rounds(
    config: Config, threads: int, shape: str | None = None, tokens: int | None = None, n: int = 5
) -> Point:
    """Median seconds of ``n`` warm rounds, and the peak of this process; the value is left open.

    A ``shape`` is a policy of random weights that never ends an answer before ``tokens``.
    """
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
        if tokens:
            config = replace(config, sampler=replace(config.sampler, max_new_tokens=tokens))
        rounds = OurRounds(config, scenario)
    if shape:
        rounds.agent.sampler.eos_id = NEVER
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
    return [_rounds(Config(), threads, "100k", value)._replace(value=value)]


def parameters(shape: str, threads: int) -> list[Point]:
    """Parameters of the policy's layers."""
    from sim.bench.shapes import shape_of

    width, layers = shape_of(shape)
    value = 10.0 * layers * width**2
    return [_rounds(Config(), threads, shape, n=3)._replace(value=value)]


def rounds(value: int, threads: int) -> list[Point]:
    """One run of ``value`` short rounds, records and checkpoints included, window by window."""
    import time

    import numpy as np

    from sim.bench.machine import read_memory
    from sim.progress import quiet_loading
    from sim.run import run

    class Clock(Listener):
        """Notes time and memory at the end of every round, when all is written."""

        def __init__(self) -> None:
            self.at: list[float] = []
            self.resident: list[float | None] = []

        def round(self, row: dict[str, Any]) -> None:
            """One more round."""
            self.at.append(time.perf_counter())
            self.resident.append(read_memory().now)

    quiet_loading()
    clock, window = Clock(), value // POINTS
    config = replace(
        _people(batch=8, responses=2),
        rounds=value,
        threads=threads,
        evaluation=EvaluationConfig(every=value, n_harm=8, n_help=8, n_true=0),
    )
    with TemporaryDirectory() as folder:
        run(config, Path(folder) / "run", listener=clock)
    seconds = np.diff(clock.at[:-1])  # the last round is evaluated
    return [
        Point(
            float(end),
            float(np.median(seconds[max(0, end - window - 1) : end - 1])),
            clock.resident[end - 1],
        )
        for end in range(window, value + 1, window)
    ]


def processes(value: int, threads: int) -> list[Point]:
    """Seconds a run when ``value`` processes, of one thread each, work off eight short runs."""
    import time

    from sim.presets import preset
    from sim.sweep import sweep

    runs = [replace(preset("smoke"), seed=seed) for seed in range(8)]
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = sweep(runs, folder, jobs=value, any_code=True)["runs"]
        seconds = (time.perf_counter() - began) / len(runs)
    failed = [run for run in done if run["outcome"] == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed")
    return [Point(value, seconds, None)]


AXES = {
    "prompts": Axis("prompts B", (16, 64, 256, 1024), prompts),
    "responses": Axis("responses K", (2, 4, 8, 16), responses),
    "tokens": Axis("tokens T", (12, 24, 48, 96), tokens),
    "parameters": Axis("policy parameters", ("100k", "1m", "3m", "10m"), parameters),
    "annotators": Axis("annotators", (100, 1_000, 10_000, 100_000), annotators),
    "rounds": Axis("round of a long run", (1000,), rounds, flat=True),
    "processes": Axis("processes", (1, 2), processes, flat=True),
}
