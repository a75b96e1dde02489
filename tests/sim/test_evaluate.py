"""What an evaluation computes, against exact sums."""

import pytest
import torch

from sim.evaluate import distances


def test_distances_estimate_the_exact_ones_from_what_was_said():
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05])
    reference = torch.tensor([0.2, 0.3, 0.1, 0.4])
    n, generator = 200_000, torch.Generator().manual_seed(0)
    said = torch.multinomial(policy, 2 * n, replacement=True, generator=generator).view(n, 2)
    short = torch.arange(n) % 2 == 0  # every other answer has one token only
    logp, logp_ref = policy.log()[said], reference.log()[said]
    logp[short, 1] = logp_ref[short, 1] = 0.0
    found = distances(logp, logp_ref, 2 * n - int(short.sum()))
    per_token = float((policy * (policy / reference).log()).sum())
    assert found["kl"] == pytest.approx(1.5 * per_token, rel=0.02)
    assert found["policy/kl_k3"] == pytest.approx(1.5 * per_token, rel=0.02)
    variation = float((policy - reference).abs().sum()) / 2
    assert found["policy/total_variation"] == pytest.approx(variation, rel=0.02)
