"""The README's own code runs, and does what the text beside it says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(name: str) -> str:
    """The Python block of the README that defines or calls ``name``."""
    return next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if name in b)


@pytest.fixture
def attack_file(tmp_path):
    (tmp_path / "my_attack.py").write_text(block("class CloseCalls"))
    return f"{tmp_path / 'my_attack.py'}:CloseCalls(margin=1.1)"


@pytest.fixture
def defence_file(tmp_path):
    (tmp_path / "my_defence.py").write_text(block("class Anchor"))
    return f"{tmp_path / 'my_defence.py'}:Anchor(strength=5.0)"


def test_own_attack_flips_close_calls_only(attack_file):
    from envs.annotators.view import View
    from envs.attacks import attacks
    from envs.types import VOTE_A, VOTE_B

    attack = attacks.create(attack_file)
    margin = np.array([1.0, -1.0, 2.0, -2.0, 0.0])
    view = type("Close", (), {"margin": margin})()
    honest = np.array([VOTE_A, VOTE_B, VOTE_A, VOTE_B, VOTE_A], np.int8)
    assert "margin" in dir(View), "the stand-in offers what a real view offers"
    assert attack.vote(view, honest).tolist() == [VOTE_B, VOTE_A, VOTE_A, VOTE_B, VOTE_A]


def test_gymnasium_block_runs():
    namespace: dict = {}
    exec(block("gym.make").replace('info["cost"], ', "votes = "), namespace)
    assert namespace["env"].unwrapped.spec.kwargs["rho"] == 0.2
    assert len(namespace["votes"]) == 64
    assert isinstance(namespace["env"], gym.Env)


@pytest.mark.world
def test_own_attack_and_defence_run_in_the_loop(
    attack_file, defence_file, tmp_path, embedded_models
):
    from sim.config import AttackConfig
    from sim.run import run
    from tests.sim.test_run import SMALL

    base = replace(SMALL, rounds=3, attack=AttackConfig(attack_file, rho=1.0))
    run(base, tmp_path / "plain")
    run(replace(base, defences=(defence_file,)), tmp_path / "anchored")
    text = (tmp_path / "plain/rounds.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()[1:]]
    assert sum(row["feedback/rho_flips"] for row in rows) > 0, "the attack flipped votes"
    last = [(tmp_path / name / "policies").glob("*3.safetensors") for name in ("plain", "anchored")]
    first, second = (next(found).read_bytes() for found in last)
    assert first != second, "the defence changed the policy"
    run(replace(base, defences=(defence_file, "freeze")), tmp_path / "frozen")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_linked_files_exist(path):
    assert (Path(__file__).parents[1] / path).exists()


def test_commands_named_in_the_readme_exist():
    from sim.cli import COMMANDS

    named = set(re.findall(r"^poisonloop ([\w-]+)", README, re.M))
    assert named and named <= set(COMMANDS)


def test_functions_named_in_the_readme_take_what_it_gives_them():
    import inspect

    import sim

    named = re.findall(r"`sim\.(\w+)\(([\w, ]*)\)`", README)
    assert {name for name, _ in named} == {"run", "sweep", "load"}
    for name, arguments in named:
        given = arguments.split(", ")
        bound = inspect.signature(getattr(sim, name)).bind(*given)
        assert len(bound.arguments) == len(given)
