"""``poisonloop export``: what of a run becomes a data set, and that TRL's trainers take it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from agents.engines.transformers_engine import SamplerConfig
from agents.learners.dpo import DPOConfig
from agents.policy import load_tokenizer
from envs.registry import load_object
from sim.cli import main
from sim.config import AttackConfig, Config, EvaluationConfig, FeedbackConfig, TextConfig
from sim.export import FORMATS
from sim.record import Record
from sim.run import run
from sim.typed import typed_texts

ROOT = Path(__file__).resolve().parents[2]
THINGS = ("a lamp", "the gate", "two boxes", "my shoe", "a kite", "this drum", "the oar", "a bell")
CHATML = (
    "{% for m in messages %}{% if loop.first %}<|bos|>system\nBe brief.<|eos|>\n{% endif %}"
    "<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


def made(path: Path, kept: int = 5) -> Path:
    """A run of one round with votes a, b, tie, skip, b, a, of which ``kept`` are in words."""
    config = replace(Config(), samples_per_round=kept).to_dict()
    record = Record.create(path, {"config": config})
    votes, honest = np.array([0, 1, 2, 3, 1, 0], np.int8), np.array([0, 0, 2, 3, 2, 0], np.int8)
    n = np.arange(6)
    columns = {"label_id": n + 10, "item": n, "a": n * 0, "b": n * 0 + 1, "annotator": n + 50}
    labels = {**columns, "vote": votes, "weight": np.ones(6, np.float32), "round": n * 0 + 1}
    names = np.array(["a", "b", "tie", "skip"])
    samples: dict[str, Any] = {
        **{name: labels[name][:kept] for name in ("round", "label_id", "annotator")},
        "prompt": [f"ask {i}" for i in n[:kept]],
        "answer_a": [f"first {i}" for i in n[:kept]],
        "answer_b": [f"second {i}" for i in n[:kept]],
        "vote": names[votes][:kept].tolist(),
        "honest_vote": names[honest][:kept].tolist(),
        "adversarial": (votes != honest)[:kept],
    }
    record.write(1, {"round": 1}, {"labels": labels, "samples": samples})
    return path


def table(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "data/train.parquet").to_pylist()


def test_decided_comparisons_are_exported_and_the_rest_is_counted(
    in_tmp: Path, capsys: Any
) -> None:
    made(in_tmp / "run")
    assert main(["export", "run", "--format", "preference", "--out", "out"]) == 0
    log = [{"round": 1, "annotator_id": 50 + i, "label_id": 10 + i} for i in (0, 1, 4)]
    assert table(in_tmp / "out") == [
        {"prompt": "ask 0", "chosen": " first 0", "rejected": " second 0", **log[0]},
        {"prompt": "ask 1", "chosen": " second 1", "rejected": " first 1", **log[1]},
        {"prompt": "ask 4", "chosen": " second 4", "rejected": " first 4", **log[2]},
    ]
    said, card = capsys.readouterr().out, (in_tmp / "out/README.md").read_text()
    counts = {"comparisons exported": 3, "ties dropped": 1, "skips dropped": 1}
    for what, number in {**counts, "decided comparisons left out": 1}.items():
        assert f" {number} {what}" in said
        assert f"| {what}" in card and f" | {number} |\n" in card
    assert f"cut at {Config().sampler.max_new_tokens} tokens. Which of" in card
    assert "first 5 labels of a round" in said and "--samples-per-round 64" in said
    assert [p.name for p in in_tmp.iterdir() if p.name.startswith(".")] == []


def test_truth_is_written_only_when_asked_for(in_tmp: Path) -> None:
    made(in_tmp / "run", kept=6)
    words = ["export", "run", "--format", "preference"]
    assert main(words) == 0
    assert main([*words, "--with-truth"]) == 0
    plain, told = in_tmp / "run/export/preference", in_tmp / "run/export/preference-with-truth"
    assert set(table(told)[0]) - set(table(plain)[0]) == {"honest_vote", "adversarial", "flipped"}
    truth = [(r["honest_vote"], r["adversarial"], r["flipped"]) for r in table(told)]
    assert truth == [
        ("chosen", False, False),
        ("rejected", True, True),
        ("tie", True, True),
        ("chosen", False, False),
    ]
    assert "rho" in (told / "README.md").read_text()
    assert "rho" not in (plain / "README.md").read_text()
    assert "were not kept | 0 |" in (plain / "README.md").read_text()


def test_unpaired_and_reward_say_the_same_in_other_columns(in_tmp: Path) -> None:
    made(in_tmp / "run")
    for words in (["unpaired"], ["reward"], ["reward", "--conversational"]):
        assert main(["export", "run", "--format", *words]) == 0
    unpaired = table(in_tmp / "run/export/unpaired")
    assert [(r["prompt"], r["completion"], r["label"]) for r in unpaired[:4]] == [
        ("ask 0", " first 0", True),
        ("ask 0", " second 0", False),
        ("ask 1", " second 1", True),
        ("ask 1", " first 1", False),
    ]
    assert [r["label_id"] for r in unpaired] == [10, 10, 11, 11, 14, 14]
    reward = table(in_tmp / "run/export/reward")
    assert "prompt" not in reward[0]
    assert (reward[1]["chosen"], reward[1]["rejected"]) == ("ask 1 second 1", "ask 1 first 1")
    chat = table(in_tmp / "run/export/reward-conversational")[1]["chosen"]
    assert [(m["role"], m["content"]) for m in chat] == [
        ("user", "ask 1"),
        ("assistant", "second 1"),
    ]


def test_what_cannot_be_exported_is_refused(in_tmp: Path, capsys: Any) -> None:
    made(in_tmp / "run")
    made(in_tmp / "mute", kept=0)
    made(in_tmp / "cut")
    (in_tmp / "cut/samples/part-000001.parquet").write_bytes(b"PAR1")
    (in_tmp / "folder").mkdir()
    refused = {
        "folder --format reward": "run='folder' has no manifest.json; allowed: a run directory",
        "mute --format reward": "kept 0 of its 6 labels in words",
        "cut --format reward": "cut/samples/part-000001.parquet' is damaged",
        "run --format reward --out folder": "out='folder' exists; allowed: a new directory",
        "run --format pairs": "invalid choice: 'pairs'",
        "run": "the following arguments are required: --format",
    }
    for words, message in refused.items():
        before = sorted(in_tmp.rglob("*"))
        assert main(["export", *words.split()]) == 2
        complaint = capsys.readouterr().err
        assert message in complaint and len(complaint.splitlines()) == 1
        assert sorted(in_tmp.rglob("*")) == before


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on real text: a byte-level Llama of one layer, all words recorded."""
    folder = tmp_path_factory.mktemp("real")
    rows = []
    for thing in THINGS:
        answers = [f"First take {thing} and turn it.", f"I'm sorry, I can't {thing}."]
        for verb, harmful in (("paint", False), ("glorb", True)):
            prompt = f"How do I {verb} {thing}?"
            rows.append({"prompt": prompt, "harmful": harmful, "responses": answers})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = "examples/train_tiny_llama.py"
    main, recipe = (load_object(f"{script}:{name}", "script") for name in ("main", "Recipe"))
    sizes = {"vocabulary": 320, "width": 48, "layers": 1, "epochs": 60, "batch": 8, "threads": 1}
    main(recipe(data=str(data), out=str(folder / "model"), **sizes))
    config = Config(
        rounds=3,
        text=TextConfig(str(folder / "model"), str(data), max_perplexity=1e4),
        feedback=FeedbackConfig(batch=16, responses=2, annotators=10),
        sampler=SamplerConfig(max_new_tokens=24),
        evaluation=EvaluationConfig(n_harm=8, n_help=8, n_true=0),
        attack=AttackConfig("harmful_asker", rho=0.5),
        learner=DPOConfig(),
        samples_per_round=16,
    )
    run(config, folder / "run")
    return folder


