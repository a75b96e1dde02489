"""Rows taken a few at a time, for models that read so many at once."""

from __future__ import annotations

import numpy as np


def chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """``rows`` in order, ``size`` at a time; none of them is empty."""
    return np.split(rows, range(size, len(rows), size)) if len(rows) else []


def by_length(length: list[int] | np.ndarray, size: int) -> list[np.ndarray]:
    """Places of (N,) texts, ``size`` at a time, similar lengths together: little is padding."""
    return chunks(np.argsort(length, kind="stable"), size)
