"""A run directory survives being cut off anywhere."""

import json
import shutil

import numpy as np
import pytest
import torch

from sim.files import dumps
from sim.record import Record
from sim.state import flatten, unflatten


def state(round: int) -> dict:
    weights = torch.full((3, 2), float(round))
    return {
        "agent": {"weights": weights, "tied": weights, "log": np.arange(round + 1)},
        "moments": {0: {"step": torch.tensor(2.0), "betas": (0.9, 0.999)}},
        "clocks": {"labels": 64 * round},
        "nothing": None,
    }


def write_rounds(record: Record, first: int, last: int) -> None:
    for round in range(first, last + 1):
        table = {"label_id": np.arange(4) + 4 * round, "vote": ["a", "b", "tie", "skip"]}
        record.write(round, {"round": round, "safety/harm": 0.1 * round}, {"labels": table})
        record.save_policy(round, {"w": torch.full((2,), float(round))})
        record.checkpoint(round, state(round))


def tree(path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def test_state_survives_flattening():
    tensors: dict = {}
    back = unflatten(json.loads(dumps(flatten(state(3), tensors))), tensors)
    assert torch.equal(back["agent"]["weights"], torch.full((3, 2), 3.0))
    assert np.array_equal(back["agent"]["log"], np.arange(4))
    assert back["moments"][0]["betas"] == [0.9, 0.999], "integer keys survive JSON"
    assert back["clocks"] == {"labels": 192} and back["nothing"] is None


def test_existing_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="poisonloop resume"):
        Record.create(tmp_path, {})


def test_nan_is_never_written(tmp_path):
    record = Record.create(tmp_path / "run", {})
    with pytest.raises(ValueError, match="JSON"):
        record.write(0, {"round": 0, "reward": float("nan")})


def test_restore_finds_the_last_round(tmp_path):
    write_rounds(Record.create(tmp_path / "run", {}), 0, 3)
    round, restored = Record(tmp_path / "run").restore()
    assert round == 3 and torch.equal(restored["agent"]["weights"], torch.full((3, 2), 3.0))
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["round-000002", "round-000003"]


def cut_row(run):
    text = (run / "rounds.jsonl").read_bytes()
    (run / "rounds.jsonl").write_bytes(text[:-7])


def append_half_row(run):
    with open(run / "rounds.jsonl", "a") as file:
        file.write('{"round": 4, "safety/ha')


def cut_commit(run):
    text = (run / "commits.jsonl").read_bytes()
    (run / "commits.jsonl").write_bytes(text[:-9])


def lose_copy(run):
    shutil.rmtree(run / ".copy")


def lose_copy_and_cut_row(run):
    lose_copy(run)
    cut_row(run)


def lose_copy_and_cut_commit(run):
    lose_copy(run)
    cut_commit(run)


def cut_checkpoint(run):
    file = run / "checkpoints/round-000003/state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_part_byte(run):
    file = run / "labels/part-000003.parquet"
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(bytes(data))


def leave_uncommitted_part(run):
    (run / "labels/part-000004.parquet").write_bytes(b"half")
    (run / "labels/.part-000005.parquet.tmp").write_bytes(b"half")


def lose_checkpoint(run):
    (run / "checkpoints/round-000003/state.json").unlink()


DAMAGE = {
    cut_row: 3,  # it is written twice
    append_half_row: 3,
    cut_commit: 3,
    lose_copy: 3,
    lose_copy_and_cut_row: 2,
    lose_copy_and_cut_commit: 2,
    cut_checkpoint: 2,
    flip_part_byte: 2,
    leave_uncommitted_part: 3,
    lose_checkpoint: 2,
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_costs_at_most_the_last_round(tmp_path, damage):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_rounds(Record.create(whole, {}), 0, 5)
    write_rounds(Record.create(broken, {}), 0, 3)
    damage(broken)
    record = Record(broken)
    round, _ = record.restore()
    assert round == DAMAGE[damage]
    write_rounds(record, round + 1, 5)
    assert tree(broken) == tree(whole)


def test_damage_behind_the_last_round_is_named_and_nothing_is_changed(tmp_path):
    run = tmp_path / "run"
    write_rounds(Record.create(run, {}), 0, 3)
    (run / "labels/part-000001.parquet").unlink()
    before = tree(run)
    with pytest.raises(ValueError, match="labels/part-000001.parquet is damaged or gone"):
        Record(run).restore()
    assert tree(run) == before


def lose_many_rows(run):
    (run / "rounds.jsonl").write_text("")


def lose_many_commits(run):
    (run / "commits.jsonl").write_text("")


def lose_both_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


MANY = {
    lose_many_rows: "rounds.jsonl",
    lose_many_commits: "commits.jsonl",
    lose_both_checkpoints: "checkpoints/round-000003/state.safetensors",
}


@pytest.mark.parametrize("damage", MANY, ids=lambda damage: damage.__name__)
def test_a_run_that_could_only_start_over_is_refused_and_left_as_it_is(tmp_path, damage):
    """Without its copy, as runs of before have none."""
    run = tmp_path / "run"
    write_rounds(Record.create(run, {}), 0, 3)
    lose_copy(run)
    damage(run)
    before = tree(run)
    with pytest.raises(ValueError, match=f"{MANY[damage]} is damaged or gone"):
        Record(run).restore()
    assert tree(run) == before


@pytest.mark.parametrize("damage", [lose_many_rows, lose_many_commits])
def test_the_copy_stands_in_for_rows_and_commits(tmp_path, damage):
    run = tmp_path / "run"
    write_rounds(Record.create(run, {}), 0, 3)
    before = tree(run)
    damage(run)
    assert Record(run).restore()[0] == 3 and tree(run) == before


def test_nothing_intact_starts_over(tmp_path):
    run = tmp_path / "run"
    write_rounds(Record.create(run, {}), 0, 0)
    lose_copy(run)
    cut_commit(run)
    record = Record(run)
    assert record.restore() is None
    write_rounds(record, 0, 1)
    assert Record(run).restore()[0] == 1
