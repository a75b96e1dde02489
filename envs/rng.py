"""Random numbers that are passed in, never global.

Two kinds. ``stream`` gives an ordinary ``numpy`` generator named by what it is for, so adding a
consumer never shifts another one's draws. ``uniform`` is a counter-based hash: the draw for (round,
item, annotator) is a pure function of those numbers, whatever else happens in the run. That is what
couples the arms of an experiment: the honest vote exists, and is the same, with and without an
attacker.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(seed: int, *names: int | str) -> int:
    """A 63-bit key for ``names`` under ``seed``; different names never share one in practice."""
    text = "/".join(str(name) for name in (seed, *names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def stream(seed: int, *names: int | str) -> np.random.Generator:
    """The generator named ``names`` under the root ``seed``."""
    return np.random.Generator(np.random.Philox(key(seed, *names)))


def _mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), on uint64 arrays."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def uniform(key: int, *counters: np.ndarray | int) -> np.ndarray:
    """Uniform draws in (0, 1), one for each broadcast combination of integer ``counters``.

    Args:
        key: from :func:`key`; names the purpose of the draw.
        *counters: integers or integer arrays that broadcast together.

    Returns:
        float64 array of the broadcast shape.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(key, np.uint64) + _GOLDEN)
        for counter in counters:
            word = np.asarray(counter).astype(np.int64).view(np.uint64)
            state = _mix(state ^ (_mix(word + _GOLDEN) + _GOLDEN))
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
