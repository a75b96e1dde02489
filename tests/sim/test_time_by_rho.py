"""Time inside by rho and defence, from runs whose exits are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sim.analysis.cells import CLEAN, cell_table, cells, lines
from sim.analysis.load import Run
from sim.analysis.time_by_rho import plot_time_by_rho
from tests.sim.test_analysis import drawn_text

ROUNDS = 20


def made(
    rho: float = 0.2,
    exit_at: int | None = None,
    defences: tuple[str, ...] = (),
    seed: int = 0,
    world: int = 3,
    learner: str = "grpo",
    rounds: int = ROUNDS,
    stopped: bool = False,
    **attack: Any,
) -> Run:
    """A run of ten labels a round; every other of an attacker's labels is a flip."""
    config = {
        "seed": seed,
        "rounds": rounds,
        "world": {"seed": world},
        "learner": {"name": learner, "lr": 0.1},
        "attack": {"name": "label_noise", "rho": rho} | attack,
        "defences": list(defences),
        "evaluation": {"cost_limit": 0.25, "alpha": 0.05, "limits": {}, "n_help": 128},
    }
    last = exit_at if stopped and exit_at else rounds
    at = np.arange(last + 1)
    columns: dict[str, Any] = {"round": at, "labels": np.where(at > 0, 10.0, np.nan)}
    columns |= {f"clock/{name}": at * k for name, k in (("labels", 10), ("optimizer_steps", 4))}
    columns |= {"clock/malicious_labels": 10 * rho * at, "clock/flips": 5 * rho * at}
    later = np.where(at > 10, 2.0, 1.0)  # from the eleventh round twice as many flips
    columns |= {"feedback/rho_labels": rho + 0 * at, "feedback/rho_flips": rho / 2 * later}
    columns["safety/harm"] = np.where(at >= (exit_at or np.inf), 0.6, 0.1)
    when = None if exit_at is None else {"rounds": exit_at, "labels": 10 * exit_at}
    if when:
        when |= {"optimizer_steps": 4 * exit_at, "malicious_labels": 10 * rho * exit_at}
        when |= {"flips": 5 * rho * exit_at}
    summary = {
        "outcome": "safe" if exit_at is None else "exited",
        "exit_confirmed": when,
        "bracket": None if exit_at is None else [exit_at - 2, exit_at],
        "last_certified_safe": last if exit_at is None else exit_at - 2,
        "occupancy": 1.0 if exit_at is None else exit_at / (last + 1),
        "collapsed_at": None,
        "diverged_at": None,
        "help_start": 0.5,
        "help_end": 0.9,
        "help_gain": 0.4,
        "harm_end": 0.1 if exit_at is None else 0.6,
        "limits": {"harm": 0.25},
    }
    path = Path(f"{learner}-{rho}-{'+'.join(defences)}-{seed}-{world}-{attack}-{rounds}")
    return Run(path, {"config": config}, summary, pd.DataFrame(columns))


def design() -> list[Run]:
    """Two learners, three values of rho, two defences, four seeds; time falls with rho."""
    runs = []
    for learner in ("grpo", "dpo"):
        for seed in range(4):
            pairing = {"seed": seed, "world": 3 + seed % 2, "learner": learner}
            for defence in ((), ("lisa",)):
                runs.append(made(0.0, None, defence, **pairing))
            runs += [made(0.2, 10 + 2 * seed, (), **pairing), made(0.8, 4, (), **pairing)]
            runs += [made(0.2, None, ("lisa",), **pairing), made(0.8, 8, ("lisa",), **pairing)]
    return runs


def test_cells_by_hand():
    table = cells(design()).set_index(["learner", "defence", "attack", "rho"])
    bare = table.loc[("grpo", "no defence", "label_noise", 0.2)]
    # Exits at 10, 12, 14, 16 of 20: mean 13. Worlds have means 12 and 14.
    assert (bare["n"], bare["worlds"], bare["left"], bare["horizon"]) == (4, 2, 4, 20)
    assert bare["value"] == pytest.approx(13 / 20)
    assert 10 / 20 <= bare["low"] < 13 / 20 < bare["high"] <= 16 / 20
    assert table.loc[("dpo", "lisa", CLEAN, 0.0), "value"] == 1.0
    certain = table.loc[("dpo", "lisa", "label_noise", 0.8)]
    assert certain["value"] == pytest.approx(0.4)
    assert certain[["low", "high"]].isna().all(), "they all left at once"


def test_shares_are_those_up_to_the_exit():
    """Exits at 10 see a share of flips of .1; one that goes on to 20 sees .1 and then .2."""
    left, stayed = cells([made(0.2, 10), made(0.2, None, ("lisa",))]).to_dict("records")
    assert left["feedback/rho_flips"] == pytest.approx(0.1)
    assert stayed["feedback/rho_flips"] == pytest.approx(0.15)
    assert left["feedback/rho_labels"] == pytest.approx(0.2) and left["asked"] == 0.2
    assert np.isnan(left["feedback/rho_post"]), "not recorded"


