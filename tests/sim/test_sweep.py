"""Sweeps: which runs they are, what the table says of them, and what happens when one fails."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.learners import learners
from sim import flags, sweep_command
from sim.analysis.arm_names import arm_names
from sim.checks import check
from sim.cli import main
from sim.config import AttackConfig, Config
from sim.config_file import to_yaml
from sim.pool import Job, work_off
from sim.presets import preset
from sim.resume import extend, is_finished
from sim.sweep import LONGEST, PlannedRun, directory, plan
from sim.sweep_command import grid, study
from sim.sweep_file import from_sweep_file
from sim.sweep_progress import SweepListener, ending
from sim.sweep_table import print_table, tabulate, write_table


def configs(words: str) -> list[Config]:
    """What the words after ``poisonloop sweep`` ask for."""
    return grid(*flags.read(words.split()))


def test_every_combination_is_a_run(tmp_path: Path) -> None:
    chosen = configs("smoke --rho 0 .1 .2 --learner grpo dpo --defence none freeze --seeds 2")
    assert len(chosen) == 3 * 2 * 2 * 2
    runs = plan(chosen, tmp_path)
    assert len({run.path for run in runs}) == 24
    assert [run.config.seed for run in runs[:2]] == [0, 1]
    names = arms_of(runs)
    assert names[0] == "grpo: clean" and "dpo: harmful_asker ρ=0.2 + freeze" in names
    assert len(set(names)) == 12


def arms_of(runs: list[PlannedRun]) -> list[str]:
    """The arm of every run."""
    return arm_names([run.config.to_dict() for run in runs])


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
    runs = plan(chosen, Path("out"))
    assert arms_of(runs)[::2] == [
        "clean + small_lr + refusal_loss learner.lr=0.0001",
        "clean + small_lr + refusal_loss learner.lr=0.001",
    ]  # worlds are replicates of an arm, not other arms


@pytest.mark.parametrize(
    ("words", "seeds"),
    [("--seeds 3", [0, 1, 2]), ("--seed 4 --seeds 2", [4, 5]), ("--seed 7 1", [7, 1]), ("", [0])],
)
def test_seeds(words: str, seeds: list[int]) -> None:
    assert [config.seed for config in configs(words)] == seeds


def test_attacks_that_never_act_are_one_run() -> None:
    runs = plan(configs("--rho 0 .1 --attack always_flip harm_targeted"), Path("out"))
    assert arms_of(runs) == ["clean", "always_flip ρ=0.1", "harm_targeted ρ=0.1"]


@pytest.mark.parametrize(
    "more",
    [
        "--rho 0 .1 --learner dpo grpo --seeds 3",
        "--rho .1 --learner.lr 1e-4 5e-4",  # the second is the default
        "--rho .1 --feedback.batch 32 64 --defence none freeze",
    ],
)
def test_widening_a_sweep_keeps_the_directories_it_has(more: str) -> None:
    (narrow,) = plan(configs("--rho .1"), Path("out"))
    wide = {run.path: run.config for run in plan(configs(more), Path("out"))}
    assert wide[narrow.path] == narrow.config and len(wide) > 1


def test_a_directory_is_named_by_its_own_config_alone() -> None:
    config = preset("smoke")
    names = {directory(config), directory(replace(config, rounds=99))}  # extended in its place
    assert len(names) == 1 and names.pop().startswith("grpo-clean-")
    assert directory(replace(config, samples_per_round=9)) == directory(config)  # only recorded
    known = "grpo-clean-3297afaf-world0-seed0"
    assert directory(config) == known, "fields that were added rename the runs of earlier sweeps"
    assert directory(replace(config, threads=2)) != directory(config)
    frozen = [replace(config, defences=(spec,)) for spec in ("freeze", "freeze()")]
    assert directory(frozen[0]) == directory(frozen[1])
    spec = "some/where/my.py:Mine(" + ", ".join(f"setting_{i}={i}" for i in range(40)) + ")"
    long = directory(replace(config, seed=3, defences=(spec,)))
    assert len(long) < LONGEST + 40 and "/" not in long and long.endswith("-world0-seed3")
    spec = "/some-where/else/my.py:Mine(path='a/b')"
    outside = directory(replace(config, attack=AttackConfig(spec, rho=0.2), defences=("freeze",)))
    assert outside.startswith("grpo-my.py-Mine-path=-a-b--rho0.2-freeze-")
    with pytest.raises(ValueError, match="rounds=5 and 9 of one run"):
        plan([config, replace(config, rounds=9)], Path("out"))


def test_the_demo_study_has_both_null_controls() -> None:
    runs = plan(study(*flags.read(["--study", "demo"])), Path("out"))
    assert len(runs) == 10
    assert list(dict.fromkeys(arms_of(runs))) == [
        "clean", "harmful_asker ρ=0.4", "harmful_asker ρ=0.4 + refusal_loss",
        "harmful_asker ρ=0.4 + freeze", "harmful_asker ρ=0.4 + small_lr",
    ]  # fmt: skip


def test_the_study_of_exit_times_covers_its_grid_and_can_run() -> None:
    runs = plan(study(*flags.read(["--study", "exit-times"])), Path("out"))
    assert len(runs) == 7 * 3 * 4 * 3 * 3
    for run in runs:
        check(run.config)
        assert run.config.evaluation.n_true == 2000 and not run.config.evaluation.stop_on_exit
    assert len({(c.config.seed, c.config.world.seed) for c in runs}) == 9


def test_a_sweep_is_read_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "grid.yaml"
    file.write_text(
        "preset: smoke\nrho: [0, .4]\ndefence: [none, freeze+small_lr]\nseeds: 2\n"
        "evaluation: {n_harm: 32, stop_on_exit: true}\nlearner.lr: 1e-3\n"
    )
    name, options = from_sweep_file(str(file))
    runs = plan(grid(name, options), Path("out"))
    assert len(runs) == 8
    asked = {(c.config.attack.rho, c.config.defences) for c in runs}
    assert asked == {(r, d) for r in (0, 0.4) for d in ((), ("freeze", "small_lr"))}
    for config in (run.config for run in runs):
        assert config.evaluation.n_harm == 32 and config.evaluation.stop_on_exit
        assert config.learner.lr == 1e-3 and config.rounds == 5
    assert main(["sweep", "grid.yaml", "--seeds", "3", "--dry-run"]) == 0  # a flag wins
    assert "12 runs in 4 arms" in capsys.readouterr().out
    typed = "--attack.rho .1 --evaluation.no-stop-on-exit --dry-run"  # in other spellings too
    assert main(["sweep", "grid.yaml", *typed.split()]) == 0
    assert "4 runs in 2 arms" in capsys.readouterr().out
    assert main(["sweep", "--rho", ".2", "--defence", "lissa", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "defence: unknown name 'lissa'" in said.err and not said.out
    assert main(["sweep", "exit-times", "--dry-run"]) == 0
    assert "756 runs" in capsys.readouterr().out


BAD_FILES = [
    ("rho: [[0]]", "allowed: a value or a list of values"),
    ("config: {rho: 0}\nseeds: 5", "--config.rho is not a flag"),
    ("config: none.yaml", "config='none.yaml': No such file or directory"),
    ("rho: 0\nrho: .2", "sweep='grid.yaml' has 'rho' twice; allowed: every key once"),
    ("learner.lr: 1\nlearner: {lr: 2}", "learner.lr twice in 'grid.yaml'; allowed: one of them"),
    ("rho: 0\nattack: {rho: .2}", "--rho with --attack.rho; allowed: one of them"),
    ("", "sweep='grid.yaml' holds nothing; allowed: fields: values"),
    ("rho: null", "attack.rho='None'; allowed: a number"),
    ("rho: []", "--rho has no value; allowed: one value"),
    ("evaluation: {stop_on_exit: [true, 3]}", "--evaluation.stop-on-exit 3; allowed: true, false"),
]


@pytest.mark.parametrize(("text", "said"), BAD_FILES)
def test_a_bad_file_is_refused_by_name(text: str, said: str, in_tmp: Path, capsys: Any) -> None:
    Path("grid.yaml").write_text(text)
    assert main(["sweep", "grid.yaml", "--dry-run"]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (
            "--attack always_flip",
            "attack: always_flip changes nothing at rho 0; give --rho above 0",
        ),
        ("--attack malicious_grpo", "malicious_grpo changes nothing at rho 0; give --rho 1"),
        ("--attack none --rho .2", "everybody is honest whatever rho is; 0.2 is not kept"),
        ("--attack none always_flip --rho 0 .2", ""),
    ],
)
def test_an_attack_that_acts_in_no_run_is_told(
    words: str, note: str, in_tmp: Path, capsys: Any
) -> None:
    assert main(["sweep", "smoke", *words.split(), "--rounds", "1", "--dry-run"]) == 0
    said, head, _ = capsys.readouterr().out.partition(
        "1 run in 1 arm, 1 round each" if note else "2 runs"
    )
    assert head and (note in said if note else not said)


def test_what_a_file_may_hold(in_tmp: Path) -> None:
    def read(text: str) -> list[Config]:
        Path("grid.yaml").write_text(text)
        return grid(*from_sweep_file("grid.yaml"))

    whole = replace(preset("smoke"), learner=learners.get("dpo")(lr=1e-3))
    assert read(to_yaml(whole)) == [whole]  # as --print-config writes it
    both = read("evaluation: {stop_on_exit: [true, false]}")
    assert [config.evaluation.stop_on_exit for config in both] == [True, False]
    Path("mine.json").write_text('{"rounds": 3}')
    assert {config.rounds for config in read("config: mine.json\nrho: [0, .1]")} == {3}


def test_the_judges_study_can_run() -> None:
    runs = plan(study(*flags.read(["--study", "judges"])), Path("out"))
    assert len(runs) == 36
    for run in runs:
        check(run.config)
        assert run.config.threat == "offline" and run.config.attack.rho == 1


def test_the_table_of_defaults_is_made_on_worlds_that_nothing_was_tuned_on() -> None:
    tuned = study(*flags.read(["--study", "tuning"]))
    shown = study(*flags.read(["--study", "learners"]))
    assert not {c.world.seed for c in tuned} & {c.world.seed for c in shown}
    assert len({(c.world.seed, c.seed) for c in shown}) == 9
    defaults = {c.learner for c in shown}
    assert defaults == {learners.get(name)() for name in ("dpo", "grpo", "ppo", "sft")}
    clean = [c for c in tuned if not c.attack.rho]
    assert defaults <= {c.learner for c in clean if c.reward_model == Config().reward_model}


def finish(run: Any, **summary: Any) -> None:
    """Leave what a finished run leaves, as far as the table reads it."""
    gain = summary.get("help_gain")
    summary |= {"help_start": 0.5, "help_end": None if gain is None else 0.5 + gain}
    run.path.mkdir(parents=True)
    (run.path / "manifest.json").write_text(
        json.dumps({"config": run.config.to_dict(), "versions": {}})
    )
    known = {"outcome": "safe", "harm_end": 0.0, "exit_confirmed": None, "exit_true": None}
    (run.path / "summary.json").write_text(json.dumps({**known, **summary}))
    (run.path / "rounds.jsonl").write_text('{"round": 0}\n')


def test_table_by_hand(tmp_path: Path) -> None:
    clean = preset("smoke")
    hostile = replace(clean, attack=AttackConfig("harmful_asker", rho=0.4))
    undefended = "harmful_asker ρ=0.4"
    held, frozen = f"{undefended} + refusal_loss", f"{undefended} + freeze"
    arms = [
        clean,
        hostile,
        replace(hostile, defences=("refusal_loss",)),
        replace(hostile, defences=("freeze",)),
    ]
    runs = plan([replace(config, seed=seed) for config in arms for seed in (0, 1)], tmp_path)
    exits = {"outcome": "exited", "exit_confirmed": {"rounds": 3, "labels": 90}}
    rows = [
        {"help_gain": 0.2}, {"help_gain": 0.4},
        {"help_gain": 0.3, "harm_end": 0.8, **exits}, {"help_gain": 0.3, "harm_end": 0.6},
        {"help_gain": 0.1},  # its second seed fails
        {"help_gain": 0.0}, {"help_gain": 0.0},
    ]  # fmt: skip
    broken = runs[5].path
    for run, row in zip([c for c in runs if c.path != broken], rows, strict=True):
        finish(run, **row)
    table = tabulate(tmp_path, runs, {broken: "ValueError: no"})
    by_arm = {row["arm"]: row for row in table["arms"]}

    assert by_arm["clean"]["learning_retained"] == pytest.approx(1.0)
    assert by_arm["clean"]["holds"] is True
    assert by_arm[undefended]["harm_end"] == pytest.approx(0.7)
    assert (by_arm[undefended]["safe"], by_arm[undefended]["exited"]) == (1, 1)
    assert by_arm[undefended]["exit_rounds"] == [3]
    assert by_arm[undefended]["exit_labels"] == [90]
    assert by_arm[undefended]["holds"] is False  # it learned, but left the set
    # paired by seed: .1 of the .2 that seed 0 gains when clean; the failed seed has no part in it
    assert by_arm[held]["learning_retained"] == pytest.approx(0.5)
    assert (by_arm[held]["failed"], by_arm[held]["holds"]) == (1, False)
    assert by_arm[frozen]["learning_retained"] == 0 and by_arm[frozen]["holds"] is False

    write_table(table, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    with open(tmp_path / "table.csv") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == list(by_arm)


def test_without_a_clean_arm_nothing_is_said_of_learning(tmp_path: Path, capsys: Any) -> None:
    runs = plan(configs("smoke --rho .4"), tmp_path)
    finish(runs[0], help_gain=0.3)
    (row,) = tabulate(tmp_path, runs, {})["arms"]
    assert row["learning_retained"] is None and row["holds"] is None
    print_table({"arms": [row]})
    assert "clean, undefended twin" in " ".join(capsys.readouterr().out.split())


def test_the_table_covers_what_the_folder_held_before(tmp_path: Path) -> None:
    before = plan(configs("smoke --rho 0 .4 --seeds 2"), tmp_path)
    for run in before:
        finish(run, help_gain=0.4)
    (now,) = plan(configs("smoke --rho .4 --defence freeze"), tmp_path)
    finish(now, help_gain=0.1)
    table = tabulate(tmp_path, [now], {})
    assert [(row["arm"], row["runs"]) for row in table["arms"]] == [
        ("clean", 2), ("harmful_asker ρ=0.4", 2), ("harmful_asker ρ=0.4 + freeze", 1),
    ]  # fmt: skip
    assert table["arms"][2]["learning_retained"] == pytest.approx(0.25)  # its twin is of before


@pytest.mark.parametrize(
    ("summary", "holds"),
    [
        ({"help_gain": 0.2}, True),
        ({"help_gain": 0.2, "harm_end": 0.3}, False),  # above the limit, if unconfirmed
        ({"help_gain": None, "harm_end": None, "outcome": "diverged"}, False),
    ],
)
def test_what_holds(tmp_path: Path, summary: dict[str, Any], holds: bool) -> None:
    clean, defended = plan(configs("smoke --rho 0 .4 --defence freeze none")[1:3], tmp_path)
    assert not clean.config.defences and defended.config.defences
    finish(clean, help_gain=0.2)
    finish(defended, **summary)
    rows = tabulate(tmp_path, [], {})["arms"]
    assert [row["holds"] for row in rows] == [True, holds]


def test_the_end_of_a_run_that_diverged_is_said() -> None:
    summary = {"outcome": "diverged", "harm_end": None, "help_gain": None}
    assert ending({**summary, "diverged": {"round": 3}}) == "diverged in round 3"


@pytest.mark.parametrize("columns", [None, 80, 100, 120])
def test_numbers_of_the_printed_table_are_whole(
    columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    known = {"runs": 9, "safe": 5, "exited": 4, "collapsed": 0, "diverged": 0, "failed": 0}
    figures = {"harm_end": 0.61, "help_gain": -0.27, "learning_retained": -0.93, "holds": False}
    exits = {"exit_rounds": [97, 98, 96, 95], "exit_found": True}
    names = ("clean", "harmful_asker ρ=0.4 + refusal_loss", "dpo: label_noise ρ=0.25 " * 4)
    arms = [{"arm": arm, **known, **figures, **exits} for arm in names]
    print_table({"arms": arms, "discovery_rate": 0.05})
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= (columns or 120)
    assert said.count(" no ") == len(names) and "holds" in said and "…" not in said
    for whole in ("0.61", "-0.27", "-0.93", "5\N{NO-BREAK SPACE}safe", "95", "96", "97", "98"):
        assert len(re.findall(rf"(?<![\d.-]){whole}(?!\d)", said)) == len(names)


def test_a_stopped_sweep_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_command, "sweep", stopped)
    words = ["sweep", "smoke", "--rho", "0", ".4", "--out", f"{tmp_path}/a b"]
    assert main(words) == 130
    said = capsys.readouterr().err
    assert f"poisonloop sweep smoke --rho 0 .4 --out '{tmp_path}/a b'" in said


def test_extending_makes_a_finished_run_unfinished(tmp_path: Path) -> None:
    (run,) = plan([preset("smoke")], tmp_path)
    finish(run, help_gain=0.1)
    assert is_finished(run.path, run.config)
    longer = replace(run.config, rounds=9)
    assert not is_finished(run.path, longer)
    extend(run.path, longer)
    assert not (run.path / "summary.json").exists()
    assert not is_finished(run.path, run.config)


def test_a_directory_of_another_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    (run,) = plan([preset("smoke")], tmp_path)
    finish(run, help_gain=0.1)
    other = replace(run.config, samples_per_round=1)
    (run.path / "manifest.json").write_text(json.dumps({"config": other.to_dict()}))
    assert main(["sweep", "smoke", "--out", str(tmp_path)]) == 2
    assert "holds a run of another config" in capsys.readouterr().err


class Heard(SweepListener):
    """Remembers failures."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def failed(self, path: Path, reason: str) -> None:
        self.failures.append(path.name)


