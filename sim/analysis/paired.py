"""Do two arms differ? Runs of one replicate are paired: same people, same prompts, same draws.

* Effect: the difference of restricted means, over the replicates that both arms ran. Its interval
  is a bootstrap that draws worlds first and replicates within worlds second, pairs kept together,
  since runs of one world share its language and models. Few worlds make it too narrow: of three,
  two drawn alike are common.
* p-value: if the arms do not differ, the two runs of a pair could as well have been each other's.
  All 2^n exchanges within pairs are made up to ``EXACT`` pairs, ``DRAWS`` random ones beyond; the
  p-value is the share that differ by as much as what was seen, which counts itself. Four pairs
  cannot go below 2 / 16 = .125, six below .031.
* The log-rank test ignores the pairs, and is secondary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis.survival import MIN_SEEDS, Estimate, weighted_rmst

EXACT = 14
"""Most pairs of which all exchanges are made, 16,384."""
DRAWS = 10_000


class Comparison(NamedTuple):
    """One arm against another."""

    difference: Estimate | None  # of restricted means; None where one is unknown
    p_value: float | None  # of exchanges within pairs; None below MIN_SEEDS pairs
    log_rank: float | None  # likewise


def compare(table: pd.DataFrame, arm: str, against: str, horizon: float) -> Comparison:
    """``arm`` minus ``against`` up to ``horizon``, over the replicates that both ran.

    Args:
        table: :func:`sim.analysis.survival.exit_table`.
        arm: name in the table.
        against: another.
        horizon: end of the restriction, in units of ``time``.

    Raises:
        ValueError: an unknown arm, or no replicate that both arms ran.
    """
    first, second = pairs(table, arm, against)
    enough = len(first) >= MIN_SEEDS
    return Comparison(
        rmst_difference(table, arm, against, horizon, np.random.default_rng(0)),
        exchange_p(first, second, horizon, np.random.default_rng(0)) if enough else None,
        log_rank(pd.concat([first, second]), arm, against) if enough else None,
    )


def pairs(table: pd.DataFrame, arm: str, against: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of two arms, those of one replicate at the same place.

    Raises:
        ValueError: an unknown arm, or no replicate that both arms ran.
    """
    parts = []
    for name in (arm, against):
        part = table[table["arm"] == name].set_index("replicate")
        if part.empty:
            raise UsageError(f"arm={name!r}; allowed: {sorted(set(table['arm']))}")
        parts.append(part)
    shared = parts[0].index.intersection(parts[1].index)
    if shared.empty:
        raise UsageError(f"arms {arm!r} and {against!r} share no seed; run both on the same")
    return parts[0].loc[shared], parts[1].loc[shared]


def rmst_difference(
    table: pd.DataFrame,
    arm: str,
    against: str,
    horizon: float,
    rng: np.random.Generator,
    draws: int = 2000,
) -> Estimate | None:
    """RMST of ``arm`` minus that of ``against``, with the nested bootstrap's error and interval.

    Returns:
        None where :func:`sim.analysis.survival.rmst` is None for an arm; no error and no interval
        where it is for a draw.

    Raises:
        ValueError: an unknown arm, or no replicate that both arms ran.
    """
    first, second = pairs(table, arm, against)
    n = len(first)
    value = _difference(first, second, horizon, np.ones((1, n)), np.ones((1, n)))[0]
    if np.isnan(value):
        return None
    weights = nested_weights(first["world"].to_numpy(), rng, draws)
    return with_interval(value, _difference(first, second, horizon, weights, weights), n)


def nested_rmst(
    part: pd.DataFrame, horizon: float, rng: np.random.Generator, draws: int = 2000
) -> Estimate | None:
    """RMST of one arm with the nested bootstrap's error and interval.

    Args:
        part: rows of :func:`sim.analysis.survival.exit_table`.
        horizon: end of the restriction.
        rng: of the draws.
        draws: resamples.
    """
    time, event, n = part["time"].to_numpy(float), part["event"].to_numpy(bool), len(part)
    value = weighted_rmst(time, event, horizon, np.ones((1, n)))[0][0]
    if np.isnan(value):
        return None
    weights = nested_weights(part["world"].to_numpy(), rng, draws)
    return with_interval(value, weighted_rmst(time, event, horizon, weights)[0], n)


