"""``poisonloop defend``, the table of defences, and defences that come from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.defence import CONSTRAINTS, defences
from sim.cli import main
from sim.hashes import digest
from sim.listing import defence_rows

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = (
    "from agents.offline import OfflineDefence\n"
    "class Mine(OfflineDefence):\n"
    "    needs = frozenset({'refusal'})\n"
    "    def __init__(self, steps=2, lr=1e-3, batch=4):\n"
    "        super().__init__(steps, lr, batch)\n"
    "    def loss(self, ctx, step):\n"
    "        return ctx.lm_loss(ctx.data['refusal'].next(self.batch))\n"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out new", "defence=none; allowed: offline defences"),
        ("--defence lisa --out new", "defence='lisa' acts during training only; allowed: offline"),
        ("--defence mine.py:Mine+lisa --out new", "'lisa' acts during training only"),
        ("--defence mine.py:Mine --out old", "out='old' exists; allowed: a new directory"),
        ("--defence mine.py:Mine", "--out is missing; allowed: a new directory"),
        ("--defence mine.py:Mine(steps=-1) --out new", "steps=-1; allowed: >= 0"),
        ("--defence mine.py:Mine --out /proc/new/model", "out='/proc/new/model': "),
        ("--defence mine.py:Mine --out new --no-such 1", "--no-such is not a flag"),
    ],
)
def test_bad_words_are_one_line_and_leave_nothing(
    words: str, message: str, in_tmp: Path, capsys: Any
) -> None:
    (in_tmp / "old").mkdir()
    (in_tmp / "mine.py").write_text(OFFLINE)
    assert main(["defend", *words.split()]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and len(complaint.splitlines()) == 1
    left = {path.name for path in in_tmp.iterdir()} - {"__pycache__"}
    assert left == {"old", "mine.py"}


def test_help_names_the_offline_defences(capsys: Any) -> None:
    assert main(["defend", "--help"]) == 0
    said = capsys.readouterr().out
    offline = [name for name in defences.names() if defences.get(name).offline]
    assert all(name in said for name in offline) and "refusal_loss" not in said


def test_the_folder_of_real_text_is_taken_with_its_settings(in_tmp: Path) -> None:
    from sim import flags
    from sim.defend_command import next_lines

    (in_tmp / "out").mkdir()
    (in_tmp / "out/config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    words = "--model m --data d.jsonl --sampler.max-new-tokens 9 --defence rmu --out out".split()
    config = flags.build(*flags.read(words[:-2]))
    lines = next_lines(words, config, Path("out"))
    assert lines[0].endswith(f"poisonloop run {' '.join(words[:-2])} --rho .4")
    assert lines[2].endswith(
        "run --model out --data d.jsonl --sampler.max-new-tokens 9 --rho .4"
    ), "the usual 64 tokens of a prompt fit"


@pytest.mark.world
def test_a_defended_model_is_saved_whole(
    embedded_models: Any, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from agents.policy import load_causal_lm, load_tokenizer
    from sim import defended

    monkeypatch.setattr(defended, "cache_folder", lambda: in_tmp / "cache")
    (in_tmp / "mine.py").write_text(OFFLINE)
    assert main(["defend", "smoke", "--defence", "mine.py:Mine(steps=3)", "--out", "a/b"]) == 0
    out = in_tmp / "a/b"
    facts = json.loads((out / "defended.json").read_text())
    weights = (out / "model.safetensors").read_bytes()
    assert facts["hashes"]["defended"] == digest([out / "model.safetensors"])
    assert facts["defences"] == [f"{in_tmp / 'mine.py'}:Mine(steps=3)"]
    assert facts["world"]["seed"] == 0 and list(facts["plugin_hashes"]) == facts["defences"]
    model, start = load_causal_lm(out), load_causal_lm(embedded_models.aligned)
    both = zip(model.parameters(), start.parameters(), strict=True)
    moved = [float((mine - theirs).detach().abs().max()) for mine, theirs in both]
    assert 0 < max(moved) < 0.1, "three small steps away from the aligned model"
    words = load_tokenizer(out)
    assert words.get_vocab() == load_tokenizer(embedded_models.tokenizer).get_vocab()
    assert [path.name for path in (in_tmp / "a").iterdir()] == ["b"], "no temporary folder stays"
    said = capsys.readouterr().out
    assert "poisonloop run smoke --defence 'mine.py:Mine(steps=3)' --rho .4\n" in said
    asked = "poisonloop run --model a/b --data FILE --text.prompt-tokens 40 --rho .4\n"
    assert asked in said, "64 positions, of which 24 are for the answer"
    assert main(["defend", "--defence", "mine.py:Mine(steps=3)", "--out", "again"]) == 0
    assert (in_tmp / "again/model.safetensors").read_bytes() == weights
    assert len(list((in_tmp / "cache").glob("*/config.json"))) == 1, "built once"


def test_the_list_says_what_a_defence_constrains_needs_and_costs() -> None:
    rows = {row[0]: row[1:] for row in defence_rows()}
    assert set(rows) == set(defences.names())
    summary = defences.summaries()["vaccine"]
    facts = ("embedding", "while training", "perturbation", "-", "2x", "Huang et al. 2024", summary)
    assert rows["vaccine"] == facts
    assert rows["refusal_loss"][:4] == ("loss", "while training", "additive", "refusal")
    assert rows["rep_noise"][1:3] == ("before release", "offline")
    assert rows["lisa"][2:4] == ("turns", "refusal"), "of its default arguments"
    assert {row[0] for row in rows.values()} <= set(CONSTRAINTS)
    assert all(row[-1] for row in rows.values()), "every defence says what it does"


@pytest.mark.parametrize("columns", [60, 80, 139, 140, 200])
def test_the_list_loses_nothing(columns: int, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= columns
    words = said.split()
    facts = " ".join(fact for row in defence_rows() for fact in row if fact != "-").split()
    assert [word for word in facts if word not in words] == []
    headings = ("data needed", "what it does")
    assert all((heading in said) == (columns >= 140) for heading in headings)
    assert "harmful_asker" in said and "boltzmann" in said and "grpo" in said


def test_the_list_in_a_pipe_has_every_sentence_on_one_line(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    lines = [line.strip() for line in said.splitlines()]
    for name, constraint, acts, place, _needs, cost, _paper, summary in defence_rows():
        told = lines[lines.index(f"{name}  {summary}") + 1]
        assert told.startswith(f"{constraint} · acts {acts} · place in a list: {place} · needs ")
        assert f"cost {cost}" in told
    assert max(map(len, said.splitlines())) < 300
    assert "Lists of defences usually go offline, additive, turns, perturbation" in said


def test_the_example_is_the_readmes_and_fifteen_lines() -> None:
    text = (ROOT / "examples/own_defence.py").read_text()
    code = text.split('"""\n', 1)[1].strip()
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code in [block.strip() for block in readme]
    lines = [line for line in code.splitlines() if line.strip() and '"""' not in line]
    assert len(lines) <= 15


