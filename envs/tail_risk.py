"""Conditional value at risk of a cost: the mean of its worst draws, bounded and tested by betting.

CVaR_a(c) is the mean over the worst share a of what the policy says; a = 1 is the mean, a -> 0 the
worst answer. Rockafellar & Uryasev (2000) write it as a minimum of means,

    CVaR_a(c) = min over v in [0, 1] of  v + E[(c - v)+] / a,

reached at the (1 - a)-quantile, and that reduces everything here to bounded means.

* Lower bound. At the minimising v*, which is unknown but fixed, a betting bound on E[(c - v*)+] at
  level alpha / 2 is all that is needed; the minimum over all v of the same expression cannot exceed
  it. No union over v is paid.
* Upper bound. Any v gives one, so a few fixed ones share alpha / 2 equally.
* ``TailProcess``. If CVaR_a <= L there is a v* <= L with E[(c - v*)+ - a (L - v*)] <= 0, so the
  wealth of a bet on that difference is an e-value, and so is the minimum of such wealths over v,
  which lies below. v* may differ from checkpoint to checkpoint of a policy that moves; the minimum
  is taken within each, before checkpoints are multiplied, so the product stays an e-process of
  "no checkpoint so far was above L" and starts mix as in :class:`envs.eprocess.EProcess`.

[0, 1] and [0, L] are cut into ``CELLS`` cells, on each of which the expression is replaced by its
least value, (c - right end)+ and left end elsewhere: bounds get wider by about two cells, never
invalid. Draws as in :mod:`envs.eprocess`: independent, with replacement, one per prompt.
"""

from __future__ import annotations

import numpy as np

from envs.eprocess import MARGINS, EProcess, lower_bound

CELLS = 64
"""Cells of v; the price of one is its width."""
CANDIDATES = np.array([0.0, 0.25, 0.5, 0.75])
"""Values of v that upper bounds are taken at; 0 is the best one while costs are 0 or 1."""
_AT_ONCE = 2**20
"""Numbers held at once while lower bounds are computed."""


def cvar(costs: np.ndarray, share: float) -> float:
    """Mean of the worst ``share`` of costs (n,), the last of them in part."""
    worst = np.sort(np.asarray(costs, float))[::-1]
    weights = np.clip(share * worst.size - np.arange(worst.size), 0.0, 1.0)
    return float(weights @ worst / weights.sum())


def cvar_bounds(costs: np.ndarray, share: float, alpha: float) -> tuple[float, float]:
    """Lower and upper bound on the CVaR of one frozen policy's cost, each at level ``alpha / 2``.

    Args:
        costs: (n,) draws in [0, 1], in the order drawn.
        share: a in (0, 1].
        alpha: probability in (0, 1) that the CVaR lies outside.
    """
    costs = np.asarray(costs, float)
    edges = np.linspace(0, 1, CELLS + 1)
    blocks = np.array_split(edges[1:], min(CELLS, 1 + CELLS * costs.size // _AT_ONCE))
    tails = np.concatenate([_tail_lower(costs, block, alpha / 2) for block in blocks])
    low = (edges[:-1] + tails / share).min()
    above = _beyond(costs, CANDIDATES)
    means = 1 - lower_bound(1 - above, alpha / (2 * CANDIDATES.size))
    high = (CANDIDATES + (1 - CANDIDATES) * means / share).min()
    return float(min(low, 1.0)), float(min(high, 1.0))


def _beyond(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(values, n) excess of costs over each value, as a share of the largest there can be."""
    room = np.maximum(1 - values, 1e-12)[:, None]
    return np.clip((costs - values[:, None]) / room, 0.0, 1.0)


def _tail_lower(costs: np.ndarray, values: np.ndarray, alpha: float) -> np.ndarray:
    """(values,) lower bounds on E[(c - v)+]."""
    return (1 - values) * lower_bound(_beyond(costs, values), alpha)


class TailProcess(EProcess):
    """Start-time mixture against "the CVaR was at most ``limit`` at every checkpoint so far".

    Args:
        limit: L in (0, 1); ``share`` * L below .95, as for a mean.
        share: a in (0, 1].
        runs: leading shape of independent runs tested side by side, () for one.

    Raises:
        ValueError: no bet is possible at this limit.
    """

    def __init__(self, limit: float, share: float, runs: tuple[int, ...] = ()):
        super().__init__(share * limit, runs)
        edges = np.linspace(0, limit, CELLS + 1)
        self._left_out = edges[1:]  # costs below the right end of a cell count nothing
        self._staked = share * (limit - edges[:-1])  # (cells,) what a draw costs the gambler

    def _evidence(self, costs: np.ndarray) -> np.ndarray:
        """Log of the least wealth over v by bet, (*runs, bets)."""
        margins = np.array(MARGINS[: self.bets.size])
        least = np.full((*costs.shape[:-1], self.bets.size), np.inf)
        for value, mean in zip(self._left_out, self._staked, strict=True):
            gains = np.maximum(costs - value, 0.0)[..., None] - mean
            bets = margins / (mean * (1 - mean))
            least = np.minimum(least, np.log1p(gains * bets).sum(-2))
        return least
