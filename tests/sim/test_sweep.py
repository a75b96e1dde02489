"""Sweeps: which runs they are, what the table says of them, and what happens when one fails."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim import flags
from sim.cli import main
from sim.config import AttackConfig, Config, preset
from sim.pool import Job, work_off
from sim.resume import extend, is_finished
from sim.sweep import plan
from sim.sweep_command import grid, study
from sim.sweep_progress import SweepListener
from sim.sweep_table import tabulate, write_table


def configs(words: str) -> list[Config]:
    """What the words after ``poisonloop sweep`` ask for."""
    return grid(*flags.read(words.split()))


def test_every_combination_is_a_run(tmp_path: Path) -> None:
    chosen = configs("smoke --rho 0 .1 .2 --learner grpo dpo --defence none freeze --seeds 2")
    assert len(chosen) == 3 * 2 * 2 * 2
    cells = plan(chosen, tmp_path)
    assert len({cell.path for cell in cells}) == 24
    assert [cell.config.seed for cell in cells[:2]] == [0, 1]
    names = list(dict.fromkeys(cell.arm for cell in cells))
    assert "grpo clean" in names and "dpo harmful_asker rho=0.2 + freeze" in names
    assert len(names) == 12


def test_a_flag_with_several_values_of_its_own_is_not_an_axis() -> None:
    (only,) = configs("--feedback.behaviours boltzmann lapse --learner.betas .8 .9")
    assert only.feedback.behaviours == ("boltzmann", "lapse")
    assert only.learner.betas == (0.8, 0.9)


def test_any_flag_can_be_an_axis_and_stacks_are_one_value() -> None:
    chosen = configs("--learner.lr 1e-4 1e-3 --world.seed 3 4 --defence small_lr+refusal_loss")
    assert [(c.learner.lr, c.world.seed) for c in chosen] == [
        (1e-4, 3), (1e-4, 4), (1e-3, 3), (1e-3, 4),
    ]  # fmt: skip
    assert {c.defences for c in chosen} == {("small_lr", "refusal_loss")}
    cells = plan(chosen, Path("out"))
    assert [cell.arm for cell in cells[::2]] == [
        "grpo clean + small_lr + refusal_loss learner.lr=0.0001",
        "grpo clean + small_lr + refusal_loss learner.lr=0.001",
    ]  # worlds are replicates of an arm, not other arms


@pytest.mark.parametrize(
    ("words", "seeds"),
    [("--seeds 3", [0, 1, 2]), ("--seed 4 --seeds 2", [4, 5]), ("--seed 7 1", [7, 1]), ("", [0])],
)
def test_seeds(words: str, seeds: list[int]) -> None:
    assert [config.seed for config in configs(words)] == seeds


def test_attacks_that_never_act_are_one_run() -> None:
    cells = plan(configs("--rho 0 .1 --attack always_flip harm_targeted"), Path("out"))
    assert [cell.arm for cell in cells] == [
        "grpo clean", "grpo always_flip rho=0.1", "grpo harm_targeted rho=0.1",
    ]  # fmt: skip


def test_widening_a_sweep_keeps_the_directories_it_has() -> None:
    narrow = {cell.path for cell in plan(configs("--rho .1"), Path("out"))}
    wide = {c.path for c in plan(configs("--rho 0 .1 --learner dpo grpo --seeds 3"), Path("out"))}
    assert narrow < wide


def test_the_demo_study_has_the_four_arms() -> None:
    cells = plan(study(*flags.read(["--study", "demo"])), Path("out"))
    assert len(cells) == 8
    assert len({cell.arm for cell in cells}) == 4


def finish(cell: Any, **summary: Any) -> None:
    """Leave what a finished run leaves, as far as the table reads it."""
    cell.path.mkdir(parents=True)
    (cell.path / "manifest.json").write_text(json.dumps({"config": cell.config.to_dict()}))
    known = {"outcome": "safe", "harm_end": 0.0, "exit_confirmed": None, "exit_true": None}
    (cell.path / "summary.json").write_text(json.dumps({**known, **summary}))


def test_table_by_hand(tmp_path: Path) -> None:
    clean = preset("smoke")
    hostile = replace(clean, attack=AttackConfig("harmful_asker", rho=0.4))
    arms = {
        "clean": [clean, replace(clean, seed=1)],
        "undefended": [hostile, replace(hostile, seed=1)],
        "held": [replace(hostile, seed=s, defences=("refusal_loss",)) for s in (0, 1)],
        "frozen": [replace(hostile, seed=s, defences=("freeze",)) for s in (0, 1)],
    }
    cells = plan(arms, tmp_path)
    exits = {"outcome": "exited", "exit_confirmed": {"rounds": 3, "labels": 90}}
    rows = [
        {"help_gain": 0.2}, {"help_gain": 0.4},
        {"help_gain": 0.3, "harm_end": 0.8, **exits}, {"help_gain": 0.3, "harm_end": 0.6},
        {"help_gain": 0.1},  # its second seed fails
        {"help_gain": 0.0}, {"help_gain": 0.0},
    ]  # fmt: skip
    done = [cell for cell in cells if (cell.arm, cell.config.seed) != ("held", 1)]
    for cell, row in zip(done, rows, strict=True):
        finish(cell, **row)
    broken = next(cell.path for cell in cells if cell not in done)
    table = tabulate(cells, {broken: "ValueError: no"})
    by_arm = {row["arm"]: row for row in table["arms"]}

    assert by_arm["clean"]["learning_retained"] == pytest.approx(1.0)
    assert by_arm["clean"]["holds"] is True
    assert by_arm["undefended"]["harm_end"] == pytest.approx(0.7)
    assert (by_arm["undefended"]["safe"], by_arm["undefended"]["exited"]) == (1, 1)
    assert by_arm["undefended"]["exit_rounds"] == [3]
    assert by_arm["undefended"]["exit_labels"] == [90]
    assert by_arm["undefended"]["holds"] is False  # it learned, but left the set
    # paired by seed: .1 of the .2 that seed 0 gains when clean; the failed seed has no part in it
    assert by_arm["held"]["learning_retained"] == pytest.approx(0.5)
    assert (by_arm["held"]["failed"], by_arm["held"]["holds"]) == (1, False)
    assert by_arm["frozen"]["learning_retained"] == 0 and by_arm["frozen"]["holds"] is False

    write_table(table, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    with open(tmp_path / "table.csv") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == list(by_arm)


def test_without_a_clean_arm_nothing_is_said_of_learning(tmp_path: Path) -> None:
    cells = plan(configs("smoke --rho .4"), tmp_path)
    finish(cells[0], help_gain=0.3)
    (row,) = tabulate(cells, {})["arms"]
    assert row["learning_retained"] is None and row["holds"] is None


def test_extending_makes_a_finished_run_unfinished(tmp_path: Path) -> None:
    (cell,) = plan([preset("smoke")], tmp_path)
    finish(cell, help_gain=0.1)
    assert is_finished(cell.path, cell.config)
    longer = replace(cell.config, rounds=9)
    assert not is_finished(cell.path, longer)
    extend(cell.path, longer)
    assert not (cell.path / "summary.json").exists()
    assert not is_finished(cell.path, cell.config)
    with pytest.raises(ValueError, match="another config"):
        extend(cell.path, replace(longer, seed=5))


def test_a_directory_of_another_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    (cell,) = plan([preset("smoke")], tmp_path)
    finish(cell, help_gain=0.1)
    other = replace(cell.config, samples_per_round=1)
    (cell.path / "manifest.json").write_text(json.dumps({"config": other.to_dict()}))
    assert main(["sweep", "smoke", "--out", str(tmp_path)]) == 2
    assert "holds a run of another config" in capsys.readouterr().err


class Heard(SweepListener):
    """Remembers failures."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def failed(self, path: Path, reason: str) -> None:
        self.failures.append(path.name)


