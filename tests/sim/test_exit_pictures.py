"""Exits by bracket, by clock, by limit, and what they cost: numbers in the pictures are known."""

import numpy as np
import pytest
from matplotlib.text import Text

from sim.analysis import style
from sim.analysis.brackets import plot_brackets
from sim.analysis.exit_times import clock_table, plot_exit_times
from sim.analysis.frontier import frontier_table, plot_frontier
from sim.analysis.limits import exit_shares, limit_table, plot_limits
from sim.analysis.load import Run, named
from tests.sim.test_analysis import drawn_text
from tests.sim.test_time_by_rho import design, made


def edit(run: Run, **fields: object) -> Run:
    return Run(run.path, run.manifest, run.summary | fields, run.rounds)


# Brackets.


def test_runs_outside_from_the_start_have_a_picture():
    """Half of the mass falls at 0, where the curve begins."""
    runs = [edit(made(0.2, 1), bracket=[None, 0]), edit(made(0.2, 11, seed=1), bracket=[4, 8])]
    (panel,) = plot_brackets(runs).child_axes
    boxes = [(box.get_x(), box.get_width(), box.get_height()) for box in panel.patches]
    assert boxes == [(-1, 1, pytest.approx(0.5)), (4, 4, pytest.approx(0.5))]


def test_brackets_are_boxes_beside_the_confirmed_curve():
    """Certified in (4, 8], and never; confirmed at 11 of 20 rounds, and never."""
    runs = [edit(made(0.2, 11), bracket=[4, 8]), made(0.2, None, seed=1), made(0.0)]
    ax = plot_brackets(runs)
    (panel,) = ax.child_axes
    assert panel.get_title(loc="left").endswith("n = 2")
    (box,) = panel.patches
    assert (box.get_x(), box.get_width(), box.get_y(), box.get_height()) == (4, 4, 0.5, 0.5)
    curve = panel.lines[0].get_xydata()
    assert curve.tolist() == [[0, 1], [11, 0.5], [20, 0.5]]
    assert "n = 2 runs in 1 arms" in drawn_text(ax)
    on_labels = plot_brackets(runs, clock="labels").child_axes[0].patches[0]
    assert (on_labels.get_x(), on_labels.get_width()) == (40, 40), "ten labels a round"
    with pytest.raises(ValueError, match="none of 1 has a bracket"):
        plot_brackets([made(0.0)])


# Clocks.


def test_attackers_labels_to_exit():
    runs = [made(0.5, 4), made(0.5, 6, seed=1), made(0.5, None, seed=2), made(0.0, 3)]
    ax = plot_exit_times(runs)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["label_noise ρ=0.5"]
    marks = {line.get_marker(): [] for line in ax.lines}
    for line in ax.lines:
        marks[line.get_marker()] += [float(x) for x in line.get_xdata()]
    # Five malicious labels a round: exits at 20 and 30, one run inside until 100.
    assert sorted(marks["o"]) == [20, 30] and marks[">"] == [100] and marks["None"] == [30, 30]
    assert "n = 3 runs in 1 arms" in drawn_text(ax), "clean runs have no attacker"
    rounds = plot_exit_times(runs, clock="rounds")
    assert len(rounds.get_yticklabels()) == 2


def test_runs_that_left_at_once_are_counted():
    words = drawn_text(plot_exit_times([made(0.5, 4, seed=seed) for seed in range(3)]))
    assert " 3 " in words


def test_medians_on_every_clock():
    runs = [made(0.5, at, seed=seed) for seed, at in enumerate((4, 6, 8, None))] + [made(0.0)]
    (row,) = clock_table(runs).to_dict("records")
    assert row["left"] == "3 of 4"
    assert row["round"].startswith("6 [4, ") and row["labels consumed"].startswith("60 [40, ")
    assert row["malicious labels"].startswith("30 [20, ")
    assert clock_table([made(0.0)]).empty


# Limits.


def with_limits(run: Run, *left: float) -> Run:
    """``run`` with exits confirmed at the limits ``left`` of .1, .25 and .4."""
    known = {
        f"{b:.2f}": {"confirmed": {"rounds": 5} if b in left else None} for b in (0.1, 0.25, 0.4)
    }
    return edit(run, tau_b=known)


