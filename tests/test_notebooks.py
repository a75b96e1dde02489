"""Every notebook's code runs from top to bottom, with ``FAST=1``."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_and_holds_no_output(path):
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) <= 15
    assert not any(cell.get("outputs") for cell in cells)


def check_first_run(names):
    assert set(names["summaries"]) == {"poisoned", "defended"}
    assert names["joined"].groupby("adversarial").size().min() > 0


def check_write_an_attack(names):
    assert names["by_hand"].tolist() == [1, 0, 0, 1, 0], "the two close calls are turned round"
    flips = names["rates"]["feedback/rho_flips"]
    assert 0 < flips["close calls"] < flips["always flip"] <= 0.6
    assert 0 < names["changed"]["close calls"] < names["changed"]["always flip"]
    asked, wakes = names["asked"], names["wakes"]
    assert not asked.loc[1:wakes].any() and asked.loc[wakes + 1 :].any()


def check_write_a_defence(names):
    assert names["verdicts"]["passed"].all() and len(names["verdicts"]) >= 5
    arms = names["arms"]
    assert len(arms) == 4 and arms["arm"].str.contains("KeepRefusals").sum() == 1
    frozen = arms[arms["arm"].str.contains("freeze")].iloc[0]
    assert frozen["help_gain"] < arms[arms["arm"] == "clean"].iloc[0]["help_gain"]


def check_exit_times(names):
    assert len(names["exits"]) == len(names["configs"]) and names["exits"]["event"].any()
    errors = names["errors"].set_index("estimate")
    assert set(errors.index) == {"naive", "confirmed", "bracket"} and (errors["leave"] > 0).all()
    parent, fork = names["both"]
    assert fork.began == 2 and fork.config["defences"] == ["refusal_loss"]
    assert (parent.rounds["safety/harm"][:3] == fork.rounds["safety/harm"][:3]).all()


CHECKS = {
    "first_run": check_first_run,
    "write_an_attack": check_write_an_attack,
    "write_a_defence": check_write_a_defence,
    "exit_times": check_exit_times,
}
"""What a notebook's names must hold at its end."""


@pytest.mark.world
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, tmp_path, embedded_models):
    monkeypatch.setenv("FAST", "1")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace: dict = {}
    for cell in code(path):
        exec(compile(cell, str(path), "exec"), namespace)
    CHECKS[path.stem](namespace)
