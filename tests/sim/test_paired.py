"""Do two arms differ: known differences, the bootstrap's two levels, exchanges counted by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test

from sim.analysis import paired
from sim.analysis.paired import (
    compare,
    exchange_p,
    nested_rmst,
    nested_weights,
    pairs,
    rmst_difference,
)
from sim.analysis.survival import median_exit, rmst, weighted_rmst


def rows(arm: str, times: list[float], horizon: float = 100.0, worlds: int = 1) -> pd.DataFrame:
    """Runs that left at ``times``; later than ``horizon`` is never."""
    time = np.array(times, float)
    return pd.DataFrame(
        {
            "arm": arm,
            "replicate": [f"seed {k}" for k in range(time.size)],
            "world": np.arange(time.size) % worlds,
            "time": np.minimum(time, horizon),
            "event": time < horizon,
        }
    )


def test_exchanges_by_hand():
    """Differences 1, 2, 3, 4: of 16 exchanges the two extreme ones are as far out."""
    table = pd.concat([rows("a", [11, 22, 33, 44]), rows("b", [10, 20, 30, 40])])
    found = compare(table, "a", "b", 90.0)
    assert found.difference.value == pytest.approx(2.5)
    assert found.p_value == pytest.approx(2 / 16)
    mixed = pd.concat([rows("a", [11, 22, 33, 36]), rows("b", [10, 20, 30, 40])])
    # Differences 1, 2, 3, -4 sum to 2: of the 16 signed sums, 14 are as large (all but two 0s).
    assert compare(mixed, "a", "b", 90.0).p_value == pytest.approx(14 / 16)


def test_exchanges_agree_with_scipy():
    rng = np.random.default_rng(3)
    a, b = rng.uniform(20, 80, 8), rng.uniform(10, 70, 8)
    known = permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    first, second = pairs(pd.concat([rows("a", [*a]), rows("b", [*b])]), "a", "b")
    assert exchange_p(first, second, 100.0, rng) == pytest.approx(known.pvalue)


def test_random_exchanges_beyond_the_exact_ones(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.uniform(20, 80, 9), rng.uniform(10, 70, 9)
    first, second = pairs(pd.concat([rows("a", [*a]), rows("b", [*b])]), "a", "b")
    exact = exchange_p(first, second, 100.0, rng)
    monkeypatch.setattr(paired, "EXACT", 8)
    assert exchange_p(first, second, 100.0, rng) == pytest.approx(exact, abs=0.02)


def test_exchanges_hold_their_level():
    """Where arms do not differ, at most five of a hundred tests are below .05."""
    rng = np.random.default_rng(11)
    found = []
    for _ in range(200):
        shared = rng.normal(60, 15, 6)  # what a pair has in common
        a, b = (shared + rng.normal(0, 10, 6) for _ in range(2))
        found.append(exchange_p(rows("a", [*a], 80.0), rows("b", [*b], 80.0), 80.0, rng))
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_nothing_below_four_pairs():
    table = pd.concat([rows("a", [10, 20, 30]), rows("b", [40, 50, 60])])
    found = compare(table, "a", "b", 90.0)
    assert found.p_value is None and found.log_rank is None and found.difference.low is None
    with pytest.raises(ValueError, match="at least 4"):
        exchange_p(*pairs(table, "a", "b"), 90.0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="share no seed"):
        compare(table.assign(replicate=range(6)), "a", "b", 90.0)


def test_worlds_are_drawn_before_runs():
    worlds = np.array(["x", "x", "x", "y", "y", "y"])
    weights = nested_weights(worlds, np.random.default_rng(0), 4000)
    assert (weights.sum(1) == 6).all()
    both = (weights[:, :3].sum(1) > 0) & (weights[:, 3:].sum(1) > 0)
    assert both.mean() == pytest.approx(0.5, abs=0.03), "half of the draws see one world only"
    # Runs of a world agree and worlds do not: all variance is between worlds, as of two draws.
    part = rows("a", [20, 20, 20, 60, 60, 60]).assign(world=worlds)
    found = nested_rmst(part, 90.0, np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (40, 20, 60)
    assert found.error == pytest.approx(20 / np.sqrt(2), rel=0.05)
    flat = nested_rmst(part.assign(world="one"), 90.0, np.random.default_rng(0))
    assert flat.error == pytest.approx(20 / np.sqrt(6), rel=0.05)


def test_many_resamples_at_once_are_those_one_by_one():
    rng = np.random.default_rng(5)
    time = np.array([1.0, 3, 3, 5, 6, 8, 9])
    event = np.array([True, True, False, True, False, True, False])
    picks = rng.integers(0, 7, (60, 7))
    weights = np.array([np.bincount(pick, minlength=7) for pick in picks])
    values, errors = weighted_rmst(time, event, 10.0, weights)
    alone = [rmst(time[pick], event[pick], 10.0) for pick in picks]
    assert np.isnan(values).any() and not np.isnan(values).all()
    for value, error, found in zip(values, errors, alone, strict=True):
        if found is None:
            assert np.isnan(value)
        else:
            assert (value, error) == pytest.approx((found.value, found.error))


def test_median_by_hand():
    """Of ten that leave one by one the fifth is the median; the band is half at the 2nd and 8th."""
    time, event = np.arange(1.0, 11), np.ones(10, bool)
    found = median_exit(time, event)
    # Log-log Greenwood: S exp(+-1.96 s), s^2 = sum d/(n (n-d)) / ln(S)^2, first at or below half.
    low = high = None
    for k in range(1, 10):
        s = 1 - k / 10
        error = np.sqrt(sum(1 / ((11 - i) * (10 - i)) for i in range(1, k + 1))) / -np.log(s)
        low = low or (k if s ** np.exp(1.96 * error) <= 0.5 else None)
        high = high or (k if s ** np.exp(-1.96 * error) <= 0.5 else None)
    assert (found.value, found.low, found.high) == (5, low, high)
    assert median_exit(time, time < 5) is None, "fewer than half left"
    few = median_exit(time[:3], event[:3])
    assert (few.value, few.low) == (2, None)
    all_left = median_exit(time[:4], event[:4])
    assert all_left.value == 2 and np.isinf(all_left.high), "the band says nothing of nobody"
    half = median_exit(time, time < 6)
    assert half.value == 5 and np.isinf(half.high)
    assert half.in_words() == f"5 [{half.low:g}, ∞)"


def test_intervals_over_three_worlds_are_too_narrow_but_not_those_of_differences():
    """Worlds differ by as much as seeds do; a shared world cancels from a paired difference."""
    rng, held = np.random.default_rng(0), []
    million = rng.normal(60, np.sqrt(300), 10**6)
    truth = np.minimum(million, 100).mean()
    for _ in range(150):
        base = np.repeat(rng.normal(60, 10, 3), 3) + rng.normal(0, 10, 9)
        a, b = (
            rows(name, [*(base + rng.normal(0, 10, 9))]).assign(world=np.repeat(range(3), 3))
            for name in "ab"
        )
        one = nested_rmst(a, 100.0, np.random.default_rng(0), 400)
        both = rmst_difference(pd.concat([a, b]), "a", "b", 100.0, np.random.default_rng(0), 400)
        held.append((one.low <= truth <= one.high, both.low <= 0 <= both.high))
    alone, difference = np.mean(held, 0)
    assert 0.76 <= alone <= 0.93 and 0.88 <= difference <= 0.98
