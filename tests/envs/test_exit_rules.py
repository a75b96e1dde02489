"""Rules that date an exit, and brackets around it, against hand-made and library numbers."""

import numpy as np
import pytest
from scipy.stats import beta

from envs.brackets import KINDS, brackets
from envs.eprocess import MARGINS, EProcess
from envs.exit_rules import NEVER, RULES, Plan, binomial_excess, date
from envs.monitor import CostMonitor

PLAN = Plan(limit=0.2, alpha=0.05, planned=40)


def counted(*harmful: int, n: int = 64) -> np.ndarray:
    """One run whose checkpoints have so many harmful answers of n: (1, checkpoints, n)."""
    return np.stack([np.arange(n) < k for k in harmful])[None]


def test_means_by_hand():
    run = counted(12, 13, 12, 13, 14, 0)  # b * n = 12.8
    assert date("mean", run, PLAN).tolist() == [1]
    assert date("mean_twice", run, PLAN).tolist() == [4]
    assert date("mean_twice", counted(13, 12, 13), PLAN).tolist() == [NEVER]
    exactly = np.tile([1.0, 0, 0, 0, 0], (1, 2, 1))
    assert date("mean", exactly, PLAN).tolist() == [NEVER], "a mean of b is in the safe set"


def test_clopper_pearson_is_the_bound_of_the_beta_quantile():
    """Harmful answers of 64 that a lower bound takes to pass .2: 19 at .05, 24 at .05 / 40."""
    for level, needed in ((0.05, 19), (0.05 / 40, 24)):
        for n in (16, 64, 256):
            k = np.arange(1, n + 1)
            draws = np.arange(n)[None] < k[:, None]
            expected = beta.ppf(level, k, n - k + 1) > 0.2
            assert binomial_excess(draws, 0.2, level).tolist() == expected.tolist()
        rule = "cp_each" if level == 0.05 else "cp_planned"
        assert date(rule, counted(0, needed - 1, needed), PLAN).tolist() == [2]


def test_betting_rules_by_hand():
    """Products of 1 + bet (x - b), one bet at a time, averaged over bets at the end."""
    costs = np.random.default_rng(0).random((1, 9, 5)) ** 0.7
    bets = [(m / (0.2 * 0.8)) for m in MARGINS]
    e = np.array([[np.prod(1 + bet * (x - 0.2)) for x in costs[0]] for bet in bets])  # (bets, 9)
    plain = np.cumprod(e, 1).mean(0)
    mixture, detector = np.zeros(9), np.zeros(9)
    for row in e:
        active = running = 0.0
        for t, value in enumerate(row, 1):
            active = (active + 1 / (t * (t + 1))) * value
            running = (running + 1) * value
            mixture[t - 1] += (active + 1 / (t + 1)) / len(bets)
            detector[t - 1] += running / len(bets)
    for stakes, expected in (("first", plain), ("mixture", mixture), ("every", detector)):
        process = EProcess(0.2, (1,), stakes)
        found = np.exp([process.update(costs[:, t])[0] for t in range(9)])
        assert found == pytest.approx(expected)
    for rule, values, threshold in (
        ("e_first", plain, 20),
        ("e_mixture", mixture, 20),
        ("e_sr", detector, 400),
    ):
        crossed = np.flatnonzero(values >= threshold)
        assert crossed.size, "the example must reach the threshold"
        assert date(rule, costs, PLAN).tolist() == [crossed[0]]


@pytest.mark.parametrize("rule", RULES)
def test_an_array_and_a_sequence_of_checkpoints_are_dated_alike(rule):
    rng = np.random.default_rng(1)
    costs = rng.random((30, 12, 40)) < np.linspace(0.1, 0.6, 12)[:, None]
    dates = date(rule, costs, PLAN)
    assert date(rule, [costs[:, t] for t in range(12)], PLAN).tolist() == dates.tolist()
    assert (dates != NEVER).any()
    uneven = [costs[:, t, : 20 + 5 * (t % 3)] for t in range(12)]
    alone = [date(rule, [c[i : i + 1] for c in uneven], PLAN)[0] for i in range(30)]
    assert date(rule, uneven, PLAN).tolist() == alone, "a run is dated by its own costs"


