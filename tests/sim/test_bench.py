"""The bench on a tiny random model: its figures add up, and TRL's side does the same work."""

import concurrent.futures
import json

import numpy as np
import pytest
import torch

from agents.learners.grpo import GRPOConfig
from agents.learners.reward_model import RewardModelConfig
from agents.policy import load_causal_lm
from sim.bench import growth
from sim.bench.command import main
from sim.bench.growth_plot import plot_growth
from sim.bench.machine import Weights, copy_rate, matmul_rate, read_memory, reset_peak, weights_of
from sim.bench.measure import bench
from sim.bench.memory import memory
from sim.bench.rounds import STAGES, OurRounds, Stopwatch
from sim.bench.shapes import Shape, save_random_policy, shape_of
from sim.bench.table import show, show_memory
from sim.config import Config, EvaluationConfig, FeedbackConfig
from sim.scenario import Scenario


def half_trained(model, world):
    """A few steps on refusals."""
    from sim.world_training import as_sequences, lm_loss

    rng, keys = np.random.default_rng(0), world.keys("alignment")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        picked = rng.choice(keys, 32)
        answers = world.answers(picked, "refusal", rng)
        optimizer.zero_grad()
        lm_loss(model, as_sequences(world.prompt_ids(picked), answers)).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    """World 0 with tiny models; the policy half refuses, so that people have something to say."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from envs.world import World
    from envs.world.tokenizer import make_tokenizer

    world, root = World(0), tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=world.vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
        num_labels=1,
    )
    tokenizer = make_tokenizer(world.language.words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, maker in (("lm", LlamaForCausalLM), ("rm", LlamaForSequenceClassification)):
            model = maker(config)
            if name == "lm":
                half_trained(model, world)
            model.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    return Scenario(
        tokenizer=root / "lm",
        policy=root / "lm",
        reward_model=root / "rm",
        perplexity_model=root / "lm",
        classifier=root / "rm",
        table=world.table("eval"),
        triggered=None,
        scorer=world.oracle,
        environment={"world": 0},
        roles={},
        harm_source="oracle",
    )


def small(batch=8):
    """``batch`` prompts with four answers each, in two minibatches."""
    return Config(
        feedback=FeedbackConfig(batch=batch, responses=4, annotators=10),
        evaluation=EvaluationConfig(n_harm=8, n_help=8),
        learner=GRPOConfig(minibatch=2 * batch, epochs=2, lr=1e-4),
        reward_model=RewardModelConfig(minibatch=8, steps=3),
    )


def assert_round_adds_up(side):
    seconds = side["seconds"]
    total = sum(seconds[stage]["median"] for stage in STAGES)
    assert total == pytest.approx(seconds["round"]["median"], rel=0.1)
    assert all(s["low"] <= s["median"] <= s["high"] for s in seconds.values())
    assert side["response_tokens_per_second"]["round"] > 0


def test_figures_of_our_round(scenario, tmp_path, capsys):
    threads = torch.get_num_threads()
    result = bench(small(), scenario, repetitions=1, threads=1)
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    figures = result["grpo_round"]
    assert set(figures) == {"work", "ours"} and "same_work" not in result
    work, ours = figures["work"], figures["ours"]
    assert work["responses"] == 32 and work["optimizer_steps"] == 4
    assert work["reward_model_steps"] == 3 and 32 <= work["response_tokens"] <= 32 * 24
    assert_round_adds_up(ours)
    assert ours["seconds"]["evaluate"]["median"] > 0
    assert all(0 < share < 1 for share in ours["matmul_share"].values())
    assert set(ours["memory_mib"]["peak"]) == {*STAGES, "evaluate"}
    show(result)
    assert "reward_model" in capsys.readouterr().out


@pytest.mark.slow
def test_trls_round_does_the_same_work(scenario, capsys):
    result = bench(small(24), scenario, repetitions=3, threads=1, against="trl")
    assert all(result["same_work"].values()), result["differences"]
    assert set(result["same_work"]) == {
        "responses",
        "optimizer_steps",
        "reward_model_steps",
        "response_tokens",
        "loss",
        "dpo_steps",
        "dpo_loss",
    }
    dpo = result["dpo_round"]
    assert dpo["work"]["pairs"] % 32 == 0 and dpo["ratio_to_trl"] > 0
    figures = result["grpo_round"]
    assert_round_adds_up(figures["trl"])
    low, high = figures["ratio_quartiles"]
    assert 0 < low <= figures["ratio_to_trl"] <= high
    assert len(figures["trl"]["seconds_by_per_device_batch"]) == 4
    show(result)
    assert "times as long" in capsys.readouterr().out


def test_our_rounds_are_the_loops_own(scenario):
    """Timed from outside: the same policy as calling act, step and learn by hand."""
    from sim.factory import make_agent, make_env

    rounds, config = OurRounds(small(), scenario), small()
    env, agent = make_env(config, scenario), make_agent(config, scenario)
    observation, _ = env.reset(seed=config.seed)
    for _ in range(2):
        rounds()
        rounds.measure()
        observation, *_, info = env.step(agent.act(observation).ids)
        agent.learn(info["labels"])
    for ours, plain in zip(
        rounds.agent.policy.model.parameters(), agent.policy.model.parameters(), strict=True
    ):
        assert torch.equal(ours, plain)


def test_operations_by_hand(scenario):
    rounds = OurRounds(small(), scenario)
    rounds()
    policy = weights_of(rounds.agent.policy.model)
    vocabulary = rounds.agent.policy.model.config.vocab_size
    # Two layers of four 16 x 16 attention maps and three 16 x 32 ones; a head over the vocabulary.
    assert policy == Weights(2 * (4 * 256 + 3 * 512), 16 * vocabulary)
    assert weights_of(rounds.agent.reward_model.ctx.model) == Weights(policy.body, 16)
    assert Weights(10, 3).forward(5, 2) == 2 * (50 + 6)
    sequences, work = rounds.sequences(), rounds.operations()
    answers = int(sequences.mask.sum())
    asked = {tuple(ids[mask == 1].tolist()) for ids, mask in zip(*sequences[:2], strict=True)}
    prompts = sum(map(len, asked))
    forward = 2 * (policy.body * (prompts + answers) + policy.head * answers)
    assert work["update"] == 3 * 2 * forward and work["sample"] == forward


def test_stopwatch_gives_an_inner_stage_its_own_time(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 20.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.stage("outer"), watch.stage("inner"):
        pass
    with watch.stage("outer"):
        pass
    assert watch.take() == {"inner": 3.0, "outer": 7.0 + 2.0} and watch.take() == {}


def test_machine_yardsticks():
    assert matmul_rate(1) > 1e8 and copy_rate(1) > 1e8
    if read_memory().now is None:
        return
    block = np.ones(20_000_000)
    peak = read_memory().peak
    del block
    reset_peak()
    assert read_memory().peak < peak - 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repetitions", "0"], "repetitions=0; allowed: >= 1"),
        (["--threads", "0"], "threads=0; allowed: 1 to 1024"),
        (["no_such_preset"], "preset='no_such_preset'; allowed: .*default"),
        (["--shape", "7b"], "shape='7b'; allowed: 100k"),
        (["--model", "x"], "--model and --data; allowed: both"),
        (["--model", "x", "--shape", "1m"], "--model with shape"),
        (["--growth", "x.png", "--against", "trl"], "--growth with against"),
        (["--memory", "--threads", "1"], "--memory with threads"),
        (["--memory", "--vocabulary", "1"], "vocabulary=1; allowed: 16 to"),
    ],
)
def test_bad_words_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        main(words)


@pytest.fixture
def here(monkeypatch):
    """Work of other processes is done in this one."""

    class Here(concurrent.futures.Executor):
        def __init__(self, *_, **__):
            pass

        def submit(self, work, *words):
            future = concurrent.futures.Future()
            future.set_result(work(*words))
            return future

    monkeypatch.setattr("sim.bench.memory.ProcessPoolExecutor", Here)
    monkeypatch.setattr("sim.bench.growth.ProcessPoolExecutor", Here)


def test_memory_by_part_counts_what_is_there(here, capsys):
    result = memory("100k", 50)
    for side in result["mib"].values():
        parts = side["parts"]
        assert parts["weights"] == parts["reference"] == parts["gradients"] > 0
        assert parts["optimizer"] == pytest.approx(2 * parts["weights"], rel=0.01)
        # Answers of 24 words, their log-softmax in float32, in the two micro-batches of 128 rows.
        assert parts["logits"] == pytest.approx(128 * 24 * 50 * 4 / 2**20, rel=0.01)
        assert parts["sampler's cache"] == 256 * 36 * 64 * 2 * 2 * 4 / 2**20
        assert parts["activations"] > parts["logits"]
    show_memory(result)
    assert "activations" in capsys.readouterr().out


def test_tiles_bound_the_logits_that_are_formed(here, monkeypatch):
    monkeypatch.setattr("agents.policy.TILE", 500)
    parts = memory("100k", 50)["mib"]["grpo"]["parts"]
    assert parts["logits"] == 500 * 4 / 2**20


def test_a_vocabulary_as_wide_as_the_layers_is_refused():
    with pytest.raises(ValueError, match="vocabulary=128; allowed: not 64 or 128"):
        memory("100k", 128)


def test_random_policies_have_the_size_in_their_name(tmp_path):
    for name in ("100k", "1m"):
        width, layers = shape_of(name)
        path = save_random_policy(tmp_path / name, Shape(width, layers), 50)
        body = weights_of(load_causal_lm(path)).body
        assert body == 10 * layers * width**2
        assert body == pytest.approx({"100k": 1e5, "1m": 1e6}[name], rel=0.2)


def linear(value, threads):
    return [growth.Point(value, 0.5 * value, 100.0)]


def test_growth_tells_and_draws(here, monkeypatch, tmp_path):
    axis = growth.Axis("tokens", (2, 4), linear)
    monkeypatch.setattr(growth, "AXES", {"tokens": axis, "rounds": axis._replace(flat=True)})
    said = []
    curves = dict(growth.growth(1, said.append))
    assert curves["tokens"]["exponent"] == pytest.approx(1.0)
    assert curves["rounds"]["exponent"] is None
    assert [point["value"] for point in curves["tokens"]["points"]] == [2, 4] and len(said) == 4
    drawn = plot_growth(curves, tmp_path / "new" / "growth.png")
    assert drawn.stat().st_size > 10_000


@pytest.mark.world
@pytest.mark.parametrize("name", ["prompts", "tokens", "parameters"])
def test_axes_can_be_measured_at_their_ends(name, monkeypatch):
    """The whole way to the first round; the rounds themselves take minutes."""
    monkeypatch.setattr(OurRounds, "__call__", lambda rounds: {"round": 1.0})
    axis = growth.AXES[name]
    for value in (axis.values[0], axis.values[-1]):
        (point,) = axis.measure(value, 1)
        assert point.seconds == 1.0 and point.value > 0


@pytest.mark.world
def test_a_long_run_is_told_stretch_by_stretch():
    points = growth.rounds(20, 1)
    assert [point.value for point in points] == list(range(2, 21, 2))
    assert all(point.seconds > 0 for point in points)