def test_the_example_does_what_it_says() -> None:
    """Refusals move less, under every learner, the stronger it is."""
    from agents.policy import response_logprobs
    from sim.score import tiny

    moved = {}
    for strength in (0, 10):
        agent = tiny.agent("sft", (f"{ROOT}/examples/own_defence.py:KeepRefusals({strength=})",))
        tiny.rounds(agent, 0, 6)
        rows = tiny.roles()["refusal"].sequences
        now, before = (
            response_logprobs(m, rows) for m in (agent.policy.model, agent.policy.reference)
        )
        moved[strength] = float((now - before).square().sum())
    assert 0 < moved[10] < 0.7 * moved[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which somebody else's package was installed, offline."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "tests/plugin_package", folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder / "site"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def command_line(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``poisonloop`` in a new process that finds ``site``."""
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "sim.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.world
def test_a_defence_of_an_installed_package(
    embedded_models: Any, installed: Path, tmp_path: Path
) -> None:
    run = ["run", "smoke", "--rounds", "1", "--defence", "slow_start(steps=99)"]
    done = command_line(installed, *run, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert rows[-1]["round"] == 1 and rows[-1]["clock/optimizer_steps"] == 0, "it left out all"
    refused = command_line(tmp_path, *run, "--out", str(tmp_path / "other"))
    assert refused.returncode == 2 and "unknown name 'slow_start'" in refused.stderr


def test_a_defence_in_a_module_of_the_working_folder(in_tmp: Path) -> None:
    (in_tmp / "my_offline_module.py").write_text(OFFLINE)
    made = defences.create("my_offline_module:Mine(steps=7)")
    assert made.steps == 7 and made.offline
