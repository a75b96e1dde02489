"""The vLLM sampler on a backend of the test's own: syncs, their proof, and what it corrects."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from agents.adapters import TRAINED, adapter_params, inject, plain_weights
from agents.batches import Sequences
from agents.defence import Defence
from agents.engines.backend import (
    Completion,
    EngineFailed,
    VLLMConfig,
    cache_bytes,
    engine_arguments,
    within,
)
from agents.engines.mismatch import CAP, corrected
from agents.engines.transformers_engine import Sampled, SamplerConfig, TransformersSampler
from agents.engines.vllm_sampler import VLLMSampler
from agents.learners.update import Diverged
from agents.policy import response_logprobs
from envs.usage import UsageError


class CopyBackend:
    """Another copy of the policy; ``deaf`` ones ignore what they are sent, ``late`` ones lag."""

    def __init__(self, tiny, off: float = 0.0):
        self.tiny = tiny
        self.model = tiny.model(seed=99)
        self.off = off
        self.deaf = False
        self.loads, self.adapters = 0, []
        self.closed = 0
        self.said = []

    def generate(self, request):
        self.said.append("generate")
        config = SamplerConfig(request.max_new_tokens, request.temperature)
        sampler = TransformersSampler(config, self.tiny.tokenizer())
        answers = []
        for prompt, seed in zip(request.prompts, request.seeds, strict=True):
            ids = torch.tensor([prompt])
            said = sampler.sample(self.model, ids, torch.ones_like(ids), request.k, seed)
            for row, mask in enumerate(said.sequences.mask.bool()):
                logprobs = said.logprobs[row, mask] + self.off
                answers.append(
                    Completion(said.sequences.ids[row, mask].tolist(), logprobs.tolist())
                )
        return answers

    def score(self, texts):
        found = []
        for text in texts:
            ids = torch.tensor([text])
            one = Sequences(
                ids[:, :1], torch.ones(1, 1).long(), ids[:, 1:], torch.ones_like(ids)[:, 1:]
            )
            found.append(response_logprobs(self.model, one)[0].double().numpy() + self.off)
        return found

    def load_weights(self, weights):
        self.loads += 1
        if not self.deaf:
            self.model.load_state_dict(dict(weights))

    def load_adapter(self, tensors, settings):
        self.adapters.append({name: value.clone() for name, value in tensors.items()})

    def sleep(self):
        self.said.append("sleep")

    def wake(self):
        self.said.append("wake")

    def close(self):
        self.closed += 1


def make(tiny, backend, **fields):
    config = SamplerConfig(max_new_tokens=tiny.answer)
    return VLLMSampler(config, VLLMConfig(**fields), tiny.tokenizer(), lambda targets: backend)


def nudged(model, size=0.01):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_answers_come_with_the_trainers_logprobs_and_repeat(tiny):
    model, prompts = tiny.model(), tiny.prompts(6)
    sampler = make(tiny, CopyBackend(tiny))
    sampler.load(model, 0)
    first, again = (sampler.sample(model, *prompts, 3, 5) for _ in range(2))
    assert torch.equal(first.sequences.ids, again.sequences.ids)
    other = sampler.sample(model, *prompts, 3, 6)
    assert not torch.equal(first.sequences.ids, other.sequences.ids)
    expected = response_logprobs(model, first.sequences)
    torch.testing.assert_close(first.logprobs, expected, rtol=0, atol=1e-5)
    assert torch.equal(first.sequences.prompt_ids, prompts[0].repeat_interleave(3, 0))
    ends = first.sequences.mask.sum(1)
    assert ends.min() < tiny.answer, "some answers end early"
    assert (first.sequences.ids[first.sequences.mask == 0] == tiny.pad).all()


def test_weights_are_sent_once_a_version_and_phase(tiny):
    model, backend = tiny.model(), CopyBackend(tiny)
    sampler = make(tiny, backend)
    for version, phase in [(0, ""), (0, ""), (1, ""), (1, "serve"), (1, "serve"), (1, "eval")]:
        sampler.load(model, version, phase)
    assert backend.loads == 4
    hot = sampler.at(SamplerConfig(tiny.answer, temperature=2.0))
    hot.load(model, 1, "eval")
    assert backend.loads == 4, "one engine at every temperature"
    sampler.close()
    sampler.close()
    assert backend.closed == 1


@pytest.mark.parametrize("learner", ["sft", "grpo"])
def test_the_engine_sleeps_while_the_learner_learns(tiny, learner):
    agent, backend = tiny.agent(learner), CopyBackend(tiny)
    agent.sampler = agent.rollout_sampler = make(tiny, backend)
    learn = agent.learner.learn
    agent.learner.learn = lambda *batch: (backend.said.append("learn"), learn(*batch))[1]
    tiny.rounds(agent, 0, 2)
    said = [word for word in backend.said if word != "score"]
    assert said == ["generate", "sleep", "learn", "wake", "generate", "sleep", "learn"]
    agent.close()
    agent.sampler = agent.rollout_sampler = make(tiny, backend, sleep=False)
    tiny.rounds(agent, 2, 4)
    assert backend.said[len(said) :] == ["generate", "learn", "generate", "learn"]


def test_of_a_policy_with_an_adapter_the_adapter_alone_is_sent(tiny):
    model, backend = tiny.model(), CopyBackend(tiny)
    plain = tiny.weights(model)
    inject(model, TRAINED, "all-linear", 2, 4, seed=0)
    sampler = make(tiny, backend)
    for version in range(3):
        with torch.no_grad():
            for p in adapter_params(model, TRAINED):
                p.add_(0.1)
        sampler.load(model, version)
    assert backend.loads == 1 and torch.equal(tiny.weights(backend.model), plain)
    assert len(backend.adapters) == 3 and list(backend.adapters[0]) == list(backend.adapters[2])
    assert all("lora_" in name for name in backend.adapters[0])
    inject(model, "another", "all-linear", 2, 4, seed=1)  # a defence's, beside it
    sampler.load(model, 3)
    assert backend.loads == 2 and len(backend.adapters) == 3
    merged = plain_weights(model)
    assert all(torch.equal(v, merged[n]) for n, v in backend.model.state_dict().items())


def test_a_sync_that_reaches_the_engine_is_proved(tiny):
    model, sampler = tiny.model(), make(tiny, CopyBackend(tiny))
    sampler.load(model, 0)
    sampler.sample(model, *tiny.prompts(6), 2, 0)
    assert sampler.told()["sync/gap"] < 1e-5
    sampler.load(nudged(model), 1)
    found = sampler.told()
    assert found["sync/moved"] == pytest.approx(1, abs=1e-3) and found["sync/gap"] < 1e-5
    assert sampler.told() == {}


@pytest.mark.parametrize("size", [0.03, 3e-7], ids=["large step", "small step"])
def test_old_weights_stop_the_run_by_name(tiny, size):
    """The sabotage: the engine drops a sync. A small step hides in the gap, not in the movement."""
    model, backend = tiny.model(), CopyBackend(tiny)
    sampler = make(tiny, backend)
    sampler.load(model, 0)
    sampler.sample(model, *tiny.prompts(6), 2, 0)
    backend.deaf = True
    named = "other weights than the policy's" if size > 1e-3 else "did not reach the engine"
    with pytest.raises(EngineFailed, match=f"version 7.*{named}"):
        sampler.load(nudged(model, size), 7)


def test_weights_put_back_are_sent_though_the_version_is_the_same(tiny):
    """The true crossing asks earlier policies of a finished run."""
    agent, backend = tiny.agent("sft"), CopyBackend(tiny)
    agent.sampler = agent.rollout_sampler = make(tiny, backend)
    tiny.rounds(agent, 0, 1)
    early = {name: value.clone() for name, value in agent.stack.ctx.export_weights().items()}
    tiny.rounds(agent, 1, 3)
    late = tiny.weights(backend.model)
    agent.load_policy(early)
    agent.respond(*tiny.prompts(3), 1, 0)
    assert not torch.equal(tiny.weights(backend.model), late)
    assert torch.equal(tiny.weights(backend.model), tiny.weights(agent.policy.model))


def test_a_policy_without_a_distribution_has_diverged(tiny):
    agent = tiny.agent("sft")
    agent.sampler = agent.rollout_sampler = make(tiny, CopyBackend(tiny))
    tiny.rounds(agent, 0, 1)
    with torch.no_grad():
        agent.policy.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(Diverged):
        agent.act(tiny.observation(1))


def test_steps_too_small_to_hear_add_up(tiny):
    model, backend = tiny.model(), CopyBackend(tiny, off=0.01)  # as rounding may put them apart
    sampler = make(tiny, backend, tolerance=1.0)
    sampler.load(model, 0)
    sampler.sample(model, *tiny.prompts(6), 2, 0)
    backend.deaf = True
    with pytest.raises(EngineFailed, match="the engine by"):
        for version in range(1, 400):
            sampler.load(nudged(model, 1e-5), version)
    assert version > 2


def test_an_engine_with_other_weights_never_answers(tiny):
    backend = CopyBackend(tiny)
    backend.deaf = True
    sampler = make(tiny, backend)
    sampler.load(tiny.model(), 0)
    with pytest.raises(EngineFailed, match=r"version 0 left the engine.*allowed 0.001"):
        sampler.sample(tiny.model(), *tiny.prompts(6), 2, 0)


@pytest.mark.parametrize("mode", ["none", "recompute", "importance"])
def test_corrections(tiny, mode):
    model, sequences = tiny.model(), tiny.sequences(80)
    own = response_logprobs(model, sequences)
    shift = torch.linspace(-0.2, 0.2, 80)[:, None] * sequences.mask
    sampled = Sampled(sequences, own - shift)  # t - s = shift
    out, gaps = corrected(model, sampled, 1.0, mode)
    rows = slice(64) if mode == "none" else slice(None)
    tokens = sequences.mask[rows].sum()
    assert gaps["sampler/gap"] == pytest.approx(float(shift[rows].abs().sum() / tokens), abs=1e-5)
    assert gaps["sampler/kl"] == pytest.approx(float(-shift[rows].sum() / tokens), abs=1e-5)
    old = sampled.logprobs if mode == "none" else own
    torch.testing.assert_close(out.logprobs, old)
    if mode != "importance":
        assert out.weight is None
        return
    torch.testing.assert_close(out.weight, shift.sum(1).exp().clamp(max=CAP), rtol=0, atol=1e-4)
    assert out.weight.max() == CAP and out.weight.min() < 1


@pytest.mark.parametrize("learner", ["grpo", "ppo", "dpo", "sft"])
def test_the_training_system_learns_alike_from_either_sampler(tiny, learner):
    """The backend draws its own answers, so only the first round's weights can be compared."""
    agent = tiny.agent(learner)
    agent.sampler = agent.rollout_sampler = make(tiny, CopyBackend(tiny), correction="importance")
    before = tiny.weights(agent.policy.model)
    learned = tiny.rounds(agent, 0, 3)
    assert not torch.equal(before, tiny.weights(agent.policy.model))
    for one in learned:
        assert one.metrics["sampler/gap"] < 1e-5 and one.metrics["sync/gap"] < 1e-5
        assert one.metrics["sampler/weight"] == pytest.approx(1, abs=1e-4)
    assert learned[-1].metrics["sync/moved"] == pytest.approx(1, abs=0.01)


