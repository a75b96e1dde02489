"""A run directory cut at any byte of any file, or with a flipped bit: mended, or refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from envs.usage import UsageError
from sim.analysis.load import load_run
from sim.cli import main
from sim.config import AttackConfig, Config, EvaluationConfig, FeedbackConfig
from sim.record import Record
from sim.resume import is_finished, resumable
from sim.seal import read_sealed

pytestmark = pytest.mark.world

SMALL = Config(
    rounds=4,
    feedback=FeedbackConfig(batch=4, responses=2, annotators=20),
    evaluation=EvaluationConfig(n_harm=8, n_help=8, n_true=8),
    attack=AttackConfig("harmful_asker", rho=0.5),
)
DAMAGES = 200  # of a run that was stopped
FEW = 60  # of one that has ended
APPENDED = ("rounds.jsonl", "commits.jsonl", "timings.jsonl")
NO_PART = ("timings.jsonl", ".lock")  # of a run's identity


class Damage(NamedTuple):
    """What is done to one file."""

    name: str
    cut: bool
    at: int  # bytes left, or the bit that is flipped

    def do(self, run: Path) -> None:
        file = run / self.name
        data = bytearray(file.read_bytes())
        if self.cut:
            file.write_bytes(data[: self.at])
        else:
            data[self.at // 8] ^= 1 << self.at % 8
            file.write_bytes(data)


def tree(run: Path) -> dict[str, bytes]:
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {str(p.relative_to(run)): p.read_bytes() for p in files if p.name not in NO_PART}


def kind(name: str) -> str:
    """Name of a file without its round."""
    parts = Path(name).parts
    return parts[0] + ("/*" + Path(name).suffix if len(parts) > 1 else "")


def damages(run: Path, count: int, seed: int) -> Iterator[Damage]:
    """Every kind of file alike, every file of it, every byte; as many cuts as flips."""
    rng = np.random.default_rng(seed)
    names = [str(p.relative_to(run)) for p in sorted(run.rglob("*")) if p.is_file()]
    kinds: dict[str, list[str]] = {}
    for name in names:
        if (run / name).stat().st_size:  # the lock is empty
            kinds.setdefault(kind(name), []).append(name)
    for number in range(count):
        of = list(kinds.values())[number // 2 % len(kinds)]
        name = of[rng.integers(len(of))]
        size = (run / name).stat().st_size
        cut = number % 2 == 0
        yield Damage(name, cut, int(rng.integers(size if cut else 8 * size)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any, embedded_models: Any) -> Path:
    from sim.run import run

    path = tmp_path_factory.mktemp("damage") / "whole"
    run(SMALL, path)
    return path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: Any, whole: Path) -> Path:
    """The same run, killed after three of its rounds."""
    from sim.run import run

    class Killed(Exception):
        pass

    class Kills:
        def round(self, row: dict[str, Any]) -> None:
            if row["round"] == 3:
                raise Killed

        def start(self, *_: Any) -> None:
            pass

    path = tmp_path_factory.mktemp("damage") / "stopped"
    with pytest.raises(Killed):
        run(SMALL, path, listener=Kills())  # type: ignore[arg-type]
    return path


def older(run: Path, round: int) -> set[str]:
    """Files of checkpoints before that of ``round``."""
    files = (run / "checkpoints").rglob("state.*")
    return {str(p.relative_to(run)) for p in files if int(p.parent.name[-6:]) < round}


class Resumes:
    """Resumes runs. One that stands where another stood before is not run to its end again."""

    def __init__(self, whole: Path):
        self.end = {n: data for n, data in tree(whole).items() if n not in older(whole, 4)}
        self.known: dict[int, dict[str, bytes]] = {}

    def __call__(self, run: Path) -> int:
        """Resume ``run``; the round from which it went on.

        Raises:
            ValueError: it is refused.
        """
        from sim.run import run as run_loop

        config = resumable(run)
        assert config == SMALL, "no damage makes another run of it"
        restored = Record(run).restore()
        round = -1 if restored is None else restored[0]
        stands = tree(run)
        for name in stands.keys() & older(run, round):
            del stands[name]  # needed no more, not looked at, and soon removed
        if round not in self.known:
            run_loop(config, run, resume=round >= 0 or (run / "manifest.json").is_file())
            ends = tree(run)
            assert {n: ends[n] for n in ends if n not in older(run, 4)} == self.end
            self.known[round] = stands
        assert stands == self.known[round]
        return round


@pytest.mark.parametrize(("ended", "count"), [(False, DAMAGES), (True, FEW)])
def test_a_damaged_run_is_resumed_or_refused_by_name(
    whole: Path, stopped: Path, tmp_path: Path, ended: bool, count: int
) -> None:
    run, resume = tmp_path / "run", Resumes(whole)
    source, last = (whole, 4) if ended else (stopped, 3)
    lost: Counter[str] = Counter()
    for damage in damages(source, count, seed=6 + ended):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source, run)
        damage.do(run)
        before = tree(run)
        try:
            round = resume(run)
        except UsageError as refusal:
            if "has finished its" in str(refusal):  # the damage is where it cannot matter
                assert harmless(run, damage), damage
                lost["nothing"] += 1
                continue
            assert damage.name in str(refusal), (damage, refusal)
            assert tree(run) == before, "a refusal changes nothing"
            assert damage.name not in APPENDED, damage
            lost["refused"] += 1
            continue
        assert last - round <= 1, (damage, round)
        assert not (damage.cut and damage.name in APPENDED and last > round), damage
        lost["one round" if round < last else "nothing"] += 1
    assert sum(lost.values()) == count
    print(f"{'finished' if ended else 'stopped'}: {dict(lost)}")
    assert lost["nothing"] > lost["refused"] > 0 and lost["one round"] > 0


def harmless(run: Path, damage: Damage) -> bool:
    """Whether what is damaged is written twice, or needed only to go on after the end."""
    doubled = damage.name.removeprefix(".copy/") in (*APPENDED, ".lock")
    return doubled or damage.name.startswith("checkpoints/")


def test_damaged_results_are_never_shown(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a report reads is right, or refused by name; a sweep counts it as finished or not."""
    run, right = tmp_path / "run", load_run(whole)
    tables = {name: right.table(name) for name in ("labels", "truth", "samples")}
    seen: Counter[str] = Counter()
    for damage in damages(whole, FEW, seed=8):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        damage.do(run)
        try:
            found = load_run(run)
            assert all(found.table(name).equals(table) for name, table in tables.items())
            assert found.rounds.equals(right.rounds), damage
            assert (found.manifest, found.summary) == (right.manifest, right.summary), damage
            assert is_finished(run, SMALL)
            seen["right"] += 1
        except UsageError as refusal:
            assert damage.name in str(refusal), (damage, refusal)
            seen["refused"] += 1
            if damage.name == "summary.json":
                assert not is_finished(run, SMALL)
    print(f"shown: {dict(seen)}")
    assert seen["right"] > 10 and seen["refused"] > 10
    part = run / "samples/part-000001.parquet"
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    part.write_bytes(part.read_bytes()[:-1])
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "samples/part-000001.parquet is damaged" in capsys.readouterr().err