def nested_weights(worlds: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """How often every run is in a bootstrap draw of worlds, then of runs within worlds.

    Args:
        worlds: (n,) world of every run.
        rng: of the draws.
        draws: how many.

    Returns:
        (draws, n) counts. A world drawn twice has its runs drawn twice over.
    """
    names, member = np.unique(worlds, return_inverse=True)
    picked = rng.multinomial(names.size, np.full(names.size, 1 / names.size), draws)
    weights = np.zeros((draws, member.size))
    for world in range(names.size):
        runs = np.flatnonzero(member == world)
        chances = np.full(runs.size, 1 / runs.size)
        weights[:, runs] = rng.multinomial(picked[:, world] * runs.size, chances)
    return weights


def exchange_p(
    first: pd.DataFrame, second: pd.DataFrame, horizon: float, rng: np.random.Generator
) -> float | None:
    """Two-sided p-value of the difference of restricted means, by exchanges within pairs.

    Args:
        first: rows of :func:`pairs`.
        second: those that they are paired with.
        horizon: end of the restriction.
        rng: of the exchanges beyond ``EXACT`` pairs.

    Returns:
        None where the restricted mean is unknown after some exchange.

    Raises:
        ValueError: fewer than ``MIN_SEEDS`` pairs; no p-value is printed then.
    """
    n = len(first)
    _enough(n)
    if n <= EXACT:
        kept = np.arange(2**n)[:, None] >> np.arange(n) & 1 == 0  # the first row exchanges nothing
    else:
        kept = np.vstack([np.ones((1, n), bool), rng.random((DRAWS, n)) < 0.5])
    both = pd.concat([first, second])
    one, other = (np.column_stack([k, ~k]).astype(float) for k in (kept, ~kept))
    found = np.abs(_difference(both, both, horizon, one, other))
    if np.isnan(found).any():
        return None
    return float(np.mean(found >= found[0] - 1e-9 * horizon))


def log_rank(table: pd.DataFrame, arm: str, against: str) -> float:
    """Two-sided p-value that two arms have one survival curve.

    Raises:
        ValueError: an arm has fewer than ``MIN_SEEDS`` runs; no p-value is printed then.
    """
    from lifelines.statistics import logrank_test

    first, second = (table[table["arm"] == name] for name in (arm, against))
    _enough(min(len(first), len(second)))
    result = logrank_test(first["time"], second["time"], first["event"], second["event"])
    return float(result.p_value)


def with_interval(value: float, samples: np.ndarray, n: int) -> Estimate:
    """``value`` with what its bootstrap ``samples`` say; nothing where one of them is unknown.

    Runs that are all alike give an error of 0 and no interval: one of width 0 would be a claim.
    """
    if np.isnan(samples).any():
        return Estimate(float(value), None, None, None, n)
    if np.ptp(samples) <= 1e-9 * max(1.0, abs(value)):
        return Estimate(float(value), 0.0, None, None, n)
    low, high = np.quantile(samples, [0.025, 0.975]) if n >= MIN_SEEDS else (None, None)
    return Estimate(float(value), float(np.std(samples, ddof=1)), low, high, n)


def _difference(
    first: pd.DataFrame, second: pd.DataFrame, horizon: float, one: np.ndarray, other: np.ndarray
) -> np.ndarray:
    """(draws,) RMST of ``first`` weighted by ``one`` minus that of ``second`` by ``other``."""
    a, b = (
        weighted_rmst(part["time"].to_numpy(), part["event"].to_numpy(), horizon, weights)[0]
        for part, weights in ((first, one), (second, other))
    )
    return a - b


def _enough(n: int) -> None:
    if n < MIN_SEEDS:
        raise UsageError(f"seeds per arm: {n}; allowed: at least {MIN_SEEDS} for a p-value")
