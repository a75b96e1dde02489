"""PPO's parts against hand-worked numbers."""

import math
from dataclasses import replace

import pytest
import torch

from agents.batches import RolloutBatch
from agents.learners.ppo import PPOConfig, adapt_kl, gae, token_rewards, value_loss, whiten
from agents.policy import response_logprobs


def test_gae_by_hand():
    """Three tokens; the fourth column is padding with a value that must not count."""
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    values = torch.tensor([[0.5, 0.4, 0.3, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    # delta = (-.1, -.1, .7); A_2 = .7; A_1 = -.1 + .95 * .7; A_0 = -.1 + .95 * A_1
    expected = torch.tensor([[0.43675, 0.565, 0.7, 0.0]])
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 0.95), expected)


def test_gae_with_discount_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])
    # delta_1 = 2 - .25; delta_0 = 1 + .9 * .25 - .5; A_0 = delta_0 + .9 * .5 * delta_1
    expected = torch.tensor([[0.725 + 0.45 * 1.75, 1.75]])
    torch.testing.assert_close(gae(rewards, values, torch.ones(1, 2), 0.9, 0.5), expected)


@pytest.mark.parametrize(("gamma", "decay"), [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_triangular_product_equals_the_backward_recursion(gamma, decay):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([9, 1, 4, 7, 2, 8])[:, None]).long()
    rewards, expected = rewards * mask, torch.zeros(6, 9, dtype=torch.float64)
    running = following = torch.zeros(6, dtype=torch.float64)
    for t in reversed(range(9)):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * decay * running) * mask[:, t]
        following = values[:, t] * mask[:, t]
        expected[:, t] = running
    result = gae(rewards, values, mask, gamma, decay)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_score_falls_on_the_last_token_and_kl_on_all():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.5, 7.0, 7.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), mask, kl, 0.5)
    expected = torch.tensor([[-0.05, 0.1, 1.85], [-1.25, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_whitening_by_hand():
    """Masked entries (1, 3, 5): mean 3, population variance 8/3."""
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    unit = 2 / math.sqrt(8 / 3)
    expected = torch.tensor([[-unit, 0.0, 0.0], [unit, 0.0, 0.0]])
    torch.testing.assert_close(whiten(values, mask), expected)


def test_whitening_is_invariant_to_scale():
    generator = torch.Generator().manual_seed(1)
    values, mask = torch.randn(4, 5, generator=generator), torch.ones(4, 5)
    torch.testing.assert_close(whiten(100 * values + 3, mask), whiten(values, mask))


def test_value_loss_takes_the_worse_of_value_and_clipped_value():
    mask = torch.tensor([[1, 1, 0]])
    value, old = torch.tensor([[0.5, 0.5, 9.0]]), torch.tensor([[0.1, 0.1, 0.0]])
    returns = torch.tensor([[0.0, 1.0, 0.0]])
    # clipped value .3: max(.25, .09) and max(.25, .49), halved
    assert value_loss(value, old, returns, mask, 0.2).item() == pytest.approx(0.37)


def test_controller_is_a_constant_over_a_thousand_samples():
    """125 batches of 8 at the cap: a factor e^.02, so .2 becomes .20404."""
    for kl, expected in ((7.2, 0.20404), (50.0, 0.20404), (6.0, 0.2), (0.0, 0.19604)):
        coefficient = 0.2
        for _ in range(125):
            coefficient = adapt_kl(coefficient, kl, 8, 6.0, 10_000)
        assert coefficient == pytest.approx(expected, abs=5e-6)
    assert adapt_kl(1.0, 6.6, 1000, 6.0, 10_000) == pytest.approx(1.01)


def rollouts(tiny, stack, n=8, **changes):
    sequences = tiny.sequences(n)
    logp = response_logprobs(stack.ctx.model, sequences)
    batch = RolloutBatch(
        sequences=sequences,
        group=torch.arange(n) // 2,
        logp_old=logp,
        logp_ref=logp - 0.1 * sequences.mask,
        rewards={"reward": torch.linspace(-1, 1, n)},
        weight=torch.ones(n),
    )
    return replace(batch, **changes)


def step_batch(tiny, stack, learner, ratio, advantage):
    """One step's batch in which every token has the given probability ratio and advantage."""
    batch = rollouts(tiny, stack)
    shape = batch.logp_old.shape
    zeros = {"reward": torch.zeros(shape)}
    return replace(
        batch,
        logp_old=batch.logp_old - math.log(ratio),
        extra={"advantage": torch.full(shape, advantage), "returns": zeros, "values": zeros},
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "moves"),
    [
        (0.5, 1.0, -0.5, True),
        (1.1, 1.0, -1.1, True),
        (1.5, 1.0, -1.2, False),
        (0.5, -1.0, 0.8, False),
        (0.9, -1.0, 0.9, True),
        (1.5, -1.0, 1.5, True),
    ],
)
def test_clipped_objective(tiny, ratio, advantage, expected, moves):
    stack = tiny.stack()
    learner = PPOConfig(vf_coef=0.0).build(stack.ctx, stack, 1.0)
    report = learner.run(step_batch(tiny, stack, learner, ratio, advantage))
    assert report.losses["loss"] == pytest.approx(expected, abs=1e-5)
    assert (tiny.gradient(stack.ctx.model).norm() > 1e-3) == moves


@pytest.mark.parametrize("trunk", [False, True])
def test_the_value_loss_stops_at_the_heads_unless_asked(tiny, trunk):
    stack = tiny.stack()
    learner = PPOConfig(value_trunk=trunk).build(stack.ctx, stack, 1.0)
    with torch.no_grad():
        learner.heads["reward"].weight.fill_(0.1)
    batch = step_batch(tiny, stack, learner, 1.0, 0.0)
    batch.extra["returns"]["reward"] = torch.ones(batch.logp_old.shape)
    learner.run(batch)
    assert learner.heads["reward"].weight.grad.abs().sum() > 0
    assert (tiny.gradient(stack.ctx.model).norm() > 0) == trunk


def test_value_heads_have_a_learning_rate_of_their_own(tiny):
    stack = tiny.stack()
    PPOConfig(lr=1e-4, value_lr=1e-2).build(stack.ctx, stack, 1.0)
    assert [group["lr"] for group in stack.ctx.optimizer.param_groups] == [1e-4, 1e-2]


def test_dropped_rollouts_train_neither_policy_nor_value_head(tiny):
    stack = tiny.stack()
    learner = PPOConfig().build(stack.ctx, stack, 1.0)
    batch = step_batch(tiny, stack, learner, 1.0, 1.0)
    batch.extra["returns"]["reward"] = torch.ones(batch.logp_old.shape)
    report = learner.run(replace(batch, weight=torch.zeros(len(batch.weight))))
    assert report.losses["loss"] == 0
    assert not learner.heads["reward"].bias.grad.any()


@pytest.mark.parametrize(("ratio", "zeroed"), [(9.9, False), (10.1, True)])
def test_ratio_limit_zeroes_policy_and_value_loss(tiny, ratio, zeroed):
    stack = tiny.stack()
    learner = PPOConfig().build(stack.ctx, stack, 1.0)
    batch = step_batch(tiny, stack, learner, ratio, -1.0)
    batch.extra["returns"]["reward"] = torch.ones(batch.logp_old.shape)
    report = learner.run(batch)
    # 9.9 from the policy, and .1 * 1/2 * (0 - 1)^2 from the value head, which is born at zero
    assert report.losses["loss"] == pytest.approx(0.0 if zeroed else 9.95, abs=1e-3)
    assert (tiny.gradient(stack.ctx.model).norm() == 0) == zeroed
    assert (tiny.gradient(learner.heads).norm() == 0) == zeroed


def test_adaptive_control_follows_the_measured_kl(tiny):
    """Sequence KL is .1 per token here, far under the target: the coefficient falls 20 % n/H."""
    stack = tiny.stack()
    config = PPOConfig(kl=0.2, kl_control="adaptive", kl_horizon=100, epochs=1)
    learner = config.build(stack.ctx, stack, 1.0)
    metrics = learner.learn(rollouts(tiny, stack), seed=0)
    assert metrics["policy/kl_coefficient"] == pytest.approx(0.2 * (1 - 0.2 * 8 / 100))
    fixed = PPOConfig(kl=0.2, epochs=1).build(stack.ctx, stack, 1.0)
    assert fixed.learn(rollouts(tiny, stack), seed=0)["policy/kl_coefficient"] == 0.2


def test_advantages_are_whitened_gae_of_penalised_rewards(tiny):
    stack = tiny.stack()
    learner = PPOConfig(kl=0.5).build(stack.ctx, stack, 1.0)
    batch, kl = learner._advantages(rollouts(tiny, stack))
    mask = batch.sequences.mask
    length = mask.sum(1)
    assert kl == pytest.approx(0.1 * float(length.float().mean()), rel=1e-4)
    rewards = -0.05 * mask.float()
    rewards[torch.arange(8), length - 1] += batch.rewards["reward"]
    raw = gae(rewards, torch.zeros(8, tiny.answer), mask, 1.0, 0.95)
    torch.testing.assert_close(batch.extra["returns"]["reward"], raw)
    torch.testing.assert_close(batch.extra["advantage"], whiten(raw, mask))


def test_each_reward_channel_gets_its_own_value_head(tiny):
    stack = tiny.stack()
    learner = PPOConfig().build(stack.ctx, stack, 1.0)
    batch = rollouts(tiny, stack)
    batch = replace(
        batch,
        rewards={**batch.rewards, "cost": -batch.rewards["reward"]},
        mix=lambda a: a["reward"] - a["cost"],
    )
    learner.learn(batch, seed=0)
    assert set(learner.heads) == {"reward", "cost"}
    assert not torch.equal(learner.heads["reward"].weight, learner.heads["cost"].weight)
    assert all(head.weight.abs().sum() > 0 for head in learner.heads.values())
