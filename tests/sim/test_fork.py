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
from sim.seal import read_sealed, sealed, write_sealed

pytestmark = pytest.mark.world

ROUNDS = 8
SMALL = Config(
    rounds=ROUNDS,
    feedback=FeedbackConfig(batch=8, responses=2, annotators=20, delay=1),
    evaluation=EvaluationConfig(n_harm=8, n_help=8, n_true=16),
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


def checkpoint(run: Path, round: int) -> dict:
    from sim.record import Record

    return Record(run).state(round)["agent"]


@pytest.mark.parametrize("learner", ["ppo", "dpo", "grpo(lr=1e-5)"])
def test_another_learner_begins_anew_on_the_same_policy(learner, parent, tmp_path):
    """Also one whose field alone is another: the old moments hold the old learning rate."""
    from sim import flags

    config = replace(SMALL, learner=flags.chosen_learner(SMALL, learner))
    out = fork(parent, tmp_path / "out", 7, config)
    old, new = checkpoint(parent, 7), checkpoint(out, 7)
    moments = (agent["contexts"]["policy"]["optimizer"] for agent in (old, new))
    assert [bool(optimizer["state"]) for optimizer in moments] == [True, False]
    assert new["contexts"]["policy"]["optimizer"]["param_groups"][0]["lr"] == config.learner.lr
    assert new["contexts"]["policy"]["step"] == old["contexts"]["policy"]["step"] == 7
    for part in ("policy", "reference"):
        assert all(new[part][name].equal(old[part][name]) for name in old[part])
    assert ("reward_model" in new) == (config.learner_name != "dpo")
    assert rows(out)[:8] == rows(parent)[:8] and rows(out)[8] != rows(parent)[8]
    assert rows(out)[8]["clock/labels"] == rows(parent)[8]["clock/labels"]
    labels = [pq.read_table(run / "labels/part-000008.parquet") for run in (parent, out)]
    assert labels[0].select(DRAWN).equals(labels[1].select(DRAWN))


def test_a_reward_model_that_was_not_there_learns_from_the_window(parent, tmp_path):
    from sim.run import run

    short = replace(SMALL, rounds=2, learner=replace(dpo(), lr=1e-4))
    run(short, tmp_path / "dpo")
    out = fork(tmp_path / "dpo", tmp_path / "grpo", 1, replace(SMALL, rounds=2))
    begun = checkpoint(out, 1)
    first = checkpoint(fork(parent, tmp_path / "first", 0, SMALL, go_on=False), 0)
    assert all(begun["reward_model"][k].equal(v) for k, v in first["reward_model"].items())
    # Labels of one round have come, with a delay of another.
    assert len(begun["replay"]["columns"].get("label_id", ())) == 0
    assert rows(out)[2]["reward"] is not None


def dpo():
    from agents.learners.dpo import DPOConfig

    return DPOConfig()


VECTORS = "security_vectors(steps=2, batch=4)"


def test_what_a_defence_puts_into_the_model_comes_and_goes(parent, tmp_path):
    """A vector is trained on the policy of the fork; a fork without it goes on with the policy."""
    with_vector = replace(SMALL, defences=(VECTORS,))
    out = fork(parent, tmp_path / "vector", 7, with_vector)
    plain = checkpoint(parent, 7)
    held = checkpoint(out, 7)
    base = {name.replace(".base_layer.", "."): v for name, v in held["policy"].items()}
    assert all(base[name].equal(value) for name, value in plain["policy"].items())
    assert len(base) > len(plain["policy"])
    base = {name.replace(".base_layer.", "."): v for name, v in held["reference"].items()}
    assert all(base[name].equal(value) for name, value in plain["reference"].items())
    longer = replace(SMALL, rounds=9)
    back = fork(out, tmp_path / "back", 8, longer)
    assert checkpoint(back, 8)["policy"].keys() == plain["policy"].keys()
    policy = "policies/round-000008.safetensors"
    assert (back / policy).read_bytes() == (out / policy).read_bytes()
    told = json.loads((back / "manifest.json").read_text())["fork"]
    assert told["of"]["at"] == 7 and told["changed"]["defences"] == [[VECTORS], []]


def test_a_fork_survives_kill_nine(parent, tmp_path):
    config = "replace(SMALL, defences=('lisa',), rounds=14)"
    whole = fork(parent, tmp_path / "whole", 3, eval(config))
    out = tmp_path / "killed"
    code = (
        "from dataclasses import replace; from pathlib import Path; "
        "from tests.sim.test_fork import SMALL, fork; "
        f"fork(Path({str(parent)!r}), Path({str(out)!r}), 3, {config})"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints/round-000006").is_dir():
            assert process.poll() is None, "the fork ended before it could be killed"
            assert time.monotonic() < deadline, "the fork never reached round 6"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    from sim.resume import resumable
    from sim.run import run

    assert not (out / "summary.json").exists()
    run(resumable(out), out, resume=True)
    assert files(out) == files(whole)
    kept = [p.name for p in sorted((out / "checkpoints").iterdir())]
    assert kept == [f"round-{n:06d}" for n in (3, 13, 14)]  # its own first one, to fork again


def test_a_rebuilding_that_was_killed_goes_on(parent, tmp_path, monkeypatch):
    """And what it left behind is gone in the end."""
    from sim.fork import rebuild
    from sim.resume import recorded_config
    from sim.run import run

    class Killed(Exception):
        pass

    class Kill:
        def start(self, *_):
            pass

        def round(self, row):
            if row["round"] == 2:
                raise Killed

    left = tmp_path / ".out-round4"
    with pytest.raises(Killed):
        run(recorded_config(parent), left, listener=Kill())
    resumed = []

    def spied(*given, **named):
        resumed.append(named["resume"])
        return run(*given, **named)

    monkeypatch.setattr(rebuild, "run", spied)
    out = fork(parent, tmp_path / "out", 4, SMALL)
    assert resumed == [True]
    assert files(out) == files(parent) and not left.exists()


def copy(run: Path, to: Path, **edits) -> Path:
    """A copy of a run whose manifest says something else."""
    shutil.copytree(run, to)
    manifest = read_sealed(to / "manifest.json")
    for section, fields in edits.items():
        manifest["config"][section].update(fields)
    write_sealed(to / "manifest.json", manifest)
    return to


def test_a_run_that_does_not_come_out_as_recorded_is_not_forked(parent, tmp_path):
    """Here another learning rate stands for other code, or another machine."""
    other = copy(parent, tmp_path / "other", learner={"lr": 1e-5})
    known = replace(SMALL, learner=replace(SMALL.learner, lr=1e-5))
    with pytest.raises(ValueError, match=r"at=3: .* \(round 1: .* was recorded\).*kept \(7, 8"):
        fork(other, tmp_path / "out", 3, known)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out-round3").exists()


def test_rows_that_come_out_again_do_not_vouch_for_the_state(parent, tmp_path):
    other = copy(parent, tmp_path / "other")
    lines = [json.loads(line) for line in (other / "commits.jsonl").read_text().splitlines()]
    commit = {k: v for k, v in lines[3].items() if k != "checksum"}
    commit["files"]["checkpoints/round-000003/state.json"][1] = "0" * 32
    lines[3] = sealed(commit)
    (other / "commits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"at=3: .* \(the state after it differs\)"):
        fork(other, tmp_path / "out", 3, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_fork_without_a_whole_checkpoint_is_no_run_from_the_start(parent, tmp_path):
    from sim.run import run

    out = fork(parent, tmp_path / "out", 7, SMALL, go_on=False)
    state = out / "checkpoints/round-000007/state.json"
    state.write_bytes(state.read_bytes()[:-1])
    before = (out / "rounds.jsonl").read_bytes()
    with pytest.raises(ValueError, match="is a fork, and no checkpoint of it is whole"):
        run(SMALL, out, resume=True)
    assert (out / "rounds.jsonl").read_bytes() == before


def test_kept_checkpoints_are_forked_as_they_are(tmp_path, embedded_models):
    """Where rows do not come out again, every k-th round still can be forked."""
    from sim.record import Record
    from sim.run import run

    run(replace(SMALL, keep_every=3), tmp_path / "run")
    assert Record(tmp_path / "run").checkpoints() == [3, 6, 7, 8]
    other = copy(tmp_path / "run", tmp_path / "other", attack={"rho": 0.25})
    known = replace(SMALL, keep_every=3, attack=AttackConfig("harmful_asker", rho=0.25))
    out = fork(other, tmp_path / "out", 3, known)
    assert rows(out)[:4] == rows(other)[:4]
    with pytest.raises(ValueError, match=r"round 4: .* kept \(3, 6, 7, 8;"):
        fork(other, tmp_path / "next", 5, known)  # from round 3 on
    same = fork(tmp_path / "run", tmp_path / "same", 5, replace(SMALL, keep_every=3))
    assert files(same) == files(tmp_path / "run")


def test_an_extended_run_is_run_again_as_it_was_planned(tmp_path, embedded_models):
    from sim.run import run

    run(replace(SMALL, rounds=4), tmp_path / "run")
    run(SMALL, tmp_path / "run", resume=True)
    same = fork(tmp_path / "run", tmp_path / "same", 2, SMALL)
    labels = [table(path, "labels") for path in (same, tmp_path / "run")]
    assert labels[0].equals(labels[1])
    with pytest.raises(ValueError, match=r"at=6: .* was extended in round 4.*kept \(7, 8\)"):
        fork(tmp_path / "run", tmp_path / "out", 6, SMALL)


CHANGED = [
    (dict(seed=1), r"seed=1 in a fork of a run with 0; allowed: another attack, learner or"),
    (dict(feedback=replace(SMALL.feedback, batch=4)), r"feedback\.batch=4 in a fork"),
    (dict(world=replace(SMALL.world, seed=1)), r"world\.seed=1 in a fork"),
    (dict(rounds=3), r"at=3 with rounds=3; allowed: --rounds above 3"),
    (dict(defences=("rep_noise",)), r"rep_noise acts before the release.*any of .*lisa"),
]


@pytest.mark.parametrize(("changed", "message"), CHANGED)
def test_what_cannot_be_changed_in_midway_is_refused_by_name(changed, message, parent, tmp_path):
    with pytest.raises(ValueError, match=message):
        fork(parent, tmp_path / "out", 3, replace(SMALL, **changed))
    assert not list(tmp_path.iterdir())


REFUSED = [
    (["--at", "9"], r"at=9; allowed: 0 to 8"),
    (["--at", "-1"], r"at=-1; allowed: 0 to 8"),
    (["--defence", "lisa"], "fork needs --at"),
    (["--at", "3", "--defence", "liza"], "liza"),
    (["--at", "3", "--seed", "4"], "seed=4"),
    (["--at", "3", "--model", "x"], "text.model"),
    (["--at", "3", "--nonsense", "4"], "--nonsense is not a flag"),
    (["--at", "3", "--out", "{parent}"], "exists; allowed: a new directory"),
    (["--at", "3", "--attack", "malicious_grpo", "--rho", ".5"], "allowed: 1"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_the_command_refuses_before_anything_is_built(
    words, message, parent, in_tmp, monkeypatch, capsys
):
    from sim.cli import main

    monkeypatch.setattr("sim.scenario.make_scenario", None)
    before = sorted(parent.parent.iterdir())
    words = [word.format(parent=parent) for word in words]
    assert main(["fork", str(parent), *words]) == 2
    said = capsys.readouterr()
    assert message.removeprefix("r") in said.err and said.err.count("\n") == 1
    assert sorted(parent.parent.iterdir()) == before and not list(in_tmp.iterdir())


def test_an_attack_that_does_nothing_is_told(parent, in_tmp, monkeypatch, capsys):
    from sim.cli import main

    for name in ("branch", "execute"):
        monkeypatch.setattr(f"sim.fork.command.{name}", lambda *_, **__: None)
    words = ["fork", str(parent), "--at", "1", "--rho", "0", "--out", "fork"]
    assert main(words) == 0
    assert "changes nothing" not in capsys.readouterr().out
    assert main([*words, "--attack", "trigger"]) == 0
    assert "attack: trigger changes nothing at rho 0; give --rho" in capsys.readouterr().out


def test_a_run_that_is_none_is_refused(in_tmp, capsys):
    from sim.cli import main

    assert main(["fork", "nowhere", "--at", "3"]) == 2
    assert "run='nowhere' has no manifest.json" in capsys.readouterr().err
    assert main(["fork", "--at", "3"]) == 2
    assert "fork needs a run" in capsys.readouterr().err
    assert main(["fork", "--help"]) == 0
    assert "--at ROUND" in capsys.readouterr().out


def test_from_the_command_line_to_the_report(parent, in_tmp, capsys):
    from sim.analysis.load import load_runs
    from sim.cli import main

    shutil.copytree(parent, "runs/mine")
    words = ["fork", "runs/mine", "--at", "7", "--defence", "lisa(rho=5)", "--rounds", "9"]
    assert main(words) == 0
    out = Path("runs/mine-from7-lisa-rho-5")
    said = capsys.readouterr().out
    assert (
        "Outcome: " in said and f"Next:    side by side:  poisonloop report runs/mine {out}" in said
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert (
        manifest["command"] == "poisonloop fork runs/mine --at 7 --defence 'lisa(rho=5)' --rounds 9"
    )
    assert manifest["fork"]["changed"]["rounds"] == [8, 9]
    assert main(["fork", "runs/mine", "--at", "7", "--defence", "lisa", "--out", "runs/other"]) == 0
    paths = ["runs/mine", str(out), "runs/other"]
    assert main(["report", *paths, "--out", "report"]) == 0
    page = Path("report/report.html").read_text()
    assert "Branches" in page and "defences none → lisa(rho=5)" in page
    loaded = load_runs(paths)
    assert len({run.arm for run in loaded}) == 3
    assert [list(run.own_evaluations["round"])[0] for run in loaded] == [0, 7, 7]


def test_adapters_on_a_model_of_ones_own(tmp_path):
    """Policy, reference and reward model are adapters on one base; a vector comes beside them."""
    from sim.run import run
    from tests.sim.test_models import config_of, save_model

    rows_of = [
        {"prompt": f"w{i} w{j}", "harmful": bool(j % 2), "responses": [f"w{j} w{i}", "I'm sorry"]}
        for i in range(8)
        for j in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    config = replace(config_of(save_model(tmp_path / "model", "llama"), "grpo"), rounds=4)
    run(config, tmp_path / "run")
    same = fork(tmp_path / "run", tmp_path / "same", 2, config)
    assert files(same) == files(tmp_path / "run")
    out = fork(tmp_path / "run", tmp_path / "vector", 3, replace(config, defences=(VECTORS,)))
    old, new = checkpoint(tmp_path / "run", 3), checkpoint(out, 3)
    for part in ("policy", "reference", "reward_model"):
        assert all(new[part][name].equal(value) for name, value in old[part].items())
    assert any("security_vector" in name for name in new["policy"])
    back = fork(out, tmp_path / "back", 3, config, go_on=False)
    again = checkpoint(back, 3)
    assert all(again[part].keys() == old[part].keys() for part in ("policy", "reference"))
    for part in ("policy", "reference"):
        assert all(again[part][name].equal(value) for name, value in old[part].items())


def test_defences_before_the_release_stay_and_others_may_follow(tmp_path, embedded_models):
    from sim.run import run

    file = tmp_path / "kept.py"
    file.write_text(
        "from agents.defences.controls import Freeze\nclass Kept(Freeze):\n    offline = True\n"
    )
    kept = f"{file}:Kept"
    config = replace(SMALL, rounds=3, defences=(kept,))
    run(config, tmp_path / "run")
    out = fork(tmp_path / "run", tmp_path / "out", 2, replace(config, defences=(kept, "freeze")))
    policy = (out / f"policies/round-{n:06d}.safetensors" for n in (2, 3))
    assert len({path.read_bytes() for path in policy}) == 1
    for refused in ((), ("freeze",), ("freeze", kept)):
        with pytest.raises(ValueError, match=r"Kept acts before the release .*allowed: after"):
            fork(tmp_path / "run", tmp_path / "no", 2, replace(config, defences=refused))


def test_an_attacker_takes_the_loop_over_and_loses_it_again(parent, tmp_path):
    """Her judge stands where the reward model was; afterwards there is a fresh one."""
    hers = replace(SMALL, rounds=9, attack=AttackConfig("malicious_grpo", rho=1.0, stop_at=1.0))
    out = fork(parent, tmp_path / "hers", 7, hers)
    assert "reward_model" not in checkpoint(out, 7) and rows(out)[-1]["round"] == 9
    back = fork(out, tmp_path / "back", 8, replace(SMALL, rounds=9))
    first = checkpoint(fork(parent, tmp_path / "first", 0, SMALL, go_on=False), 0)
    begun = checkpoint(back, 8)["reward_model"]
    assert all(begun[name].equal(value) for name, value in first["reward_model"].items())
    assert rows(back)[9]["reward"] is not None


def test_where_a_rule_of_its_own_ended_the_run_it_would_end_again(parent, tmp_path):
    other = copy(parent, tmp_path / "other", evaluation={"stop_on_exit": True})
    summary = read_sealed(other / "summary.json")
    write_sealed(other / "summary.json", {**summary, "exit_confirmed": {"rounds": 5}})
    stops = replace(SMALL, evaluation=replace(SMALL.evaluation, stop_on_exit=True))
    with pytest.raises(ValueError, match="at=6: the exit is confirmed in round 5.*below 5"):
        fork(other, tmp_path / "out", 6, stops)
    stopped = copy(parent, tmp_path / "stopped", attack={"stop_at": 0.9})
    write_sealed(stopped / "summary.json", {**summary, "attacker_stopped": 8})
    longer = replace(SMALL, rounds=9, attack=replace(SMALL.attack, stop_at=0.9))
    with pytest.raises(ValueError, match=r"at=8: there the attacker ended the run.*below 8"):
        fork(stopped, tmp_path / "out", 8, longer)
