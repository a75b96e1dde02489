"""Which recorded comparisons a report holds."""

import json
from dataclasses import replace

import pytest

from envs.usage import UsageError
from sim.analysis import samples
from sim.analysis.load import load_runs
from sim.record import Record
from tests.sim.test_analysis import write_run


def test_many_samples_are_thinned_evenly(tmp_path, monkeypatch):
    for seed in range(6):
        write_run(tmp_path / str(seed), seed=seed)
    loaded = load_runs([tmp_path])
    whole = samples.collect(loaded)
    assert samples.told(whole) == "960 recorded comparisons from 120 rounds."
    monkeypatch.setattr(samples, "MOST", 6 * 8 * 5)
    some = samples.collect(loaded)
    assert set(some.rows["round"]) == {0, 4, 8, 12, 16} and len(some.rows) == 6 * 8 * 5
    assert "90 of 120 recorded rounds are left out" in samples.told(some)
    monkeypatch.setattr(samples, "MOST", 6 * 3)
    assert len(samples.collect(loaded).rows) == 6 * 3
    monkeypatch.setattr(samples, "MOST_TEXT", 6)
    assert len(samples.collect(loaded).rows) == 6


def test_a_fork_has_its_own_rounds(tmp_path):
    path = write_run(tmp_path / "run")
    (run,) = load_runs([path])
    fork = replace(run, manifest={**run.manifest, "fork": {"at": 15, "changed": {}}})
    found = samples.collect([run, fork])
    assert (found.rounds, found.recorded) == (25, 25)
    assert found.rows.groupby("run")["round"].min().tolist() == [0, 15]
    assert samples.collect([fork]).rounds == 20, "its parent is not there to show them"


@pytest.mark.parametrize("damage", [lambda whole: whole[:60], lambda whole: whole[:40] + b"x" * 9])
def test_damaged_samples_are_refused_by_name(tmp_path, damage):
    part = sorted((write_run(tmp_path / "run") / "samples").iterdir())[10]
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(UsageError, match=f"{part.name}' is damaged.*allowed"):
        samples.collect(load_runs([tmp_path]))


def test_samples_that_can_be_read_are_compared_with_their_hashes(tmp_path):
    path = write_run(tmp_path / "run")
    part = sorted((path / "samples").iterdir())[0]
    (path / "rounds.jsonl").rename(tmp_path / "rows")
    journal = Record(path).journal
    for line in (tmp_path / "rows").read_text().splitlines():
        journal.row(json.loads(line))
    journal.commit(20, {f"samples/{part.name}": [part.stat().st_size, "another"]})
    with pytest.raises(UsageError, match=f"samples/{part.name} is damaged or gone"):
        samples.collect(load_runs([tmp_path]))
    part.unlink()  # no page without it, as if it had never been
    with pytest.raises(UsageError, match=f"samples/{part.name} is damaged or gone"):
        samples.collect(load_runs([tmp_path]))
