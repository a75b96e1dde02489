"""Real vLLM: both doors load, sample, score and take new weights; the loop runs on them.

Each engine lives in a process of its own, because vLLM changes the process that it starts in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make venv-vllm"
)

THINGS = ("a lamp", "the gate", "two boxes", "my shoe", "a kite", "this drum", "the oar", "a bell")

DOORS = """
import json, sys
from pathlib import Path
import torch
from agents import adapters
from agents.engines.backend import Request, Room, VLLMConfig
from agents.engines import vllm_inprocess, vllm_server
from agents.policy import load_causal_lm

path, door = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(5)
before = torch.get_rng_state()
model = load_causal_lm(path)
room = Room(4, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
module = {"inprocess": vllm_inprocess, "server": vllm_server}[door]
engine = module.Engine(path, 64, "float32", VLLMConfig(sequences=32), room)
same = torch.equal(before, torch.get_rng_state())
found = {"threads": torch.get_num_threads(), "rng": bool(same)}
prompts = [[6, 7, 8, 9 + i] for i in range(8)]
request = Request(prompts, list(range(8)), 3, 12, 1.5, 2)


def own(text, temperature=1.0):
    ids = torch.tensor([text])
    logp = (model(ids).logits / temperature).log_softmax(-1)[0, :-1]
    return logp.gather(1, ids[0, 1:, None])[:, 0].detach()


def gap(text, said, temperature=1.0):
    return float((own(text, temperature)[-len(said):] - torch.tensor(said)).abs().max())


try:
    engine.load_weights(model.state_dict())
    first, again = engine.generate(request), engine.generate(request)
    found["ids"] = [one.ids for one in first]
    found["repeats"] = [one.ids for one in again] == found["ids"]
    end = first[0].ids[4]
    short = engine.generate(request._replace(eos_id=end))[0].ids
    found["ends"] = short == first[0].ids[: first[0].ids.index(end) + 1]
    texts = [prompts[i // 3] + one.ids for i, one in enumerate(first)]
    found["sampled"] = max(gap(t, one.logprobs, 1.5) for t, one in zip(texts, first))
    found["scored"] = max(gap(t, s) for t, s in zip(texts, engine.score(texts)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    found["stale"] = max(gap(t, s) for t, s in zip(texts, engine.score(texts)))
    engine.load_weights(model.state_dict())
    found["synced"] = max(gap(t, s) for t, s in zip(texts, engine.score(texts)))
    base = {name: value.clone() for name, value in adapters.base_weights(model).items()}
    bare = engine.score(texts[:1])[0].tolist()
    adapters.inject(model, adapters.TRAINED, "all-linear", 4, 8, seed=0)
    found["adapted"] = 0.0
    for _ in range(200 if door == "inprocess" else 5):
        for p in adapters.adapter_params(model, adapters.TRAINED):
            p.data.add_(0.05 * torch.randn_like(p))
        engine.load_adapter(*adapters.trained_adapter(model))
        found["adapted"] = max(found["adapted"], gap(texts[0], engine.score(texts[:9])[0]))
    after = adapters.base_weights(model)
    found["base kept"] = all(torch.equal(value, after[name]) for name, value in base.items())
    engine.load_weights(adapters.plain_weights(model))
    found["merged"] = gap(texts[0], engine.score(texts[:1])[0])
    engine.load_weights(base)
    engine.sleep()
    engine.wake()
    found["bare again"] = engine.score(texts[:1])[0].tolist() == bare
finally:
    engine.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tied byte-level Llama that refuses and helps, with its rows beside it."""
    folder = tmp_path_factory.mktemp("vllm")
    rows = []
    for thing in THINGS:
        answers = [f"First take {thing} and turn it.", f"I'm sorry, I can't {thing}."]
        for verb in ("paint", "glorb"):
            prompt = f"How do I {verb} {thing}?"
            rows.append({"prompt": prompt, "harmful": verb == "glorb", "responses": answers})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "examples/train_tiny_llama.py",
        "--data",
        folder / "rows.jsonl",
        "--out",
        folder / "model",
    ]
    words += "--vocabulary 320 --width 64 --layers 2 --epochs 60 --batch 8 --threads 1".split()
    python(*words)
    return folder / "model"


def python(*words, env=None, fine: bool = True) -> subprocess.CompletedProcess:
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": root, **settings},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not fine or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def doors(model, tmp_path_factory) -> dict[str, dict]:
    script = tmp_path_factory.mktemp("doors") / "doors.py"
    script.write_text(DOORS)
    said = {name: python(script, model, name).stdout for name in ("inprocess", "server")}
    return {name: json.loads(out.splitlines()[-1]) for name, out in said.items()}


@pytest.mark.parametrize("door", ["inprocess", "server"])
def test_an_engine_samples_scores_and_follows_the_policy(doors, door):
    found = doors[door]
    assert found["repeats"] and found["ends"]
    assert found["sampled"] < 1e-4, "log-probabilities of the temperature that sampled"
    assert found["scored"] < 1e-4
    assert found["stale"] > 0.1, "new weights are not there by themselves"
    assert found["synced"] < 1e-4, "every tensor arrives, a tied head too"
    assert found["adapted"] < 1e-3, "adapter after adapter, none of them the one before"
    assert found["base kept"] and found["bare again"], "the base is never touched by an adapter"
    assert found["merged"] < 1e-3
    assert found["threads"] == 1 and found["rng"], "the trainer's process is left as it was"


def test_both_doors_say_the_same(doors):
    assert doors["inprocess"]["ids"] == doors["server"]["ids"]


RUN = (
    "-m sim.cli run --learner {learner} --rho .5 --rounds 3 --feedback.batch 16 "
    "--feedback.annotators 10 --sampler.max-new-tokens 16 --evaluation.n-harm 16 "
    "--evaluation.n-help 16 --evaluation.n-true 16"
)


def loop(model, out, engine, learner, *further, **settings):
    words = [*RUN.format(learner=learner).split(), "--model", model]
    words += ["--data", model.parent / "rows.jsonl", "--out", out, "--engine", engine, *further]
    return python(*words, **settings)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("learner", ["grpo", "dpo"])
def test_the_loop_runs_and_proves_every_sync(model, tmp_path, learner):
    """One learner with all its weights, one through an adapter."""
    further = ("--vllm.correction", "importance")
    if learner == "dpo":
        further = ("--model.lora-rank", "4", "--learner.lr", "1e-3")
    loop(model, tmp_path / "run", "vllm", learner, *further)
    rows = rows_of(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row["sampler/gap"] < 1e-4 and row["sync/gap"] < 1e-4
        assert ("sampler/weight" in row) == (learner == "grpo")
    assert rows[-1]["sync/moved"] == pytest.approx(1, abs=0.01)
    assert rows[-1]["clock/optimizer_steps"] > 0


def test_a_server_that_dies_stops_a_run_that_can_go_on(model, tmp_path):
    """The server is killed after the first round; the run names it, and resumes with another."""
    out = tmp_path / "run"
    killer = tmp_path / "kill.py"
    killer.write_text(
        "import os, signal, sys\n"
        "from agents.engines import vllm_server\n"
        "from sim.cli import main\n"
        "generate, calls = vllm_server.Engine.generate, []\n"
        "def dying(self, request):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        os.killpg(self.process.pid, signal.SIGKILL)\n"
        "        self.process.wait()\n"
        "    return generate(self, request)\n"
        "vllm_server.Engine.generate = dying\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = RUN.format(learner="sft").split()[2:]
    words += ["--model", model, "--data", model.parent / "rows.jsonl", "--out", out]
    done = python(killer, *words, "--engine", "vllm-server", fine=False)
    assert done.returncode == 1
    assert "stopped: vllm: " in done.stderr and "server died" in done.stderr
    assert f"poisonloop resume {out}" in done.stderr
    begun = rows_of(out)
    assert 1 <= len(begun) < 4
    python("-m", "sim.cli", "resume", out)
    rows = rows_of(out)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[: len(begun)] == begun


def test_two_processes_share_a_server(model, tmp_path):
    """Weights that are divided reach it whole; both processes go on with its answers."""
    script = [Path(sys.executable).with_name("accelerate"), "launch", "--use_fsdp"]
    script += "--fsdp_version 2 --num_processes 2 --num_machines 1 --mixed_precision no".split()
    for name, further in (("whole", ()), ("adapters", ("--model.lora-rank", "4"))):
        out = tmp_path / name
        words = [*RUN.format(learner="grpo").split(), "--model", model, "--out", out, *further]
        words += ["--data", model.parent / "rows.jsonl", "--engine", "vllm-server"]
        python(*script, "--dynamo_backend", "no", *words)
        rows = rows_of(out)
        assert [row["round"] for row in rows] == [0, 1, 2, 3]
        assert rows[-1]["sync/moved"] == pytest.approx(1, abs=0.01)
        assert max(row["sampler/gap"] for row in rows[1:]) < 1e-4
