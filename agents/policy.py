"""The policy: a causal language model, its tokenizer, and the log-probabilities of responses.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t)

Everything is computed on response tokens only: ``logits_to_keep`` makes the model form logits for
the T response positions and never for the prompt, so the (N, T, V) tensor is as small as the
question needs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.batches import Sequences


class ResponseTerms(NamedTuple):
    """One forward pass over responses; t <= T is the longest response among the rows."""

    logp: Tensor  # (N, T) at least float32, 0 on padding
    logits: Tensor  # (N, t, V) at least float32
    hidden: Tensor | None  # (N, T, d), state that predicts each token; only when asked for


def trim(sequences: Sequences) -> Sequences:
    """Drop columns that are padding in every row."""
    start = int((sequences.prompt_mask.sum(0) > 0).long().argmax())
    end = int((sequences.mask.sum(0) > 0).sum())
    prompts = (sequences.prompt_ids[:, start:], sequences.prompt_mask[:, start:])
    return Sequences(*prompts, sequences.ids[:, : max(end, 1)], sequences.mask[:, : max(end, 1)])


def forward_inputs(sequences: Sequences) -> dict[str, Tensor]:
    """Model inputs for left-padded prompts followed by right-padded responses."""
    mask = torch.cat([sequences.prompt_mask, sequences.mask], dim=1)  # (N, P + T)
    return {
        "input_ids": torch.cat([sequences.prompt_ids, sequences.ids], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def response_terms(
    model: nn.Module, sequences: Sequences, temperature: float = 1.0, hidden: bool = False
) -> ResponseTerms:
    """Log-probabilities of every response token under ``model``.

    Args:
        model: a transformers causal language model, wrapped or not.
        sequences: N prompts with responses.
        temperature: divides the logits, as the sampler did.
        hidden: also return the final-norm hidden states (for value heads).
    """
    width = sequences.ids.shape[1]
    sequences = trim(sequences)
    length = sequences.ids.shape[1]
    out = model(
        **forward_inputs(sequences),
        logits_to_keep=length + 1,
        output_hidden_states=hidden,
        use_cache=False,
    )
    logits = out.logits[:, :-1]  # (N, t, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    nats = F.cross_entropy(logits.flatten(0, 1), sequences.ids.flatten(), reduction="none")
    logp = F.pad(-nats.view_as(sequences.ids) * sequences.mask, (0, width - length))
    states = None
    if hidden:
        states = out.hidden_states[-1][:, -length - 1 : -1]
        states = F.pad(states, (0, 0, 0, width - length))
    return ResponseTerms(logp, logits, states)


@torch.no_grad()
def response_logprobs(
    model: nn.Module, sequences: Sequences, temperature: float = 1.0, batch: int = 256
) -> Tensor:
    """(N, T) log-probabilities without gradient, ``batch`` rows at a time."""
    parts = [
        response_terms(model, sequences.take(rows), temperature).logp
        for rows in torch.arange(len(sequences)).split(batch)
    ]
    return torch.cat(parts)


def freeze_copy(model: nn.Module) -> nn.Module:
    """A frozen deep copy of ``model`` in evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer at ``path``, which must have a chat template and a pad or EOS token.

    Raises:
        ValueError: no chat template, or no EOS token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if not tokenizer.chat_template:
        raise ValueError(
            f"model: {str(path)!r} has no chat template; allowed: a tokenizer with one"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: {str(path)!r} has no EOS token; allowed: a tokenizer with one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str | Path) -> nn.Module:
    """The causal language model at ``path`` in float32; safetensors only, no remote code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=torch.float32)


class Policy:
    """The model being trained, and the frozen reference it is measured against."""

    def __init__(self, model: nn.Module, tokenizer: Any, temperature: float = 1.0):
        self.model = model.eval()  # no dropout: sampler and trainer must agree
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.reference: nn.Module | None = None
        self.version = 0

    def snapshot_reference(self) -> None:
        """Freeze the present weights as the reference policy."""
        self.reference = freeze_copy(self.model)

    def parameters(self) -> list[nn.Parameter]:
        """Trainable policy parameters; value heads and critics are not among them."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def reference_logprobs(self, sequences: Sequences) -> Tensor:
        """(N, T) under the reference."""
        assert self.reference is not None, "reference is snapshotted after prepare"
        return response_logprobs(self.reference, sequences, self.temperature)
