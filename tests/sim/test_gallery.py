"""What a report may show of several runs: nothing that they do not support, and it says so."""

import pytest

from sim.analysis.gallery import PICTURES, SHEETS
from sim.analysis.load import load_runs
from tests.sim.test_analysis import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A clean run, one that left, one that has not ended."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "clean", 0.0, 0, float("inf"), rounds=8)
    write_run(root / "left", 0.25, 0, 3.0, rounds=8)
    (write_run(root / "goes-on", 0.5, 0, 3.0, rounds=8) / "summary.json").unlink()
    return load_runs([root])


def test_unfinished_runs_are_left_out_where_their_end_matters(runs):
    drawn = {picture.name for picture in PICTURES if picture.supports(runs)}
    assert {"arms", "survival"} <= drawn and "incidence" not in drawn
    for picture in PICTURES:
        if picture.supports(runs):
            assert picture.draw(runs).get_figure() is not None
    made = {sheet.name: sheet.make(runs) for sheet in SHEETS}
    assert [len(made[name]) for name in ("arms", "runs", "truth", "branches")] == [2, 3, 0, 0]


def test_of_runs_that_have_not_ended_only_rounds_are_shown(runs):
    begun = [run for run in runs if not run.summary]
    shown = [picture.name for picture in PICTURES if picture.supports(begun)]
    assert shown == ["arms", "hackability"], "reward and harm are known of every round"
    assert [sheet.name for sheet in SHEETS if len(sheet.make(begun))] == ["hackability", "runs"]


def test_names_are_files_and_differ():
    for group in (PICTURES, SHEETS):
        names = [entry.name for entry in group]
        assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)