@pytest.mark.parametrize("rule", ["cp_planned", "e_first", "e_mixture"])
def test_false_exits_at_the_limit_keep_the_promise(rule):
    runs = 1500
    costs = np.random.default_rng(2).random((runs, 40, 32)) < 0.2
    false = (date(rule, costs, PLAN) != NEVER).mean()
    assert false <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_the_detector_keeps_its_run_length():
    """Mean checkpoints before a false alarm at C = b; runs cut at 400 make the mean too small."""
    plan = Plan(limit=0.2, run_length=20.0)
    dates = date("e_sr", np.random.default_rng(3).random((300, 400, 8)) < 0.2, plan)
    waited = np.where(dates == NEVER, 400, dates + 1)
    assert waited.mean() - 3 * waited.std() / np.sqrt(300) >= 20
    assert (dates != NEVER).mean() > 0.5, "it promises no probability"


@pytest.mark.parametrize("kind", KINDS)
def test_brackets_hold_a_crossing(kind):
    runs, curve = 400, np.linspace(0.02, 0.62, 40)
    true = int(np.flatnonzero(curve > 0.2)[0])
    left, right = brackets(
        kind, np.random.default_rng(4).random((runs, 40, 128)) < curve[:, None], PLAN
    )
    held = (left < true) & ((right >= true) | (right == NEVER))
    assert held.mean() >= 0.95
    assert (right != NEVER).all() and (right - left).mean() < 25, "holding all would be no answer"


def test_betting_brackets_are_the_monitor_s():
    rng = np.random.default_rng(5)
    costs = rng.beta(2, 3, (6, 15, 96)) ** np.linspace(4, 0.6, 15)[:, None]
    left, right = brackets("betting", costs, Plan(limit=0.25, planned=15))
    for run, found in zip(costs, zip(left, right, strict=True), strict=True):
        monitor = CostMonitor({"harm": 0.25}, alpha=0.05, planned=15)
        for t, draws in enumerate(run):
            monitor.observe(t, {}, {"harm": draws})
        low, high = monitor.bracket()
        assert found == (NEVER if low is None else low, NEVER if high is None else high)
    assert (right != NEVER).any()


@pytest.mark.parametrize(
    ("rule", "costs", "named"),
    [
        ("median", counted(1), "median"),
        ("mean", counted(1)[0], "runs, checkpoints, n"),
        ("mean", [], "no checkpoint"),
        ("mean", [np.full((2, 3), 1.5)], "within"),
        ("mean", [np.full((2, 3), np.nan)], "within"),
        ("mean", [np.zeros((2, 3)), np.zeros((1, 3))], "runs fixed"),
        ("cp_each", np.full((1, 1, 4), 0.5), "fractions"),
        ("cp_planned", counted(*[1] * 41), "planned=40"),
    ],
)
def test_bad_costs_are_named(rule, costs, named):
    with pytest.raises(ValueError, match=named):
        date(rule, costs, PLAN)


def test_bad_plans_are_named():
    for fields in ({"limit": 1.0}, {"alpha": 0.0}, {"planned": 0}, {"run_length": 0.5}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Plan(**fields)
    with pytest.raises(ValueError, match="bracket='wald'"):
        brackets("wald", counted(1), PLAN)
    with pytest.raises(ValueError, match="planned=40"):
        brackets("betting", counted(*[1] * 41), PLAN)


def test_nested_lists_are_read_as_the_array_that_they_look_like():
    costs = np.random.default_rng(0).random((3, 40, 8))
    plan = Plan(limit=0.25, alpha=0.05, planned=40)
    assert (date("mean", costs.tolist(), plan) == date("mean", costs, plan)).all()
