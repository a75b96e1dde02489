"""Feasible rewards in tables: the proposition where it holds, and both ways in which it fails."""

from dataclasses import replace

import numpy as np
import pytest

from envs.proposition import CASES, TabularCMDP, answers, best, detour, judge, shifted


def random_process(seed: int, low: float, ends: bool = True) -> TabularCMDP:
    """Five states, four actions; rewards of safe actions in [low, low + 1], of unsafe ones more."""
    rng = np.random.default_rng(seed)
    cost = rng.random((5, 4))
    cost[:, 0] = 0.0
    unsafe = cost > 0.5
    reward = low + rng.random((5, 4)) + 2 * unsafe
    moves = rng.dirichlet(np.ones(5), (5, 4))
    moves = np.where(unsafe[..., None] & ends, 0.0, moves)
    return TabularCMDP(reward, cost, moves, np.full(5, 0.2))


def test_a_two_state_process_solved_by_hand():
    """Waiting earns 1 and stays with probability 1/2; leaving earns 1.5 and ends the episode."""
    process = TabularCMDP(
        reward=np.array([[1.0, 1.5]]), cost=np.zeros((1, 2)),
        next_state=np.array([[[0.5], [0.0]]]), start=np.ones(1), discount=0.8,
    )  # fmt: skip
    value, occupancy = best(process)
    assert value == pytest.approx(1 / (1 - 0.4))
    assert occupancy[0] == pytest.approx([1 / 0.6, 0.0], abs=1e-6)
    assert best(process, among=np.array([[False, True]]))[0] == pytest.approx(1.5)


def test_programs_agree_with_value_iteration():
    process = random_process(0, -0.5)
    values = np.zeros(5)
    for _ in range(400):
        values = (process.reward + process.discount * process.next_state @ values).max(1)
    assert best(process)[0] == pytest.approx(process.start @ values, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_where_safe_rewards_are_positive_and_unsafe_actions_end(seed):
    found = judge(random_process(seed, low=0.1))
    assert found.holds and found.value == pytest.approx(found.safe_value, abs=1e-6)
    assert found.unsafe_most < 1e-4


def test_the_three_cases():
    assert judge(CASES["holds"]()).holds
    assert best(CASES["holds"]().feasible())[1].argmax() == 1  # gibberish: harmless hacking
    below = judge(CASES["all below zero"]())
    assert not below.holds and below.unsafe_least == pytest.approx(1.0, abs=1e-4)
    assert (below.value, below.safe_value) == pytest.approx((0.0, -1.6), abs=1e-6)
    around = judge(CASES["a detour"]())
    assert not around.holds and around.value == pytest.approx(0.9, abs=1e-6)


def test_a_constant_moves_the_feasible_optimum_and_no_other():
    high, low = CASES["holds"](), CASES["all below zero"]()
    np.testing.assert_allclose(high.reward - low.reward, 2.0)
    assert best(high)[1].argmax() == best(low)[1].argmax() == 3
    assert best(high.feasible())[1].argmax() != best(low.feasible())[1].argmax()


def test_worthless_on_both_sides_leaves_a_safe_policy_optimal_but_not_alone():
    found = judge(answers(refusal=0.0, gibberish=-1.0, help=-1.0, harm=1.0))
    assert found.holds and found.unsafe_most == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_low_floor_needs_neither_condition(seed):
    process = random_process(seed, low=-2.0, ends=False)
    assert not judge(process).holds
    found = judge(process, shifted(process))
    assert found.holds and found.unsafe_most < 1e-4
    assert judge(detour(), shifted(detour())).holds


def test_bad_tables_are_named():
    good = answers(0.1, 0.2, 0.3, 1.0)
    for field, value in (
        ("cost", np.ones((1, 4))),
        ("cost", np.ones((2, 4))),
        ("next_state", np.full((1, 4, 1), 1.5)),
        ("start", np.ones(2)),
        ("discount", 1.0),
    ):
        with pytest.raises(ValueError, match=field):
            replace(good, **{field: value})
