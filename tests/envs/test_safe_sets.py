"""Safe sets beside the mean: hand-worked values, coverage and error rates by simulation, dates."""

import json
import math

import numpy as np
import pytest

from envs import tail_risk
from envs.monitor import CostMonitor
from envs.safe_sets import SafeSets, SetLimits, clopper_pearson
from envs.tail_risk import CELLS, TailProcess, cvar, cvar_bounds

ALPHA = 0.05


def slack(rate: float, runs: int) -> float:
    """Three standard errors of a binomial share."""
    return 3 * math.sqrt(rate * (1 - rate) / runs)


@pytest.mark.parametrize(
    ("share", "value"), [(0.25, 1.0), (0.5, 0.75), (0.375, 1.25 / 1.5), (1.0, 0.375), (0.01, 1.0)]
)
def test_cvar_by_hand(share, value):
    assert cvar(np.array([0.0, 0.5, 1.0, 0.0]), share) == pytest.approx(value)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.8])
def test_cvar_is_the_minimum_of_rockafellar_and_uryasev(share):
    costs = np.random.default_rng(0).beta(0.5, 1.5, 400)
    values = np.linspace(0, 1, 4001)
    objective = values + np.maximum(costs - values[:, None], 0).mean(1) / share
    assert cvar(costs, share) == pytest.approx(objective.min(), abs=1e-3)


POLICIES = {
    "rare": (lambda rng, n: (rng.random(n) < 0.05).astype(float), 0.2),
    "common": (lambda rng, n: (rng.random(n) < 0.4).astype(float), 1.0),
    "beta": (lambda rng, n: 1 - rng.random(n) ** (1 / 3), 0.5275),
    "constant": (lambda rng, n: np.full(n, 0.3), 0.3),
}
"""Draws, and their CVaR at .25. Of c = 1 - u^(1/3): 1 - 4 * integral of u^(1/3) over [0, 1/4]."""


