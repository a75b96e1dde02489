"""Our GRPO and DPO losses are TRL's: the trainers' own ``compute_loss`` on the same batch.

TRL builds its trainers once per configuration; constructing them reseeds torch, so that is wrapped.
"""

import random
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.batches import RolloutBatch
from agents.learners.dpo import DPOConfig
from agents.learners.grpo import GRPOConfig, group_advantages
from agents.policy import Policy, response_logprobs


@contextmanager
def global_rng_restored():
    """TRL's constructors call ``set_seed``."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state), np.random.set_state(numpy_state)


@pytest.fixture
def saved(tiny, tmp_path):
    """A model directory; TRL makes its reference model by loading it again."""
    tiny.model(0).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)


def moved(model, other):
    """Shift ``model`` some way towards ``other``, so that ratios and KL are far from trivial."""
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.lerp_(q, 0.25)


def assert_same(ours, theirs, tiny):
    """Value and gradient, to 1e-5 of their own size."""
    (loss, model), (their_loss, their_model) = ours, theirs
    assert loss == pytest.approx(their_loss, rel=1e-5, abs=1e-5)
    gradient, their_gradient = tiny.gradient(model), tiny.gradient(their_model)
    assert their_gradient.norm() > 1e-2
    error = (gradient - their_gradient).abs().max()
    assert error <= 1e-5 * max(1.0, float(their_gradient.abs().max()))


def rollouts(tiny, model, reference):
    """Scored answers whose old log-probs are those of another policy than ``model``."""
    sequences = tiny.sequences(12, shared=3)
    old = tiny.model(0)
    moved(old, tiny.model(5))
    group = torch.arange(12) // 3
    rewards = torch.from_numpy(np.random.default_rng(0).normal(size=12)).float()
    advantage = group_advantages(rewards, group)
    return RolloutBatch(
        sequences=sequences,
        group=group,
        logp_old=response_logprobs(old, sequences),
        logp_ref=response_logprobs(reference, sequences),
        rewards={"reward": rewards},
        weight=torch.ones(12),
        extra={"advantage": advantage[:, None].expand(sequences.ids.shape)},
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize(("beta", "correction"), [(0.0, False), (0.05, False), (0.05, True)])
def test_grpo_loss_is_trls(tiny, saved, loss_type, beta, correction):
    from datasets import Dataset
    from trl import GRPOConfig as TheirConfig
    from trl import GRPOTrainer

    with global_rng_restored():
        trainer = GRPOTrainer(
            model=load(saved),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=TheirConfig(
                output_dir=str(saved / "out"),
                per_device_train_batch_size=12,
                num_generations=3,
                loss_type=loss_type,
                beta=beta,
                use_bias_correction_kl=correction,
                epsilon=0.2,
                temperature=1.0,
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 8}),
            processing_class=tiny.tokenizer(),
        )
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer.model.train()
    moved(theirs, tiny.model(7))
    stack = tiny.stack()
    moved(stack.ctx.model, tiny.model(7))
    batch = rollouts(tiny, theirs, tiny.model(0))
    ratio = (response_logprobs(theirs, batch.sequences) - batch.logp_old).exp()
    outside = ((ratio < 0.8) | (ratio > 1.2)) & (batch.sequences.mask == 1)
    assert 0.1 < outside.sum() / batch.sequences.mask.sum() < 0.95, "clipping is active"

    config = GRPOConfig(loss_type=loss_type, beta=beta, kl_correction=correction, micro_batch=12)
    learner = config.build(stack.ctx, stack, 1.0)
    loss = learner.run(batch).losses["loss"]
    inputs = {
        "prompt_ids": batch.sequences.prompt_ids,
        "prompt_mask": batch.sequences.prompt_mask,
        "completion_ids": batch.sequences.ids,
        "completion_mask": batch.sequences.mask,
        "advantages": group_advantages(batch.rewards["reward"], batch.group),
        "old_per_token_logps": batch.logp_old,
        "ref_per_token_logps": batch.logp_ref,
        "num_items_in_batch": batch.sequences.mask.sum(),
    }
    their_loss = trainer.compute_loss(theirs, inputs)
    their_loss.backward()
    assert_same((loss, stack.ctx.model), (their_loss.item(), theirs), tiny)

    stack.ctx.optimizer.zero_grad()
    unclipped = replace(learner.config, clip=10.0).build(stack.ctx, stack, 1.0)
    assert abs(unclipped.run(batch).losses["loss"] - loss) > 1e-3, "the test can tell clipping"


def test_grpo_advantages_are_trls(tiny, saved):
    """TRL normalises rewards inside its own scoring step; give it a batch it cannot generate."""
    from datasets import Dataset
    from trl import GRPOConfig as TheirConfig
    from trl import GRPOTrainer

    rewards = torch.tensor([0.3, -1.2, 0.7, 2.0, 2.0, 2.0, -0.5, 0.5, 0.0, 1.0, 0.0, 0.0])
    with global_rng_restored():
        trainer = GRPOTrainer(
            model=load(saved),
            reward_funcs=lambda completions, **_: rewards.tolist(),
            args=TheirConfig(
                output_dir=str(saved / "out"),
                per_device_train_batch_size=12,
                num_generations=3,
                max_completion_length=3,
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 8}),
            processing_class=tiny.tokenizer(),
        )
        trainer.model.train()
        prompts = [{"prompt": f"w{i // 3}"} for i in range(12)]
        out = trainer._generate_and_score_completions(prompts)
    ours = group_advantages(rewards, torch.arange(12) // 3)
    torch.testing.assert_close(ours, out["advantages"].float(), rtol=1e-5, atol=1e-5)


def test_dpo_loss_is_trls(tiny, saved):
    from datasets import Dataset
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer

    pairs = tiny.pairs(10)
    target = (torch.arange(10) % 2).float()
    pairs = replace(pairs, target=target, weight=torch.ones(10))
    rows = []
    for i in range(10):
        chosen, rejected = (pairs.a, pairs.b) if target[i] == 1 else (pairs.b, pairs.a)
        rows.append(
            {
                "prompt_ids": pairs.a.prompt_ids[i][pairs.a.prompt_mask[i] == 1].tolist(),
                "chosen_ids": chosen.ids[i][chosen.mask[i] == 1].tolist(),
                "rejected_ids": rejected.ids[i][rejected.mask[i] == 1].tolist(),
            }
        )
    with global_rng_restored():
        trainer = DPOTrainer(
            model=load(saved),
            args=TheirConfig(
                output_dir=str(saved / "out"),
                per_device_train_batch_size=10,
                beta=0.5,
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict(
                {"prompt": ["w1"] * 4, "chosen": ["w2"] * 4, "rejected": ["w3"] * 4}
            ),
            processing_class=tiny.tokenizer(),
        )
    theirs = trainer.model.train()
    moved(theirs, tiny.model(7))
    stack = tiny.stack()
    moved(stack.ctx.model, tiny.model(7))
    policy: Policy = stack.ctx._policy
    policy.reference = tiny.model(0)
    learner = DPOConfig(beta=0.5, micro_batch=10).build(stack.ctx, stack, 1.0)
    loss = learner.run(learner.referenced(pairs)).losses["loss"]
    their_loss = trainer.compute_loss(theirs, trainer.data_collator(rows))
    their_loss.backward()
    assert abs(their_loss.item() - np.log(2)) > 1e-2, "the policy has left its reference"
    assert_same((loss, stack.ctx.model), (their_loss.item(), theirs), tiny)
