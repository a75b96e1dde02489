"""The table of what fits where, against what rounds of real models were seen to keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from agents.engines.transformers_engine import SamplerConfig
from agents.learners.grpo import GRPOConfig
from agents.models import ModelConfig
from sim import memory as table
from sim.bench.memory import ANSWER, MIB, PROMPT, measured_round
from sim.bench.shapes import save_random_policy, shape_of
from sim.cli import main
from sim.config import Config, FeedbackConfig
from sim.memory import SIZES, Work, activations, counted, estimate, logits, peak

VOCABULARY, MICRO = 4001, 32
TOLERANCE = 0.2
"""Of activations; weights, gradients and moments are counted exactly."""
CONFIGS = {
    "whole": ModelConfig(device="cpu", gradient_checkpointing="off"),
    "adapters": ModelConfig(device="cpu", gradient_checkpointing="off", lora_rank=8),
    "bfloat16": ModelConfig("bfloat16", "cpu", "off", 8),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy of a few hundred thousand parameters."""
    return save_random_policy(tmp_path_factory.mktemp("policy"), shape_of("100k"), VOCABULARY)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_are_what_a_round_was_seen_to_keep(folder, name):
    model = CONFIGS[name]
    steps = {"minibatch": 2 * MICRO, "micro_batch": MICRO}
    seen = measured_round(folder, "grpo", VOCABULARY, model, **steps)["parts"]
    policy = AutoConfig.from_pretrained(folder)
    shape, work = counted(policy, model), Work(MICRO, MICRO, PROMPT, ANSWER)
    config = Config(
        model=model,
        learner=GRPOConfig(**steps),
        feedback=FeedbackConfig(batch=64, responses=4),
        sampler=SamplerConfig(max_new_tokens=ANSWER),
    )
    parts = estimate(config, policy, policy, prompt_tokens=PROMPT)
    for part in ("weights", "gradients", "optimizer", "reference"):
        assert parts[part] / MIB == pytest.approx(seen[part], rel=0.01, abs=0.01), part
    kept = activations(shape, work, model) / MIB
    assert kept == pytest.approx(seen["activations"], rel=TOLERANCE)
    assert logits(shape, MICRO * ANSWER) / MIB >= seen["logits"]
    assert parts["sampling"] / MIB >= seen["sampler's cache"] * model.torch_dtype.itemsize / 4

    again = replace(model, gradient_checkpointing="on")
    less = measured_round(folder, "grpo", VOCABULARY, again, **steps)["parts"]["activations"]
    assert less < 0.2 * seen["activations"]
    one_layer = seen["activations"] / shape.layers  # formed again, unseen by the outer pass
    found = activations(shape, work, again) / MIB
    assert found == pytest.approx(less + one_layer, rel=TOLERANCE)


def test_a_size_is_its_name_and_adapters_and_precision_pay():
    from transformers import LlamaConfig

    peaks = {}
    for name, fields in SIZES.items():
        policy = LlamaConfig(**fields)
        shape = counted(policy, ModelConfig())
        assert shape.parameters == pytest.approx(float(name[:-1]) * 1e9, rel=0.25)
        for model in (
            ModelConfig(device="cuda", gradient_checkpointing="on"),
            ModelConfig(device="cuda", gradient_checkpointing="on", lora_rank=16),
            ModelConfig("bfloat16", "cuda", "on", 16),
        ):
            config = Config(model=model)
            peaks[name, model.dtype, model.lora_rank] = peak(estimate(config, policy, policy))
        same = estimate(config, policy, policy)
        own = estimate(config, policy, policy, same=False)
        assert own["reward model"] - same["reward model"] == 2 * shape.body
    for name in SIZES:
        whole, wide, narrow = (value for key, value in peaks.items() if key[0] == name)
        assert whole > 3 * wide and wide > 1.4 * narrow


def test_a_learner_without_rollouts_needs_no_reward_model():
    from transformers import LlamaConfig

    from agents.learners.dpo import DPOConfig

    policy = LlamaConfig(**SIZES["0.5B"])
    assert estimate(Config(learner=DPOConfig()), policy, policy)["reward model"] == 0
    assert estimate(Config(), policy, policy)["reward model"] > 0


def test_a_run_that_does_not_fit_is_told_at_its_start(folder, monkeypatch):
    config = Config(model=CONFIGS["whole"])
    assert table.shortage(config, folder, folder) is None
    monkeypatch.setattr(table, "available", lambda device: 2**20)
    said = table.shortage(config, folder, folder)
    assert said and said.startswith("model: about 0.") and "cpu has 0.0; `poisonloop memory" in said


def test_the_command_prints_a_row_a_method(folder, capsys):
    assert main(["memory", "--model", str(folder), "--model.lora-rank", "4"]) == 0
    said = capsys.readouterr().out
    assert said.count("adapters, rank 4, bfloat16") == said.count("whole") == 2
    assert "reward model" in said and "This machine: cpu" in said
    assert main(["memory", "--learner", "ppo", "--model", str(folder)]) == 0
    assert capsys.readouterr().out.count(" ppo ") == 3
    assert main(["memory", "--model", "nowhere"]) == 2
    assert "text.model='nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_vllm_has_its_own_weights_with_a_head_and_its_own_cache(tied):
    """Learning and the engine are there at once; the trainer's own sampling is not."""
    from transformers import LlamaConfig

    from agents.engines.backend import cache_bytes

    policy = LlamaConfig(**{**SIZES["0.5B"], "tie_word_embeddings": tied})
    config = Config(model=ModelConfig("bfloat16", "cuda", "on", 16))
    own = estimate(config, policy, policy)
    parts = estimate(replace(config, engine="vllm"), policy, policy)
    p, t = config.text.prompt_tokens, config.sampler.max_new_tokens
    shape = counted(policy, config.model)
    head = shape.width * shape.vocabulary
    room = cache_bytes(policy, p + t + 1, config.vllm.sequences, "bfloat16")
    assert parts["vllm"] == 2 * (shape.body + head) + room and own["vllm"] == 0
    assert shape.parameters == shape.body + (0 if tied else head)
    assert parts["sampling"] == 0 < own["sampling"]
    assert peak(parts) == sum(parts.values())


@pytest.mark.parametrize("rank", [0, 16])
def test_processes_share_all_but_adapters(rank):
    from transformers import LlamaConfig

    policy = LlamaConfig(**SIZES["8B"])
    config = Config(model=ModelConfig("float32", "cuda", "on", rank))
    alone = estimate(config, policy, policy)
    assert estimate(config, policy, policy, processes=1) == alone
    four = estimate(config, policy, policy, processes=4)
    base = 4 * counted(policy, config.model).parameters
    adapters = 4 * counted(policy, config.model).adapter
    assert four["weights"] == base // 4 + adapters
    assert four["optimizer"] == (2 * adapters if rank else alone["optimizer"] // 4)
    assert four["reference"] == (base + adapters) // 4, "a tree of its own"
    assert four["sampling"] > base, "the policy is whole while it is sampled"
    if not rank:
        assert peak(four) < peak(alone)
