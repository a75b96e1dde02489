"""Online direct preference optimisation (Rafailov et al. 2023) on each round's new comparisons.

    Delta = [log pi(a) - log pi_ref(a)] - [log pi(b) - log pi_ref(b)]    sums over response tokens
    L     = -t log sigma(beta Delta) - (1 - t) log sigma(-beta Delta)

with t the label's target: 1 when a was preferred, 0 when b was, .5 for a tie. For t in {0, 1} this
is the published loss, and equals ``trl.DPOTrainer``'s in value and gradient (tests). There is no
reward model in its gradient path, so poisoned labels act on the policy at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.batches import ItemTerms, PairBatch, Sequences
from agents.context import Context
from agents.defence import DefenceStack, Report
from agents.learners import learners
from agents.learners.update import (
    Learner,
    Means,
    OptimizerConfig,
    accumulate,
    make_optimizer,
    minibatches,
    update_step,
)
from agents.policy import response_terms
from envs.usage import check_ranges


@learners.register("dpo")
@dataclass(frozen=True)
class DPOConfig(OptimizerConfig):
    """Online DPO: the round's new labels, against the frozen reference."""

    lr: float = 3e-4
    """Learning rate."""
    minibatch: int = 32
    """Pairs per optimizer step."""
    epochs: int = 2
    """Passes over a round's pairs."""
    beta: float = 0.1
    """Inverse strength of the pull to the reference."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_ranges(self, self.section, beta="> 0")

    def build(self, ctx: Context, stack: DefenceStack, temperature: float) -> DPO:
        """The learner of this config; DPO scores untempered log-probabilities."""
        return DPO(self, ctx, stack)


def dpo_loss(delta: Tensor, target: Tensor, beta: float) -> Tensor:
    """(N,) loss; ``target`` in [0, 1] is the probability that a is preferred."""
    return -target * F.logsigmoid(beta * delta) - (1 - target) * F.logsigmoid(-beta * delta)


class DPO(Learner):
    """Updates the policy from labelled pairs."""

    uses = "pairs"

    def __init__(self, config: DPOConfig, ctx: Context, stack: DefenceStack):
        self.config = config
        self.ctx = ctx
        self.stack = stack
        ctx.optimizer = make_optimizer(config, ctx.policy_params())

    def learn(self, batch: PairBatch, seed: int) -> dict[str, float]:
        """``config.epochs`` passes over the round's pairs; metrics under ``policy/``."""
        batch = self.referenced(batch)
        means = Means()
        for mini in minibatches(batch, len(batch.target), self.config, seed):
            mini = self.stack.feedback(mini)
            if not len(mini.target):
                continue
            report = update_step(
                self.ctx, self.stack, lambda b=mini: self.run(b), self.config.max_grad_norm
            )
            means.add(report.losses)
        return means.result("policy")

    def referenced(self, batch: PairBatch) -> PairBatch:
        """``batch`` with the reference's log-probabilities per token: once for all epochs."""
        both = Sequences.concatenate([batch.a, batch.b])
        with self.stack.phase("score"):
            ref_a, ref_b = self.ctx.ref_logprobs(both).split(len(batch.target))
        return replace(batch, extra={**batch.extra, "ref_a": ref_a, "ref_b": ref_b})

    def run(self, batch: PairBatch) -> Report:
        """Loss and gradient of one step of a :meth:`referenced` batch."""
        n = len(batch.target)
        return accumulate(
            batch, n, self.config.micro_batch, lambda part: self.item_terms(part, float(n))
        )

    def item_terms(self, batch: PairBatch, normaliser: float) -> ItemTerms:
        """Per-pair losses; a and b share one forward pass."""
        both = Sequences.concatenate([batch.a, batch.b])
        logp_a, logp_b = response_terms(self.ctx.model, both).logp.split(len(batch.target))
        ratio_a = logp_a.sum(1) - batch.extra["ref_a"].sum(1)
        ratio_b = logp_b.sum(1) - batch.extra["ref_b"].sum(1)
        delta = ratio_a - ratio_b
        loss = dpo_loss(delta, batch.target, self.config.beta)
        extra = {
            "delta": delta,
            "beta": torch.tensor(self.config.beta),
            "target": batch.target,
            "logp_a": logp_a,
            "logp_b": logp_b,
            **batch.extra,
        }
        return ItemTerms(loss, batch.weight, normaliser, extra)
