"""Policies of a chosen size with random weights: speed and memory do not ask what a model knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from envs.usage import UsageError
from sim.scenario import Scenario

POSITIONS = 1024
"""Longest sequence of a random policy."""


class Shape(NamedTuple):
    """A Llama: feed-forward twice as wide, heads of 64 (or four smaller ones)."""

    width: int
    layers: int


SHAPES = {
    "100k": Shape(64, 2),
    "1m": Shape(192, 3),
    "3m": Shape(256, 5),
    "10m": Shape(384, 7),
    "30m": Shape(640, 7),
    "100m": Shape(1024, 10),
}
"""By the parameters of their layers: 10 * layers * width^2."""


def shape_of(name: str) -> Shape:
    """The shape called ``name``.

    Raises:
        ValueError: unknown name.
    """
    if name not in SHAPES:
        raise UsageError(f"shape={name!r}; allowed: {', '.join(SHAPES)}")
    return SHAPES[name]


def save_random_policy(folder: Path, shape: Shape, vocabulary: int) -> Path:
    """A freshly initialised Llama of ``shape`` in ``folder``; the same bytes each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=2 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(4, shape.width // 64),
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def with_random_policy(scenario: Scenario, shape: Shape, folder: Path) -> Scenario:
    """``scenario`` with a policy of ``shape`` over the same words, saved in ``folder``."""
    from agents.policy import load_tokenizer

    words = len(load_tokenizer(scenario.tokenizer))
    return replace(scenario, policy=save_random_policy(folder, shape, words))
