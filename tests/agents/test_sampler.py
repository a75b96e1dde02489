"""The sampler: repeatable bytes, honest log-probs, right frequencies, right ends."""

import itertools

import numpy as np
import pytest
import torch

from agents.engines.transformers_engine import SamplerConfig, TransformersSampler
from agents.learners.update import Diverged
from agents.policy import response_logprobs


@pytest.fixture
def sampler(tiny):
    def make(**fields):
        config = SamplerConfig(**{"max_new_tokens": tiny.answer, **fields})
        return TransformersSampler(config, tiny.tokenizer())

    return make


def test_same_seed_same_bytes_and_another_seed_differs(tiny, sampler):
    model, prompts = tiny.model(), tiny.prompts(6)
    first, again, other = (sampler().sample(model, *prompts, 3, seed) for seed in (5, 5, 6))
    assert torch.equal(first.sequences.ids, again.sequences.ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.sequences.ids, other.sequences.ids)


def test_sampling_leaves_the_global_generator_alone(tiny, sampler):
    before = torch.random.get_rng_state()
    sampler().sample(tiny.model(), *tiny.prompts(2), 2, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.4])
def test_sampling_logprobs_are_the_trainers(tiny, sampler, temperature):
    model, prompts = tiny.model(), tiny.prompts(16)
    assert len(set(prompts[1].sum(1).tolist())) > 2, "prompts of different lengths"
    sampled = sampler(temperature=temperature).sample(model, *prompts, 4, 1)
    expected = response_logprobs(model, sampled.sequences, temperature)
    torch.testing.assert_close(sampled.logprobs, expected, rtol=0, atol=1e-5)
    wrong = response_logprobs(model, sampled.sequences, temperature * 1.1)
    assert (wrong - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_rows_that_leave_the_batch_change_no_logprobs(tiny, sampler, monkeypatch, family):
    """Long answers, equal prompts, caches with and without room: still the trainer's numbers."""
    from transformers import CONFIG_MAPPING as CONFIGS
    from transformers import AutoModelForCausalLM, DynamicCache

    from agents.engines import transformers_engine as engine

    fields = {"n_head": 2, "n_embd": 16, "n_layer": 2} if family == "gpt2" else {}
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **fields}
    if family == "mistral":
        size |= {"sliding_window": 4, "num_key_value_heads": 1, "intermediate_size": 24}
    config = CONFIGS[family](vocab_size=tiny.vocabulary, initializer_range=0.3, **size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(engine.new_cache(model, 1), DynamicCache) == (family == "mistral")
    left = []
    for kind in (engine.RoomyLayer, engine.DynamicLayer):
        select = kind.batch_select_indices

        def selected(layer, rows, select=select):
            left.append(len(rows))
            select(layer, rows)

        monkeypatch.setattr(kind, "batch_select_indices", selected)
    ids, mask = (column[[0, 1, 0, 2, 2, 3]] for column in tiny.prompts(4))
    sampled = sampler(max_new_tokens=16).sample(model, ids, mask, 8, 1)
    assert len(set(left)) > 2, "rows left more than once"
    expected = response_logprobs(model, sampled.sequences)
    torch.testing.assert_close(sampled.logprobs, expected, rtol=0, atol=1e-5)


def test_k_expands_prompt_major(tiny, sampler):
    ids, mask = tiny.prompts(4)
    sampled = sampler().sample(tiny.model(), ids, mask, 3, 0)
    assert torch.equal(sampled.sequences.prompt_ids, ids.repeat_interleave(3, 0))
    assert torch.equal(sampled.sequences.prompt_mask, mask.repeat_interleave(3, 0))
    assert len(sampled.sequences) == 12


def test_rows_end_at_the_first_eos(tiny, sampler):
    sampled = sampler(max_new_tokens=12).sample(tiny.model(), *tiny.prompts(64), 4, 2)
    ids, mask = sampled.sequences.ids, sampled.sequences.mask
    length = mask.sum(1)
    assert (mask == (torch.arange(12) < length[:, None])).all(), "mask is a prefix"
    assert (ids[mask == 0] == tiny.pad).all() and (sampled.logprobs[mask == 0] == 0).all()
    is_end = (ids == tiny.eos) & (mask == 1)
    ended = is_end.any(1)
    assert 0 < ended.sum() < len(ids)
    assert (is_end.sum(1)[ended] == 1).all()
    assert (is_end.long().argmax(1)[ended] == length[ended] - 1).all()
    assert (length[~ended] == 12).all()


def test_stops_early_when_all_have_ended(tiny, sampler):
    model = tiny.model()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():  # the end token at any position: its logit far above all others
        model.lm_head.weight.zero_()
        model.lm_head.weight[tiny.eos] = 0
    model.lm_head.register_forward_hook(
        lambda _m, _i, out: out + 50.0 * (torch.arange(tiny.vocabulary) == tiny.eos)
    )
    sampled = sampler(max_new_tokens=12).sample(model, *tiny.prompts(4), 2, 0)
    assert (sampled.sequences.mask.sum(1) == 1).all() and len(calls) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_the_softmax(tiny, sampler, temperature):
    """Every two-token response of one prompt: shares within four standard errors."""
    model, n = tiny.model(), 40_000
    ids, mask = (column[:1] for column in tiny.prompts(3))
    chosen = sampler(max_new_tokens=2, temperature=temperature, batch=n)
    drawn = chosen.sample(model, ids, mask, n, 3).sequences.ids.numpy()
    answers = np.array(list(itertools.product(range(tiny.vocabulary), repeat=2)))
    answers[answers[:, 0] == tiny.eos, 1] = tiny.pad
    answers = np.unique(answers, axis=0)
    prompt = ids[0][mask[0] == 1].repeat(len(answers), 1)
    both = torch.cat([prompt, torch.from_numpy(answers)], 1)
    with torch.no_grad():
        logp = (model(both).logits[:, len(prompt[0]) - 1 : -1] / temperature).log_softmax(-1)
    logp = logp.gather(2, torch.from_numpy(answers)[..., None])[..., 0].numpy()
    logp[answers[:, 0] == tiny.eos, 1] = 0
    probability = np.exp(logp.sum(1).astype(float))
    assert probability.sum() == pytest.approx(1, abs=1e-4)
    code = answers[:, 0] * tiny.vocabulary + answers[:, 1]
    counts = np.bincount(drawn[:, 0] * tiny.vocabulary + drawn[:, 1], minlength=code.max() + 1)
    share = counts[code] / n
    common = probability > 1e-3
    error = np.sqrt(probability * (1 - probability) / n)
    assert (np.abs(share - probability)[common] < 4.5 * error[common]).all()
    assert counts[code].sum() == n


def test_batches_change_draws_only_not_distributions(tiny, sampler):
    model, prompts = tiny.model(), tiny.prompts(8)
    sampled = sampler(batch=6).sample(model, *prompts, 3, 0)
    expected = response_logprobs(model, sampled.sequences)
    torch.testing.assert_close(sampled.logprobs, expected, rtol=0, atol=1e-5)


def test_broken_weights_are_an_outcome_not_a_crash(tiny, sampler):
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="non-finite"):
        sampler().sample(model, *tiny.prompts(2), 1, 0)
    agent = tiny.agent()
    with torch.no_grad():
        agent.policy.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(Diverged):
        agent.act(tiny.observation(0))
