"""Padding-free forward passes that read a prompt once for all its answers.

A padded batch of B prompts with K answers each holds B * K * (P + T) positions; what has to be
computed are the prompts' tokens once and the answers' tokens, often less than half. Here those
tokens stand in one row of length M: first every distinct prompt, then every answer. All of a
transformer but its attention works on single positions and never notices. Attention puts the
tokens of its block back in place:

    prompts   causal among themselves                        (U, P)
    answers   on their prompt, and causal among themselves   (N, T) on (N, P + T)

Gradients flow through the shared prompts as through copies of them. Used for the families below,
whose attention is the plain one; ``agents.policy`` pads for all others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agents.batches import Sequences, distinct_prompts
from agents.sharding import has_hooks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``config.model_type`` whose attention is softmax(q k / scale) v and nothing more."""
NAME = "poisonloop_packed"


class Pack(NamedTuple):
    """N answers to U distinct prompts as one row of M tokens, and where each token stands."""

    ids: Tensor  # (1, M) prompts' tokens, then answers' tokens
    position: Tensor  # (1, M) place in its own sequence
    owner: Tensor  # (N,) which prompt an answer is to
    prompt: Tensor  # (U, P) where in the row; 0 on padding
    answer: Tensor  # (N, T) where in the row; 0 on padding
    in_prompt: Tensor  # (Mp,) the prompts' tokens in a flat (U * P)
    in_answer: Tensor  # (Ma,) the answers' tokens in a flat (N * T)
    visible: Tensor  # (N, 1, T, P + T) bool, what each answer token attends to
    before: Tensor  # (Ma,) where in the row each answer token is predicted
    last: Tensor  # (N,) where in the row each answer ends


def pack(sequences: Sequences) -> Pack:
    """Lay out left-padded prompts with right-padded answers."""
    rows, owner = distinct_prompts(sequences.prompt_ids, sequences.prompt_mask)
    prompts, filled = sequences.prompt_ids[rows], sequences.prompt_mask[rows]
    length, width = filled.sum(1), filled.shape[1]
    device = filled.device
    place = torch.arange(int(length.max()), device=device)
    inside = place < length[:, None]  # (U, P), right-padded from here on
    shifted = (place + (width - length)[:, None]).clamp(max=width - 1)
    answer_length = sequences.mask.sum(1)
    step = torch.arange(max(1, int(answer_length.max())), device=device)
    said = step < answer_length[:, None]  # (N, T)
    in_prompt, in_answer = inside.flatten().nonzero()[:, 0], said.flatten().nonzero()[:, 0]
    prompt = _places(inside, in_prompt, 0)
    answer = _places(said, in_answer, len(in_prompt))
    end = prompt.gather(1, length[:, None] - 1)[owner]  # (N, 1), the prompt's last token
    causal = torch.ones(len(step), len(step), dtype=torch.bool, device=device).tril()
    seen = inside[owner, None].expand(-1, len(step), -1)
    positions = (place.expand_as(inside), length[owner, None] + step)
    ids = (prompts.gather(1, shifted), sequences.ids[:, : len(step)])
    return Pack(
        ids=_row(ids, in_prompt, in_answer),
        position=_row(positions, in_prompt, in_answer),
        owner=owner,
        prompt=prompt,
        answer=answer,
        in_prompt=in_prompt,
        in_answer=in_answer,
        visible=torch.cat([seen, causal.expand(len(said), -1, -1)], 2)[:, None],
        before=torch.cat([end, answer[:, :-1]], 1).flatten()[in_answer],
        last=torch.cat([end, answer], 1).gather(1, answer_length[:, None])[:, 0],
    )


def _places(filled: Tensor, flat: Tensor, start: int) -> Tensor:
    """Where the ``flat`` entries of a block stand in the row when the first is at ``start``."""
    places = torch.zeros(filled.numel(), dtype=torch.int64, device=flat.device)
    places[flat] = torch.arange(start, start + len(flat), device=flat.device)
    return places.view(filled.shape)


def _row(blocks: tuple[Tensor, Tensor], in_prompt: Tensor, in_answer: Tensor) -> Tensor:
    return torch.cat([blocks[0].flatten()[in_prompt], blocks[1].flatten()[in_answer]])[None]


def can_pack(model: nn.Module, length: int) -> bool:
    """Whether ``model`` is of a family that packs, at sequences of ``length`` positions.

    One with hooks on itself is not: packing calls its parts, and would pass them by.
    """
    if has_hooks(model):
        return False
    config: Any = model.config
    window = getattr(config, "sliding_window", None) or length
    return config.model_type in FAMILIES and window >= length


def packed_inputs(model: nn.Module, layout: Pack) -> dict[str, Any]:
    """Keyword arguments that make ``model`` read the row; its attention is switched if needed."""
    if model.config._attn_implementation != NAME:  # padded inputs go on as before under this name
        model.set_attn_implementation(NAME)
    return {
        "input_ids": layout.ids,
        "position_ids": layout.position,
        # Four-dimensional: taken as it is.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=layout.ids.device),
        "use_cache": False,
        "pack": layout,
    }


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    pack: Pack | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention over a row, (1, H, M, D) to (1, M, H, D); padded inputs take torch's own."""
    if pack is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **rest
        )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (M, heads, D)

    def block(states: Tensor, places: Tensor) -> Tensor:
        return states[places].transpose(1, 2)  # (rows, heads, columns, D)

    def attend(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
        k, v = (repeat_kv(states, module.num_key_value_groups) for states in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scaling, **mask)
        return mixed.transpose(1, 2).flatten(0, 1)  # (rows * columns, heads, D)

    prompt_k, prompt_v = block(k, pack.prompt), block(v, pack.prompt)
    whole_k = torch.cat([prompt_k[pack.owner], block(k, pack.answer)], 2)
    whole_v = torch.cat([prompt_v[pack.owner], block(v, pack.answer)], 2)
    prompts = attend(block(q, pack.prompt), prompt_k, prompt_v, is_causal=True)
    answers = attend(block(q, pack.answer), whole_k, whole_v, attn_mask=pack.visible)
    return torch.cat([prompts[pack.in_prompt], answers[pack.in_answer]])[None], None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
