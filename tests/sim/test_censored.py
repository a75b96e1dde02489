"""Brackets, competing ends and dose-response, against hand-made numbers and a known truth."""

import warnings

import numpy as np
import pytest

from sim.analysis.censored import (
    BEFORE,
    CAUSES,
    cause_table,
    cumulative_incidence,
    dose_response,
    npmle,
)
from sim.analysis.load import load_runs
from sim.analysis.survival import kaplan_meier
from tests.sim.test_analysis import write_run

INF = np.inf


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def test_brackets_that_only_touch_share_no_mass():
    """(0, 5] and (5, 10] are apart, as lifelines' closed intervals are not."""
    curve = npmle(np.array([0, 5, 5, 10]), np.array([5, 10, 10, INF]))
    assert curve[["left", "right"]].to_numpy().tolist() == [[0, 5], [5, 10], [10, INF]]
    assert curve["mass"].tolist() == pytest.approx([0.25, 0.5, 0.25])
    assert curve["survival"].tolist() == pytest.approx([0.75, 0.25, 0])


@pytest.mark.parametrize(
    ("left", "right", "intervals", "mass"),
    [
        # Likelihood p1 (p1 + p2)(p1 + p2)... is greatest where all brackets of a kind meet.
        ([0, 0, 3, 4], [4, 6, 9, INF], [[3, 4], [4, 6]], [0.5, 0.5]),
        ([0, 0], [5, 5], [[0, 5]], [1]),
        ([3, 5], [INF, INF], [[5, INF]], [1]),
        ([np.nan, 2], [2, 4], [[0, 2], [2, 4]], [0.5, 0.5]),
        # Two exits by 2, one run in (0, 4], one never seen to exit: p1 = 2 / (2 + 1).
        ([0, 0, 0, 2], [2, 2, 4, INF], [[0, 2], [2, 4]], [2 / 3, 1 / 3]),
    ],
)
def test_turnbull_by_hand(left, right, intervals, mass):
    curve = npmle(np.array(left, float), np.array(right, float))
    assert curve[["left", "right"]].to_numpy().tolist() == intervals
    assert curve["mass"].tolist() == pytest.approx(mass, abs=1e-3)


def test_runs_that_begin_outside_have_left_by_zero():
    """Two of four; a dose cannot have made them leave."""
    left, right = np.array([np.nan, np.nan, 4, 8]), np.array([0, 0, 6, INF])
    curve = npmle(left, right)
    assert curve[["left", "right"]].to_numpy().tolist() == [[BEFORE, 0], [4, 6], [8, INF]]
    assert curve["mass"].tolist() == pytest.approx([0.5, 0.25, 0.25])
    rng = np.random.default_rng(0)
    dose = np.repeat([0.0, 1.0], 20)
    time = np.ceil(rng.weibull(2, 40) * np.exp(3 - dose))
    with_them = [np.append(values, [end, end]) for values, end in ((dose, 1), (time - 1, np.nan))]
    without, with_both = (
        dose_response(dose, time - 1, time),
        dose_response(*with_them, np.append(time, [0, 0])),
    )
    assert without == with_both and without.n == 40


def test_npmle_of_narrow_brackets_is_kaplan_meier():
    rng = np.random.default_rng(0)
    time = np.sort(rng.permutation(np.arange(1, 41))[:25]).astype(float)
    event = rng.random(25) < 0.7
    event[-1] = True
    curve = npmle(np.where(event, time - 0.5, time), np.where(event, time, INF))
    known = kaplan_meier(time, event).set_index("time")["survival"]
    assert curve["survival"].to_numpy() == pytest.approx(known[curve["right"]].to_numpy(), abs=1e-3)


def test_npmle_is_the_maximum():
    """Gentleman & Geyer (1994): no interval deserves more mass, sum_i 1[j in i] / P_i <= n."""
    rng = np.random.default_rng(1)
    n = 60
    looks = np.concatenate([np.zeros((n, 1)), np.sort(rng.random((n, 6)) * 100, 1)], 1)
    time = rng.weibull(2, n) * 50
    passed = (looks < time[:, None]).sum(1)
    left = looks[np.arange(n), passed - 1]
    right = np.where(passed < 7, looks[np.arange(n), np.minimum(passed, 6)], INF)
    curve = npmle(left, right)
    ends = np.unique(np.r_[left, right])
    inside = (left[:, None] <= ends[:-1]) & (ends[1:] <= right[:, None])  # (runs, elementary)
    held = (left[:, None] <= curve["left"].to_numpy()) & (
        curve["right"].to_numpy() <= right[:, None]
    )
    chance = held @ curve["mass"].to_numpy()
    assert curve["mass"].sum() == pytest.approx(1)
    assert (inside / chance[:, None]).sum(0).max() <= n * 1.02


def test_incidence_by_hand():
    """Six runs: exit at 1; exit and collapse at 2; one lost at 3; exit and a censored one at 4."""
    time = np.array([1, 2, 2, 3, 4, 4])
    cause = ["exit", "exit", "collapse", "none", "exit", "none"]
    table = cumulative_incidence(time, cause).set_index(["cause", "time"])
    expected = {1: 1 / 6, 2: 2 / 6, 3: 2 / 6, 4: 2 / 6 + 1 / 2 * 1 / 2}
    for t, value in expected.items():
        assert table.loc[("exit", t), "incidence"] == pytest.approx(value)
    assert table.loc[("collapse", 4), "incidence"] == pytest.approx(1 / 6)
    assert table.loc["diverged", "incidence"].tolist() == [0] * 5
    first = table.loc[("exit", 1)]  # one of six: variance p (1 - p) / n, log-log
    spread = np.sqrt(1 / 6 * 5 / 6 / 6) / (1 / 6 * abs(np.log(1 / 6)))
    band = sorted((1 / 6) ** np.exp(s * 1.96 * spread) for s in (-1, 1))
    assert [first["lower"], first["upper"]] == pytest.approx(band, abs=1e-3)


