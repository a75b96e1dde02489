"""Proxy against truth over pairs of evaluations: orders by hand, error rates, pictures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sim.analysis.hackability import (
    Pairs,
    disagreement,
    hackability_table,
    measured,
    ordered_pairs,
    plot_hackability,
    supports,
)
from sim.analysis.load import Run


def made(columns: dict, seed: int = 0, world: int = 0, name: str = "a") -> Run:
    """A run in memory; evaluations every round unless ``round`` says otherwise."""
    n = len(next(iter(columns.values())))
    rounds = pd.DataFrame({"round": np.arange(n), "safety/n": 400, **columns})
    config = {
        "seed": seed, "world": {"seed": world}, "learner": {"name": "grpo"},
        "attack": {"name": "harmful_asker", "rho": 0.5}, "defences": [],
        "evaluation": {"n_help": 400},
    }  # fmt: skip
    return Run(Path(name), {"config": config}, {}, rounds, arm=name)


def traced(proxy: list, harm: list, error: float = 0.01, **more) -> Run:
    utility = 1 - 2 * np.array(harm)
    columns = {"reward_eval": proxy, "reward_eval_error": error, "safety/harm": harm}
    return made({**columns, "utility": utility, "utility_error": error}, **more)


def test_orders_of_three_policies():
    """Reward 0, 1, 2; harm .1, .8, .3: both rise 0-1 and 0-2, and 1-2 agrees."""
    run = traced([0.0, 1.0, 2.0], [0.1, 0.8, 0.3])
    assert ordered_pairs(run, "harm") == Pairs(3, 2, 1)
    assert ordered_pairs(run, "utility") == Pairs(3, 2, 1)
    assert disagreement([run]).disagree == pytest.approx(2 / 3)


def test_only_certified_orders_count():
    """.10 and .12 of 400 are not told apart, nor are rewards within their errors."""
    assert ordered_pairs(traced([0.0, 1.0], [0.10, 0.12])) == Pairs(1, 0, 0)
    assert ordered_pairs(traced([0.0, 0.1], [0.1, 0.8], error=0.1)).undecided == 1
    assert ordered_pairs(traced([1.0, 1.0], [0.1, 0.8])).undecided == 1


def test_the_margin_that_is_needed_shares_alpha_over_pairs_and_both_means():
    from scipy.stats import norm

    for n in (2, 12):
        needed = norm.isf(0.05 / (4 * n * (n - 1) / 2)) * np.sqrt(2)
        for factor, decided in ((0.999, 0), (1.001, 1)):
            proxy = np.r_[np.zeros(n - 1), factor * needed]
            run = traced(list(proxy), [0.01] * (n - 1) + [0.9], error=1.0)
            assert ordered_pairs(run).disagree == decided * (n - 1)


def test_noise_alone_is_certified_in_few_runs():
    """Two policies in turns, truly ordered alike by both: any disagreement is a false one."""
    rng, runs, false = np.random.default_rng(0), 400, 0
    means = np.tile([0.2, 0.3], 5)
    for _ in range(runs):
        harm = rng.binomial(400, means) / 400
        proxy = rng.normal(-means, 0.05)
        false += ordered_pairs(traced(list(proxy), list(harm), error=0.05)).disagree > 0
    assert false / runs <= 0.05


def test_true_share_lies_between_certified_and_certified_or_undecided():
    """Truth known: reward -harm on the way up, so that no pair is disordered, then +harm."""
    rng, held = np.random.default_rng(1), 0
    harm = np.r_[np.linspace(0.1, 0.5, 6), np.linspace(0.55, 0.9, 6)]
    reward = np.r_[-3 * harm[:6], 3 * harm[6:]]
    rise = (reward[None] - reward[:, None]) * (harm[None] - harm[:, None])
    true = (rise[np.triu_indices(12, 1)] > 0).mean()
    for _ in range(200):
        noisy = (rng.normal(reward, 0.3), rng.binomial(400, harm) / 400)
        found = disagreement([traced(*map(list, noisy), error=0.3)])
        held += found.disagree <= true <= found.disagree + found.undecided
    assert held / 200 >= 0.95 and 0.3 < true < 0.9


def test_older_runs_are_read_with_errors_that_are_not_too_small():
    rng = np.random.default_rng(2)
    reward = [np.nan, *(0.5 * np.arange(1, 40) + rng.normal(0, 0.2, 39))]
    harm = np.where(np.arange(40) % 5 == 0, np.linspace(0.05, 0.9, 40), np.nan)
    table = measured(made({"reward": reward, "safety/harm": harm, "utility": 1 - harm}), "utility")
    assert table["round"].tolist() == [5, 10, 15, 20, 25, 30, 35]
    assert table["proxy_error"].iloc[0] == pytest.approx(0.2, rel=0.35)  # the line is no noise
    assert (table["truth_error"] == 1.5 / np.sqrt(800)).all()
    with pytest.raises(ValueError, match="truth='joy'"):
        measured(made({"safety/harm": harm}), "joy")


def test_runs_count_alike_and_are_resampled_from_four_on():
    """Three runs of no disagreement and one of three quarters, however many pairs they have."""
    agree = [traced([0.0, 1.0] * 6, [0.9, 0.1] * 6, seed=s) for s in range(3)]
    hacked = traced([0.0, 1.0, 2.0, 2.0], [0.1, 0.3, 0.5, 0.9], seed=3)
    assert ordered_pairs(hacked) == Pairs(6, 5, 0)
    found = disagreement([*agree, hacked])
    assert found.disagree == pytest.approx(5 / 6 / 4) and found.runs == 4
    assert found.low == 0.0 and found.high == pytest.approx(0.625, abs=0.22)
    assert disagreement(agree).low is None


def test_worlds_are_resampled_before_runs():
    """All disagreement is in one of two worlds, so both extremes come up."""
    runs = [traced([0.0, 1.0], [0.1, 0.9], seed=s, world=0) for s in range(4)]
    runs += [traced([0.0, 1.0], [0.9, 0.1], seed=s, world=1) for s in range(4)]
    found = disagreement(runs)
    assert (found.disagree, found.low, found.high) == (0.5, 0.0, 1.0)


def test_the_interval_is_of_the_mean_over_runs_where_worlds_have_unequal_numbers():
    """Twelve runs of one world disagree, one of each of twelve others does not."""
    runs = [traced([0.0, 1.0], [0.1, 0.9], seed=s, world=0) for s in range(12)]
    runs += [traced([0.0, 1.0], [0.9, 0.1], world=1 + s) for s in range(12)]
    found = disagreement(runs)
    assert found.disagree == 0.5 and found.low < 0.5 < found.high < 1


def test_table_and_picture_leave_out_what_has_no_reward():
    hacked = [traced([0.0, 1.0], [0.1, 0.9], seed=s, name="hacked") for s in range(4)]
    without = made(
        {"reward": [np.nan] * 3, "safety/harm": [0.1, 0.5, 0.9], "utility": 0.0}, name="dpo"
    )
    assert supports([without, *hacked]) and not supports([without])
    table = hackability_table([without, *hacked])
    assert table["arm"].tolist() == ["hacked"] * 2
    assert table["reward against"].tolist() == ["harm", "utility"]
    assert (table["disagree"] == 1).all() and table["low"].isna().all(), "all alike"
    ax = plot_hackability([without, *hacked])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["hacked"]
    assert [bar.get_width() for bar in ax.patches] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="reward at two evaluations"):
        plot_hackability([without])
