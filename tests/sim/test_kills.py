"""A sweep killed again and again, at random moments, ends in what it ends in undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim import flags
from sim.record import Record
from sim.sweep import sweep
from sim.sweep_command import grid
from tests.sim.same_runs import tree

ROOT = Path(__file__).parents[2]
WORDS = (
    "smoke --rho 0 .4 --feedback.batch 8 --checkpoint-every 1 --threads 1 "
    "--evaluation.every 2 --evaluation.n-harm 8 --evaluation.n-help 8 --rounds"
).split()


def table(out: Path) -> dict[str, Any]:
    told = json.loads((out / "table.json").read_text())
    for run in told["runs"]:
        run["path"] = Path(run["path"]).name
    return told


def committed(out: Path) -> dict[str, int]:
    runs = [path.parent for path in out.glob("*/manifest.json")]
    return {run.name: len(Record(run).commits()) for run in runs}


def begin(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sim.cli", "sweep", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that it can be killed with its workers
    )


@pytest.mark.world
@pytest.mark.parametrize(
    ("kills", "rounds"), [(2, 4), pytest.param(10, 14, marks=pytest.mark.slow)]
)
def test_a_sweep_survives_being_killed(
    embedded_models: Any, tmp_path: Path, kills: int, rounds: int
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    words = [*WORDS, str(rounds)]
    configs = grid(*flags.read(words))
    sweep(configs, alone, 2)
    rng = np.random.default_rng(kills)
    for _ in range(kills):
        before = committed(killed)
        driver = begin([*words, "--out", str(killed)])
        end = time.monotonic() + 120
        while rng.random() < 0.996 and committed(killed) == before:  # seldom, while it starts
            assert driver.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.6))
        assert driver.poll() is None, "it was still at work"
        if rng.random() < 0.5:
            os.killpg(driver.pid, signal.SIGKILL)
        else:  # its workers notice
            driver.kill()
        driver.wait()
        after = committed(killed)
        assert all(after[name] >= count for name, count in before.items()), "none is lost again"
    sweep(configs, killed, 2)
    assert tree(killed) == tree(alone) and len(committed(killed)) == 2
    assert table(killed) == table(alone)
