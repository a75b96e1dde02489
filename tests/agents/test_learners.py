"""Contract of every registered learner: repeatable, in pieces of any size, or openly diverged."""

from dataclasses import replace

import pytest
import torch

from agents.batches import RolloutBatch, SFTBatch
from agents.learners import learners
from agents.learners.reward_model import RewardModel, RewardModelConfig
from agents.learners.update import Diverged, OptimizerConfig, minibatches
from agents.policy import response_logprobs

LEARNERS = learners.names()


def test_the_four_learners_are_registered():
    assert {"dpo", "grpo", "ppo", "sft"} <= set(LEARNERS)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_round_changes_the_weights_and_only_the_seed_decides_how(tiny, name):
    ends = []
    for seed in (0, 0, 1):
        agent = tiny.agent(name)
        agent.seed = seed
        before = tiny.weights(agent.policy.model)
        reference = tiny.weights(agent.policy.reference)
        learned = tiny.rounds(agent, 0, 1)[0]
        ends.append(tiny.weights(agent.policy.model))
        assert not torch.equal(ends[-1], before)
        assert torch.equal(tiny.weights(agent.policy.reference), reference)
        assert agent.stack.ctx.step > 0 and agent.policy.version == 1
        assert all(torch.isfinite(torch.tensor(v)) for v in learned.metrics.values())
        assert any(key.startswith("policy/") for key in learned.metrics)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def step_of(tiny, name, micro_batch):
    """A learner of ``name``, and one optimizer step's worth of work for it."""
    if name == "reward_model":
        stack = tiny.stack((), "reward_model")
        learner = RewardModel(RewardModelConfig(micro_batch=micro_batch), stack.ctx, stack)
        return stack.ctx, lambda: learner.run(tiny.pairs(10))
    stack = tiny.stack()
    policy = stack.ctx._policy
    policy.reference = tiny.model(3)
    learner = learners.get(name)(micro_batch=micro_batch).build(stack.ctx, stack, 1.0)
    pairs = tiny.pairs(10)
    if learner.uses == "pairs":
        referenced = learner.referenced(pairs)
        return stack.ctx, lambda: learner.run(referenced)
    if learner.uses == "winners":
        batch = SFTBatch(pairs.label_id, pairs.a, pairs.weight, pairs.annotator_id)
        return stack.ctx, lambda: learner.run(batch)
    sequences = tiny.sequences(12, shared=3)
    shape = sequences.ids.shape
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(shape, generator=generator)
    batch = RolloutBatch(
        sequences=sequences,
        group=torch.arange(12) // 3,
        logp_old=response_logprobs(tiny.model(0), sequences) + 0.2 * signal,
        logp_ref=policy.reference_logprobs(sequences),
        rewards={"reward": signal[:, 0]},
        weight=torch.rand(12, generator=generator) + 0.5,
        extra={
            "advantage": signal.flip(0),
            "returns": {"reward": signal},
            "values": {"reward": 0.1 * signal.flip(1)},
        },
    )
    return stack.ctx, lambda: learner.run(batch)


@pytest.mark.parametrize("name", [*LEARNERS, "reward_model"])
def test_gradient_does_not_depend_on_micro_batch(tiny, name):
    results = []
    for micro_batch in (64, 5, 1):
        ctx, run = step_of(tiny, name, micro_batch)
        ctx.optimizer.zero_grad()
        loss = run().losses["loss"]
        owned = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        gradient = torch.cat([p.grad.flatten() for p in owned if p.grad is not None])
        results.append((loss, gradient))
    (loss, gradient), *others = results
    assert gradient.norm() > 1e-2
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*LEARNERS, "reward_model"])
def test_run_may_be_called_any_number_of_times(tiny, name):
    """It draws nothing and counts nothing: two calls add up to exactly twice one."""
    ctx, run = step_of(tiny, name, 64)
    ctx.optimizer.zero_grad()
    run()
    once = tiny.gradient(ctx.model)
    run()
    assert torch.equal(tiny.gradient(ctx.model), 2 * once)
    assert ctx.step == 0


@pytest.mark.parametrize("name", LEARNERS)
def test_nan_is_divergence_and_the_optimizer_does_not_step(tiny, name):
    agent = tiny.agent(name)
    agent.act(tiny.observation(0))
    with torch.no_grad():
        agent.policy.model.model.norm.weight[0] = float("nan")
    before = tiny.weights(agent.policy.model)
    with pytest.raises(Diverged, match="policy: loss"):
        agent.learn(tiny.labels(0))
    after = tiny.weights(agent.policy.model)
    assert torch.equal(before.nan_to_num(7), after.nan_to_num(7))
    assert agent.stack.ctx.step == 0


def test_an_infinite_reward_is_divergence(tiny):
    agent = tiny.agent("grpo")
    agent.act(tiny.observation(0))
    with torch.no_grad():
        agent.reward_model.ctx.model.score.weight.fill_(float("inf"))
    with pytest.raises(Diverged):
        agent.learn(tiny.labels(0))


def test_minibatches_cover_every_row_once_an_epoch(tiny):
    pairs, config = tiny.pairs(10), OptimizerConfig(minibatch=4, epochs=2)
    seen = [m.label_id.tolist() for m in minibatches(pairs, 10, config, seed=1)]
    assert [len(rows) for rows in seen] == [4, 4, 2] * 2
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    again = [m.label_id.tolist() for m in minibatches(pairs, 10, config, seed=1)]
    assert again == seen
    for mini in minibatches(pairs, 10, config, seed=1):
        assert torch.equal(mini.a.ids, pairs.a.ids[mini.label_id])


def test_sft_is_token_cross_entropy_by_hand(tiny):
    stack = tiny.stack()
    learner = learners.get("sft")().build(stack.ctx, stack, 1.0)
    sequences = tiny.sequences(6)
    batch = SFTBatch(torch.arange(6), sequences, torch.ones(6), torch.zeros(6))
    logp = response_logprobs(stack.ctx.model, sequences)
    expected = -(logp * sequences.mask).sum() / sequences.mask.sum()
    assert learner.run(batch).losses["loss"] == pytest.approx(expected.item(), rel=1e-5)
    weight = torch.tensor([2.0, 0, 1, 1, 1, 1])
    expected = -(logp.sum(1) * weight).sum() / sequences.mask.sum()
    weighted = replace(batch, weight=weight)
    assert learner.run(weighted).losses["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_clipping_bounds_the_norm_of_the_step(tiny, name):
    """With plain numbers: the gradients that reach Adam never exceed ``max_grad_norm``."""
    agent = tiny.agent(name, max_grad_norm=1e-3)
    norms = []
    step = agent.stack.ctx.optimizer.step

    def recorded():
        grads = [
            p.grad
            for group in agent.stack.ctx.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step()

    agent.stack.ctx.optimizer.step = recorded
    tiny.rounds(agent, 0, 1)
    assert norms and max(norms) <= 1.001e-3
