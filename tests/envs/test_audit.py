"""A classifier's harm, corrected by audits: unbiased, covering, and worth its while."""

import numpy as np
import pytest

from envs.audit import audited_mean
from envs.eprocess import betting_bounds


def judged(runs: int, m: int, k: int, harm: float, errors: float, seed: int = 0):
    """Answers with true harm, and a classifier wrong on a share ``errors`` of either kind."""
    rng = np.random.default_rng(seed)
    true = rng.random((runs, m, k)) < harm
    return (true ^ (rng.random(true.shape) < errors)).astype(float), true[..., 0].astype(float)


def test_value_by_hand():
    """Two blocks: .5 * (1/2, 1) + oracle (0, 1) - .5 * first answers (1, 1)."""
    found = audited_mean(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([0.0, 1.0]))
    assert found.value == pytest.approx((0.25 - 0.5 + 0.5 + 1 - 0.5) / 2)


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("harm", "errors"), [(0.2, 0.1), (0.05, 0.3), (0.5, 0.0)])
def test_bounds_cover_and_the_value_is_unbiased(trust, harm, errors):
    runs = 600
    found = audited_mean(*judged(runs, 96, 4, harm, errors), trust=trust)
    missed = (found.low > harm) | (found.high < harm)
    assert missed.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert found.value.mean() == pytest.approx(harm, abs=4 * found.value.std() / np.sqrt(runs))
    if errors:
        low, high = betting_bounds(judged(1, 600, 4, harm, errors)[0].reshape(-1), 0.05)
        assert not low <= harm <= high, "the classifier alone is confidently wrong"


def test_fractional_harm_covers():
    rng = np.random.default_rng(1)
    true = rng.beta(1, 3, (500, 96, 4))
    found = audited_mean(np.clip(true + 0.1, 0, 1), true[..., 0])
    assert ((found.low > 0.25) | (found.high < 0.25)).mean() <= 0.05 + 3 * np.sqrt(0.0475 / 500)


def test_a_good_classifier_narrows_what_audits_say():
    classifier, oracle = judged(200, 128, 4, 0.2, 0.1)
    widths = {}
    for trust in (0.0, 0.5):
        found = audited_mean(classifier, oracle, trust=trust)
        widths[trust] = (found.high - found.low).mean()
    assert widths[0.0] == pytest.approx(0.207, abs=0.01)
    assert widths[0.5] == pytest.approx(0.162, abs=0.01)


def test_without_trust_or_unaudited_answers_the_audits_speak_alone():
    classifier, oracle = judged(3, 50, 4, 0.3, 0.2)
    alone = betting_bounds(oracle, 0.05)
    for found in (
        audited_mean(classifier, oracle, trust=0.0),
        audited_mean(classifier[..., :1], oracle),
    ):
        assert np.array([found.low, found.high]) == pytest.approx(np.array(alone))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((np.zeros((4, 2)), np.zeros(3)), r"\(4, 2\)"),
        ((np.zeros((0, 2)), np.zeros(0)), "classifier"),
        ((np.full((4, 2), 2.0), np.zeros(4)), "by the classifier"),
        ((np.zeros((4, 2)), np.full(4, np.nan)), "by the oracle"),
        ((np.zeros((4, 2)), np.zeros(4), 1.0), "alpha"),
        ((np.zeros((4, 2)), np.zeros(4), 0.1, 1.5), "trust"),
    ],
)
def test_bad_input_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        audited_mean(*arguments)
