"""Sampling with the trainer's own model: the embedded default, bit-exact on one machine.

Untruncated ancestral sampling, y_t ~ softmax(logits_t / temperature), with a key-value cache. Equal
prompts are encoded once and their cache expanded for all answers; rows that have ended leave the
batch when enough of them have, and decoding stops with the last.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from agents import processes
from agents.batches import Sequences, distinct_prompts
from agents.models import device_of
from agents.sharding import put_together
from envs.usage import check_ranges


@dataclass(frozen=True)
class SamplerConfig:
    """How responses are drawn."""

    max_new_tokens: int = 24
    """T, the longest response in tokens."""
    temperature: float = 1.0
    """Divides the logits; 1 samples the policy itself."""
    batch: int = 1024
    """Rows decoded together."""

    def __post_init__(self) -> None:
        """Check the ranges; no response is longer than the contexts of models of this size."""
        check_ranges(self, "sampler.", max_new_tokens="1 to 32768", batch=">= 1")
        check_ranges(self, "sampler.", temperature="0.001 to 100")


class Sampled(NamedTuple):
    """Responses with their sampling log-probabilities."""

    sequences: Sequences  # B*K rows, prompt-major
    logprobs: Tensor  # (B*K, T) float32, 0 on padding
    weight: Tensor | None = None  # (B*K,) where importance is corrected for


SHRINK = 0.75
"""Ended rows leave the batch when no more than this share goes on: leaving copies the cache."""


NOT_FINITE = "sampling: non-finite logits"


class RoomyLayer(DynamicLayer):
    """Keys and values with room for ``room`` tokens after the prompt, written in without a copy."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self._stores: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, n, D) states; returns all so far."""
        if not self.is_initialized:
            keys, values = super().update(key_states, value_states)
            self.capacity = self.get_seq_length() + self.room
            return keys, values
        begin, n = self.get_seq_length(), key_states.shape[-2]
        if not self._stores or self._stores[0].data_ptr() != self.keys.data_ptr():
            self._stores = tuple(self._with_room(states) for states in (self.keys, self.values))
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, begin : begin + n] = states
        self.keys, self.values = (store[:, :, : begin + n] for store in self._stores)
        return self.keys, self.values

    def _with_room(self, states: Tensor) -> Tensor:
        rows, heads, length, width = states.shape
        store = states.new_empty(rows, heads, self.capacity, width)
        store[:, :, :length] = states
        return store


