"""Distances between hidden states, in float32 at least: half precision overflows or misses.

multi-scale MMD    samples of whole sequences       cosine, Euclidean    token by token
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of states and goal (N, T, d) at the tokens in a mask (N, T): a scalar."""


def wide(states: Tensor) -> Tensor:
    """In float32, or in float64 if they are."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def multiscale_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples (n, D), five Gaussian kernels.

    The bandwidth is the mean distance of the pooled points, without gradient: the value has no
    scale, and with the diagonals it is biased. Two samples of one law in many dimensions stay
    near (2/n)(5 - 1.906862), never at 0. Points that all coincide give 0.
    """
    n, pooled = len(x), torch.cat([wide(x), wide(y)])
    squares = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist").square()
    width = squares.detach().sum() / (4 * n * n - 2 * n) / 4
    width = width.clamp(min=1e-30)  # all points in one place: every kernel is 1 then
    return _discrepancy(sum(torch.exp(-squares / (width * 2**i)) for i in range(5)), n)


def _discrepancy(kernel: Tensor, n: int) -> Tensor:
    """From the kernel (2n, 2n) of two pooled samples, diagonals included."""
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def mmd(states: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """:func:`multiscale_mmd` of sequences as long vectors that are zero outside ``mask``."""
    shown = mask[:, :, None]
    return multiscale_mmd((states * shown).flatten(1), (goal * shown).flatten(1))


def relu_cosine(states: Tensor, goal: Tensor) -> Tensor:
    """Mean of relu(cos) over the rows of two matrices: 0 once they point elsewhere."""
    cosines = F.cosine_similarity(wide(states), wide(goal), dim=-1)
    return cosines.relu().sum() / max(1, len(states))


def likeness(states: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """:func:`relu_cosine` of the tokens."""
    return relu_cosine(states[mask], goal[mask])


def angle(states: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Mean of 1 - cos over the tokens."""
    cosines = F.cosine_similarity(wide(states[mask]), wide(goal[mask]), dim=-1)
    return (1 - cosines).sum() / mask.sum().clamp(min=1)


def euclidean(states: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Mean Euclidean distance over the tokens."""
    gaps = torch.linalg.vector_norm(wide(states[mask]) - wide(goal[mask]), dim=-1)
    return gaps.sum() / mask.sum().clamp(min=1)