def test_a_sweep_mends_what_it_can_and_says_what_it_cannot(whole: Path, tmp_path: Path) -> None:
    from sim.sweep import plan, sweep

    (cell,) = plan([SMALL], tmp_path)
    shutil.copytree(whole, cell.path)
    summary = cell.path / "summary.json"
    summary.write_bytes(summary.read_bytes().replace(b"harm_start", b"harm_stars"))
    assert [run["failure"] for run in sweep([SMALL], tmp_path, 1)["runs"]] == [None]
    assert read_sealed(summary) == read_sealed(whole / "summary.json")
    policy = cell.path / "policies/round-000001.safetensors"
    policy.write_bytes(b"")
    summary.unlink()
    (failed,) = sweep([SMALL], tmp_path, 1)["runs"]
    assert "policies/round-000001.safetensors is damaged or gone" in failed["failure"]
    manifest = cell.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(UsageError, match="manifest.json.* is damaged"):
        sweep([SMALL], tmp_path, 1)


def test_a_run_of_before_has_no_checksums(whole: Path, tmp_path: Path) -> None:
    """Neither the manifest nor the summary of runs that were recorded before they were sealed."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / ".copy")
    for name in ("manifest.json", "summary.json"):
        (run / name).write_text(json.dumps(read_sealed(run / name)))
    assert load_run(run).summary == load_run(whole).summary
    assert is_finished(run, SMALL) and resumable(run, 6) == replace(SMALL, rounds=6)
