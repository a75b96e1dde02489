"""Flags and files: what is wrong is named with what is allowed; what is right reaches its field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim.cli import main
from sim.config import Config
from sim.config_file import from_file, to_yaml
from sim.evaluation_config import EvaluationConfig
from sim.presets import preset

# Words typed, and what the one line of complaint has to name: field, value, what is allowed.
BAD_INPUT = {
    "command": ("runn", ["command='runn'", "run, sweep, resume"]),
    "preset": ("run smokey", ["preset='smokey'", "default, smoke, demo", "did you mean 'smoke'"]),
    "second word": ("run smoke demo", ["'demo'", "--"]),
    "unknown flag": ("run --learner.lrr 1", ["--learner.lrr", "did you mean --learner.lr"]),
    "american": ("run --defense x", ["--defense", "did you mean --defence"]),
    "two values": ("run --rho .1 .2", ["--rho .1 .2", "one value"]),
    "no value": ("run --rounds", ["--rounds has no value; allowed: one value"]),
    "rho": ("run --rho 1.5", ["attack.rho=1.5", "0 to 1"]),
    "rho text": ("run --rho x", ["attack.rho='x'; allowed: a number"]),
    "one response": ("run --feedback.responses 1", ["feedback.responses=1", ">= 2"]),
    "rounds": ("run --rounds 0", ["rounds=0", ">= 1"]),
    "batch text": ("run --feedback.batch x", ["feedback.batch='x'; allowed: a whole number"]),
    "choice": ("run --world.size huge", ["world.size='huge'", "small, medium"]),
    "engine": ("run --engine warp", ["engine='warp'", "transformers"]),
    "cost limit": ("run --evaluation.cost-limit 1", ["evaluation.cost_limit=1.0", "0.01 to 0.9"]),
    "learner": ("run --learner grpoo", ["'grpoo'", "dpo, grpo, ppo, sft", "did you mean 'grpo'"]),
    "learner field": ("run --learner grpo(lrr=1)", ["grpo(lrr=1)", "lr, betas"]),
    "learner type": ("run --learner grpo(lr='x')", ["learner.lr='x'", "a number"]),
    "attack": ("run --attack harm_target --rho .1", ["'harm_target'", "trigger", "did you mean"]),
    "attack value": ("run --attack harm_targeted(eta=3) --rho .1", ["eta=3", "allowed"]),
    "attack spec": ("run --attack harm_targeted(eta --rho .1", ["harm_targeted(eta", "key=value"]),
    "crowd": ("run --feedback.collection crowd --attack harmful_asker --rho .1",
              ["harmful_asker", "crowd", "chat"]),
    "behaviour": ("run --feedback.behaviours perfect", ["'perfect'", "boltzmann"]),
    "defence": ("run --defence refusal_los", ["'refusal_los'", "freeze", "did you mean"]),
    "defence value": ("run --defence refusal_loss(alpha=-1)", ["alpha=-1", ">= 0"]),
    "defence file": ("run --defence nowhere.py:Mine", ["'nowhere.py'"]),
    "switch": ("run --evaluation.stop-on-exit maybe",
               ["--evaluation.stop-on-exit maybe; allowed: true, false"]),
    "both ways": ("run --evaluation.stop-on-exit --evaluation.no-stop-on-exit",
                  ["--evaluation.stop-on-exit with --evaluation.no-stop-on-exit; allowed: one"]),
    "two spellings": ("run --rho 0 --attack.rho .2", ["--rho with --attack.rho; allowed: one"]),
    "shares": ("run --feedback.harmful-share .9", ["harmful_share=0.9", "contrast_share=0.25"]),
    "redundancy": ("run --feedback.collection crowd --feedback.redundancy 101",
                   ["redundancy=101", "100"]),
    "model alone": ("run --model here", ["text.model='here'", "text.data=None", "both"]),
    "no data": ("run --model . --data rows.jsonl", ["data='rows.jsonl'", ".json or .parquet"]),
    "config file": ("run --config none.yaml", ["config='none.yaml'", "readable file"]),
    "resume": ("resume nothing", ["run='nothing'", "a run directory"]),
    "report": ("report nothing", ["run='nothing' does not exist; allowed: a run directory"]),
    "sweep rho": ("sweep --rho 0 2", ["attack.rho=2.0", "0 to 1"]),
    "sweep seeds": ("sweep --seeds x", ["--seeds x", "whole number"]),
    "sweep jobs": ("sweep --jobs 0", ["jobs=0", ">= 1"]),
    "sweep study": ("sweep --study nothing", ["study='nothing'", "demo"]),
    "study flags": ("sweep --study demo --rho 1", ["--rho", "--out, --jobs, --status"]),
    "two studies": ("sweep judges --study demo", ["--study judges demo; allowed: one value"]),
    "sweep of what": ("sweep exit-time", ["sweep='exit-time'", "smoke", "exit-times", ".yaml"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = BAD_INPUT[case]
    assert main(words.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("poisonloop: error: ")
    assert len(said.err.splitlines()) == 1
    assert [part for part in named if part not in said.err] == []
    assert list(in_tmp.iterdir()) == []  # nothing was written


def test_a_defence_that_needs_absent_data(in_tmp: Path, capsys: Any) -> None:
    source = (
        "from agents.defence import Defence\n"
        "class Mine(Defence):\n    needs = frozenset({'unicorns'})\n"
    )
    (in_tmp / "mine.py").write_text(source)
    assert main(["run", "--defence", "mine.py:Mine"]) == 2
    said = capsys.readouterr().err
    assert "mine.py:Mine: needs unicorns" in said and "refusal" in said


def printed_config(words: str, capsys: Any, path: Path) -> Config:
    """The config that ``words`` print, read back from a file."""
    assert main(["run", *words.split(), "--print-config"]) == 0
    path.write_text(capsys.readouterr().out)
    return from_file(Config(), str(path))


def test_flags_reach_their_fields(in_tmp: Path, capsys: Any) -> None:
    words = (
        "demo --rho .3 --learner dpo --learner.beta .5 --defence freeze"
        " --defence refusal_loss(alpha=2) --rounds 7 --seed 4 --evaluation.n_harm 9"
        " --feedback.batch=32 --world.seed 3 --evaluation.stop-on-exit"
        " --evaluation.limits over_refusal .5"
    )
    config = printed_config(words, capsys, in_tmp / "c.yaml")
    assert (config.attack.name, config.attack.rho) == ("harmful_asker", 0.3)
    assert (config.learner_name, config.learner.beta) == ("dpo", 0.5)
    assert config.defences == ("freeze", "refusal_loss(alpha=2)")
    assert (config.rounds, config.seed, config.world.seed) == (7, 4, 3)
    assert (config.evaluation.n_harm, config.feedback.batch) == (9, 32)
    assert config.evaluation.limits == {"over_refusal": 0.5} and config.evaluation.stop_on_exit


def test_a_file_is_read_before_the_flags(in_tmp: Path, capsys: Any) -> None:
    (in_tmp / "mine.yaml").write_text("rounds: 9\nlearner: {name: ppo, lr: 1e-4}\nseed: 2\n")
    config = printed_config("smoke --config mine.yaml --seed 5", capsys, in_tmp / "c.yaml")
    assert (config.rounds, config.seed, config.learner_name) == (9, 5, "ppo")
    assert config.learner.lr == 1e-4
    assert config.evaluation == preset("smoke").evaluation  # the file says nothing of it


def test_a_learner_spec_keeps_the_rest_of_its_own_preset(in_tmp: Path, capsys: Any) -> None:
    (in_tmp / "mine.yaml").write_text("learner: {beta: 0.7}")
    config = printed_config("--config mine.yaml --learner grpo(lr=.001)", capsys, in_tmp / "c.yaml")
    assert (config.learner.beta, config.learner.lr) == (0.7, 0.001)


@pytest.mark.parametrize("name", ["smoke", "noisy", "over_refusal_repair"])
def test_config_round_trip(name: str, tmp_path: Path) -> None:
    config = preset(name)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "manifest.json").write_text(json.dumps({"config": config.to_dict(), "git": None}))
    for file in ("c.yaml", "c.json", "manifest.json"):
        assert from_file(preset("claims"), str(tmp_path / file)) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds: x", "rounds='x'; allowed: a whole number"),
        ("attack: 3", "attack=3; allowed: a section with name, rho"),
        ("atack: {rho: .1}", "unknown field 'atack'"),
        ("attack: {roh: .1}", "unknown field 'roh'"),
        ("engine: warp", "engine='warp'; allowed: transformers"),
        ("learner: {name: zzz}", "learner='zzz'; allowed: dpo, grpo"),
        ("learner: {name: 3}", "learner=3; allowed: dpo, grpo"),
        ("learner: {name: mine.py:Mine}", "learner='mine.py:Mine'; allowed: dpo, grpo"),
        ("learner: {betas: [1e-1]}", "allowed: 2 values: a number, a number"),
        ("learner: {betas: [1e-1, 2]}", "learner.betas=(0.1, 2)"),
        ("config: 3", "unknown field 'config'; allowed: rounds"),
        ("{config: {seed: 1}, rounds: 9}", "unknown field 'config'"),
        ("rounds: 3\nrounds: 4", "config='c.yaml' has 'rounds' twice; allowed: every key once"),
        ("attack: {rho: 0, rho: .2}", "has 'rho' twice"),
        ("", "config='c.yaml' holds nothing; allowed: fields: values"),
        ("- 1", "holds list"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
    ],
)
def test_bad_files(text: str, said: str, in_tmp: Path) -> None:
    (in_tmp / "c.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        from_file(Config(), "c.yaml")
    assert said in str(error.value)
    assert [path.name for path in in_tmp.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("words", "on"),
    [
        (["--evaluation.stop-on-exit"], True),
        (["--evaluation.stop-on-exit", "true"], True),
        (["--evaluation.stop_on_exit=False"], False),
        (["--evaluation.no-stop-on-exit"], False),
    ],
)
def test_switches_take_a_value_or_none(words: list[str], on: bool) -> None:
    from sim import flags

    for base in (True, False):
        start = replace(Config(), evaluation=EvaluationConfig(stop_on_exit=base))
        assert flags.changed(start, flags.read(words)[1]).evaluation.stop_on_exit is on


def test_a_typed_none_stays_none() -> None:
    from sim import flags
    from sim.checks import settled

    typed = flags.build("smoke", {"--attack": ["none"], "--rho": ["0.5"]})
    assert typed.attack.name == "none"
    assert settled(typed) == settled(flags.build("smoke", {}))
    assert flags.build("smoke", {"--rho": ["0.5"]}).attack.name == "harmful_asker"
