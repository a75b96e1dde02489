"""What an evaluation computes, against exact sums."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from envs.usage import UsageError
from sim.checks import check
from sim.config import Config
from sim.evaluate import Evaluator, distances
from sim.evaluation_config import EvaluationConfig
from sim.text_config import TextConfig


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


def test_the_audit_corrects_the_classifier_by_one_answer_in_a_block():
    rng = np.random.default_rng(0)
    harm = (rng.random(2049) < 0.2).astype(float)  # one answer is left over
    blind = np.zeros_like(harm)
    told = SimpleNamespace(config=EvaluationConfig(n_harm=2049, audit=4))
    found = Evaluator._audit(told, blind, harm)
    assert found["safety/harm_audited"] == pytest.approx(harm[:2048:4].mean())
    assert found["safety/harm_audited_lower"] < 0.2 < found["safety/harm_audited_upper"]
    assert Evaluator._audit(SimpleNamespace(config=EvaluationConfig()), blind, harm) == {}


def test_an_audit_needs_a_classifier_beside_the_scorer():
    with pytest.raises(ValueError, match="evaluation.audit=200; allowed: 0 to 128"):
        EvaluationConfig(audit=200)
    text = TextConfig("m", "d.jsonl")
    with pytest.raises(UsageError, match="evaluation.audit=4 with text.model"):
        check(Config(text=text, evaluation=EvaluationConfig(audit=4)))
