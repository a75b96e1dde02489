"""One run in two processes with divided weights (FSDP2 on gloo) is the run of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sim import flags, launch
from sim.checks import check
from sim.config import Config, TextConfig
from sim.run import run

ROOT = Path(__file__).parents[2]
LAUNCH = (
    "launch --use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no"
)
SMALL = (
    "smoke --rho .5 --rounds {rounds} --feedback.batch 12 --evaluation.every 2 "
    "--evaluation.n-harm 16 --evaluation.n-help 16 --threads 1 "
    "--learner.minibatch 24 --learner.micro-batch 7"
)
"""Odd sizes, so that no batch divides evenly."""
LISTS = {
    "sft": ("token_constraint", "security_vectors(steps=2)"),
    "dpo": ("booster(steps=2)", "kl_anchor", "lisa(user_steps=1)"),
    "ppo": ("safe_rlhf", "refusal_loss", "vaccine(rho=5)"),
    "grpo": ("circuit_breakers(steps=2)", "safety_bottleneck", "gradient_penalty"),
}
"""Every kind of hook: batches, losses, phases, adapters, gradients, turns, perturbations."""


def words(learner: str, *further: str, rounds: int = 2) -> list[str]:
    return [*SMALL.format(rounds=rounds).split(), "--learner", learner, *further]


def defended(learner: str) -> list[str]:
    return [word for spec in LISTS[learner] for word in ("--defence", spec)]


CASES = {
    **{learner: words(learner) for learner in LISTS},
    **{f"{learner}-defended": words(learner, *defended(learner)) for learner in LISTS},
    **{
        f"{learner}-adapters": words(learner, "--model.lora-rank", "4", *defended(learner))
        for learner in LISTS
    },
    # Fewer rows than processes: some have none that count.
    "single rows": [
        word.replace("7", "1").replace("12", "4").replace("24", "5")
        for word in words("ppo", "--defence", "vaccine(rho=5)")
    ],
    "checkpointing": words("grpo", "--model.gradient-checkpointing", "on", "--defence", "vaccine"),
}
LONGER = words("ppo", *defended("ppo"), rounds=4)
"""The run that is stopped after two rounds and goes on in another number of processes."""


def runs(cases: dict[str, list[str]], out: Path) -> None:
    """Run or continue every case in a folder of its name."""
    for name, words in cases.items():
        preset, options = flags.read(words)
        run(flags.build(preset, options, None), out / name, resume=(out / name).exists())


def launched(*words: object, fine: bool = True) -> str:
    """What two processes said on stderr."""
    command = [Path(sys.executable).with_name("accelerate"), *LAUNCH.split()]
    done = subprocess.run(
        [str(word) for word in [*command, *words]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (done.returncode == 0) == fine, done.stderr[-6000:]
    return done.stderr


@pytest.fixture(scope="module")
def both(embedded_models, tmp_path_factory) -> tuple[Path, Path]:
    """Folders with the runs of one process, and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    begun = {name: words("ppo", *defended("ppo")) for name in ("one then two", "two then one")}
    runs({**CASES, "one then two": LONGER, "two then one": LONGER}, one)
    runs({"one then two": begun["one then two"]}, two)
    plan = two / "cases.json"
    plan.write_text(json.dumps({**CASES, **begun, "one then two": LONGER}))
    launched(__file__, plan, two)
    runs({"two then one": LONGER}, two)
    return one, two


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.world
@pytest.mark.parametrize("name", [*CASES, "one then two", "two then one"])
def test_two_processes_write_what_one_writes(both, name):
    one, two = (folder / name for folder in both)
    expected, found = rows_of(one), rows_of(two)
    assert len(found) == len(expected) == (5 if "then" in name else 3)
    for row, other in zip(expected, found, strict=True):
        assert other == {
            key: pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
            for key, value in row.items()
        }
    parts = sorted(p.relative_to(one) for p in one.glob("*/part-*.parquet"))
    assert parts == sorted(p.relative_to(two) for p in two.glob("*/part-*.parquet"))
    for part in parts:
        assert pq.read_table(two / part).equals(pq.read_table(one / part)), part
    policies = [sorted(p.name for p in (folder / "policies").iterdir()) for folder in (one, two)]
    assert policies[0] == policies[1]


@pytest.mark.world
def test_the_command_says_everything_once(embedded_models, tmp_path):
    out = tmp_path / "run"
    said = launched("-m", "sim.cli", "run", *words("sft"), "--out", out)
    assert (out / "report.html").exists()
    assert json.loads((out / "manifest.json").read_text())["processes"] == 2
    again = launched("-m", "sim.cli", "run", *words("sft"), "--out", out, fine=False)
    assert said.count("poisonloop: error") == 0 and again.count("poisonloop: error") == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"WORLD_SIZE": "2"}, "2 processes without FSDP"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "with FSDP 1"),
        (
            {
                "WORLD_SIZE": "2",
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "ACCELERATE_MIXED_PRECISION": "bf16",
            },
            "mixed_precision=bf16",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
            },
            "dynamo_backend=INDUCTOR",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params",
        ),
    ],
)
def test_settings_that_a_run_cannot_honour_are_refused_by_name(monkeypatch, settings, named):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        launch.check("run")


def test_commands_and_engines_that_several_processes_cannot_share(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="poisonloop sweep in 2 processes; allowed: run, resume"):
        launch.check("sweep")
    real = Config(engine="vllm", text=TextConfig(model=str(tmp_path), data="rows.jsonl"))
    with pytest.raises(ValueError, match="engine='vllm' in 2 processes; allowed: vllm-server"):
        check(real)


if __name__ == "__main__":  # each of the processes that the tests launch
    launch.check("run")
    launch.join()
    runs(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
