"""The one optimizer step that every learner shares; the defences' hooks are called here.

    with phase("update"):  zero grads -> backward chain around run() -> clip -> optimizer step

``run`` performs the learner's complete forward, loss and backward for that step, over all
micro-batches, accumulating into ``.grad``. It draws no data and changes no counter, so a defence
may call it 0, 1 or n times. A non-finite loss or gradient raises :class:`Diverged`: an outcome of
the run, never a crash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agents import processes
from agents.batches import Batch, ItemTerms, PairBatch, distinct_prompts, take
from agents.context import Context
from agents.defence import DefenceStack, Report, Run
from agents.sharding import parts_add_up
from envs import rng as draws
from envs.usage import check_ranges


class Diverged(FloatingPointError):
    """A loss, gradient or sampling probability was not finite."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the size of its steps.

    Raises:
        ValueError: a field out of range.
    """

    section = "learner."
    """Where the fields stand in a run's configuration; messages say it."""

    lr: float = 1e-4
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this L2 norm after all contributions are summed."""
    minibatch: int = 128
    """Items per optimizer step."""
    micro_batch: int = 128
    """Items per forward and backward; lower it when memory is short."""
    epochs: int = 1
    """Passes over a round's items."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, self.section, lr="0 to 1", betas=">= 0, < 1", weight_decay=">= 0")
        check_ranges(self, self.section, max_grad_norm="> 0", minibatch=">= 1", epochs=">= 1")
        check_ranges(self, self.section, micro_batch=">= 1")


class Learner:
    """Base of the policy learners: what the agent calls, with default bodies.

    Attributes:
        uses: what ``learn`` takes: ``"rollouts"`` (RolloutBatch), ``"pairs"`` (PairBatch) or
            ``"winners"`` (SFTBatch).
    """

    uses: str

    def learn(self, batch: Any, seed: int) -> dict[str, float]:
        """Optimizer steps on one round's batch; returns metrics under ``policy/``."""
        raise AssertionError(f"{type(self).__name__} defines learn")

    def state_dict(self) -> dict[str, Any]:
        """What the learner keeps beyond model, optimizer and step count."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


def make_optimizer(config: OptimizerConfig, params: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW over ``params``, in its multi-tensor form: the fast one for many small tensors."""
    return torch.optim.AdamW(
        params,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def update_step(
    ctx: Context,
    stack: DefenceStack,
    run: Run,
    max_grad_norm: float,
    extra_params: list[nn.Parameter] | None = None,
) -> Report:
    """One optimizer step through the defences.

    Args:
        extra_params: parameters outside ``ctx.policy_params()`` that the optimizer owns (value
            heads).

    Raises:
        Diverged: non-finite loss or gradient norm.
    """
    params = [*ctx.policy_params(), *(extra_params or [])]
    with stack.phase("update"):
        ctx.optimizer.zero_grad(set_to_none=True)
        report = stack.backward(run)
        norm = float(processes.whole(nn.utils.clip_grad_norm_(params, max_grad_norm)))
        if not all(map(math.isfinite, (norm, *report.losses.values()))):
            raise Diverged(f"{ctx.learner}: loss {report.losses}, gradient norm {norm}")
        if not report.skipped:
            ctx.optimizer.step()
            ctx.step += 1
    return report._replace(losses={**report.losses, "grad_norm": norm})


def minibatches(batch: Batch, n: int, config: OptimizerConfig, seed: int) -> Iterator[Batch]:
    """Shuffled minibatches of ``batch`` for ``config.epochs`` passes; only ``seed`` decides."""
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(draws.key(seed, "minibatches", epoch))
        for rows in torch.randperm(n, generator=generator).split(config.minibatch):
            yield take(batch, rows)


def accumulate(
    batch: Batch,
    n: int,
    micro_batch: int,
    terms: Callable[[Batch], ItemTerms],
    losses: Callable[[Batch, ItemTerms], Tensor] | None = None,
) -> Report:
    """Forward and backward over micro-batches; the body of most learners' ``run``.

    The rows of a micro-batch are divided between the processes of the run.

    Args:
        terms: differentiable item terms of one micro-batch, normalised by the whole step.
        losses: a further loss of the learner's own (a value loss), added to
            ``batch.reduce(terms)``.
    """
    total = 0.0
    owner = _prompts(batch) if processes.count() > 1 else torch.arange(n)
    with parts_add_up():
        for rows in torch.arange(n).split(micro_batch):
            mine, counts = processes.share(rows, owner[rows])
            part = take(batch, mine) if len(mine) < n else batch
            with processes.counting(counts):
                item_terms = terms(part)
            loss = batch.reduce(item_terms)
            if losses is not None:
                loss = loss + losses(part, item_terms)
            if not counts:
                loss = 0 * loss
            loss.backward()
            total += float(loss.detach())
    return Report({"loss": float(processes.total(torch.tensor(total, dtype=torch.float64)))})


def _prompts(batch: Any) -> Tensor:
    """(n,) which prompt each item is about, on the CPU."""
    asked = batch.a if isinstance(batch, PairBatch) else batch.sequences
    return distinct_prompts(asked.prompt_ids, asked.prompt_mask)[1].cpu()


class Means:
    """Running means of the scalars that update steps report."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, float]) -> None:
        """Count one step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def result(self, prefix: str) -> dict[str, float]:
        """``{prefix/name: mean}``."""
        return {f"{prefix}/{name}": self._sums[name] / self._counts[name] for name in self._sums}
