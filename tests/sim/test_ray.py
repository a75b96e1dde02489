"""A sweep on a Ray cluster of two nodes on loopback, one of which is lost on the way."""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sim import flags
from sim.cli import main
from sim.lease import LEASES, owner
from sim.sweep import sweep
from sim.sweep_command import grid
from sim.sweep_progress import SweepListener
from tests.sim.same_runs import tree

WORDS = (
    "smoke --feedback.batch 8 --threads 1 --evaluation.every 3 --evaluation.n-harm 8 "
    "--evaluation.n-help 8 --rho 0 .4 --seeds 2 --rounds 3"
).split()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="pip install 'poisonloop[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000}
    made = Cluster()
    made.add_node(**small, include_dashboard=False)
    made.second = made.add_node(**small)
    yield made
    made.shutdown()


class LosesANode(SweepListener):
    """Ends a node as soon as both are at work, and remembers what it hears."""

    def __init__(self, cluster: Any, out: Path):
        self.cluster, self.out = cluster, out
        self.rounds: list[tuple[str, int]] = []
        self.ended: list[str] = []
        self.lost = False

    def round(self, path: Path, row: dict[str, Any]) -> None:
        self.rounds.append((path.name, row["round"]))
        names = {lease.name.rpartition(".")[0] for lease in (self.out / LEASES).glob("[!.]*")}
        at_work = [name for name in names if owner(self.out / LEASES, name)]
        if len(at_work) == 2 and not self.lost:
            self.cluster.remove_node(self.cluster.second, allow_graceful=False)
            self.lost = True

    def done(self, path: Path, summary: dict[str, Any]) -> None:
        self.ended.append(path.name)


@pytest.mark.world
def test_two_nodes_make_the_runs_of_the_local_pool_and_the_loss_of_one_loses_none(
    cluster: Any, embedded_models: Any, tmp_path: Path
) -> None:
    configs = grid(*flags.read(WORDS))
    alone, far = tmp_path / "alone", tmp_path / "far"
    sweep(configs, alone, 2)
    heard = LosesANode(cluster, far)
    table = sweep(configs, far, listener=heard, ray=cluster.address)
    assert heard.lost, "both nodes were at work"
    assert [run["failure"] for run in table["runs"]] == [None] * 4
    assert tree(far) == tree(alone) and len(table["runs"]) == 4
    assert sorted(heard.ended) == sorted({name for name, _ in heard.rounds})
    assert {(name, 3) for name in heard.ended} <= set(heard.rounds)


@pytest.mark.slow
def test_a_run_that_fails_on_the_cluster_is_told_as_in_the_pool(
    cluster: Any, tmp_path: Path
) -> None:
    from sim import ray_pool
    from sim.pool import Job
    from sim.presets import preset

    wrong = {**preset("smoke").to_dict(), "rounds": 0}
    with ray_pool.cluster(cluster.address, None) as ray:
        failures = ray_pool.work_off(ray, [Job(tmp_path / "a", wrong)], 1, SweepListener())
    assert "rounds=0; allowed: >= 1" in failures[tmp_path / "a"]
    assert (tmp_path / "a.error.txt").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--backend dask", "backend='dask'; allowed: local, ray"),
        ("--address auto", "address='auto' with backend='local'; allowed: --backend ray"),
    ],
)
def test_other_backends_are_refused(words: str, said: str, capsys: Any) -> None:
    assert main(["sweep", "smoke", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_without_ray_the_line_that_installs_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    known = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "ray":
            raise ImportError
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    began = time.monotonic()
    assert main(["sweep", "smoke", "--backend", "ray"]) == 2
    assert "pip install 'poisonloop[ray]'" in capsys.readouterr().err
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:x"])
def test_no_cluster_at_an_address_is_said(address: str) -> None:
    pytest.importorskip("ray", reason="pip install 'poisonloop[ray]'")
    from sim import ray_pool

    refused = pytest.raises(ValueError, match=f"address='{address}' cannot be reached")
    with refused, ray_pool.cluster(address, None):
        pass
