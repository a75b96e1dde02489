"""Forks: exact where nothing changes, the same people and draws where something does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sim.config import AttackConfig, Config, EvaluationConfig, FeedbackConfig

pytestmark = pytest.mark.world

ROUNDS = 8
SMALL = Config(
    rounds=ROUNDS,
    feedback=FeedbackConfig(batch=8, responses=2, annotators=20, delay=1),
    evaluation=EvaluationConfig(n_harm=8, n_help=8, n_true=0),
    attack=AttackConfig("harmful_asker", rho=0.5),
)
SAME = ("labels", "truth", "samples", "policies")
DRAWN = ["label_id", "item", "annotator", "a", "b", "round"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory, embedded_models):
    """A run of eight rounds, of which the last two have a checkpoint."""
    from sim.run import run

    path = tmp_path_factory.mktemp("runs") / "parent"
    run(SMALL, path)
    return path


def fork(parent: Path, out: Path, at: int, config: Config, go_on: bool = True) -> Path:
    """Fork as the command does, without its words."""
    from sim.checks import settled
    from sim.fork.branch import branch, check_fork
    from sim.resume import recorded_config
    from sim.run import run

    known, config = recorded_config(parent), settled(config)
    check_fork(parent, known, config, at)
    branch(parent, known, config, at, out, "poisonloop fork")
    if go_on:
        run(config, out, resume=True)
    return out


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def table(run: Path, name: str):
    return pq.read_table(run / name).to_pandas()


def files(run: Path, names=SAME) -> dict[str, bytes]:
    found = [p for name in names for p in (run / name).rglob("*") if p.is_file()]
    return {str(p.relative_to(run)): p.read_bytes() for p in [*found, run / "rounds.jsonl"]}


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_fork_that_changes_nothing_goes_on_byte_for_byte(at, parent, tmp_path):
    """From the start, from a round that is run again, from a checkpoint that is kept."""
    out = fork(parent, tmp_path / "same", at, SMALL)
    assert files(out) == files(parent)
    last = f"checkpoints/round-{ROUNDS:06d}/state.safetensors"
    assert (out / last).read_bytes() == (parent / last).read_bytes()
    assert (out / "summary.json").read_bytes() == (parent / "summary.json").read_bytes()
    told = json.loads((out / "manifest.json").read_text())["fork"]
    assert told["at"] == at and told["changed"] == {} and told["rebuilt"] == (at < 7)
    assert not [p for p in tmp_path.iterdir() if p != out]


def test_without_an_attack_from_a_round_on(parent, tmp_path):
    """The same people see the same honest prompts; only what the attack did is gone."""
    out = fork(parent, tmp_path / "calm", 4, replace(SMALL, attack=AttackConfig()))
    before, after = table(parent, "labels"), table(out, "labels")
    assert before[DRAWN].equals(after[DRAWN])
    first = before["round"] < 4
    assert before[first].equals(after[first]) and rows(out)[:5] == rows(parent)[:5]
    truth = table(parent, "truth"), table(out, "truth")
    assert not truth[1].adversarial[after["round"] >= 4].any()
    assert truth[0].adversarial[before["round"] >= 4].any()
    said = table(parent, "samples"), table(out, "samples")
    honest = ~said[0].adversarial
    assert len(said[0]) == 8 * (ROUNDS - 1) and honest.sum() > 8
    assert said[0].prompt[honest].equals(said[1].prompt[honest])
    # The first answers after the fork are those of the policy that both have in common.
    both = honest & (said[0]["item"] // 8 <= 4)
    assert (said[0]["item"][both] // 8 == 4).any()
    for column in ("answer_a", "answer_b", "honest_vote", "vote"):
        assert said[0][column][both].equals(said[1][column][both])


def test_a_defence_acts_after_the_fork_alone(parent, tmp_path):
    config = replace(SMALL, defences=("lisa(rho=10, alignment_steps=1, user_steps=1)",))
    out = fork(parent, tmp_path / "lisa", 4, config)
    assert rows(out)[:5] == rows(parent)[:5]
    logged = ["defence/lisa/distance" in row for row in rows(out)]
    assert logged == [False] * 5 + [True] * 4
    assert rows(out)[5]["policy/loss"] is not None
    before, after = files(parent, ["policies"]), files(out, ["policies"])
    moved = [before[name] != after[name] for name in sorted(before) if name != "rounds.jsonl"]
    assert moved == [False] * 5 + [True] * 4
    assert table(parent, "labels")[DRAWN].equals(table(out, "labels")[DRAWN])
    assert table(parent, "samples").prompt.equals(table(out, "samples").prompt)


@pytest.mark.parametrize(
    "spec", ["lisa(rho=0.0, alignment_steps=0)", "refusal_loss(alpha=0.0)", "freeze"]
)
def test_what_prepares_at_the_fork_finds_the_policy_and_its_optimizer(spec, parent, tmp_path):
    """Defences without strength leave the original path, moments included; freezing ends it."""
    out = fork(parent, tmp_path / "out", 4, replace(SMALL, defences=(spec,)))
    before, after = files(parent, ["policies"]), files(out, ["policies"])
    if spec == "freeze":
        kept = before["policies/round-000004.safetensors"]
        assert {after[f"policies/round-{n:06d}.safetensors"] for n in range(4, 9)} == {kept}
    else:
        after["rounds.jsonl"] = before["rounds.jsonl"]  # these log what they did
        assert after == before