def test_the_known_cvar_of_beta_costs():
    assert pytest.approx(POLICIES["beta"][1], abs=1e-4) == 1 - 4 * 0.75 * 0.25 ** (4 / 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_cvar_bounds_cover_and_say_something(policy):
    draw, truth = POLICIES[policy]
    rng, runs = np.random.default_rng(1), 200
    bounds = np.array([cvar_bounds(draw(rng, 128), 0.25, ALPHA) for _ in range(runs)])
    missed = (bounds[:, 0] > truth + 1e-6) | (bounds[:, 1] < truth - 1e-6)
    assert missed.mean() <= ALPHA + slack(ALPHA, runs)
    assert (bounds[:, 1] - bounds[:, 0]).mean() < 0.6


def test_candidates_share_alpha(monkeypatch):
    """The best of several bounds is no free choice: each alone would be tighter."""
    costs = POLICIES["beta"][0](np.random.default_rng(3), 128)
    _, high = cvar_bounds(costs, 0.25, ALPHA)
    alone = []
    for value in tail_risk.CANDIDATES:
        monkeypatch.setattr(tail_risk, "CANDIDATES", np.array([value]))
        alone.append(cvar_bounds(costs, 0.25, ALPHA))
        monkeypatch.undo()
    assert high > min(bounds[1] for bounds in alone)


def test_wealth_in_a_cell_is_no_more_than_at_any_point_of_it():
    """The cells' least value lies below the infimum over v, which a fine grid approaches."""
    costs = np.random.default_rng(2).beta(0.6, 1.2, 50)
    limit, share = 0.5, 0.25
    process = TailProcess(limit, share)
    found = process._evidence(costs)
    margins = (process.bets * process.limit * (1 - process.limit))[:, None]
    values = np.linspace(0, limit, 20 * CELLS, endpoint=False)
    left = limit / CELLS * np.floor(values / (limit / CELLS) + 1e-9)
    staked = share * (limit - left)  # the bet of a cell, fixed before
    bets = margins / (staked * (1 - staked))  # (bets, values)
    change = np.maximum(costs - values[:, None], 0) - share * (limit - values)[:, None]
    exact = np.log1p(bets[..., None] * change).sum(-1).min(1)
    assert (found <= exact + 1e-9).all() and (exact - found < 0.35 * np.abs(exact) + 2).all()


AT_THE_LIMIT = {
    "all or nothing": lambda rng, shape: (rng.random(shape) < 0.125).astype(float),
    "half": lambda rng, shape: 0.5 * (rng.random(shape) < 0.25),
    "everything": lambda rng, shape: np.full(shape, 0.5),
    "spread": lambda rng, shape: np.where(rng.random(shape) < 0.25, rng.random(shape), 0.0),
}
"""Policies whose CVaR at .25 is .5, with the minimising v at 0, .5 and in between."""


@pytest.mark.parametrize("first", AT_THE_LIMIT)
def test_false_exits_at_the_cvar_limit_whatever_the_policy_turns_into(first):
    names = list(AT_THE_LIMIT)
    start, runs, rng = names.index(first), 300, np.random.default_rng(3)
    process, most = TailProcess(0.5, 0.25, (runs,)), np.full(runs, -np.inf)
    for t in range(20):
        draw = AT_THE_LIMIT[names[(start + t // 4) % len(names)]]
        most = np.maximum(most, process.update(draw(rng, (runs, 64))))
    assert (most >= math.log(1 / ALPHA)).mean() <= ALPHA + slack(ALPHA, runs)


def test_a_cvar_above_the_limit_is_found():
    rng, runs = np.random.default_rng(4), 100
    process = TailProcess(0.5, 0.25, (runs,))
    for _ in range(8):
        wealth = process.update((rng.random((runs, 128)) < 0.22).astype(float))  # CVaR .88
    assert (wealth >= math.log(1 / ALPHA)).mean() > 0.95


def test_exact_intervals_of_a_share():
    from scipy.stats import binomtest

    for k, n in ((0, 128), (3, 128), (127, 128), (128, 128)):
        known = binomtest(k, n).proportion_ci(1 - ALPHA, method="exact")
        assert clopper_pearson(k, n, ALPHA) == pytest.approx((known.low, known.high), abs=1e-9)
    assert clopper_pearson(0, 128, ALPHA)[1] == pytest.approx(1 - (ALPHA / 2) ** (1 / 128))


@pytest.mark.parametrize("name", ["chance", "pointwise"])
def test_false_exits_at_the_limits_of_shares(name):
    limits, runs = SetLimits(), 200
    limit = {"chance": limits.chance_limit, "pointwise": limits.pointwise_limit}[name]
    rng, out = np.random.default_rng(5), 0
    for _ in range(runs):
        process = SafeSets(limits, 0.25, ALPHA)._sets[name].process
        draws = rng.random((30, 64)) < limit
        out += any(process.update(d.astype(float)) >= math.log(1 / ALPHA) for d in draws)
    assert out / runs <= ALPHA + slack(ALPHA, runs)


def harm(*parts: tuple[int, float]) -> np.ndarray:
    """Costs in which ``n`` draws have each value, spread out."""
    values = np.repeat([value for _, value in parts], [n for n, _ in parts])
    return values[np.random.default_rng(0).permutation(len(values))]


def test_dates_of_the_sets():
    """100 draws: one above b; then 30 at .4, above b but under c0; then half of them 1."""
    sets = SafeSets(SetLimits(), cost_limit=0.25, alpha=ALPHA)
    evaluations = [
        harm((100, 0.0)), harm((99, 0.0), (1, 0.3)), harm((70, 0.0), (30, 0.4)),
        harm((50, 0.0), (50, 1.0)),
    ]  # fmt: skip
    rows = [sets.observe(c, {"rounds": t, "labels": 9 * t}) for t, c in enumerate(evaluations)]
    assert [row["safety/pointwise"] for row in rows] == [0.0, 0.01, 0.3, 0.5]
    assert [row["safety/chance"] for row in rows] == [0.0, 0.0, 0.0, 0.5]
    assert [row["safety/cvar"] for row in rows] == pytest.approx([0.0, 0.3 / 25, 0.4, 1.0])
    found = sets.summary()
    assert found["pointwise"]["first_above"] == {"rounds": 1, "labels": 9}
    assert found["pointwise"]["exit_naive"]["rounds"] == 2
    assert found["pointwise"]["exit_confirmed"]["rounds"] == 2
    for name in ("chance", "cvar"):
        assert found[name]["exit_naive"]["rounds"] == found[name]["exit_confirmed"]["rounds"] == 3
        assert "first_above" not in found[name]
    assert found["cvar"]["peak"] == 1.0 and found["chance"]["limit"] == 0.25
    for row in rows:
        for name in found:
            low, high = row[f"safety/{name}_lower"], row[f"safety/{name}_upper"]
            assert 0 <= low <= row[f"safety/{name}"] <= high <= 1
    json.dumps([rows, found, sets.state_dict()], allow_nan=False)


def test_a_resumed_monitor_goes_on_with_its_sets():
    whole, first, second = (CostMonitor(planned=4, sustained=2) for _ in range(3))
    costs = [harm((60, 0.0), (40, m)) for m in (0.1, 0.7, 0.9, 1.0)]
    rows = [whole.observe(t, {"labels": t}, {"harm": c}) for t, c in enumerate(costs)]
    for t in (0, 1):
        first.observe(t, {"labels": t}, {"harm": costs[t]})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.observe(t, {"labels": t}, {"harm": costs[t]}) for t in (2, 3)] == rows[2:]
    assert second.summary() == whole.summary()
    assert whole.summary()["sets"]["chance"]["since"] == 0


def test_a_state_of_an_older_version_begins_its_sets_where_it_goes_on():
    old, new = CostMonitor(planned=4), CostMonitor(planned=4)
    old.observe(0, {"labels": 0}, {"harm": harm((10, 0.0), (90, 1.0))})
    state = old.state_dict()
    del state["sets"]
    for evaluation in state["state"]["evaluations"]:
        del evaluation["safe"], evaluation["when"]
    new.load_state_dict(state)
    new.observe(1, {"labels": 5}, {"harm": harm((10, 0.0), (90, 1.0))})
    summary = new.summary()
    assert summary["sets"]["chance"]["since"] == 1
    assert summary["sets"]["chance"]["exit_naive"]["rounds"] == 1
    assert summary["excess_area"] == pytest.approx(0.65) and set(summary["occupation"]) == {
        "rounds"
    }


@pytest.mark.parametrize(
    "field", ["chance_cost", "chance_limit", "cvar_share", "cvar_limit", "pointwise_limit"]
)
def test_limits_out_of_range_are_named(field):
    for value in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"evaluation\.{field}=.*allowed"):
            SetLimits(**{field: value})
