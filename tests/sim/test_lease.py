"""Leases: one owner at a time, dead ones are replaced, whoever was replaced notices."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sim import lease as leases
from sim.lease import Lease, owner


def test_a_run_has_one_owner_until_it_is_free(tmp_path: Path) -> None:
    first = Lease.claim(tmp_path, "run")
    assert first is not None and first.held()
    with first.beating():
        assert Lease.claim(tmp_path, "run") is None
        assert owner(tmp_path, "run") is not None
        other = Lease.claim(tmp_path, "run.2")
        assert other is not None, "names may look like another run's lease"
    assert owner(tmp_path, "run") is None
    second = Lease.claim(tmp_path, "run")
    assert second is not None and second.number > first.number
    assert not first.held()


def test_an_owner_that_died_on_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    code = "import sys; from sim.lease import Lease; assert Lease.claim(sys.argv[1], 'run')"
    code = code.replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert owner(tmp_path, "run") is None
    assert Lease.claim(tmp_path, "run") is not None


def test_an_owner_elsewhere_counts_as_dead_when_it_no_longer_beats(tmp_path: Path) -> None:
    far = tmp_path / "run.7"
    far.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert owner(tmp_path, "run") == "elsewhere:1"
    assert Lease.claim(tmp_path, "run") is None
    old = time.time() - 2 * leases.STALE
    os.utime(far, (old, old))
    taken = Lease.claim(tmp_path, "run")
    assert taken is not None and taken.number == 8
    far.write_text("")  # the old owner comes back and frees what is no longer his
    assert taken.held() and owner(tmp_path, "run") is not None


def test_a_beat_keeps_a_lease_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.02)
    lease = Lease.claim(tmp_path, "run")
    assert lease is not None
    old = time.time() - 2 * leases.STALE
    os.utime(lease.path, (old, old))
    with lease.beating():
        end = time.monotonic() + 10
        while lease.path.stat().st_mtime < old + leases.STALE and time.monotonic() < end:
            time.sleep(0.02)
        assert lease.path.stat().st_mtime > old + leases.STALE


def _claims(folder: Path, gate: object, said: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    won = [n for n in range(20) if Lease.claim(folder, f"run-{n}") is not None]
    said.put(won)  # type: ignore[attr-defined]
    time.sleep(2)  # dead owners would be replaced


def test_many_that_claim_at_once_never_share(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate, said = context.Event(), context.Queue()
    others = [context.Process(target=_claims, args=(tmp_path, gate, said)) for _ in range(3)]
    for process in others:
        process.start()
    gate.set()
    won = [run for _ in others for run in said.get(timeout=60)]
    assert sorted(won) == list(range(20))
    for process in others:
        process.join()


def test_a_stopped_owner_on_this_host_is_not_dead_and_an_unreadable_lease_ages(
    tmp_path: Path,
) -> None:
    lease = Lease.claim(tmp_path, "run")
    assert lease is not None
    old = time.time() - 2 * leases.STALE
    os.utime(lease.path, (old, old))
    assert owner(tmp_path, "run") == f"{socket.gethostname()}:{os.getpid()}"
    for text in ("garbage", "[1]", "{}"):
        lease.path.write_text(text)
        assert owner(tmp_path, "run") == "unknown"
    os.utime(lease.path, (old, old))
    assert owner(tmp_path, "run") is None and Lease.claim(tmp_path, "run") is not None
