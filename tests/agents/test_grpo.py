"""GRPO's group advantages against worked rows, and its loss where it can be done by hand."""

import math

import pytest
import torch

from agents.learners.grpo import group_advantages, grpo_token_loss


@pytest.mark.parametrize(("gap", "expected"), [(1.0, 2.474174), (1e-3, 1.92921), (1e-6, 0.008719)])
def test_one_odd_answer_in_eight(gap, expected):
    """Group std makes the advantage blind to the reward's scale, until the 1e-4 takes over."""
    rewards = torch.zeros(8, dtype=torch.float64)
    rewards[0] = gap
    advantages = group_advantages(rewards, torch.zeros(8, dtype=torch.long))
    assert advantages[0].item() == pytest.approx(expected, rel=1e-4)
    assert advantages.sum().item() == pytest.approx(0, abs=1e-9)


def test_groups_are_separate_and_may_differ_in_size():
    rewards = torch.tensor([1.0, 3.0, 5.0, 10.0, 20.0, 7.0], dtype=torch.float64)
    group = torch.tensor([4, 4, 4, 9, 9, 2])
    expected = torch.tensor([-2 / 2.0001, 0, 2 / 2.0001, -5 / (50**0.5 + 1e-4)] + [0, 0])
    expected[4] = -expected[3]
    torch.testing.assert_close(group_advantages(rewards, group).float(), expected)
    shuffled = torch.tensor([5, 3, 0, 4, 2, 1])
    torch.testing.assert_close(
        group_advantages(rewards[shuffled], group[shuffled]).float(), expected[shuffled]
    )


def test_equal_rewards_move_nothing():
    advantages = group_advantages(torch.full((4,), 0.7), torch.zeros(4, dtype=torch.long))
    assert advantages.abs().max() < 1e-3


def test_token_loss_by_hand():
    logp = torch.log(torch.tensor([[0.2, 0.6]]))
    old = torch.log(torch.tensor([[0.4, 0.4]]))  # ratios .5 and 1.5
    ref = torch.log(torch.tensor([[0.1, 0.6]]))
    k3 = 0.5 - math.log(0.5) - 1
    for advantage, policy in ((1.0, (-0.5, -1.2)), (-1.0, (0.8, 1.5))):
        loss = grpo_token_loss(logp, old, ref, torch.full((1, 2), advantage), 0.2, 0.1)
        expected = torch.tensor([[policy[0] + 0.1 * k3, policy[1]]])
        torch.testing.assert_close(loss, expected)
        corrected = grpo_token_loss(logp, old, ref, torch.full((1, 2), advantage), 0.2, 0.1, True)
        expected[0, 0] = policy[0] + 0.5 * 0.1 * k3
        torch.testing.assert_close(corrected, expected)


def test_corrected_kl_has_the_reverse_kl_gradient():
    """Exact expectation over a softmax: with the ratio it is the gradient of KL(pi || ref)."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    gradients = []
    for correction in (True, False):
        terms = grpo_token_loss(
            logp, logp.detach(), ref, torch.zeros_like(logp), 0.2, 1.0, correction
        )
        loss = (logp.detach().exp() * terms).sum()
        gradients.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
    torch.testing.assert_close(gradients[0], expected)
    assert (gradients[1] - expected).abs().max() > 1e-2
