"""A disk that takes no more: a message that names the path, and a run that can be continued."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envs.usage import Interrupted
from sim import files
from sim.cli import main
from sim.config import AttackConfig, Config, EvaluationConfig, FeedbackConfig
from sim.config_file import to_yaml

SMALL = Config(
    rounds=3,
    feedback=FeedbackConfig(batch=4, responses=2, annotators=20),
    evaluation=EvaluationConfig(n_harm=8, n_help=8, n_true=0),
    attack=AttackConfig("harmful_asker", rho=0.5),
)


def tree(run: Path) -> dict[str, bytes]:
    found = [path for path in sorted(run.rglob("*")) if path.is_file()]
    other = ("timings.jsonl", ".lock")
    return {str(p.relative_to(run)): p.read_bytes() for p in found if p.name not in other}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any, embedded_models: Any) -> Path:
    from sim.run import run

    path = tmp_path_factory.mktemp("disk") / "whole"
    run(SMALL, path)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own; called with its size in KiB, again to make it larger."""
    mounted: list[Path] = []

    def sized(kib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        options = f"size={kib}k" + (",remount" if mounted else "")
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() or not shutil.which("mount"):
            pytest.skip("mounting a small file system needs root")
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield sized
    for folder in mounted[:1]:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.world
def test_a_run_on_a_full_disk_says_where_and_goes_on_when_there_is_room(
    whole: Path, disk: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(to_yaml(SMALL))
    run = disk(11_000) / "run"  # two checkpoints of 4 MB and three policies, no third
    assert main(["run", "--config", str(tmp_path / "c.yaml"), "--out", str(run)]) == 1
    said = capsys.readouterr().err
    assert f"stopped: {run}/" in said and "No space left on device; make room" in said
    assert f"continue with: poisonloop resume {run}" in said
    begun = (run / "commits.jsonl").read_bytes()
    assert begun.count(b"\n") == 2 and tree(whole)["commits.jsonl"].startswith(begun)
    assert not list(run.rglob("*.tmp")), "half a file takes room"
    assert main(["resume", str(run)]) == 1, "there still is none"
    disk(64_000)
    from sim.run import run as run_loop

    run_loop(SMALL, run, resume=True)
    assert tree(run) == tree(whole)


@pytest.mark.world
def test_a_sweep_on_a_full_disk_records_it_and_goes_on_when_there_is_room(
    whole: Path, disk: Any
) -> None:
    from sim.sweep import sweep

    out = disk(22_000) / "sweep"  # one run fits, not two
    configs = [SMALL, replace(SMALL, seed=1)]
    rows = sweep(configs, out, 1)["runs"]
    assert rows[0]["failure"] is None and "No space left on device" in rows[1]["failure"]
    assert f"{out}/" in rows[1]["failure"]
    disk(64_000)
    rows = sweep(configs, out, 1)["runs"]
    assert [row["failure"] for row in rows] == [None, None]
    assert tree(Path(rows[0]["path"])) == tree(whole)


@pytest.mark.world
@pytest.mark.parametrize("call", [0, 1, 5, 14, 27])
def test_wherever_the_disk_is_full_the_run_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The file that is being written at that moment stays half written, or is gone."""
    from sim.run import run

    known, left = os.fsync, [call]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        known(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Interrupted, match="No space left on device; make room") as stopped:
        run(SMALL, tmp_path / "run")
    assert str(tmp_path) in str(stopped.value)
    monkeypatch.undo()
    run(SMALL, tmp_path / "run", resume=(tmp_path / "run").exists())
    assert tree(tmp_path / "run") == tree(whole)