def test_occupancy_is_unknown_where_a_run_was_stopped_at_its_exit():
    seen = [made(0.2, 10, seed=seed) for seed in range(2)]
    (cell,) = cells(seen, "occupancy").to_dict("records")
    assert cell["value"] == pytest.approx(10 / 21)
    stopped = [seen[0], made(0.2, 10, seed=1, stopped=True)]
    (cell,) = cells(stopped, "occupancy").to_dict("records")
    assert np.isnan(cell["value"]) and cell["left"] == 2
    (cell,) = cells(stopped).to_dict("records")
    assert cell["value"] == pytest.approx(10 / 20), "the time until it is known"


def test_a_clean_run_of_another_length_is_the_same_defences_origin():
    runs = [made(0.0, None, (), rounds=40), made(0.0, None, ("lisa",), rounds=40)]
    runs += [made(rho, 8, d) for rho in (0.8, 0.2) for d in ((), ("lisa",))]
    later = {"name": "always_flip", "schedule": "sleeper"}
    runs += [made(0.5, 6, (), **later, start=start) for start in (2, 5)]
    found = lines(cells(runs))
    assert found["lisa", "label_noise"]["rho"].tolist() == [0, 0.2, 0.8]
    assert set(cells(runs)["horizon"]) == {20}
    late = found["no defence", "always_flip attack.start=5"]
    assert late["rho"].tolist() == [0, 0.5]


def test_the_cells_as_a_table():
    table = cell_table(design()).set_index(["learner", "defence", "ρ"])
    row = table.loc[("grpo", "no defence", 0.2)]
    assert (row["runs"], row["exits"], row["rounds"]) == (4, 4, 20)
    assert row["time inside"] == pytest.approx(0.65)
    assert row["share of votes flipped"] > 0 and "share of training targets wrong" not in table
    assert cell_table([made(0.0)]).empty


def test_the_picture_has_a_panel_a_learner_and_a_line_a_defence():
    runs = design()
    ax = plot_time_by_rho(runs)
    assert [panel.get_title(loc="left") for panel in ax.child_axes] == ["dpo", "grpo"]
    bare = ax.child_axes[1].lines[0]
    np.testing.assert_allclose(bare.get_ydata(), [1, 13 / 20, 4 / 20])
    np.testing.assert_allclose(bare.get_xdata(), np.sqrt([0, 0.2, 0.8]), atol=0.02)
    words = drawn_text(ax)
    assert "n = 4 runs a point, 2 worlds" in words and "as a share of 20 rounds" in words
    assert "none of 4 runs left, at most 53 % of such" in words  # 1 - .05 ** (1/4)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["no defence", "lisa"]
    going = Run(Path("on"), made(0.2, seed=9).manifest, {}, runs[0].rounds)
    assert "1 runs have not ended" in drawn_text(plot_time_by_rho([*runs, going]))


def test_the_share_on_the_axis_can_be_chosen():
    panel = plot_time_by_rho(design(), x="feedback/rho_flips").child_axes[1]
    np.testing.assert_allclose(panel.lines[0].get_xdata()[-1], np.sqrt(0.4), atol=0.02)
    assert panel.get_xlabel() == "ρ: share of votes flipped"
    with pytest.raises(ValueError, match="x='ducks'; allowed: asked, feedback/rho_annotators"):
        plot_time_by_rho(design(), x="ducks")
    with pytest.raises(ValueError, match="attacked at two values of rho"):
        plot_time_by_rho([made(0.2, 5), made(0.0)])


def test_runs_that_are_all_alike_have_no_interval():
    alike = cells([made(0.2, seed=seed) for seed in range(4)])
    assert alike["value"].tolist() == [1] and alike[["low", "high"]].isna().all(None)
    assert cells([made(0.2, 4 + seed, seed=seed) for seed in range(4)])["low"].notna().all()
    left = cells([made(0.2, 7, seed=seed) for seed in range(9)])  # a mean that rounding moves
    assert left["left"].tolist() == [9] and left[["low", "high"]].isna().all(None)


def test_what_a_point_at_the_top_means():
    """The caption speaks of the fewest runs, and of runs that were out by the last round."""
    many = [made(0.2, seed=seed) for seed in range(9)] + [made(0.8, 5, seed=s) for s in range(9)]
    assert "none of 9 runs left, at most 28 %" in drawn_text(plot_time_by_rho(many))
    fewer = [*many, *(made(0.4, seed=seed) for seed in range(4))]
    assert "none of 4 runs left, at most 53 %" in drawn_text(plot_time_by_rho(fewer))
    thin = [*many, made(0.4)]
    assert "none of" not in drawn_text(plot_time_by_rho(thin)), "of one run nothing is said"
    assert "100 %: out" not in drawn_text(plot_time_by_rho(many))
    late = [*many, *(made(0.4, 20, seed=seed) for seed in range(4))]
    assert "One point at 100 %: out by the last round." in drawn_text(plot_time_by_rho(late))
