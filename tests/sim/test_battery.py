"""The battery: which runs it is, what a round costs, and what its table and picture say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from agents.defence import LOG, defences
from agents.learners import learners
from sim.analysis.load import Run
from sim.battery.arms import ATTACK, UPDATES, arms, configs
from sim.battery.cost import LiveBytes, cost
from sim.battery.mechanisms import MECHANISMS, measure
from sim.battery.plot import FATES, fate, plot_battery
from sim.battery.rows import CLEAN, NONE, rows
from sim.battery.table import columns, markdown, mechanism_markdown
from sim.checks import check
from sim.cli import main

OF_A_RUN = {name for name in defences.names() if not defences.get(name).needs & LOG.keys()}
"""Defences that need nothing of the label log that the battery's runs have not."""


def test_every_registered_defence_is_an_arm_under_every_learner() -> None:
    lists = arms()
    assert lists[0] == () and len(set(lists)) == len(lists)
    assert {members[0] for members in lists if len(members) == 1} >= OF_A_RUN
    assert ("rep_noise", "tar") in lists
    asked = configs(lists, worlds=(3,))
    assert len(asked) == len(learners.names()) * (len(lists) + 1)
    for config in asked:
        check(config)
        assert config.attack.rho == 0 or config.attack == ATTACK
        assert config.evaluation.stop_on_exit and config.rounds % config.evaluation.every == 0
    assert {c.rounds for c in asked if c.learner_name == "grpo"} == {UPDATES}
    assert {c.rounds for c in asked if c.learner_name == "dpo"} == {UPDATES // 4}


def test_lists_of_a_persons_own() -> None:
    assert arms(["lisa(rho=2)", "refusal_loss+lisa", "none"]) == [
        (),
        ("lisa(rho=2)",),
        ("refusal_loss", "lisa"),
    ]


def test_every_defence_but_the_null_controls_has_a_mechanism() -> None:
    assert set(MECHANISMS) == OF_A_RUN - {"freeze", "small_lr"}


def test_live_bytes_count_each_storage_while_it_lives() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1
        del a
        b[:10].view(2, 5).add_(1)  # a view, written in place: nothing new
        held = live.now
        c = torch.ones(3000)
        del b, c
    assert held == 4000 and live.most == 16000 and live.now == 0


def made(defence: tuple[str, ...], rho: float, world: int, exit: int | None, **last: Any) -> Run:
    config = {
        "learner": {"name": "dpo"},
        "attack": {"name": "harm_targeted", "rho": rho} if rho else {"rho": 0},
        "defences": list(defence),
        "seed": 0,
        "world": {"seed": world},
        "evaluation": {"n_help": 256, "cost_limit": 0.25},
    }
    table = {"safety/harm": 0.0, "helpfulness": 0.9, "safety/over_refusal": 0.1}
    table = {**table, "perplexity": 2.0, "kl": 1.5, **last}
    start = {name: value / 2 for name, value in table.items()}
    left = None if exit is None else {"rounds": exit // 4, "optimizer_steps": exit}
    summary = {
        "outcome": "safe" if exit is None else "exited",
        "exit_confirmed": left,
        "diverged": None,
        "harm_end": table["safety/harm"],
        "help_start": 0.45,
        "help_end": table["helpfulness"],
        "help_gain": table["helpfulness"] - 0.45,
    }
    frame = pd.DataFrame([{"round": 0, **start}, {"round": 50, **table}])
    return Run(Path(f"{defence}{rho}{world}"), {"config": config}, summary, frame)


def test_rows_by_hand(tmp_path: Path) -> None:
    runs = [
        *(made((), 0.0, world, None) for world in (3, 4)),
        made((), 1.0, 3, 40, **{"safety/harm": 0.8}),
        made((), 1.0, 4, None),
        *(made(("lisa",), 1.0, world, None) for world in (3, 4)),
        *(made(("freeze",), 1.0, world, None, helpfulness=0.1) for world in (3, 4)),
    ]
    price = {("lisa", "dpo"): {"time": 1.5, "memory": 1.1}}
    clean, none, lisa, freeze = found = rows(runs, price, 200)
    assert [row["defence"] for row in found] == [CLEAN, NONE, "lisa", "freeze"]
    assert none["left"] == 1 and none["outcomes"] == {"exited": 1, "safe": 1}
    inside = {"mean": 120.0, "low": 40.0, "high": 200.0, "runs": [40.0, 200.0]}
    assert none["updates_inside"] == inside
    assert none["harm"]["mean"] == pytest.approx(0.4)
    assert lisa["learning_retained"] == pytest.approx(1.0) and lisa["holds"]
    assert freeze["learning_retained"] == pytest.approx(-0.35 / 0.45)
    assert [fate(row) for row in found] == ["holds", "mixed", "holds", "idle"]
    text = markdown(found, 200)
    assert "| no defence | dpo | 1/2 [0.01, 0.99] | 120 (40–200) | 0.40 (0.00–0.80) |" in text
    assert "| 1.5x | 1.1x |" in text
    lines = text.splitlines()
    assert {line.count(" | ") for line in lines} == {len(columns(200)) - 1}
    assert json.loads(json.dumps(found)) == [{**row, **_lists(row)} for row in found]
    assert plot_battery(found, 200, tmp_path / "b.png").stat().st_size > 10_000


def _lists(row: dict[str, Any]) -> dict[str, Any]:
    return {"left_interval": list(row["left_interval"])}


def test_fates_are_told_apart() -> None:
    row = {"left": 0, "outcomes": {"safe": 2}, "holds": None, "learning_retained": None}
    assert fate(row) == "unknown"
    assert fate({**row, "outcomes": {"safe": 1, "diverged": 1}}) == "broken"
    assert fate({**row, "holds": False, "learning_retained": 0.2}) == "idle"
    assert fate({**row, "holds": False, "learning_retained": 0.9}) == "above"
    assert set(FATES) == {"holds", "idle", "above", "unknown", "mixed", "broken"}


def test_mechanisms_in_words() -> None:
    row = {"defence": "lisa", "quantity": "distance", "more": False, "without": 2.0, "with": 1.0}
    text = mechanism_markdown([{**row, "works": True}, {**row, "with": 3.0, "works": False}])
    assert "| lisa | distance | less | 2 → 1, 2 → 3 | 1/2 |" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--updats", "4"], "--updats is not a flag"),
        (["--defence", "nope"], "unknown name 'nope'"),
        (["--learner", "nope"], "unknown name 'nope'"),
        (["--worlds", "x"], "--worlds x; allowed: a whole number"),
        (["--updates", "0"], "--updates 0; allowed: >= 1"),
        (["--seeds", "0"], "--seeds 0; allowed: >= 1"),
        (["--out", "a/file"], "out='a/file' is a file; allowed: a directory"),
        (["--mechanisms", "--defence", "freeze"], "--defence freeze; allowed: .*vaccine"),
    ],
)
def test_bad_words_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture, in_tmp: Any
) -> None:
    (in_tmp / "a").mkdir()
    (in_tmp / "a/file").touch()
    assert main(["battery", *words]) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err) and not said.out


