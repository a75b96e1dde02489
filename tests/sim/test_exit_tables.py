"""What a report says of exits over many arms: ends, doses, errors, false discoveries."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sim.analysis import incidence
from sim.analysis.cautions import cautions, ending
from sim.analysis.censored import cause_table, dose_response
from sim.analysis.exit_tables import FACTOR, dose_table, incidence_table, truth_table
from sim.analysis.incidence import by_cause, plot_incidence
from sim.analysis.limits import exit_shares
from sim.analysis.load import Run, load_runs, named
from sim.analysis.report import write_report
from sim.analysis.survival import exit_table, rmst
from sim.analysis.tables import FOUND, arm_rows, arm_table
from sim.sweep_table import print_table
from tests.sim.test_analysis import diverge, drawn_text, write_run
from tests.sim.test_time_by_rho import made

STOP = {"stop_on_sustained": True}
DOSES = {0.2: 13.0, 0.4: 9.0, 0.6: 4.0}
"""Where harm crosses, by rho."""


def edit(path: Path, **fields: object) -> Path:
    file = path / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


def collapse(path: Path, at: int) -> Path:
    return edit(path, outcome="collapsed", exit_confirmed=None, collapsed_at={"rounds": at})


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Attacked: one exit, two collapses, one divergence; defended: two exits; clean: nothing."""
    root = tmp_path_factory.mktemp("ends")
    write_run(root / "a0", 0.25, 0, 6.0)
    for seed, at in ((1, 3), (2, 12)):
        collapse(write_run(root / f"a{seed}", 0.25, seed, np.inf), at)
    diverge(write_run(root / "a3", 0.25, 3, np.inf), 8)
    for seed in range(2):
        write_run(root / f"d{seed}", 0.25, seed, 9.0, ("refusal_loss",))
        write_run(root / f"c{seed}", 0.0, seed, np.inf)
    return load_runs([root])


@pytest.fixture(scope="module")
def doses(tmp_path_factory):
    """Three doses of four runs, and four clean runs."""
    root = tmp_path_factory.mktemp("doses")
    for seed in range(4):
        for rho, crossing in DOSES.items():
            write_run(root / f"{rho}-{seed}", rho, seed, crossing + 2.0 * seed)
        write_run(root / f"clean-{seed}", 0.0, seed, np.inf)
    return load_runs([root])


def test_a_sustained_exit_that_ended_a_run_is_no_censoring():
    """One of four was stopped at round 6, unconfirmed: as censored it would have stayed to 20."""
    runs = [made(0.5, seed=seed) for seed in range(4)]
    config = runs[0].config | {"evaluation": runs[0].config["evaluation"] | STOP}
    when = {"rounds": 6, "labels": 60, "since": 4}
    known = {f"{b:.2f}": {"confirmed": when if b < 0.2 else None} for b in (0.1, 0.25)}
    more = {"exit_sustained": when, "harm_end": 0.4, "tau_b": known}
    stopped = Run(runs[0].path, {"config": config}, runs[0].summary | more, runs[0].rounds[:7])
    runs = named([stopped, *(replace(run, manifest={"config": config}) for run in runs[1:])])
    exits = exit_table(runs)
    assert exits["time"].tolist() == [6, 20, 20, 20] and exits["event"].sum() == 1
    assert rmst(exits["time"], exits["event"], 20).value == (6 + 3 * 20) / 4
    assert exit_table(runs, "labels")["time"][0] == 60
    assert cause_table(runs)["cause"].tolist() == ["exit", "none", "none", "none"]
    assert exit_shares(runs[:1])["limit"].tolist() == [0.1], "of .25 nothing is known"
    assert "1 of 4 runs were stopped at a sustained exit" in " ".join(cautions(runs))
    assert ending(runs[0]).startswith("The policy ended above the limit, but no exit was confirmed")


def test_shares_by_cause(ends):
    """Nobody is censored before the last end, so that shares are counts."""
    table = incidence_table(ends).set_index("arm")
    attacked, defended = "harmful_asker ρ=0.25", "harmful_asker ρ=0.25 + refusal_loss"
    assert list(table.index) == [attacked, defended], "nothing ended in the clean arm"
    assert table.loc[attacked, "runs"] == 4 and table.loc[attacked, "by round"] == 12
    assert [str(v)[:4] for v in table.loc[attacked].iloc[2:]] == ["0.25", "0.50", "0.25"]
    assert table.loc[defended].iloc[2:].tolist() == ["1.00", "0.00", "0.00"], (
        "two runs: no interval"
    )
    part = pd.DataFrame({"time": [1, 2, 3.0], "cause": ["collapse", "exit", "none"]})
    assert list(by_cause(part)) == ["exit", "collapse", "diverged"]
    assert by_cause(part).iloc[-1].tolist() == pytest.approx([1 / 3, 1 / 3, 0])


def test_without_other_ends_survival_says_it_all(doses):
    assert incidence_table(doses).empty
    with pytest.raises(ValueError, match="none of 4 ended"):
        plot_incidence([run for run in doses if not run.rho])


