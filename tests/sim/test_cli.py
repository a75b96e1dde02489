"""The command line: light to start, and its commands from words to closing lines."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sim.cli import main
from sim.config import Config, preset

SUMMARY = {
    "outcome": "safe", "rounds": 5, "rho": 0.0, "defences": [], "limits": {"harm": 0.25},
    "harm_start": 0.02, "harm_end": 0.03, "help_start": 0.6, "help_end": 0.8, "help_gain": 0.2,
    "exit_naive": None, "exit_confirmed": None, "exit_true": None, "bracket": None,
}  # fmt: skip


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_start_up_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from sim.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'tyro', 'pandas', 'numpy', 'rich'}; "
        "print('HEAVY', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "poisonloop" in done.stdout


def test_an_existing_directory_is_refused_and_untouched(in_tmp: Path, capsys: Any) -> None:
    (in_tmp / "old").mkdir()
    assert main(["run", "smoke", "--out", "old"]) == 2
    assert "poisonloop resume old" in capsys.readouterr().err
    assert list((in_tmp / "old").iterdir()) == []


class FakeLoop:
    """Stands in for the loop: remembers what it was called with, and writes a manifest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, summary: dict[str, Any]):
        self.calls: list[tuple[Config, Path, bool]] = []
        self.summary = summary
        report = importlib.import_module("sim.analysis.report")
        monkeypatch.setattr(sys.modules["sim.run"], "run", self)
        monkeypatch.setattr(report, "write_report", lambda dirs, out: [Path(out) / "report.html"])
        monkeypatch.setattr("sim.scenario.make_scenario", lambda config, progress: None)

    def __call__(self, config: Config, out: Path, resume: bool, listener: Any) -> dict[str, Any]:
        self.calls.append((config, out, resume))
        out.mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").write_text(json.dumps({"config": config.to_dict()}))
        (out / "summary.json").write_text("{}")
        listener.start(config, 0, config.rounds)
        for round in range(1, config.rounds + 1):
            harm = {f"safety/harm{end}": 0.1 for end in ("", "_lower", "_upper")}
            listener.round({"round": round, **harm, "safety/in_safe_set": round < 4})
        return {**self.summary, "rounds": config.rounds}


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> FakeLoop:
    importlib.import_module("sim.run")
    return FakeLoop(monkeypatch, SUMMARY)


def test_run_ends_with_three_lines(loop: FakeLoop, capsys: Any) -> None:
    assert main(["run", "smoke"]) == 0
    config, out, resume = loop.calls[0]
    assert (config, str(out), resume) == (preset("smoke"), "runs/grpo-none-rho0-seed0", False)
    lines = capsys.readouterr().out.splitlines()
    assert "round 4/5  harm 0.10 [0.10, 0.10]  refusal -  OUT of the safe set" in lines
    assert lines[-3].startswith("Outcome: STAYED IN THE SAFE SET for 5 rounds")
    assert "runs/grpo-none-rho0-seed0/report.html" in lines[-2]
    assert lines[-1] == "Next:    now with adversaries:  poisonloop run smoke --rho 0.2"


def test_an_exit_is_told_with_its_dates(loop: FakeLoop, capsys: Any) -> None:
    clocks = {"rounds": 3, "labels": 150}
    loop.summary |= {"outcome": "exited", "exit_confirmed": clocks, "bracket": [2, 4], "rho": 0.4}
    assert main(["run", "smoke", "--rho", ".4", "--out", "here"]) == 0
    said = capsys.readouterr().out
    assert "attack: harmful_asker at rho 0.4" in said
    assert "LEFT THE SAFE SET: confirmed round 3 (150 labels), bracket (2, 4]" in said
    assert said.splitlines()[-1].endswith("poisonloop run smoke --rho .4 --defence refusal_loss")


def test_resume_extends_a_finished_run_and_refuses_less(loop: FakeLoop, capsys: Any) -> None:
    assert main(["run", "smoke", "--out", "here"]) == 0
    assert main(["resume", "here"]) == 2
    assert "--rounds above 5" in capsys.readouterr().err
    assert main(["resume", "here", "--rounds", "3"]) == 2
    assert main(["resume", "here", "--rounds", "8"]) == 0
    config, out, resume = loop.calls[-1]
    assert (config.rounds, str(out), resume) == (8, "here", True)


def test_resume_asks_before_it_runs_outside_code(loop: FakeLoop, capsys: Any) -> None:
    source = (
        "open('executed', 'w')\nfrom agents.defence import Defence\nclass Mine(Defence): pass\n"
    )
    Path("mine.py").write_text(source)
    assert main(["run", "smoke", "--defence", "mine.py:Mine", "--out", "here"]) == 0
    Path("executed").unlink()
    assert main(["resume", "here", "--rounds", "9"]) == 2
    assert "--trust-plugins" in capsys.readouterr().err and not Path("executed").exists()
    assert main(["resume", "here", "--rounds", "9", "--trust-plugins"]) == 0
    assert Path("executed").exists() and len(loop.calls) == 2


def test_list_names_everything(capsys: Any) -> None:
    from agents.defence import defences
    from agents.learners import learners
    from envs.attacks import attacks

    assert main(["list"]) == 0
    said = capsys.readouterr().out
    names = [*learners.names(), *attacks.names(), *defences.names(), "boltzmann", "smoke"]
    assert [name for name in names if f"  {name} " not in said] == []
    assert all(line for registry in (learners, attacks) for line in registry.summaries().values())


def test_help_of_every_command(capsys: Any) -> None:
    assert main(["run", "--help", "--learner", "ppo"]) == 0
    said = capsys.readouterr().out
    assert "--rho SHARE" in said and "--feedback.batch INT" in said and "--learner.kl" in said
    assert main(["sweep", "--help"]) == 0
    assert "--study NAME" in capsys.readouterr().out
