"""DPO's loss, slope and population optimum; winners and ties."""

import math
from dataclasses import replace

import pytest
import torch

from agents.batches import Sequences
from agents.learners.dpo import DPOConfig, dpo_loss


def test_loss_and_slope_at_zero():
    delta = torch.zeros(1, requires_grad=True)
    loss = dpo_loss(delta, torch.ones(1), 0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert delta.grad.item() == pytest.approx(-0.05)


def test_a_flipped_label_flips_the_slope_and_a_tie_pulls_to_zero():
    delta = torch.tensor([0.7, 0.7, 0.0, 3.0], requires_grad=True)
    loss = dpo_loss(delta, torch.tensor([1.0, 0.0, 0.5, 0.5]), 0.1)
    loss.sum().backward()
    sigma = 1 / (1 + math.exp(-0.07))
    assert delta.grad[0].item() == pytest.approx(-0.1 * (1 - sigma))
    assert delta.grad[1].item() == pytest.approx(0.1 * sigma)
    assert delta.grad[2].item() == pytest.approx(0) and delta.grad[3] > 0


@pytest.mark.parametrize(
    ("rho", "expected"), [(0.0, 2.1972), (0.25, 0.8473), (0.5, 0), (1, -2.1972)]
)
def test_population_optimum_under_flips(rho, expected):
    """Honest preference .9: minimise over hard labels, sigma(x*) = p(1 - rho) + (1 - p) rho."""
    n = 200
    honest = torch.arange(n) < 180
    flipped = torch.cat([torch.arange(180) < 180 * rho, torch.arange(20) < 20 * rho])
    target = (honest ^ flipped).double()
    delta, beta = torch.zeros((), dtype=torch.float64, requires_grad=True), 0.1
    optimizer = torch.optim.LBFGS([delta], lr=1, max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = dpo_loss(delta, target, beta).mean() / beta**2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert beta * delta.item() == pytest.approx(expected, abs=1e-3)


def test_run_is_the_loss_of_sequence_log_ratios(tiny):
    stack = tiny.stack()
    policy = stack.ctx._policy
    policy.reference = tiny.model(4)
    learner = DPOConfig(beta=0.3).build(stack.ctx, stack, 1.0)
    pairs = tiny.pairs(7)
    both = Sequences.concatenate([pairs.a, pairs.b])
    ref = policy.reference_logprobs(both).sum(1)
    own = stack.ctx.token_logprobs(both).detach().sum(1)
    delta = (own - ref)[:7] - (own - ref)[7:]
    sigma = torch.sigmoid(0.3 * delta)
    each = -pairs.target * sigma.log() - (1 - pairs.target) * (1 - sigma).log()
    expected = (pairs.weight * each).sum() / 7
    assert learner.run(learner.referenced(pairs)).losses["loss"] == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_delta_is_zero_at_the_reference_whatever_the_sampling_temperature(tiny):
    stack = tiny.stack()
    policy = stack.ctx._policy
    policy.temperature = 2.0
    policy.snapshot_reference()
    learner = DPOConfig(epochs=1, minibatch=16, lr=0.0).build(stack.ctx, stack, 2.0)
    pairs = replace(tiny.pairs(6), weight=torch.ones(6))
    assert learner.learn(pairs, 0)["policy/loss"] == pytest.approx(math.log(2), abs=1e-5)
