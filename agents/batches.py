"""What enters a learner, and what a defence's ``feedback`` hook may change.

Four typed batches. A defence returns a changed copy (``dataclasses.replace``): drop, relabel or
reweight items, add reward channels, or wrap the two callables

    reduce : item terms of one (micro-)batch -> scalar loss
    mix    : {channel: advantage (N, T)} -> (N, T)

Defaults are the weighted mean of the learner's own item loss, and the advantage of channel
``"reward"``. There is no hidden clean label in any batch: truth joins by ``label_id`` outside the
training system. N counts items of the batch, P prompt tokens, T response tokens (letters:
``envs/types.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor


class _Columns(NamedTuple):
    prompt_ids: Tensor  # (N, P) int64, left-padded
    prompt_mask: Tensor  # (N, P) int64
    ids: Tensor  # (N, T) int64, response, right-padded
    mask: Tensor  # (N, T) int64, 1 up to and including EOS


class Sequences(_Columns):
    """Prompts with one response each; ``len`` counts rows."""

    __slots__ = ()

    @classmethod
    def _make(cls, iterable: Iterable[Tensor]) -> Sequences:  # type: ignore[override]
        """Behind ``_replace``; the tuple's own compares ``len`` with the number of columns."""
        return cls(*iterable)

    def take(self, index: Tensor) -> Sequences:
        """The rows ``index``."""
        return Sequences(*(column[index] for column in self))

    def to(self, device: torch.device) -> Sequences:
        """All columns on ``device``."""
        return Sequences(*(column.to(device) for column in self))

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def concatenate(parts: list[Sequences]) -> Sequences:
        """Rows of all ``parts`` in order; widths must agree."""
        return Sequences(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Pairs(NamedTuple):
    """Two answers to each of the same prompts: the data role ``pair``."""

    harm: Sequences
    refusal: Sequences

    def take(self, index: Tensor) -> Pairs:
        """The rows ``index`` of both."""
        return Pairs(self.harm.take(index), self.refusal.take(index))

    def to(self, device: torch.device) -> Pairs:
        """Both on ``device``."""
        return Pairs(self.harm.to(device), self.refusal.to(device))


def distinct_prompts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One row number for each distinct prompt (U,), and which of them every row is (N,)."""
    _, owner = torch.unique(ids.masked_fill(mask == 0, -1), dim=0, return_inverse=True)
    rows = torch.empty(int(owner.max()) + 1, dtype=torch.int64, device=ids.device)
    # Of equal rows whichever is written last will do.
    rows[owner] = torch.arange(len(owner), device=ids.device)
    return rows, owner


class ItemTerms(NamedTuple):
    """Differentiable per-item terms handed to ``reduce``.

    ``loss`` is (n,) for pairs and sequences or (n, T) per token, already masked. ``normaliser``
    belongs to the whole optimizer step, so summing ``reduce`` over micro-batches gives the step's
    loss.
    """

    loss: Tensor
    weight: Tensor  # broadcastable to loss
    normaliser: float
    extra: dict[str, Tensor]  # delta, logp, logp_ref, mask ... whatever the learner offers


def weighted_mean(terms: ItemTerms) -> Tensor:
    """The default ``reduce``."""
    return (terms.loss * terms.weight).sum() / terms.normaliser


def reward_channel(advantages: dict[str, Tensor]) -> Tensor:
    """The default ``mix``: the advantage of the channel ``"reward"``."""
    return advantages["reward"]


class GoldAnswers(NamedTuple):
    """This round's answers to questions whose key the operator has."""

    annotator_id: np.ndarray  # (G,)
    stratum: np.ndarray  # (G,) observed
    wrong: np.ndarray  # (G,) bool


NO_ANSWERS = GoldAnswers(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))


@dataclass(frozen=True)
class LabelBatch:
    """This round's votes and the window's log, before any replay (for aggregation and bans)."""

    label_id: np.ndarray  # (N,)
    item: np.ndarray  # (N,)
    annotator_id: np.ndarray  # (N,)
    target: np.ndarray  # (N,) in [0, 1], 1 = a preferred, .5 = tie
    weight: np.ndarray  # (N,) >= 0
    round: np.ndarray  # (N,)
    stratum: np.ndarray  # (N,) observed
    new: np.ndarray  # (N,) bool, cast this round
    swapped: np.ndarray  # (N,) bool; votes on one item with the same value saw the same order


@dataclass(frozen=True)
class PairBatch:
    """Labelled comparisons, for the reward model and for DPO."""

    label_id: Tensor  # (N,)
    a: Sequences
    b: Sequences
    target: Tensor  # (N,) in [0, 1]
    weight: Tensor  # (N,)
    annotator_id: Tensor  # (N,)
    reduce: Callable[[ItemTerms], Tensor] = weighted_mean
    extra: dict[str, Tensor] = field(default_factory=dict)  # (N, ...), handed on to ``reduce``


@dataclass(frozen=True)
class SFTBatch:
    """Responses to imitate."""

    label_id: Tensor  # (N,)
    sequences: Sequences
    weight: Tensor  # (N,)
    annotator_id: Tensor  # (N,)
    reduce: Callable[[ItemTerms], Tensor] = weighted_mean
    extra: dict[str, Tensor] = field(default_factory=dict)  # (N, ...), handed on to ``reduce``


@dataclass(frozen=True)
class RolloutBatch:
    """Scored responses of the current policy, K rows to a group."""

    sequences: Sequences
    group: Tensor  # (N,) which prompt
    logp_old: Tensor  # (N, T)
    logp_ref: Tensor  # (N, T)
    rewards: dict[str, Tensor]  # channel -> (N,)
    weight: Tensor  # (N,)
    kl_sign: dict[str, float] = field(default_factory=lambda: {"reward": 1.0})
    """How a KL penalty enters each channel: 1 costs reward, -1 adds to a cost, 0 or absent not."""
    mix: Callable[[dict[str, Tensor]], Tensor] = reward_channel
    reduce: Callable[[ItemTerms], Tensor] = weighted_mean
    extra: dict[str, Any] = field(default_factory=dict)


Batch = TypeVar("Batch", PairBatch, SFTBatch, RolloutBatch)


def take(batch: Batch, index: Tensor) -> Batch:
    """The rows ``index`` of any tensor batch, callables kept."""
    return _mapped(batch, lambda column: column[index])


def moved(batch: Batch, device: torch.device) -> Batch:
    """``batch`` on ``device``, callables kept."""
    return _mapped(batch, lambda column: column.to(device))


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Every tensor of ``batch`` passed through ``change``."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Sequences):
            return Sequences(*map(change, value))
        if isinstance(value, dict):
            return {name: changed(inner) for name, inner in value.items()}
        return value

    return replace(batch, **{name: changed(value) for name, value in vars(batch).items()})


def winners(pairs: PairBatch) -> SFTBatch:
    """The preferred side of every pair that is no tie."""
    decided = pairs.target != 0.5
    first = (pairs.target > 0.5)[:, None]
    columns = (torch.where(first, a, b) for a, b in zip(pairs.a, pairs.b, strict=True))
    return SFTBatch(
        label_id=pairs.label_id[decided],
        sequences=Sequences(*columns).take(decided),
        weight=pairs.weight[decided],
        annotator_id=pairs.annotator_id[decided],
    )
