"""Branches in tables and pictures: a fork is an arm of its own, and begins where it left."""

import json
from pathlib import Path

import pandas as pd
import pytest

from sim.analysis.arms import plot_arms
from sim.analysis.headline import answer
from sim.analysis.load import load_run, load_runs
from sim.analysis.plots import plot_cost_trace
from sim.analysis.report import write_report
from sim.analysis.tables import branch_table, run_table
from tests.sim.test_analysis import drawn_text, write_run
from tests.sim.test_report_page import block


def branch(parent: Path, path: Path, at: int, changed: dict, of: dict | None = None) -> Path:
    """A run directory that says it left ``parent`` after round ``at``; same config as written."""
    fork = {"parent": str(parent.resolve()), "at": at, "changed": changed, "of": of}
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fork": fork}))
    return path


@pytest.fixture(scope="module")
def branches(tmp_path_factory):
    """An attacked run, the same defended from its start, and two forks of it."""
    root = tmp_path_factory.mktemp("branches")
    parent = write_run(root / "attacked", 0.25)
    write_run(root / "defended", 0.25, 0, 15.0, ("lisa(rho=10)",))
    late = write_run(root / "late", 0.25, 0, 15.0, ("lisa(rho=10)",))
    branch(parent, late, 6, {"defences": [[], ["lisa(rho=10)"]]})
    calm = write_run(root / "calm", 0.0, 0, 16.0)
    names = {"attack.name": ["harmful_asker", "none"], "attack.rho": [0.25, 0]}
    branch(parent, calm, 4, names | {"attack.length": [10, 3]})
    return root


def test_a_fork_is_another_arm_than_the_run_that_was_so_from_its_start(branches):
    runs = load_runs([branches])
    assert {run.path.name: run.arm for run in runs} == {
        "attacked": "harmful_asker ρ=0.25",
        "defended": "harmful_asker ρ=0.25 + lisa(rho=10)",
        "late": "harmful_asker ρ=0.25 + lisa(rho=10) from round 6",
        "calm": "clean from round 4",
    }
    late = next(run for run in runs if run.path.name == "late")
    assert late.title.endswith("+ lisa(rho=10) from round 6, seed 0")


def test_the_answer_has_a_sentence_a_branch(branches):
    said = answer(load_runs([branches]))
    late, calm = (load_run(branches / name).summary["harm_end"] for name in ("late", "calm"))
    parent = f"{load_run(branches / 'attacked').summary['harm_end']:.2f} in its parent."
    lines = {line.partition(" with ")[0]: line for line in said if line.startswith("From")}
    assert lines["From round 6 on"].endswith(
        f"with defences none → lisa(rho=10): harm {late:.2f} at the end, {parent}"
    )
    assert lines["From round 4 on"].endswith(f": harm {calm:.2f} at the end, {parent}")
    assert len(answer([load_run(branches / "late")])) == 1


def test_forks_that_come_from_elsewhere_are_told_apart(tmp_path):
    """Equal afterwards, but not before: by the parent, or by the parent's own fork."""
    parent = write_run(tmp_path / "parent")
    was = [["freeze"], []], [["refusal_loss"], []]
    paths = [write_run(tmp_path / f"fork{n}") for n in range(4)]
    first = {"parent": "elsewhere", "at": 2, "changed": {"attack.rho": [0, 0.25]}, "of": None}
    told = [(was[0], None), (was[1], None), (was[0], first), (was[0], None)]
    for path, (defences, of) in zip(paths, told, strict=True):
        branch(parent, path, 5, {"defences": defences}, of)
    runs = load_runs(paths)
    assert len(runs) == 3  # the last is the first once more
    assert len({run.arm for run in runs}) == 3
    assert runs[0].arm.endswith("from round 5 (before: defences=['freeze'])")
    assert runs[2].arm.endswith("(before: round 2: attack.rho=0, defences=['freeze'])")


def test_a_branch_is_drawn_from_where_it_left(branches):
    ax = plot_arms(load_runs([branches]))
    begins = {line.get_xdata()[0] for line in ax.lines if line.get_linewidth() > 2}
    assert begins == {0, 4, 6}
    assert "A fork begins where it left" in drawn_text(ax)
    trace = plot_cost_trace(load_run(branches / "late"))
    assert "forked in round 6" in drawn_text(trace)
    assert "forked" not in drawn_text(plot_cost_trace(load_run(branches / "defended")))


def test_the_table_of_branches(branches):
    runs = load_runs([branches])
    table = branch_table(runs).set_index("from round")
    assert list(table.index) == [4, 6]
    assert table["changed"][4] == "attack.name harmful_asker → none; attack.rho 0.25 → 0"
    assert table["changed"][6] == "defences none → lisa(rho=10)"
    parent, late = load_run(branches / "attacked"), load_run(branches / "late")
    assert table["harm there"][6] == late.rounds["safety/harm"][6]
    assert table["parent's harm at end"][6] == parent.summary["harm_end"]
    assert set(table["parent"]) == {"grpo: harmful_asker ρ=0.25, seed 0"}
    alone = branch_table([late])
    assert alone["parent"][0] == str((branches / "attacked").resolve())
    assert pd.isna(alone["parent's harm at end"][0])
    assert branch_table([parent]).empty


def test_a_branch_that_became_clean_is_no_clean_run(branches):
    """What it learned before the fork, it learned under attack."""
    retained = run_table(load_runs([branches])).set_index("arm")["learning retained"]
    assert len(retained) == 4 and retained.isna().all()


def test_the_report_lays_branches_side_by_side(branches, tmp_path):
    write_report([branches], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'id="table-branches"' in page and "defences none → lisa(rho=10)" in page
    said = pd.DataFrame(block(page, "sample-data"))
    titles = [run["title"] for run in block(page, "run-data")]
    rounds = said.groupby(said["run"].map(dict(enumerate(titles))))["round"].agg(["min", "max"])
    assert rounds.loc["grpo: harmful_asker ρ=0.25 + lisa(rho=10) from round 6, seed 0"].min() == 6
    assert rounds.loc["grpo: harmful_asker ρ=0.25, seed 0"].min() == 0
    write_report([branches / "defended", branches / "attacked"], tmp_path / "plain")
    assert "table-branches" not in (tmp_path / "plain/report.html").read_text()
