"""Several sweeps in one folder, what they say of it, and runs of other outcomes or other code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim import flags, pool, sweep_status
from sim.cli import main
from sim.lease import LEASES, Lease
from sim.pool import Job, work_off
from sim.presets import preset
from sim.seal import read_sealed, write_sealed
from sim.sweep import RETRIED, PlannedRun, set_aside, sweep
from sim.sweep_command import grid
from sim.sweep_progress import SweepListener
from sim.sweep_status import seconds_left, standing

ROOT = Path(__file__).parents[2]
SMALL = (
    "sweep smoke --jobs 1 --feedback.batch 8 --checkpoint-every 1 --threads 1 "
    "--evaluation.every 3 --evaluation.n-harm 8 --evaluation.n-help 8"
).split()
WORDS = [*SMALL, *"--rho 0 .4 --seeds 2 --rounds 3".split()]


def begin(out: Path, *further: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "sim.cli", *WORDS, "--out", str(out), *further]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)


def rows(out: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in sorted(out.glob("*/rounds.jsonl"))}


@pytest.mark.world
def test_two_sweeps_and_a_killed_one_make_the_runs_of_one(
    embedded_models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--out", str(tmp_path / "alone")]) == 0
    shared = tmp_path / "shared"
    killed = begin(shared)
    while not list(shared.glob("*/rounds.jsonl")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    both = [begin(shared), begin(shared)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert rows(shared) == rows(tmp_path / "alone") and len(rows(shared)) == 4
    tables = [json.loads((tmp_path / n / "table.json").read_text()) for n in ("alone", "shared")]
    assert len(tables[0]["runs"]) == len(tables[1]["runs"]) == 4
    for table in tables:
        for run in table["runs"]:
            run["path"] = Path(run["path"]).name
    assert tables[0] == tables[1]
    capsys.readouterr()
    assert main([*WORDS, "--out", str(shared), "--status"]) == 0
    told = capsys.readouterr().out
    assert "4 finished\n" in told and "about 0 s" in told


def test_a_run_of_another_sweep_is_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pool, "AGAIN", 0.1)
    lease = Lease.claim(tmp_path / LEASES, "run")
    assert lease is not None
    wrong = {**preset("smoke").to_dict(), "rounds": 0}
    began = time.monotonic()
    with lease.beating():
        ended = threading.Event()
        found: dict[Path, str] = {}

        def work() -> None:
            found.update(work_off([Job(tmp_path / "run", wrong)], 1, SweepListener()))
            ended.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert not ended.wait(6), "it does not begin while another is at it"
    thread.join(60)
    assert time.monotonic() - began > 6 and "rounds=0" in found[tmp_path / "run"]


def cell(folder: Path, name: str = "run", **changes: Any) -> PlannedRun:
    return PlannedRun(replace(preset("smoke"), **changes), folder / name)


def recorded(cell: PlannedRun, rounds: int, seconds: float) -> None:
    cell.path.mkdir()
    (cell.path / "rounds.jsonl").write_text("{}\n" * (rounds + 1))
    line = json.dumps({"round": 1, "seconds": seconds}) + "\n"
    (cell.path / "timings.jsonl").write_text(line * rounds + '{"round": 9, "sec')


def test_the_time_left_is_that_of_rounds_recorded_here(tmp_path: Path) -> None:
    from sim.config import registered_learner

    begun = cell(tmp_path, "a", rounds=10)
    recorded(begun, 4, 2.0)
    other = cell(tmp_path, "b", rounds=10, learner=registered_learner("ppo")())
    found = [standing(begun), standing(other)]
    assert [one.state for one in found] == ["stopped", "waiting"]
    assert seconds_left(found, 2) == pytest.approx((6 + 10) * 2.0 / 2)
    recorded(other, 1, 5.0)
    assert seconds_left([*map(standing, (begun, other))], 1) == pytest.approx(6 * 2.0 + 9 * 5.0)
    assert seconds_left([standing(cell(tmp_path, "c"))], 1) is None


def test_what_is_running_and_what_failed_is_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = cell(tmp_path, "one"), cell(tmp_path, "two")
    lease = Lease.claim(tmp_path / LEASES, "one")
    assert lease is not None
    sweep_status.error_file(two.path).write_text("Traceback\nValueError: so it was\n")
    found = [standing(one), standing(two)]
    assert [s.state for s in found] == ["running", "failed"]
    sweep_status.print_status(found, 1, every=False)
    told = capsys.readouterr().out
    assert f":{os.getpid()}" in told and "so it was" in told
    assert "1 running, 1 failed" in told and "no round has been measured" in told


def test_runs_of_an_outcome_are_set_aside(tmp_path: Path) -> None:
    safe, gone = cell(tmp_path, "safe"), cell(tmp_path, "gone [1]")
    for one, outcome in ((safe, "safe"), (gone, "diverged")):
        one.path.mkdir()
        (one.path / "summary.json").write_text(json.dumps({"outcome": outcome}))
    first = tmp_path / RETRIED / "gone [1].1"
    assert set_aside([safe, gone], "diverged") == [first] and first.is_dir()
    assert safe.path.is_dir() and not gone.path.exists()
    gone.path.mkdir()
    (gone.path / "summary.json").write_text('{"outcome": "diverged"}')
    assert set_aside([safe, gone], "diverged") == [first.with_name("gone [1].2")]


@pytest.mark.world
def test_other_code_is_refused_unless_asked_for(
    embedded_models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--rounds", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    (manifest,) = tmp_path.glob("*/manifest.json")
    told = read_sealed(manifest)
    told["versions"]["poisonloop"] = "0.0.1"
    write_sealed(manifest, told)
    capsys.readouterr()
    assert main(words) == 2
    assert "was run by poisonloop 0.0.1" in capsys.readouterr().err
    assert main([*words, "--any-code"]) == 0
    assert main([*words, "--retry", "lost"]) == 2
    assert "retry='lost'; allowed: diverged, exited" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert "finished" in capsys.readouterr().out


DIVERGES = """
from pathlib import Path
from agents.defence import Defence
from agents.learners.update import Diverged

class Diverges(Defence):
    def __init__(self, while_there):
        self.file = Path(while_there)
    def backward(self, ctx, run):
        if self.file.exists():
            raise Diverged("the loss is nan")
        return run()
"""


@pytest.mark.world
def test_a_diverged_run_has_ended_and_is_run_again_when_asked_for(
    embedded_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin.py").write_text(DIVERGES)
    (tmp_path / "there").touch()
    monkeypatch.chdir(tmp_path)
    preset, options = flags.read([*SMALL[1:2], *SMALL[4:], "--rounds", "2"])
    fine, out = grid(preset, options), tmp_path / "out"
    both = [replace(fine[0], defences=("plugin.py:Diverges(while_there='there')",)), *fine]
    rows = sweep(both, out, 2)["runs"]
    assert sorted(row["outcome"] for row in rows) == ["diverged", "safe"]
    assert [row["failure"] for row in rows] == [None, None], "it is an outcome, no failure"
    (tmp_path / "there").unlink()
    assert sweep(both, out, 2)["runs"] == rows, "it is not run again"
    again = sweep(both, out, 2, retry="diverged")["runs"]
    assert [row["outcome"] for row in again] == ["safe", "safe"]
    (kept,) = (out / RETRIED).iterdir()
    assert read_sealed(kept / "summary.json")["diverged"]["reason"] == "the loss is nan"
