"""Sampling with the trainer's own model: the embedded default, bit-exact on one machine.

Untruncated ancestral sampling, y_t ~ softmax(logits_t / temperature), with a key-value cache. The
prompt is encoded once and its cache expanded for the K answers; rows end at EOS and decoding stops
when all have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agents.batches import Sequences
from envs.usage import check_ranges


@dataclass(frozen=True)
class SamplerConfig:
    """How responses are drawn."""

    max_new_tokens: int = 24
    """T, the longest response in tokens."""
    temperature: float = 1.0
    """Divides the logits; 1 samples the policy itself."""
    batch: int = 512
    """Rows decoded together."""

    def __post_init__(self) -> None:
        """Check the ranges; no response is longer than the contexts of models of this size."""
        check_ranges(self, "sampler.", max_new_tokens="1 to 32768", batch=">= 1")
        check_ranges(self, "sampler.", temperature="0.001 to 100")


class Sampled(NamedTuple):
    """Responses with their sampling log-probabilities."""

    sequences: Sequences  # B*K rows, prompt-major
    logprobs: Tensor  # (B*K, T) float32, 0 on padding


def draw(logp: Tensor, generator: torch.Generator) -> Tensor:
    """(rows, 1) tokens by inverting the cumulative distribution at one uniform number a row.

    ``torch.multinomial`` draws one exponential a row *and word*: more work than the model's here.
    """
    # In double precision: float32 sums drift over large vocabularies.
    cumulative = logp.exp().double().cumsum(-1)
    u = torch.rand((len(logp), 1), generator=generator, dtype=torch.float64)
    token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return token.clamp(max=logp.shape[-1] - 1)


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

    Returns:
        ids (n*k, T) int64 padded after EOS, mask (n*k, T) int64 through EOS, logprobs (n*k, T)
            float32.

    Raises:
        FloatingPointError: the model gave no usable distribution (non-finite logits).
    """
    rows = len(prompt_ids) * k
    ids = torch.full((rows, max_new_tokens), pad_id, dtype=torch.int64)
    mask = torch.zeros((rows, max_new_tokens), dtype=torch.int64)
    logprobs = torch.zeros((rows, max_new_tokens))
    position = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=position,
        logits_to_keep=1,
        use_cache=True,
    )
    cache = out.past_key_values
    cache.batch_repeat_interleave(k)
    logits = out.logits[:, -1].repeat_interleave(k, 0)
    attention = prompt_mask.repeat_interleave(k, 0)
    position = position[:, -1:].repeat_interleave(k, 0)
    alive = torch.ones(rows, dtype=torch.bool)
    for t in range(max_new_tokens):
        logp = (logits.float() / temperature).log_softmax(-1)
        if not torch.isfinite(logp.max(-1).values).all():
            raise FloatingPointError("sampling: non-finite logits")
        token = draw(logp, generator)  # (rows, 1)
        logprobs[:, t] = logp.gather(1, token)[:, 0] * alive
        ids[:, t] = torch.where(alive, token[:, 0], pad_id)
        mask[:, t] = alive
        alive &= token[:, 0] != eos_id
        if t + 1 == max_new_tokens or not alive.any():
            break
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], 1)
        position = position + 1
        logits = model(
            input_ids=ids[:, t : t + 1],
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return ids, mask, logprobs


class TransformersSampler:
    """Samples from whatever weights the policy's own module holds."""

    name = "transformers"

    def __init__(self, config: SamplerConfig, tokenizer: Any):
        self.config = config
        self.eos_id = tokenizer.eos_token_id
        self.pad_id = tokenizer.pad_token_id

    def load(self, model: nn.Module, version: int) -> None:
        """Nothing to move: sampler and trainer share one module."""

    def sample(
        self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, k: int, seed: int
    ) -> Sampled:
        """``k`` responses to each of B prompts; the same seed and weights give the same bytes."""
        generator = torch.Generator().manual_seed(seed)
        step = max(1, self.config.batch // k)
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
        return Sampled(Sequences(*prompts, ids, mask), logprobs)
