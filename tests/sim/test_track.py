"""The tensorboard sink shows every number of every round once, and changes nothing of the run."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim.cli import main
from sim.config import Config, EvaluationConfig, FeedbackConfig
from sim.listener import Listener, Several, Silent
from sim.track import TensorBoard, tracked

SMALL = Config(
    rounds=3,
    feedback=FeedbackConfig(batch=4, responses=2, annotators=20),
    evaluation=EvaluationConfig(every=3, n_harm=8, n_help=8, n_true=0),
)


def shown(run: Path) -> Iterator[tuple[str, int, float]]:
    """Every event in the folder of ``run``, of all files there."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for file in (run / "tensorboard").iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                yield value.tag, event.step, value.tensor.float_val[0]


def numbers(run: Path) -> dict[tuple[str, int], float]:
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return {
        (name, row["round"]): float(value)
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and name != "round"
    }


@pytest.mark.world
def test_every_number_of_every_round_is_there_once_after_a_resume_too(
    embedded_models: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'poisonloop[track]'")
    from sim.run import run

    class Killed(Exception):
        pass

    class Kills(Listener):
        def round(self, row: dict[str, Any]) -> None:
            if row["round"] == 2:
                raise Killed

    path = tmp_path / "run"
    with pytest.raises(Killed):
        run(SMALL, path, listener=Several([TensorBoard(path), Kills()]))
    seen = list(shown(path))
    assert {step for _, step, _ in seen} == {0, 1, 2}
    commits = (path / "commits.jsonl").read_text().splitlines(True)
    for folder in (path, path / ".copy"):  # the second round is lost
        (folder / "commits.jsonl").write_text("".join(commits[:-1]))
    run(SMALL, path, resume=True, listener=tracked(Silent(), "tensorboard", path))
    seen = list(shown(path))
    found = {(name, step): value for name, step, value in seen}
    assert len(found) == len(seen), "no step is there twice"
    wanted = numbers(path)
    assert found.keys() == wanted.keys() and {step for _, step in found} == {0, 1, 2, 3}
    assert all(math.isclose(found[key], wanted[key], rel_tol=1e-6) for key in wanted)
    run(SMALL, tmp_path / "plain")
    for name in ("rounds.jsonl", "summary.json", "commits.jsonl", "manifest.json"):
        assert (path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_without_a_sink_the_listener_is_alone(tmp_path: Path) -> None:
    listener = Silent()
    assert tracked(listener, None, tmp_path) is listener
    assert replace(SMALL, rounds=4).to_dict().keys() == SMALL.to_dict().keys()


@pytest.mark.parametrize("command", [["run", "smoke"], ["sweep", "smoke"], ["resume", "nothing"]])
def test_a_sink_that_is_not_there_is_refused_before_anything_begins(
    command: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert main([*command, "--track", "wandb"]) == 2
    assert "track='wandb'; allowed: tensorboard" in capsys.readouterr().err
    known = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([*command, "--track", "tensorboard"]) == 2
    assert "pip install 'poisonloop[track]'" in capsys.readouterr().err
    assert not list(in_tmp.iterdir())
