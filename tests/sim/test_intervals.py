"""Means over worlds and seeds."""

from sim.analysis.intervals import nested_mean


def test_whole_worlds_are_drawn_and_count_alike() -> None:
    assert nested_mean([[1.0, 1.0], [3.0]]) == (2.0, 1.0, 3.0)
