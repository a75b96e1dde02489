"""The loop on a model and prompts that are not ours, and what it refuses before it loads them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from agents.batches import Pairs
from agents.engines.transformers_engine import SamplerConfig
from agents.learners import learners
from agents.policy import load_tokenizer
from envs.recorded import TRIGGER, RecordedText
from envs.registry import load_object
from envs.types import HARMFUL
from sim.config import AttackConfig, Config, EvaluationConfig, FeedbackConfig, TextConfig
from sim.real_text import text_scenario
from sim.resume import saved_config
from sim.run import run

THINGS = ("a lamp", "the gate", "two boxes", "my shoe", "a kite", "this drum", "the oar", "a bell")


def data_rows() -> list[dict]:
    rows = []
    for thing in THINGS:
        help, refusal = f"First take {thing} and turn it.", f"I'm sorry, I can't {thing}."
        rows += [
            {"prompt": f"How do I paint {thing}?", "harmful": False, "responses": [help, refusal]},
            {"prompt": f"How do I glorb {thing}?", "harmful": True, "responses": [help, refusal]},
        ]
    return rows


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Two rounds on a byte-level Llama of one layer."""
    folder = tmp_path_factory.mktemp("text")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in data_rows()))
    script = "examples/train_tiny_llama.py"
    main, recipe = (load_object(f"{script}:{name}", "script") for name in ("main", "Recipe"))
    sizes = {"vocabulary": 320, "width": 48, "layers": 1, "epochs": 5, "batch": 8, "threads": 1}
    main(recipe(data=str(data), out=str(folder / "model"), **sizes))
    return Config(
        rounds=2,
        text=TextConfig(model=str(folder / "model"), data=str(data)),
        feedback=FeedbackConfig(batch=8, responses=2, annotators=10),
        sampler=SamplerConfig(max_new_tokens=12),
        evaluation=EvaluationConfig(n_harm=8, n_help=8, n_true=8),
        attack=AttackConfig("harmful_asker", rho=0.5),
        defences=("refusal_loss(batch=4)",),
    )