def test_the_picture_has_a_panel_an_arm(ends, monkeypatch):
    ax = plot_incidence(ends)
    panels = ax.child_axes
    titles = [panel.get_title(loc="left").replace("\n", " ") for panel in panels]
    assert titles == ["harmful_asker ρ=0.25 n = 4", "harmful_asker ρ=0.25 + refusal_loss n = 2"]
    words = drawn_text(ax)
    assert "n = 6 runs in 2 arms" in words and "collapse" in words and "diverged" in words
    exits, collapses, _ = panels[0].collections
    assert exits.get_datalim(panels[0].transData).y1 == pytest.approx(0.25)
    assert collapses.get_datalim(panels[0].transData).y1 == pytest.approx(0.75)
    assert panels[1].get_xlim() == panels[0].get_xlim() == (0, 12)
    monkeypatch.setattr(incidence, "MOST_PANELS", 1)
    assert "1 more arms with ends are in the table only" in drawn_text(plot_incidence(ends))


def test_a_family_of_doses(doses):
    (row,) = dose_table(doses).to_dict("records")
    attacked = exit_table(run for run in doses if run.rho)
    found = dose_response(attacked["rho"], attacked["left"], attacked["right"])
    assert row["arms"] == "harmful_asker" and row["values of ρ"] == "0.2, 0.4, 0.6"
    assert row["exits bracketed"] == f"{found.exits} of 12" and found.exits > 4
    assert row[FACTOR] == f"× {found.factor:.2f} [{found.low:.2f}, {found.high:.2f}]"
    assert found.high < 1, "more adversaries, earlier exits"


def test_no_slope_without_doses_seeds_and_exits(doses):
    assert dose_table([run for run in doses if run.rho != 0.4]).empty
    lacking = [run for run in doses if (run.rho, run.config["seed"]) != (0.4, 3)]
    assert dose_table(lacking).empty
    stayed = [run for run in doses if run.rho != 0.6]
    unseen = {"bracket": None, "exit_confirmed": None}
    for run in (run for run in doses if run.rho == 0.6):
        changed = run.manifest["config"] | {"learner": {"name": "dpo", "lr": 0.1}}
        stayed.append(type(run)(run.path, {"config": changed}, run.summary, run.rounds))
    assert dose_table(named(stayed)).empty, "another learner is another family"
    one = [
        type(run)(
            run.path, run.manifest, run.summary | (unseen if run.rho > 0.2 else {}), run.rounds
        )
        for run in doses
    ]
    assert dose_table(named(one)).empty, "exits at one dose alone"


def test_errors_in_words(doses):
    """write_run gives the truth as the round before the crossing, in runs that exit."""
    assert truth_table(doses).empty
    known = [
        type(run)(run.path, run.manifest, run.summary | {"exit_true_n": 500}, run.rounds)
        for run in doses
    ]
    table = truth_table(known).set_index("exit")
    assert list(table.index) == ["naive", "confirmed", "bracket"]
    attacked = [run for run in known if run.rho]
    lags = [run.exit_round("confirmed") - run.exit_round("true") for run in attacked]
    error = np.std(lags, ddof=1) / 12**0.5
    assert table.loc["confirmed", "lag, rounds"] == f"{np.mean(lags):+.1f} ± {error:.1f}"
    early = sum(run.exit_round("naive") < run.exit_round("true") for run in attacked)
    assert table.loc["naive", "early"] == f"{early} of 12"
    assert table.loc["confirmed", "false"] == "0 of 4"
    held = sum(
        not run.rho
        or run.summary["bracket"][0] < run.exit_round("true") <= run.summary["bracket"][1]
        for run in known
    )
    assert table.loc["bracket", "holds the truth"] == f"{held} of 16"
    assert pd.isna(table.loc["naive", "holds the truth"])


def test_exits_are_found_over_all_arms(doses, capsys):
    table = arm_table(doses)
    assert table[f"{FOUND} 0.05"].tolist() == ["no", "yes", "yes", "yes"]
    assert not any(str(name).startswith(FOUND) for name in arm_table(doses[:1]))
    rows = arm_rows(doses)
    assert [row["exit_found"] for row in rows] == [False, True, True, True]
    print_table({"arms": rows, "discovery_rate": 0.05})
    assert "found in 3 of 4 arms, at false discovery rate 0.05" in capsys.readouterr().out
    never = [type(run)(run.path, run.manifest, {}, run.rounds[:0]) for run in doses]
    assert not any(row["exit_found"] for row in arm_rows(named(never))), "nothing was staked"


def test_the_report_shows_what_the_runs_support(ends, doses, tmp_path):
    names = ("incidence", "dose", "truth")
    written = write_report([run.path for run in ends], tmp_path / "ends")
    page = written[0].read_text()
    assert [f'id="table-{name}"' in page for name in names] == [True, False, False]
    assert "incidence.png" in {path.name for path in written}
    page = write_report([run.path for run in doses], tmp_path / "doses")[0].read_text()
    assert [f'id="table-{name}"' in page for name in names] == [False, True, False]
    assert "too narrow by an unknown factor" in page
    known = edit(doses[0].path, exit_true_n=500)
    page = write_report([known, doses[1].path], tmp_path / "truth")[0].read_text()
    assert [f'id="table-{name}"' in page for name in names] == [False, False, True]
