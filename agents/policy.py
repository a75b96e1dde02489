"""The policy: a causal language model, its tokenizer, and the log-probabilities of responses.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t)

Models that can are run without padding and read a prompt once for all its answers
(``agents.packing``). Their logits are formed for response tokens only, and never for more of them
at once than fit in a tile: with V in the tens of thousands they are the largest tensor there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agents.batches import Sequences
from agents.models import device_of, freeze_copy
from agents.packing import can_pack, pack, packed_inputs
from agents.processes import by_rows
from agents.sharding import as_forward

TILE = 2**24
"""Logits formed at once: 64 MiB in float32, beside them their log-softmax and gradient."""


class ResponseTerms(NamedTuple):
    """One forward pass over responses."""

    logp: Tensor  # (N, T) at least float32, 0 on padding
    hidden: Tensor | None  # (N, T, d), state that predicts each token; only when asked for


@as_forward
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
    real = sequences.mask.flatten().nonzero()[:, 0]  # (R,) in a flat (N * T)
    ids = sequences.ids.flatten()[real]
    if can_pack(model, sequences.prompt_ids.shape[1] + sequences.ids.shape[1]):
        states = _packed_states(model, sequences)
        logp = tiled_logp(model.get_output_embeddings(), states, ids, temperature)
    else:
        width = sequences.ids.shape[1] + 1
        keep = {"logits_to_keep": width, "output_hidden_states": hidden}
        out = model(**padded_inputs(sequences), **keep)
        logp = token_logp(out.logits[:, :-1].flatten(0, 1)[real], ids, temperature)
        states = out.hidden_states[-1][:, -width:-1].flatten(0, 1)[real] if hidden else None
    return ResponseTerms(
        _spread(logp, real, sequences), _spread(states, real, sequences) if hidden else None
    )


@as_forward
def response_states(model: nn.Module, sequences: Sequences) -> Tensor:
    """(N, T, d) final-norm hidden states that predict each response token, 0 on padding."""
    if not can_pack(model, sequences.prompt_ids.shape[1] + sequences.ids.shape[1]):
        states = response_terms(model, sequences, hidden=True).hidden
        assert states is not None
        return states
    real = sequences.mask.flatten().nonzero()[:, 0]
    return _spread(_packed_states(model, sequences), real, sequences)


def _packed_states(model: nn.Module, sequences: Sequences) -> Tensor:
    """(R, d) for the R response tokens, row by row."""
    layout = pack(sequences)
    out = model.get_decoder()(**packed_inputs(model, layout))
    return out.last_hidden_state[0, layout.before]


def _spread(values: Tensor, real: Tensor, sequences: Sequences) -> Tensor:
    """(N, T, ...) from (R, ...) values of the response tokens."""
    shape = sequences.ids.shape
    empty = values.new_zeros(shape.numel(), *values.shape[1:])
    return empty.index_put((real,), values).unflatten(0, shape)


def token_logp(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """(R,) log-probabilities of ``ids`` (R,) under ``logits`` (R, V), at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    return -F.cross_entropy(logits, ids, reduction="none")


def tiled_logp(head: nn.Module, states: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """:func:`token_logp` of ``head(states)`` where no more than a tile of logits ever exists.

    Beyond one tile the backward pass forms the logits again: one more product with the head
    instead of three tensors (R, V).
    """
    rows = max(1, TILE // head.weight.shape[0])

    def tile(states: Tensor, ids: Tensor) -> Tensor:
        return token_logp(head(states), ids, temperature)

    if len(ids) <= rows:
        return tile(states, ids)
    parts = zip(states.split(rows), ids.split(rows), strict=True)
    again = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(tile, *part, **again) for part in parts])


@as_forward
def sequence_rewards(model: nn.Module, sequences: Sequences) -> Tensor:
    """(N,) outputs of a sequence classifier's one-number head, read at each response's end."""
    width = sequences.prompt_ids.shape[1]
    if can_pack(model, width + sequences.ids.shape[1]):
        layout = pack(sequences)
        states = model.base_model(**packed_inputs(model, layout)).last_hidden_state[0, layout.last]
    else:
        states = model.base_model(**padded_inputs(sequences)).last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        states = states[rows, width + sequences.mask.sum(1) - 1]
    return model.score(states.to(model.score.weight.dtype))[:, 0].float()


def padded_inputs(sequences: Sequences) -> dict[str, Any]:
    """Inputs of a model that cannot pack: left-padded prompts, then right-padded responses."""
    mask = torch.cat([sequences.prompt_mask, sequences.mask], dim=1)  # (N, P + T)
    return {
        "input_ids": torch.cat([sequences.prompt_ids, sequences.ids], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }


@torch.no_grad()
def response_logprobs(
    model: nn.Module, sequences: Sequences, temperature: float = 1.0, batch: int = 256
) -> Tensor:
    """(N, T) log-probabilities without gradient, ``batch`` rows at a time.

    The rows go to the model's device; what is found of them comes back to theirs.
    """
    here, there = sequences.ids.device, device_of(model)

    def logp(rows: Tensor) -> Tensor:
        return response_terms(model, sequences.take(rows).to(there), temperature).logp.to(here)

    return by_rows(logp, len(sequences), batch)


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


def load_causal_lm(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """The causal language model at ``path``; safetensors only, no remote code."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=dtype)
    return model.to(device)


class Policy:
    """The model being trained, and the frozen reference it is measured against."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        temperature: float = 1.0,
        base: nn.Module | None = None,
    ):
        self.base = base  # what adapters stand on, without any; None where all is trained
        self.model = model.eval()  # no dropout: sampler and trainer must agree
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.reference: nn.Module | None = None
        self.version = 0

    @property
    def device(self) -> torch.device:
        """Where the model stands."""
        return device_of(self.model)

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