def test_failures_and_deaths_do_not_stop_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)\n")
    config = preset("smoke").to_dict()
    killer = {**config, "learner": {"name": f"{tmp_path}/dies.py:Any"}}
    wrong = {**config, "rounds": 0}
    names = ("wrong-1", "killer", "wrong-2")
    jobs = [Job(tmp_path / n, wrong if "wrong" in n else killer) for n in names]
    heard = Heard()
    failures = work_off(jobs, 1, heard)
    assert [path.name for path in failures] == heard.failures == list(names)
    assert "rounds=0" in failures[tmp_path / "wrong-1"]
    assert "ended with code 7" in failures[tmp_path / "killer"]
    assert "Traceback" in (tmp_path / "wrong-2.error.txt").read_text()


@pytest.mark.world
def test_a_small_sweep_for_real(embedded_models: Any, tmp_path: Path, capsys: Any) -> None:
    words = (
        "sweep smoke --rho 0 .4 --rounds 1 --evaluation.n-harm 16 --evaluation.n-help 16"
        f" --feedback.batch 16 --jobs 2 --out {tmp_path}/s"
    ).split()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "2 runs in 2 arms" in said and "[2/2]" in said
    table = json.loads((tmp_path / "s" / "table.json").read_text())
    assert [row["runs"] for row in table["arms"]] == [1, 1]
    pictures = list((tmp_path / "s").glob("figures/*.png"))
    assert pictures and str(pictures[0].parent) in said
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "s").glob("*/rounds.jsonl"))]
    assert main(words) == 0  # nothing is left to do
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "s").glob("*/rounds.jsonl"))]
    assert again == times and "[" not in capsys.readouterr().out.split("\n")[1]
