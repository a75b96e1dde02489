"""Sentences as arrays: templates with slots, filled for many rows at once.

A form is a row of word ids in which negative numbers are slots. Filling is a gather, and words
left out are marked ABSENT and squeezed out afterwards, so that building a million sentences is a
handful of numpy calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.world.language import PAD, STEPS, Language

ABSENT = -100
SLOTS = ("{verb}", "{kind}", "{name}", *(f"{{{i}}}" for i in range(STEPS)))


def compile_forms(language: Language, forms: Sequence[str]) -> np.ndarray:
    """(forms, longest) int64 word ids; slot s is -1 - s, shorter forms end in ABSENT."""
    index = {word: i for i, word in enumerate(language.words)}
    index |= {slot: -1 - s for s, slot in enumerate(SLOTS)}
    rows = [[index[word] for word in form.split()] for form in forms]
    width = max(map(len, rows))
    return np.array([row + [ABSENT] * (width - len(row)) for row in rows], np.int64)


def fill(forms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Put ``values`` (N, slots) into the slots of ``forms`` (N, W); returns (N, W)."""
    is_slot = (forms < 0) & (forms > ABSENT)
    filled = np.take_along_axis(values, np.where(is_slot, -1 - forms, 0), axis=1)
    return np.where(is_slot, filled, forms)


def squeeze(wide: np.ndarray, width: int, left_pad: bool = False) -> np.ndarray:
    """Move the words of each row together, dropping ABSENT; returns (N, width) padded with PAD."""
    absent = wide == ABSENT
    assert (~absent).sum(1).max(initial=0) <= width, "a sentence is longer than its array"
    order = np.argsort(~absent if left_pad else absent, axis=1, kind="stable")
    packed = np.take_along_axis(wide, order, 1)
    packed = np.where(packed == ABSENT, PAD, packed)
    if packed.shape[1] >= width:
        return packed[:, -width:] if left_pad else packed[:, :width]
    padding = np.full((len(wide), width - packed.shape[1]), PAD, np.int64)
    return np.concatenate([padding, packed] if left_pad else [packed, padding], axis=1)