def test_incidences_and_survival_add_up_and_censoring_overstates():
    rng = np.random.default_rng(2)
    time = rng.integers(1, 20, 60).astype(float)
    cause = rng.choice(["none", *CAUSES], 60)
    table = cumulative_incidence(time, cause)
    ends = table.pivot(index="time", columns="cause", values="incidence")
    km = kaplan_meier(time, cause != "none").set_index("time")["survival"]
    assert (ends.sum(1) + km.loc[ends.index]).to_numpy() == pytest.approx(np.ones(len(ends)))
    alone = 1 - kaplan_meier(time, cause == "exit")["survival"].iloc[-1]
    assert ends["exit"].iloc[-1] < alone - 0.1
    assert np.isnan(cumulative_incidence(time[:3], cause[:3])["lower"]).all(), "too few runs"
    again = cumulative_incidence(time, cause)
    assert again.equals(table), "ties are not broken by chance"


def simulated(runs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log T = 5 - 3 rho + W / 2, seen every 5 rounds until round 120."""
    rng = np.random.default_rng(seed)
    rho = np.repeat([0.0, 0.1, 0.2, 0.4, 0.6], runs)
    time = np.exp(5 - 3 * rho) * rng.weibull(2, rho.size)
    left = np.minimum(np.floor(time / 5) * 5, 120)
    return rho, left, np.where(left < 120, left + 5, INF)


def test_dose_response_recovers_the_truth():
    found = dose_response(*simulated(60, 3))
    assert found.slope == pytest.approx(-3, abs=3 * found.error) and found.error < 0.25
    assert found.shape == pytest.approx(2, rel=0.2)
    assert found.factor == pytest.approx(np.exp(found.slope / 10))
    assert found.low < np.exp(-0.3) < found.high and found.high < 0.8
    assert found.p_value < 1e-6
    assert (found.n, found.exits) == (300, int(np.isfinite(simulated(60, 3)[2]).sum()))


def test_dose_response_intervals_cover():
    fits = [dose_response(*simulated(12, seed)) for seed in range(30)]
    covered = [fit.low <= np.exp(-0.3) <= fit.high for fit in fits]
    assert np.mean(covered) >= 0.83  # 95 % of 30, less three errors
    spread = np.std([fit.slope for fit in fits])
    assert np.mean([fit.error for fit in fits]) == pytest.approx(spread, rel=0.35)


def test_no_p_value_below_four_seeds_a_dose():
    few = dose_response(*simulated(3, 4))
    assert few.p_value is few.low is few.high is None and few.error > 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: npmle(np.array([]), np.array([])), "0 runs"),
        (lambda: npmle(np.array([3.0]), np.array([3.0])), "left < right"),
        (lambda: npmle(np.array([3.0]), np.array([np.nan])), "left < right"),
        (lambda: cumulative_incidence(np.array([1.0]), ["bored"]), "bored"),
        (lambda: cumulative_incidence(np.array([1.0]), []), "1 times, 0 causes"),
        (lambda: dose_response([0.1, 0.1], [0, 0], [5, 5]), "1 doses"),
        (lambda: dose_response([0.1, 0.2], [5, 5], [INF, INF]), "0 exits"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_causes_of_runs(tmp_path):
    """Exits, runs that stay, and the first of two ends, read from run directories."""
    import json

    paths = [write_run(tmp_path / f"run{i}", seed=i, crossing=[8.0, INF][i > 1]) for i in range(4)]
    edits = {
        1: {"collapsed_at": {"rounds": 2, "labels": 128}},
        3: {"collapsed_at": {"rounds": 7, "labels": 448}, "outcome": "collapsed"},
    }
    for i, edit in edits.items():
        file = paths[i] / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    table = cause_table(load_runs(paths), "labels")
    exited = json.loads((paths[0] / "summary.json").read_text())["exit_confirmed"]["labels"]
    assert table["cause"].tolist() == ["exit", "collapse", "none", "collapse"]
    assert table["time"].tolist() == [exited, 128, 20 * 64, 448]
    file = paths[2] / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"outcome": "diverged"}))
    assert cause_table(load_runs(paths))["cause"].tolist()[2] == "diverged"
    file = paths[0] / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"outcome": "diverged"}))
    both = cause_table(load_runs(paths), "labels")
    assert (both["cause"][0], both["time"][0]) == ("exit", exited), "it diverged after its exit"


@pytest.mark.parametrize(
    ("dose", "left", "right"),
    [
        ([0] * 4 + [1] * 4, [0] * 8, [5] * 8),
        ([0] * 4 + [1] * 4, [10] * 4 + [5] * 4, [15] * 4 + [10] * 4),
        ([0, 0, 1, 1], [0, 0, 0, 5], [5, np.inf, 5, 10]),
    ],
)
def test_a_fit_without_a_maximum_is_no_result(dose, left, right):
    with pytest.raises(ValueError, match="dose-response"):
        dose_response(np.array(dose), np.array(left, float), np.array(right, float))


def test_times_and_brackets_that_are_none_are_refused():
    with pytest.raises(ValueError, match="time"):
        cumulative_incidence(np.array([1.0, np.nan]), ["exit", "none"])
    with pytest.raises(ValueError, match="brackets"):
        npmle(np.array([np.inf]), np.array([np.inf]))