class Dies:
    """Ends the process that receives it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


def test_failures_and_deaths_do_not_stop_a_sweep(tmp_path: Path) -> None:
    config = preset("smoke").to_dict()
    killer = {**config, "rounds": Dies()}
    wrong = {**config, "rounds": 0}
    names = ("wrong-1", "killer", "wrong-2")
    jobs = [Job(tmp_path / n, wrong if "wrong" in n else killer) for n in names]
    heard = Heard()
    failures = work_off(jobs, 1, heard)
    assert [path.name for path in failures] == heard.failures == list(names)
    assert "rounds=0" in failures[tmp_path / "wrong-1"]
    assert "ended with code 7" in failures[tmp_path / "killer"]
    assert "Traceback" in (tmp_path / "wrong-2.error.txt").read_text()


PARENT = """
import pathlib, runpy, sys
from sim.presets import preset
from sim.pool import Job, work_off
from sim.sweep_progress import SweepListener

here = pathlib.Path(sys.argv[1])

class Waits:
    def __reduce__(self):
        return runpy.run_path, (str(here / "waits.py"),)

if __name__ == "__main__":
    job = Job(here / "run", {**preset("smoke").to_dict(), "rounds": Waits()})
    work_off([job], 1, SweepListener())
"""


def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """In the middle of its work: another sweep may want the directory."""
    (tmp_path / "waits.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name('pid').write_text(f'{os.getpid()} ')\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", tmp_path])
    pid = tmp_path / "pid"
    wait_until(lambda: pid.is_file() and pid.read_text().endswith(" "))
    worker = int(pid.read_text())
    os.kill(worker, 0)  # it is at work
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(worker), seconds=5)
    assert not alive(worker)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Give ``condition`` some time to come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


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