def test_exits_by_limit():
    runs = named([with_limits(made(0.2, 5), 0.1, 0.25), with_limits(made(0.2, seed=1), 0.1)])
    assert limit_table(runs).to_dict("records") == [
        {"arm": "label_noise ρ=0.2", "b = 0.1": "2 of 2", "b = 0.25": "1 of 2", "b = 0.4": "0 of 2"}
    ]
    words = drawn_text(plot_limits(runs))
    assert "2/2" in words and "0/2" in words and "Empty" not in words
    assert limit_table([with_limits(made(0.0))]).empty
    with pytest.raises(ValueError, match="none of 1 left a limit"):
        plot_limits([made(0.0)])


def test_limits_are_unknown_of_a_run_that_another_constraint_stopped():
    run = with_limits(made(0.2, 5, stopped=True), 0.1)
    assert exit_shares([run])["limit"].tolist() == [0.1, 0.25]
    other = edit(run, exit_constraint="over_refusal")
    assert exit_shares([other])["limit"].tolist() == [0.1]


def test_higher_limits_are_unknown_of_a_run_that_was_stopped():
    stopped = with_limits(made(0.2, 5, stopped=True), 0.1, 0.25)
    shares = exit_shares([stopped, with_limits(made(0.2, seed=1))])
    assert shares["limit"].tolist() == [0.1, 0.25] and shares["left"].tolist() == [1, 1]
    assert "Empty: unknown" in drawn_text(plot_limits([stopped]))
    later = exit_shares([stopped, with_limits(made(0.5, seed=1), 0.4)])
    assert later["limit"].tolist() == [0.1, 0.25, 0.1, 0.25, 0.4]


# What safety costs.


def cost() -> list[Run]:
    """Four defences: fast and able, slow and idle, and two between of which one is beaten."""
    runs = [made(0.0, help_gain=0.4), made(0.8, 4), made(0.2, 8)]
    for name, at, end in (("freeze", None, 0.5), ("lisa", 10, 0.8), ("tar", 8, 0.7)):
        runs.append(edit(made(0.8, at, (name,)), help_end=end, help_gain=end - 0.5))
    return runs


def test_the_frontier_by_hand():
    table = frontier_table(cost()).set_index("defence")
    assert set(table["rho"]) == {0.8}, "the attack with most defences"
    assert table["learned"].to_dict() == pytest.approx(
        {"no defence": 1.0, "freeze": 0.0, "lisa": 0.75, "tar": 0.5}
    )
    assert table["value"].to_dict() == {"no defence": 0.2, "freeze": 1, "lisa": 0.5, "tar": 0.4}
    assert table.index[table["efficient"]].tolist() == ["no defence", "freeze", "lisa"]
    alone = frontier_table([run for run in cost() if run.rho])
    assert set(alone["measure"]) == {"gain"}, "without clean runs, help gained"
    assert frontier_table([made(0.8, 4), made(0.0)]).empty


def test_the_frontier_names_its_points():
    ax = plot_frontier(cost())
    words = drawn_text(ax)
    assert "1  no defence" in words and "4  tar" in words and "means over n = 1 runs" in words
    assert ax.child_axes[0].get_title(loc="left") == "grpo: label_noise ρ = 0.8"
    assert ax.child_axes[0].get_ylabel() == "learning retained"
    lost = [
        edit(run, help_end=-3.0) if run.config["defences"] == ["tar"] else run for run in cost()
    ]
    assert "-0.2 or less" in drawn_text(plot_frontier(lost))


def test_labels_of_points_are_pushed_apart():
    ax = style.axes(None, 4, 3)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    places = np.array([[1.0, 0.9]] * 12 + [[0.5, 0.5], [0.505, 0.5]])
    labels = [str(k) for k in range(1, 15)]
    style.label_points(ax, places, labels, ["k"] * 14, (3.1, 2.3))
    figure = style.figure_of(ax)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without their lines
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            deep = min(box.x1, other.x1) - max(box.x0, other.x0)
            high = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert deep < 2 or high < 2, "two labels cover each other"


# The design that the pictures are for.


def test_clean_arms_have_no_part_in_what_needs_an_attack():
    assert set(frontier_table(design())["rho"]) == {0.8}
