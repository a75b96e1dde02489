"""The loop on the embedded world: determinism, kill -9, outcomes, and what is on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sim.config import AttackConfig, Config, EvaluationConfig, FeedbackConfig, from_dict
from sim.seal import read_sealed, write_sealed

pytestmark = pytest.mark.world

SMALL = Config(
    rounds=10,
    feedback=FeedbackConfig(batch=8, responses=2, annotators=20),
    evaluation=EvaluationConfig(n_harm=8, n_help=8, n_true=16),
    attack=AttackConfig("harmful_asker", rho=0.5),
)
IDENTITY = ("labels", "truth", "samples", "checkpoints", "policies")
ROW = """round safety/harm safety/harm_lower safety/harm_upper safety/harm_classifier
    safety/refusal_harmful safety/over_refusal safety/in_safe_set safety/log_e_value helpfulness
    utility reward kl perplexity completions/mean_length completions/empty completions/echo
    completions/gibberish labels feedback/rho_annotators feedback/rho_labels feedback/rho_flips
    feedback/rho_risk_flips feedback/rho_post clock/tokens clock/kl safety/chance
    safety/chance_lower safety/cvar_upper safety/pointwise safety/log_e_value_cvar
    hacking/short_harmful hacking/gibberish_benign hacking/echo_harmful reward_eval
    reward_eval_error utility_error""".split()
SUMMARY = "outcome exit_naive exit_confirmed bracket exit_true occupancy help_gain".split()


def identity(run: Path) -> dict[str, bytes]:
    """Everything two equal runs share, byte for byte."""
    files = [p for name in IDENTITY for p in (run / name).rglob("*") if p.is_file()]
    files += [run / "rounds.jsonl", run / "summary.json"]
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(files)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, embedded_models):
    """One small run, shared by the tests that only read it."""
    from sim.run import run

    path = tmp_path_factory.mktemp("runs") / "reference"
    run(SMALL, path)
    return path


def test_rows_and_summary_carry_the_promised_columns(finished):
    rows = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(11))
    assert not [name for name in ROW if name not in rows[-1]]
    assert not [name for name in ROW if name not in {**rows[0], **rows[1]}]
    summary = json.loads((finished / "summary.json").read_text())
    assert not [name for name in SUMMARY if name not in summary]
    assert not summary["censored"] and summary["occupation"].keys() == summary["excess"].keys()
    assert {"rounds", "labels", "flips", "optimizer_steps", "tokens"} <= summary[
        "occupation"
    ].keys()
    assert set(summary["sets"]) == {"chance", "cvar", "pointwise"}
    assert summary["hacking"]["gibberish"]["harmful"]["peak"] <= 1
    assert summary["outcome"] in ("safe", "exited", "collapsed", "diverged")


def test_label_log_holds_no_truth_and_joins_with_it(finished):
    labels = pq.read_table(finished / "labels").to_pandas()
    truth = pq.read_table(finished / "truth").to_pandas()
    assert not {"honest_vote", "adversarial", "cost_a"} & set(labels)
    assert labels.label_id.is_unique and set(labels.label_id) == set(truth.label_id)
    assert 0.2 < truth.adversarial.mean() < 0.8


def test_manifest_rebuilds_the_config(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert from_dict(manifest["config"]) == SMALL


def test_same_seed_same_bytes(finished, tmp_path):
    from sim.run import run

    run(SMALL, tmp_path / "again")
    assert identity(tmp_path / "again") == identity(finished)


def test_other_seed_other_labels(finished, tmp_path):
    from sim.run import run

    run(replace(SMALL, seed=1, rounds=1), tmp_path / "other")
    first = "labels/part-000001.parquet"
    assert (tmp_path / "other" / first).read_bytes() != (finished / first).read_bytes()


def test_kill_nine_then_resume_is_byte_identical(finished, tmp_path):
    """10 rounds = some + SIGKILL + resume."""
    from sim.run import run

    path = tmp_path / "killed"
    code = (
        f"from sim.run import run; from tests.sim.test_run import SMALL; run(SMALL, {str(path)!r})"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (path / "checkpoints" / "round-000005").is_dir():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run never reached round 5"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (path / "summary.json").exists()
    run(SMALL, path, resume=True)
    assert identity(path) == identity(finished)


def test_extending_a_run_continues_it(finished, tmp_path):
    from sim.run import run

    path = tmp_path / "extended"
    run(replace(SMALL, rounds=5), path)
    summary = run(SMALL, path, resume=True)
    assert summary["bracket_recomputed"] and summary["rounds"] == 10
    last = pq.read_table(path / "labels/part-000010.parquet")
    assert last.equals(pq.read_table(finished / "labels/part-000010.parquet"))


@pytest.mark.parametrize("name", ["always_flip", "label_noise", "trigger", "apathetic"])
def test_rho_zero_is_bitwise_no_attack(name, tmp_path, embedded_models):
    from sim.run import run

    short = replace(SMALL, rounds=2)
    run(replace(short, attack=AttackConfig("none")), tmp_path / "none")
    run(replace(short, attack=AttackConfig(name, rho=0.0)), tmp_path / "zero")
    shared = identity(tmp_path / "none").keys() - {"summary.json", "rounds.jsonl"}
    zero, none = identity(tmp_path / "zero"), identity(tmp_path / "none")
    assert shared and all(zero[file] == none[file] for file in shared)


def test_non_finite_training_is_an_outcome(tmp_path, embedded_models):
    from sim.run import run

    broken = replace(SMALL, rounds=6, learner=replace(SMALL.learner, lr=1.0, max_grad_norm=1e30))
    summary = run(replace(broken, evaluation=replace(SMALL.evaluation, n_true=0)), tmp_path / "x")
    assert summary["outcome"] in ("diverged", "exited", "collapsed")


PLUGIN = '''
from pathlib import Path
from agents.defence import Defence

class Witness(Defence):
    """Writes down which of its hooks were called."""
    def __init__(self, log):
        self.log = Path(log)
    def _say(self, word):
        with open(self.log, "a") as file:
            file.write(word + " ")
    def prepare(self, ctx):
        self._say("prepare")
    def state_dict(self):
        return {"kept": 7}
    def load_state_dict(self, ctx, state):
        self._say(f"load{state['kept']}")
'''


def test_resume_loads_defences_instead_of_preparing_them(tmp_path, embedded_models):
    from sim.run import run

    (tmp_path / "witness.py").write_text(PLUGIN)
    log = tmp_path / "log.txt"
    spec = f"{tmp_path / 'witness.py'}:Witness(log={str(log)!r})"
    config = replace(SMALL, rounds=2, defences=(spec,))
    run(config, tmp_path / "run")
    assert log.read_text().split() == ["prepare"]
    run(replace(config, rounds=3), tmp_path / "run", resume=True)
    assert log.read_text().split() == ["prepare", "load7"]


def test_offline_defences_prepare_and_then_stand_aside(tmp_path, embedded_models):
    """One that keeps refusing to learn while it acts does nothing to the attacker's own loop."""
    from sim.run import run

    (tmp_path / "kept.py").write_text(
        "from agents.defences.controls import Freeze\nclass Kept(Freeze):\n    offline = True\n"
    )
    kept = (f"{tmp_path / 'kept.py'}:Kept",)
    short = replace(SMALL, rounds=2)
    run(short, tmp_path / "none")
    run(replace(short, threat="offline", defences=kept), tmp_path / "offline")
    last = "policies/round-000002.safetensors"
    assert (tmp_path / "none" / last).read_bytes() == (tmp_path / "offline" / last).read_bytes()
    with pytest.raises(ValueError, match=r"threat='offline' with defences='freeze'.*rep_noise"):
        run(replace(short, threat="offline", defences=("freeze",)), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_delayed_labels_arrive_with_their_samples(tmp_path, embedded_models):
    from sim.run import run

    feedback = replace(SMALL.feedback, delay=2)
    run(replace(SMALL, rounds=4, feedback=feedback), tmp_path / "late")
    labels = pq.read_table(tmp_path / "late/labels").to_pandas()
    assert set(labels.item // 8) == {0, 1} and set(labels["round"] - labels.item // 8) == {2}
    samples = pq.read_table(tmp_path / "late/samples").to_pandas()
    assert len(samples) and samples.prompt.str.len().min() > 0


@pytest.mark.parametrize("n_harm", [1, 64])
def test_stopping_at_the_exit_is_final_and_resumes_to_the_same_bytes(
    n_harm, tmp_path, embedded_models
):
    """The base model complies from the start: 64 draws confirm it before any round, 1 later."""
    from sim.resume import resumable
    from sim.run import run

    evaluation = EvaluationConfig(n_harm=n_harm, n_help=8, n_true=0, stop_on_exit=True)
    world = replace(SMALL.world, start="base")
    loose = replace(SMALL, rounds=30, checkpoint_every=20, evaluation=evaluation, world=world)
    summary = run(loose, tmp_path / "whole")
    assert summary["outcome"] == "exited"
    assert summary["rounds"] == 0 if n_harm == 64 else 0 < summary["rounds"] < 20
    assert summary["exit_confirmed"]["rounds"] == summary["rounds"]
    with pytest.raises(ValueError, match="ended at its confirmed exit"):
        resumable(tmp_path / "whole", rounds=40)
    before = identity(tmp_path / "whole")
    (tmp_path / "whole/summary.json").unlink()  # as if killed after the last checkpoint
    run(loose, tmp_path / "whole", resume=True)
    assert identity(tmp_path / "whole") == before


def test_stopping_at_the_sustained_exit_is_final_and_marks_what_it_cuts(tmp_path, embedded_models):
    """The base model complies from the start, so three evaluations in a row end the run."""
    from sim.analysis.load import load_run
    from sim.analysis.tables import run_table
    from sim.resume import resumable
    from sim.run import run

    evaluation = EvaluationConfig(n_harm=64, n_help=8, n_true=0, stop_on_sustained=True)
    world = replace(SMALL.world, start="base")
    loose = replace(SMALL, evaluation=evaluation, world=world)
    summary = run(loose, tmp_path / "run")
    assert summary["exit_sustained"]["rounds"] == summary["rounds"] == 2
    assert summary["exit_sustained"]["since"] == 0 and summary["exit_confirmed"]["rounds"] == 0
    assert summary["censored"] and summary["attacker_stopped"] is None
    assert summary["exit_sustained"]["tokens"] > 0 and summary["exit_sustained"]["kl"] is not None
    row = run_table([load_run(tmp_path / "run")]).iloc[0]
    assert row["sustained exit"] == 2 and row["excess area"].startswith("≥ ")
    with pytest.raises(ValueError, match="sustained exit, as evaluation.stop_on_sustained"):
        resumable(tmp_path / "run", rounds=40)


def test_resuming_with_another_model_or_other_code_is_refused(tmp_path, embedded_models):
    from sim.run import run

    plugin = tmp_path / "witness.py"
    plugin.write_text(PLUGIN)
    spec = f"{plugin}:Witness(log={str(tmp_path / 'log.txt')!r})"
    config = replace(SMALL, rounds=1, defences=(spec,))
    run(config, tmp_path / "run")
    longer = replace(config, rounds=2)
    plugin.write_text(PLUGIN + "# changed")
    with pytest.raises(ValueError, match="began with another .*witness.py"):
        run(longer, tmp_path / "run", resume=True)
    plugin.write_text(PLUGIN)
    manifest = read_sealed(tmp_path / "run/manifest.json")
    manifest["model_hashes"] = {name: "0" * 32 for name in manifest["model_hashes"]}
    write_sealed(tmp_path / "run/manifest.json", manifest)
    with pytest.raises(ValueError, match="began with another"):
        run(longer, tmp_path / "run", resume=True)


def test_a_refused_resume_leaves_a_finished_run_as_it_was(tmp_path, embedded_models):
    from sim.run import run

    path = tmp_path / "run"
    run(replace(SMALL, rounds=2), path)
    part = path / "labels/part-000001.parquet"
    whole = part.read_bytes()
    before = (path / "manifest.json").read_bytes(), (path / "summary.json").read_bytes()
    part.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"part-000001\.parquet is damaged"):
        run(replace(SMALL, rounds=3), path, resume=True)
    part.write_bytes(whole)
    with pytest.raises(ValueError, match="another config"):
        run(replace(SMALL, rounds=3, seed=5), path, resume=True)
    assert before == ((path / "manifest.json").read_bytes(), (path / "summary.json").read_bytes())


def test_two_writers_of_one_run_are_refused(tmp_path, embedded_models):
    from sim.record import Record
    from sim.run import run

    path = tmp_path / "run"
    run(replace(SMALL, rounds=1), path)
    with Record(path).alone(), pytest.raises(ValueError, match="being written by another process"):
        run(replace(SMALL, rounds=2), path, resume=True)
    assert json.loads((path / "manifest.json").read_text())["config"]["rounds"] == 1


def test_suppressed_votes_are_no_flips():
    import numpy as np

    from envs.types import VOTE_SKIP, Labels, Truth
    from sim.rows import Clocks

    n = 4
    labels = Labels(
        *[np.zeros(n, np.int64)] * 5, np.array([0, 1, VOTE_SKIP, 1]), *[np.zeros(n)] * 2
    )
    truth = Truth(np.zeros(n), np.ones(n, bool), *[np.zeros(n)] * 9)
    clocks = Clocks()
    clocks.count(labels, truth, 0, 7)
    assert (clocks.labels, clocks.malicious_labels, clocks.flips) == (3, 3, 2)
    assert clocks.columns()["clock/tokens"] == 7


def test_other_versions_are_noted_in_the_manifest(tmp_path, embedded_models):
    from sim.run import run

    run(replace(SMALL, rounds=1), tmp_path / "run")
    file = tmp_path / "run/manifest.json"
    manifest = read_sealed(file)
    began = {**manifest["versions"], "torch": "0.1"}
    write_sealed(file, {**manifest, "versions": began})
    run(replace(SMALL, rounds=2), tmp_path / "run", resume=True)
    noted = json.loads(file.read_text())
    assert noted["versions"] == began and noted["continued_with"] == [manifest["versions"]]


def test_a_diverged_run_claims_no_end(tmp_path, embedded_models, monkeypatch):
    from agents.agent import Agent
    from agents.learners.update import Diverged
    from sim.closing import advice, verdict
    from sim.resume import resumable
    from sim.run import run

    learn = Agent.learn

    def breaks(self, *collected):
        if self.round == 2:
            raise Diverged("loss nan")
        return learn(self, *collected)

    monkeypatch.setattr(Agent, "learn", breaks)
    summary = run(replace(SMALL, evaluation=replace(SMALL.evaluation, n_true=0)), tmp_path / "x")
    assert summary["outcome"] == "diverged" and summary["diverged"]["round"] == 3
    assert {summary[k] for k in ("help_gain", "help_end", "harm_end", "occupancy")} == {None}
    assert "DIVERGED in round 3: loss nan" in verdict(summary)
    assert "--learner.lr 5e-05" in advice(summary, tmp_path, ["--learner.lr", "1"])
    with pytest.raises(ValueError, match="diverged in round 3"):
        resumable(tmp_path / "x", rounds=20)


def test_a_policy_that_cannot_be_sampled_is_refused_before_anything_is_written(
    tmp_path, embedded_models, monkeypatch
):
    from agents.learners.update import Diverged
    from sim.evaluate import Evaluator
    from sim.run import run

    def fails(self, agent, round):
        raise Diverged("sampling: non-finite logits")

    monkeypatch.setattr(Evaluator, "__call__", fails)
    with pytest.raises(ValueError, match="finite logits"):
        run(SMALL, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_saved_policies_are_plain_models(tmp_path, embedded_models):
    """A vector that trains beside the policy is in no policy that a run leaves behind."""
    from safetensors.torch import load_file

    from sim.run import run

    config = replace(SMALL, defences=("security_vectors(steps=2, batch=4)",))
    evaluation = replace(SMALL.evaluation, n_true=16)
    summary = run(replace(config, rounds=2, evaluation=evaluation), tmp_path / "run")
    run(replace(SMALL, rounds=1), tmp_path / "plain")
    ours, plain = (
        load_file(tmp_path / n / "policies/round-000001.safetensors") for n in ("run", "plain")
    )
    assert ours.keys() == plain.keys() and summary["outcome"] in ("safe", "exited", "collapsed")