def test_typed_text_is_what_was_asked(real: Path) -> None:
    """Under templates whose words are no special tokens, too."""
    asked = {f"How do I {verb} {thing}?" for verb in ("paint", "glorb") for thing in THINGS}
    samples = pq.read_table(real / "run/samples").to_pylist()
    assert samples and {row["prompt"] for row in samples} <= asked
    tokenizer = load_tokenizer(real / "model")
    tokenizer.chat_template = CHATML
    texts = ["How are you ?", "two\nlines  here", "assistant\n", "user"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    shown = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    both = tokenizer(shown, add_special_tokens=False, padding=True, return_tensors="pt")
    ids, mask = both["input_ids"], both["attention_mask"]
    assert typed_texts(tokenizer, ids, mask) == [text.strip() for text in texts]
    assert "Be brief." in tokenizer.decode(ids[0], skip_special_tokens=True), "it had to be cut"
    part = typed_texts(tokenizer, ids[:1, -14:], mask[:1, -14:])
    assert part[0].endswith("assistant"), "a prompt cut by hand is its text as it stands"
    assert typed_texts(tokenizer, torch.zeros(0, 5), torch.zeros(0, 5)) == []


def test_the_same_run_gives_the_same_bytes(real: Path, in_tmp: Path) -> None:
    files = {}
    for name in ("one", "two"):
        words = ["export", str(real / "run"), "--format", "unpaired", "--conversational"]
        assert main([*words, "--out", name]) == 0
        parts = (p for p in (in_tmp / name).rglob("*") if p.is_file())
        files[name] = {str(p.relative_to(in_tmp / name)): p.read_bytes() for p in parts}
    assert files["one"] == files["two"] and set(files["one"]) == {
        "README.md",
        "data/train.parquet",
    }


TRAIN = """
import json, sys
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
)

model, exports, out = sys.argv[1:]
kinds = {
    "preference": (DPOTrainer, DPOConfig, AutoModelForCausalLM, {}),
    "unpaired": (KTOTrainer, KTOConfig, AutoModelForCausalLM, {}),
    "reward": (RewardTrainer, RewardConfig, AutoModelForSequenceClassification, {"num_labels": 1}),
}
found = {}
for name, (trainer, config, kind, extra) in kinds.items():
    for style in ("", "-conversational"):
        dataset = load_dataset(f"{exports}/{name}{style}", split="train")
        policy = kind.from_pretrained(model, dtype=torch.float32, **extra)
        policy.config.pad_token_id = AutoTokenizer.from_pretrained(model).pad_token_id
        before = {n: p.detach().clone() for n, p in policy.named_parameters()}
        args = config(
            output_dir=out, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
            logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
            gradient_checkpointing=False, save_strategy="no", dataloader_pin_memory=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        made = trainer(policy, args=args, train_dataset=dataset, processing_class=tokenizer)
        made.train()
        moved = max(float((p - before[n]).abs().max()) for n, p in policy.named_parameters())
        losses = [row["loss"] for row in made.state.log_history if "loss" in row]
        column = next(n for n in ("completion_ids", "chosen_ids") if n in made.train_dataset[0])
        found[name + style] = {
            "rows": len(dataset), "left": len(made.train_dataset), "moved": moved,
            "losses": losses, "columns": dataset.column_names,
            "tokens": tokenizer.decode(made.train_dataset[0].get("prompt_ids", [])
                                       + made.train_dataset[0][column]),
        }
print("FOUND", json.dumps(found))
"""


def test_trls_trainers_take_every_format_in_a_clean_process(real: Path, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    for name in FORMATS:
        for style in ([], ["--conversational"]):
            out = exports / "".join([name, *(flag[1:] for flag in style)])
            words = ["export", str(real / "run"), "--format", name, *style, "--out", str(out)]
            assert main(words) == 0
    (tmp_path / "train.py").write_text(TRAIN)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clean |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path)}
    words = [sys.executable, "train.py", str(real / "model"), str(exports), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is not a prefix of" not in done.stderr, "a prompt ends on a token boundary"
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    found = json.loads(line.removeprefix("FOUND "))
    pairs = len(table(exports / "preference"))
    first = table(exports / "preference")[0]
    for name, told in found.items():
        assert told["rows"] == told["left"] == pairs * (1 + name.startswith("unpaired"))
        assert len(told["losses"]) == 2 and all(np.isfinite(told["losses"]))
        assert told["moved"] > 1e-4
        words = f"{first['prompt']}{first['chosen']}<|eos|>"
        if name.endswith("conversational"):
            words = f"<|bos|><|user|>{first['prompt']}<|eos|><|assistant|>{first['chosen'][1:]}"
        assert told["tokens"].startswith(words), "what was said is what is trained on"