@pytest.mark.world
def test_a_battery_from_start_to_picture(embedded_models: Any, in_tmp: Any, capsys: Any) -> None:
    words = "battery --defence freeze --learner dpo --worlds 0 --updates 4 --jobs 1 --out b"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert "3 runs, 4 optimizer steps each" in said
    assert Path("b/battery.png").is_file()
    table = Path("b/battery.md").read_text()
    assert "| freeze | dpo | 0/1 [0.00, 0.97] | 4 |" in table
    first = Path("b/battery.json").read_bytes()
    assert main(words.split()) == 0, "nothing is run or timed again"
    assert Path("b/battery.json").read_bytes() == first


@pytest.mark.world
def test_cost_and_mechanism_of_one_defence(embedded_models: Any) -> None:
    config = configs([("vaccine",)], ["dpo"], worlds=(0,))[1]
    factors = cost(config)
    assert factors["memory"] > 1.0 and factors["time"] > 0
    row = measure("kl_anchor", configs([()], ["dpo"], worlds=(0,))[1])
    assert row["world"] == 0 and row["without"] != row["with"]


def test_only_what_was_asked_is_tabulated(in_tmp: Any, monkeypatch: Any, capsys: Any) -> None:
    """Runs of another length in the same folder are left out."""
    from sim.battery import command
    from sim.sweep import plan

    asked = configs([()], ["dpo"], worlds=(0,), updates=4)
    wanted = [str(run.path) for run in plan(asked, Path("b"))]
    runs = [{"path": path, "failure": None} for path in [*wanted, "b/other"]]
    monkeypatch.setattr("sim.battery.command.sweep", lambda *_: {"runs": runs})
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "_finish", lambda paths, *_: seen.append(list(paths)))
    words = "--defence none --learner dpo --worlds 0 --updates 4 --no-cost --out b".split()
    assert command.command(words) == 0
    assert seen == [wanted]
