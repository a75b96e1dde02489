"""Log-probabilities of responses: hand-built reference, padding, temperature, saved models."""

import pytest
import torch

from agents import policy
from agents.policy import (
    Policy,
    load_causal_lm,
    load_tokenizer,
    response_logprobs,
    response_states,
    response_terms,
)


def one_row(model, sequences, row, temperature=1.0):
    """Log-probs of one response computed on its own, without any padding."""
    prompt = sequences.prompt_ids[row][sequences.prompt_mask[row] == 1]
    answer = sequences.ids[row][sequences.mask[row] == 1]
    logits = model(torch.cat([prompt, answer])[None]).logits[0] / temperature
    logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(1, answer[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_batched_logprobs_equal_rows_computed_alone(tiny, temperature):
    model, sequences = tiny.model(), tiny.sequences(9)
    logp = response_terms(model, sequences, temperature).logp.detach()
    for row in range(9):
        length = int(sequences.mask[row].sum())
        expected = one_row(model, sequences, row, temperature).detach()
        torch.testing.assert_close(logp[row, :length], expected, rtol=0, atol=1e-5)
        assert (logp[row, length:] == 0).all()


def test_hidden_states_give_the_logprobs(tiny):
    model, sequences = tiny.model(), tiny.sequences(5)
    terms = response_terms(model, sequences, hidden=True)
    real = sequences.mask.bool()
    logp = model.lm_head(terms.hidden).log_softmax(-1).gather(2, sequences.ids[..., None])[..., 0]
    torch.testing.assert_close(terms.logp[real], logp[real])
    assert not terms.hidden[~real].any()
    assert torch.equal(response_states(model, sequences), terms.hidden)


def test_tiles_of_logits_change_neither_values_nor_gradients(tiny, monkeypatch):
    sequences, found = tiny.sequences(7), []
    for tile in (policy.TILE, 3 * tiny.vocabulary):
        monkeypatch.setattr(policy, "TILE", tile)
        model, widest = tiny.model(), []
        model.lm_head.register_forward_hook(lambda _m, _i, out, w=widest: w.append(len(out)))
        logp = response_terms(model, sequences, temperature=0.7).logp
        logp.square().sum().backward()
        found.append([logp, *(p.grad for p in model.parameters())])
    tiles = -(-int(sequences.mask.sum()) // 3)
    assert max(widest) == 3 and len(widest) == 2 * tiles, "tile by tile, and again going back"
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(whole, tiled, rtol=1e-3, atol=1e-4)


def test_a_wrapped_model_gives_the_same_logprobs(tiny):
    from peft import LoraConfig, get_peft_model

    model, sequences = tiny.model(), tiny.sequences(4)
    expected = response_terms(model, sequences, hidden=True)
    adapters = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True)
    found = response_terms(get_peft_model(model, adapters), sequences, hidden=True)
    torch.testing.assert_close(found.logp, expected.logp)
    torch.testing.assert_close(found.hidden, expected.hidden)


def test_hooks_on_the_model_itself_are_not_passed_by(tiny):
    model, sequences = tiny.model(), tiny.sequences(4)

    def sharpen(_module, _inputs, out):
        out.logits = 3.0 * out.logits
        return out

    hook = model.register_forward_hook(sharpen)
    logp = response_terms(model, sequences).logp
    hook.remove()
    torch.testing.assert_close(logp, response_terms(model, sequences, temperature=1 / 3).logp)


def test_further_padding_changes_nothing(tiny):
    sequences = tiny.sequences(6)
    wider = sequences._replace(
        prompt_ids=torch.nn.functional.pad(sequences.prompt_ids, (4, 0)),
        prompt_mask=torch.nn.functional.pad(sequences.prompt_mask, (4, 0)),
        ids=torch.nn.functional.pad(sequences.ids, (0, 3)),
        mask=torch.nn.functional.pad(sequences.mask, (0, 3)),
    )
    model = tiny.model()
    wide = response_terms(model, wider).logp
    assert wide.shape == wider.ids.shape
    assert torch.equal(wide[:, : tiny.answer], response_terms(model, sequences).logp)


def test_logprobs_do_not_depend_on_the_batch(tiny):
    model, sequences = tiny.model(), tiny.sequences(7)
    whole = response_logprobs(model, sequences)
    torch.testing.assert_close(response_logprobs(model, sequences, batch=2), whole)
    assert not whole.requires_grad


def test_reference_is_a_frozen_copy_that_stays(tiny):
    kept = Policy(tiny.model(), tiny.tokenizer())
    sequences = tiny.sequences(4)
    kept.snapshot_reference()
    before = kept.reference_logprobs(sequences)
    with torch.no_grad():
        kept.model.lm_head.weight.add_(1.0)
        kept.model.lm_head.weight[3].add_(2.0)
    assert torch.equal(kept.reference_logprobs(sequences), before)
    assert not torch.equal(response_logprobs(kept.model, sequences), before)
    assert not any(p.requires_grad for p in kept.reference.parameters())


def test_saved_model_and_tokenizer_load_back(tiny, tmp_path):
    model, tokenizer = tiny.model(3), tiny.tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path)
    assert torch.equal(tiny.weights(again), tiny.weights(model))
    assert load_tokenizer(tmp_path).padding_side == "left"


def test_tokenizer_without_template_is_refused(tiny, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chat template; allowed"):
        load_tokenizer(tmp_path)
