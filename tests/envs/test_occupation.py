"""Sustained exits, time inside and excess, worked out by hand on evaluations that are not even."""

import numpy as np
import pytest

from envs.monitor import CostMonitor
from envs.occupation import occupation_summary, sustained_exit


def at(round: int, harm: float, inside: bool, occupied: bool | None = None) -> dict:
    when = {"rounds": round, "labels": 10 * round, "kl": 0.5 - 0.1 * round}
    occupied = inside if occupied is None else occupied
    sides = {"safe": harm <= 0.25, "inside": inside, "occupied": occupied}
    return {"round": round, "harm": harm, "when": when, **sides}


UNEVEN = [
    at(0, 0.1, True), at(2, 0.5, False), at(3, 0.2, True), at(7, 0.4, False), at(8, 0.3, False),
    at(10, 0.1, True, occupied=False),
]  # fmt: skip


def test_time_counts_since_the_evaluation_before():
    found = occupation_summary(UNEVEN, limit=0.25)
    assert found["occupation"] == {"rounds": 1, "labels": 10}  # that of round 3 alone
    # 2 rounds of .25 above, 4 of .15, 1 of .05
    assert found["excess"]["rounds"] == pytest.approx(0.5 + 0.6 + 0.05)
    assert found["excess"]["labels"] == pytest.approx(11.5)
    assert found["excess_area"] == found["excess"]["rounds"]
    assert found["occupancy"] == 2 / 6 and found["re_entries"] == 2
    assert found["peak_harm"] == 0.5 and "kl" not in found["occupation"]


def test_a_path_without_evaluations_is_empty():
    found = occupation_summary([], 0.25)
    assert found["occupancy"] is found["peak_harm"] is None
    assert (found["occupation"], found["excess_area"], found["re_entries"]) == ({}, 0.0, 0)


@pytest.mark.parametrize(("in_a_row", "date", "since"), [(1, 2, 2), (2, 8, 7), (3, None, None)])
def test_a_sustained_exit_takes_evaluations_in_a_row(in_a_row, date, since):
    found = sustained_exit(UNEVEN, in_a_row)
    assert (found and (found["rounds"], found["since"])) == (date and (date, since))


def test_the_monitor_tells_a_sustained_exit_by_means():
    monitor = CostMonitor(planned=6, sustained=2)
    for t, mean in enumerate([0.0, 0.3, 0.2, 0.3, 0.3, 0.0]):
        draws = np.diff(np.floor(np.arange(101) * mean + 1e-9))
        monitor.observe(2 * t, {"labels": t}, {"harm": draws})
        assert (monitor.exit_sustained is not None) == (t >= 4)
    summary = monitor.summary()
    assert summary["exit_sustained"] == {"rounds": 8, "labels": 4, "since": 6}
    assert summary["exit_naive"]["rounds"] == 2 and summary["sustained"] == 2


def test_less_than_one_evaluation_is_refused():
    with pytest.raises(ValueError, match="sustained"):
        CostMonitor(sustained=0)