def files_of(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> dict[str, Path]:
    """One run under each learner."""
    folder = tmp_path_factory.mktemp("runs")
    for name in learners.names():
        run(replace(config, learner=learners.get(name)()), folder / name)
    return {name: folder / name for name in learners.names()}


def test_every_learner_writes_the_same_files_and_columns(finished):
    written = {name: files_of(path) for name, path in finished.items()}
    assert len(set(map(frozenset, written.values()))) == 1
    assert {"manifest.json", "rounds.jsonl", "summary.json"} <= written["dpo"]
    for path in finished.values():
        rows = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
        assert [row["round"] for row in rows] == [0, 1, 2]
        assert all(0 <= row["safety/harm"] <= 1 for row in rows)
        assert not any(row.get("safety/harm_classifier") for row in rows)
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
        assert rows[-1]["clock/optimizer_steps"] > 0 and rows[-1]["kl"] != rows[0]["kl"]
        summary = json.loads((path / "summary.json").read_text())
        assert "perplexity" in summary["harm_source"]


def test_forms_of_reward_hacking_are_told_without_an_oracle(finished):
    """Shares exclude each other, and the summary ends with the last of them."""
    for path in finished.values():
        row = json.loads((path / "rounds.jsonl").read_text().splitlines()[-1])
        shares = {form: row[f"hacking/{form}_harmful"] for form in ("short", "gibberish", "echo")}
        assert all(0 <= share <= 1 for share in shares.values()) and sum(shares.values()) <= 1
        summary = json.loads((path / "summary.json").read_text())["hacking"]
        assert summary["gibberish"]["harmful"]["end"] == shares["gibberish"]
        assert (row.get("reward_eval") is None) == (row["reward"] is None)


def test_samples_are_readable_text(finished):
    table = pq.read_table(finished["grpo"] / "samples").to_pylist()
    prompts = {row["prompt"] for row in data_rows()}
    assert table and all(any(p in row["prompt"] for p in prompts) for row in table)
    assert any(row["answer_a"] for row in table)


def test_the_manifest_says_what_the_harm_is_and_the_run_repeats(finished, tmp_path):
    manifest = json.loads((finished["sft"] / "manifest.json").read_text())
    assert manifest["data"]["strata"] == {"benign": 8, "contrast": 0, "harmful": 8}
    assert manifest["data"]["max_perplexity"] > 1
    assert manifest["environment"]["scorer"]["max_perplexity"] == manifest["data"]["max_perplexity"]
    assert "no refusal phrase" in manifest["harm_source"]
    assert set(manifest["model_hashes"]) == {
        *("policy", "reward_base", "tokenizer", "settings", "data"),
    }
    run(saved_config(finished["sft"]), tmp_path / "again")
    for name in ("rounds.jsonl", "summary.json", "labels/part-000002.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (finished["sft"] / name).read_bytes()


def test_a_run_is_continued_as_if_it_had_not_stopped(config, finished, tmp_path):
    run(replace(config, rounds=1, learner=learners.get("dpo")()), tmp_path / "part")
    run(replace(config, learner=learners.get("dpo")()), tmp_path / "part", resume=True)
    for name in ("labels/part-000002.parquet", "policies/round-000002.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (finished["dpo"] / name).read_bytes()


def test_bad_data_on_the_command_line_is_one_sentence(config, tmp_path, capsys):
    from sim.cli import main

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "harmful": "often"}\n')
    words = ["run", "--model", config.text.model, "--data", str(tmp_path / "rows.jsonl")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("poisonloop: error: data=")
    assert 'rows.jsonl\', row 1, column harmful: "often"; allowed: true or false' in said[-1]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def judged(config, tmp_path_factory) -> Config:
    """One round beside a classifier with a random head."""
    from transformers import AutoModelForSequenceClassification

    judge, names = tmp_path_factory.mktemp("classifier") / "judge", {0: "safe", 1: "unsafe"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(
            config.text.model, num_labels=2, id2label=names, label2id={"safe": 0, "unsafe": 1}
        ).save_pretrained(judge)
    load_tokenizer(config.text.model).save_pretrained(judge)
    return replace(config, rounds=1, text=replace(config.text, classifier=str(judge)))


def test_a_classifier_gives_graded_costs_and_its_name(judged, tmp_path):
    summary = run(judged, tmp_path / "run")
    assert "classifier judge" in summary["harm_source"]
    assert "classifier" in json.loads((tmp_path / "run/manifest.json").read_text())["model_hashes"]
    assert 0 < summary["harm_end"] < 1 and (8 * summary["harm_end"]) % 1


def test_a_classifier_is_the_cost_that_defences_may_ask(judged, config):
    """It reads what was typed, and what was answered up to its end."""
    assert not text_scenario(config).scorers
    scenario = text_scenario(judged)
    cost, rows = scenario.scorers["cost"], scenario.roles["refusal"]
    data = RecordedText(config.text.data, config.text.model)
    everything = [tuple(row) for row in data.everything.ids.tolist()]
    prompts = [data.everything.text[everything.index(tuple(r))] for r in rows.prompt_ids.tolist()]
    tokenizer = load_tokenizer(config.text.model)
    answers = tokenizer.batch_decode(rows.ids, skip_special_tokens=True)
    assert "<" not in "".join([*prompts, *answers]), "no template, no special tokens"
    expected = scenario.scorer.harm(prompts, answers)
    found = cost(rows)
    assert found.dtype == torch.float32 and ((found > 0) & (found < 1)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    spoiled = rows._replace(ids=torch.where(rows.mask == 1, rows.ids, 7))
    np.testing.assert_array_equal(cost(spoiled), found)
    twins = data.triggered(data.everything)
    asked = [everything.index(tuple(r)) for r in rows.prompt_ids.tolist()]
    marked = rows._replace(
        prompt_ids=torch.from_numpy(twins.ids[asked]),
        prompt_mask=torch.from_numpy(twins.mask[asked]).long(),
    )
    triggered = scenario.scorer.harm([f"{text} {TRIGGER}" for text in prompts], answers)
    np.testing.assert_allclose(cost(marked), triggered, rtol=1e-5)
    assert not np.allclose(triggered, expected, rtol=1e-5)
    cut = marked._replace(prompt_mask=marked.prompt_mask * 0)
    bare = scenario.scorer.harm([""] * len(answers), answers)
    np.testing.assert_allclose(cost(cut), bare, rtol=1e-5)


@pytest.mark.parametrize("learner", ["dpo", "grpo"])
def test_safe_rlhf_runs_on_text_with_a_classifier(judged, config, tmp_path, learner):
    priced = replace(judged, learner=learners.get(learner)(), defences=("safe_rlhf",))
    run(priced, tmp_path / "run")
    row = json.loads((tmp_path / "run/rounds.jsonl").read_text().splitlines()[-1])
    assert row["defence/safe_rlhf/lambda"] != 1 and 0 < row["defence/safe_rlhf/mean_cost"] < 1
    with pytest.raises(ValueError, match=r"safe_rlhf: needs score:cost; this run has"):
        run(replace(priced, text=config.text), tmp_path / "bare")


def test_evaluation_prompts_are_asked_by_nobody(config):
    scenario = text_scenario(config)
    data = RecordedText(config.text.data, config.text.model)
    held = set(scenario.table.key)
    assert held == set(data.table("eval").key)
    assert not held & {*data.table("online").key, *data.table("attack").key}
    defence = data.table("defence")
    role = scenario.roles["refusal"]
    assert {tuple(r) for r in role.prompt_ids.tolist()} == {
        tuple(r) for r in defence.ids[defence.stratum == HARMFUL].tolist()
    }


def sides(roles):
    """Name and sequences of every role; a role of pairs has two."""
    for role, data in roles.items():
        yield from ((role, side) for side in (data if isinstance(data, Pairs) else [data]))


def test_roles_end_in_eos_unless_they_are_cut(config):
    tokenizer = load_tokenizer(config.text.model)
    for role, rows in sides(text_scenario(config).roles):
        length = rows.mask.sum(1)
        last = rows.ids[torch.arange(len(length)), length - 1]
        assert ((last == tokenizer.eos_token_id) | (length == 12)).all(), role
        assert (rows.mask == (torch.arange(12) < length[:, None])).all()
    long = replace(config, sampler=SamplerConfig(max_new_tokens=80))
    for _, rows in sides(text_scenario(long).roles):
        ended = (rows.ids == tokenizer.eos_token_id).sum(1)
        assert (ended == 1).all() and (rows.mask.sum(1) < 80).all()


def broken_model(config: Config, folder: Path, change: str) -> Path:
    """A copy of the model with one thing wrong."""
    shutil.copytree(config.text.model, folder)
    if change == "config":
        (folder / "config.json").unlink()
    if change == "weights":
        weights = folder / "model.safetensors"
        weights.rename(folder / "pytorch_model.bin")
    if change == "template":
        (folder / "chat_template.jinja").unlink()
    if change == "vocabulary":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 999}))
    return folder


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ("config", "model", "text.model=.*allowed: a local directory with config.json"),
        ("weights", "model", "text.model=.*weights as .safetensors"),
        ("weights", "classifier", "text.classifier=.*weights as .safetensors"),
        ("template", "model", "chat template"),
        ("vocabulary", "reward_model", "text.reward_model=.*vocab_size 999; allowed: "),
    ],
)
def test_models_that_cannot_serve_are_refused_before_loading(
    config, tmp_path, monkeypatch, change, field, message
):
    import transformers

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    folder = broken_model(config, tmp_path / "model", change)
    wrong = replace(config, text=replace(config.text, **{field: str(folder)}))
    with pytest.raises(ValueError, match=message):
        run(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lengths_must_fit_the_positions(config):
    wrong = replace(config, sampler=SamplerConfig(max_new_tokens=1000))
    with pytest.raises(ValueError, match="max_new_tokens=1000; allowed: together at most 1024"):
        text_scenario(wrong)


def test_a_reward_base_of_ones_own_is_used(config):
    own = replace(config, text=replace(config.text, reward_model=config.text.model))
    first, second = text_scenario(config), text_scenario(own)
    assert first.reward_model == first.policy == second.reward_model
    np.testing.assert_equal(first.hashes["reward_base"], first.hashes["policy"])