def test_importance_weights_reach_the_learner(tiny):
    """A sampler that overstates every log-probability by .05 a token is weighted down."""
    agents = {}
    for mode in ("none", "importance"):
        backend = CopyBackend(tiny, off=0.05)
        agents[mode] = tiny.agent("grpo")
        agents[mode].sampler = make(tiny, backend, correction=mode, tolerance=1.0)
        agents[mode].rollout_sampler = agents[mode].sampler
        metrics = tiny.rounds(agents[mode], 0, 1)[0].metrics
        assert metrics["sampler/gap"] == pytest.approx(0.05, abs=1e-3)
        assert metrics["sampler/kl"] == pytest.approx(0.05, abs=1e-3)
    assert metrics["sampler/weight"] < 0.95
    none, weighted = (tiny.weights(agent.policy.model) for agent in agents.values())
    assert not torch.equal(none, weighted)


class Masked(Defence):
    """Serves other weights than it trains."""

    def phase(self, ctx, name):
        return super().phase(ctx, name)


@pytest.mark.parametrize(("specs", "loads"), [((), 2), ((Masked,), 4)])
def test_a_defence_with_phases_is_synced_for_each(tiny, specs, loads):
    agent, backend = tiny.agent("sft", specs), CopyBackend(tiny)
    agent.sampler = agent.rollout_sampler = make(tiny, backend)
    for round in range(2):
        agent.act(tiny.observation(round))
        agent.respond(*tiny.prompts(3), 1, 0)
        agent.learn(tiny.labels(round))
    assert backend.loads == loads