def new_cache(model: nn.Module, room: int) -> Cache:
    """An empty key-value cache for ``model``; roomy where its layers are the plain ones."""
    cache = DynamicCache(config=model.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        return Cache(layers=[RoomyLayer(room) for _ in cache.layers])
    return cache


def draw(probabilities: Tensor, u: Tensor) -> Tensor:
    """(rows, 1) tokens by inverting each row's cumulative distribution at ``u`` (rows, 1).

    ``torch.multinomial`` draws one exponential a row *and word*: more work than the model's here.

    Raises:
        FloatingPointError: a row is no distribution (non-finite logits).
    """
    # In double precision: float32 sums drift over large vocabularies.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    whole = cumulative[:, -1:]
    if not torch.isfinite(whole).all():
        raise FloatingPointError(NOT_FINITE)
    token = torch.searchsorted(cumulative, u * whole, right=True)
    return token.clamp(max=probabilities.shape[-1] - 1)


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    k: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ``k`` responses to each of n left-padded prompts.

    The responses are divided between the processes of the run; all get all of them.

    Returns:
        ids (n*k, T) int64 padded after EOS, mask (n*k, T) int64 through EOS, logprobs (n*k, T)
            float32.

    Raises:
        FloatingPointError: the model gave no usable distribution (non-finite logits).
    """
    n, device = len(prompt_ids) * k, prompt_ids.device
    ids = torch.zeros((n, max_new_tokens), dtype=torch.int64, device=device)
    mask = torch.zeros((n, max_new_tokens), dtype=torch.int64, device=device)
    logprobs = torch.zeros((n, max_new_tokens), device=device)
    row, counts = processes.share(torch.arange(n, device=device))  # which of the n each row is
    first, last = int(row[0]) // k, int(row[-1]) // k
    prompt_ids, prompt_mask = prompt_ids[first : last + 1], prompt_mask[first : last + 1]
    distinct, owner = distinct_prompts(prompt_ids, prompt_mask)
    owner = owner.repeat_interleave(k)[row - first * k]
    attention = prompt_mask[distinct]
    position = (attention.cumsum(1) - 1).clamp(min=0)
    cache = new_cache(model, max_new_tokens)
    logits = model(
        input_ids=prompt_ids[distinct],
        attention_mask=attention,
        position_ids=position,
        past_key_values=cache,
        logits_to_keep=1,
        use_cache=True,
    ).logits[owner, -1]
    cache.batch_select_indices(owner)
    attention, position = attention[owner], position[owner, -1:]
    alive = torch.ones(len(row), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        probabilities = (logits.float() / temperature).softmax(-1)
        u = torch.rand((n, 1), generator=generator, dtype=torch.float64).to(device)[row]
        try:
            token = draw(probabilities, u)
        except FloatingPointError:
            t = max_new_tokens  # more steps than there are tell the other processes
            break
        said = probabilities.gather(1, token)[:, 0].log()
        ids[row, t] = token[:, 0].masked_fill(~alive, 0)
        logprobs[row, t] = said.masked_fill(~alive, 0.0)
        mask[row, t] = alive.long()
        alive &= token[:, 0] != eos_id
        going = int(alive.sum())
        if t + 1 == max_new_tokens or not going:
            break
        if going <= SHRINK * len(row):
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            row, token, attention, position = (x[kept] for x in (row, token, attention, position))
            alive = alive[kept]
        attention = torch.cat([attention, torch.ones_like(position)], 1)
        position = position + 1
        logits = model(
            input_ids=token,
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    steps = processes.largest(t + 1)
    if steps > max_new_tokens:
        raise FloatingPointError(NOT_FINITE)
    for _ in range(t + 1, steps):  # the next draws are the same everywhere
        torch.rand((n, 1), generator=generator, dtype=torch.float64)
    columns = (ids, mask, logprobs) if counts else map(torch.zeros_like, (ids, mask, logprobs))
    ids, mask, logprobs = map(processes.total, columns)
    return ids.masked_fill(mask == 0, pad_id), mask, logprobs


class TransformersSampler:
    """Samples from whatever weights the policy's own module holds."""

    correction = "exact"
    """There is none to make: it computes with the trainer's own module."""

    def __init__(self, config: SamplerConfig, tokenizer: Any):
        self.config = config
        self.eos_id = tokenizer.eos_token_id
        self.pad_id = tokenizer.pad_token_id

    def at(self, config: SamplerConfig) -> TransformersSampler:
        """The same at another temperature or length."""
        other = copy.copy(self)
        other.config = config
        return other

    def load(self, model: nn.Module, version: int, phase: str = "") -> None:
        """Nothing to move: sampler and trainer share one module."""

    def forget(self) -> None:
        """Nothing is held: the model may have been changed at any time."""

    def told(self) -> dict[str, float]:
        """Nothing to tell."""
        return {}

    def rest(self) -> None:
        """Nothing to leave: the model is the trainer's."""

    def close(self) -> None:
        """Nothing to stop."""

    def sample(
        self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, k: int, seed: int
    ) -> Sampled:
        """``k`` responses to each of B prompts; the same seed and weights give the same bytes.

        Prompts go to the model's device, answers come back to theirs; draws are the CPU's.
        """
        here = prompt_ids.device
        prompt_ids, prompt_mask = (x.to(device_of(model)) for x in (prompt_ids, prompt_mask))
        generator = torch.Generator().manual_seed(seed)
        step = max(1, self.config.batch // k)
        with put_together(model):
            parts = [
                sample_tokens(
                    model,
                    prompt_ids[start : start + step],
                    prompt_mask[start : start + step],
                    self.config.max_new_tokens,
                    self.eos_id,
                    self.pad_id,
                    generator,
                    self.config.temperature,
                    k,
                )
                for start in range(0, len(prompt_ids), step)
            ]
        ids, mask, logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
        prompts = (prompt_ids.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0))
        return Sampled(Sequences(*prompts, ids, mask).to(here), logprobs.to(here))
