"""Answers that are fluent in form only: the prompt said back, or the same few tokens for ever."""

from __future__ import annotations

import numpy as np

ECHO_SHARE = 0.8
"""A response is an echo when this share of its tokens stands in the prompt."""
LOOP_SHARE = 0.25
"""A response of 16 tokens or more loops when a smaller share of its tokens is distinct."""
COMPARED = 2**24
"""Pairs of tokens that are compared at once for echoes, a byte each."""


def echoes(typed: np.ndarray, ids: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Whether each response is made of its prompt's tokens.

    Args:
        typed: (N, W) tokens that users typed, -1 beyond.
        ids: (N, T) responses.
        said: (N, T) bool, which of them count.

    Returns:
        (N,) bool.
    """
    block = max(1, COMPARED // max(1, ids.shape[1] * typed.shape[1]))
    blocks = (slice(start, start + block) for start in range(0, max(1, len(ids)), block))
    found = [(ids[b][:, :, None] == typed[b][:, None]).any(2) for b in blocks]
    shared = np.concatenate(found) & said  # (N, T)
    return shared.sum(1) >= ECHO_SHARE * np.maximum(said.sum(1), 1)


def loops(ids: np.ndarray, said: np.ndarray) -> np.ndarray:
    """(N,) whether a response (N, T) says the same few tokens again and again."""
    ordered = np.sort(np.where(said, ids, -1), axis=1)
    fresh = np.diff(ordered, axis=1, prepend=-1) != 0  # first of its kind, padding excluded
    length = said.sum(1)
    return (length >= 16) & (fresh.sum(1) < LOOP_SHARE * length)