def test_a_hung_engine_is_given_up_and_a_dead_one_named():
    begun = time.monotonic()
    with pytest.raises(EngineFailed, match=r"no answer to generate in 0\.2 s"):
        within(0.2, "generate", threading.Event().wait)
    assert time.monotonic() - begun < 5
    with pytest.raises(EngineFailed, match="generate failed: ZeroDivisionError"):
        within(5, "generate", lambda: 1 / 0)
    assert within(5, "generate", lambda: 3) == 3


def test_threads_of_calls_compute_with_the_trainers_number():
    torch.set_num_threads(1)
    assert within(5, "generate", torch.get_num_threads) == 1


def test_engine_arguments_hold_what_was_asked_for(tiny, monkeypatch):
    shape = tiny.model().config
    shape.head_dim, shape.num_key_value_heads = 32, 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = engine_arguments("float32", 100, VLLMConfig(sequences=8), shape)
    room = 2 * shape.num_hidden_layers * 2 * 32 * 128 * 9 * 4  # keys and values, 9 blocks of 128
    assert told["kv_cache_memory_bytes"] == room == cache_bytes(shape, 100, 8, "float32")
    assert told["max_model_len"] == 100 and told["max_num_seqs"] == 8 and told["enforce_eager"]
    shape.head_dim = 16
    with pytest.raises(UsageError, match=r"head_dim=16; allowed: 32, 64"):
        engine_arguments("float32", 100, VLLMConfig(), shape)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not engine_arguments("float32", 100, VLLMConfig(), shape)["enforce_eager"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sequences": 0}, "vllm.sequences=0"),
        ({"timeout": 0.0}, "vllm.timeout"),
        ({"url": "localhost:8000"}, "vllm.url='localhost:8000'; allowed: http://"),
        ({"url": "file:///etc"}, "vllm.url"),
        ({"shared": "/no/such/folder"}, "vllm.shared='/no/such/folder' is no folder"),
    ],
)
def test_bad_sizes_are_named(fields, named):
    with pytest.raises(UsageError, match=named):
        VLLMConfig(**fields)


def test_scores_of_the_copy_are_the_policys(tiny):
    """The backend above is an honest one: what the other tests stand on."""
    model, backend = tiny.model(seed=99), CopyBackend(tiny)
    ids = torch.tensor([[6, 7, 8, 9]])
    logits = model(ids).logits.log_softmax(-1)[0, :-1]
    expected = logits.gather(1, ids[0, 1:, None])[:, 0].detach().numpy()
    np.testing.assert_allclose(backend.score(ids.tolist())[0], expected, atol=1e-5)
