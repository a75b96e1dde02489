"""Statistics that stay valid while one watches: bounds for one policy, a test of a moving one.

Both bet. A gambler who stakes a share ``l`` against "the mean cost is at most b" holds, after draws
x_1, x_2, ... in [0, 1], the wealth prod(1 + l (x_i - b)). Under that hypothesis the wealth cannot
be expected to grow, so by Ville's inequality it ever reaches 1/alpha with probability at most
alpha, however the draws were scheduled and whenever one stops.

* ``betting_bounds``: one checkpoint, one frozen policy. The confidence sequence of Waudby-Smith &
  Ramdas (2024), predictable plug-in bets, running intersection over the draws. Costs may be
  fractions, which rules out Clopper-Pearson. Wealth is monotone in the candidate mean, so bisection
  replaces their grid.
* ``EProcess``: many checkpoints of a policy that moves; hypothesis "no checkpoint so far was above
  b". Wealth staked at checkpoint 1 bleeds while the policy is still safe, so a share
  w_j = 1/(j(j+1)) of the stake waits and enters at checkpoint j: A_t = (A_{t-1} + w_t) E_t and
  M_t = A_t + 1/(t+1), the last term being the stake that still waits. M_t is averaged over bets.
  Other stakes give other rules: all of it at the first checkpoint is the plain e-process; a fresh 1
  at every checkpoint is the e-SR detector of Shin, Ramdas & Rinaldo (2024), which no longer bounds
  the chance of a false alarm but the mean number of checkpoints before one.

Draws must be independent, with replacement, one cost per prompt, and in the order drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

CAP = 0.5
"""Largest share of its wealth a bet may lose in one draw, c of Waudby-Smith & Ramdas."""
MARGINS = (0.05, 0.1, 0.2, 0.4)
"""Each bet is the growth-optimal one against a mean cost of the limit plus a margin."""
_BISECTIONS = 24
STAKES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "mixture": (lambda t: -np.log(t * (t + 1.0)), lambda t: -np.log(t + 1.0)),
    "first": (lambda t: 0.0 if t == 1 else -np.inf, lambda t: -np.inf if t else 0.0),
    "every": (lambda t: 0.0, lambda t: -np.inf),
}
"""Log stake that enters at checkpoint t >= 1, and log stake that still waits after t >= 0;
those of ``mixture`` for arrays of t too."""


def log_wealth(costs: np.ndarray, mean: np.ndarray | float, alpha: float) -> np.ndarray:
    """Largest log wealth reached over the draws when betting that the true mean exceeds ``mean``.

    Args:
        costs: (..., n) draws in [0, 1], in the order drawn.
        mean: candidate mean(s) in (0, 1), shape (...) or scalar.
        alpha: one-sided level that the size of the bets is tuned to; any value is valid.

    Returns:
        (...) values >= 0; from log(1/a) on, "the mean is at most ``mean``" is rejected at level a.
    """
    before = np.arange(costs.shape[-1])  # draws seen before each bet
    total = np.cumsum(costs, -1)
    centre = (0.5 + total) / (before + 2.0)
    spread = np.cumsum((costs - centre) ** 2, -1)
    variance = (0.25 + spread - (costs - centre) ** 2) / (before + 1.0)
    bets = np.sqrt(2 * np.log(1 / alpha) / (variance * (before + 1) * np.log(before + 2)))
    level = np.asarray(mean, float)[..., None]
    gains = np.log1p(np.minimum(bets, CAP / level) * (costs - level))
    return np.maximum(np.cumsum(gains, -1).max(-1), 0.0)


def betting_bounds(costs: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound on the mean of one frozen policy's cost, each at level ``alpha / 2``.

    Args:
        costs: (..., n) draws in [0, 1], in the order drawn.
        alpha: probability in (0, 1) that the mean ever lies outside.

    Returns:
        Two arrays (...); lower may exceed upper where the draws contradict one mean.
    """
    costs = np.asarray(costs, float)
    return lower_bound(costs, alpha / 2), 1.0 - lower_bound(1.0 - costs, alpha / 2)


def lower_bound(costs: np.ndarray, alpha: float) -> np.ndarray:
    """Lower bound (...) on the mean of (..., n) costs in [0, 1], at one-sided level ``alpha``."""
    low, high = np.zeros(costs.shape[:-1]), np.ones(costs.shape[:-1])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        rejected = log_wealth(costs, middle, alpha) >= np.log(1 / alpha)
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low


class EProcess:
    """Start-time mixture against "the mean cost was at most ``limit`` at every checkpoint so far".

    Args:
        limit: b in (0, .95); bets against b + margin >= 1 are dropped.
        runs: leading shape of independent runs tested side by side, () for one.
        stakes: when wealth is staked, a name in ``STAKES``.

    Raises:
        ValueError: no bet is possible at this limit.
    """

    def __init__(self, limit: float, runs: tuple[int, ...] = (), stakes: str = "mixture"):
        targets = np.array([limit + m for m in MARGINS if limit + m < 1 - 1e-9])
        if limit <= 0 or not targets.size:
            raise ValueError(
                f"cost_limit: {limit} leaves no bet; allowed: between 0 and {1 - MARGINS[0]:.2f}"
            )
        self.limit = limit
        self.bets = (targets - limit) / (limit * (1 - limit))  # (bets,)
        self.checkpoints = 0
        self.stakes = stakes
        self._log_active = np.full((*runs, targets.size), -np.inf)

    def update(self, costs: np.ndarray) -> np.ndarray:
        """Add one checkpoint's draws, (*runs, n) in [0, 1]; returns log M_t, shape (*runs,)."""
        self.checkpoints += 1
        log_e = self._evidence(np.asarray(costs, float))
        entering, _ = STAKES[self.stakes]
        self._log_active = np.logaddexp(self._log_active, entering(self.checkpoints)) + log_e
        return self.log_value

    def _evidence(self, costs: np.ndarray) -> np.ndarray:
        """Log e-value of one checkpoint's draws (*runs, n) by bet, (*runs, bets)."""
        excess = costs - self.limit
        return np.stack([np.log1p(bet * excess).sum(-1) for bet in self.bets], -1)

    @property
    def log_value(self) -> np.ndarray:
        """Log M_t, shape (*runs,); before the first checkpoint 0, for the detector -inf."""
        _, waiting = STAKES[self.stakes]
        wealth = np.logaddexp(self._log_active, waiting(self.checkpoints))  # (*runs, bets)
        return np.logaddexp.reduce(wealth, -1) - np.log(self.bets.size)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; exact, since floats survive JSON."""
        active = self._log_active.tolist() if self.checkpoints else None
        return {"checkpoints": self.checkpoints, "log_active": active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``'s output."""
        self.checkpoints = state["checkpoints"]
        if state["log_active"] is not None:
            self._log_active = np.array(state["log_active"])
