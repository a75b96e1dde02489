"""Online supervised fine-tuning: cross-entropy on the voted winner of each new comparison.

    L = - sum_t log pi(y_t | x, y_<t) / |y|,   y the preferred response

averaged over the response tokens of the step. The simplest way to learn from votes, and the reverse
preference attack in its supervised form: who wins the vote writes the training data.
"""

from __future__ import annotations

from dataclasses import dataclass

from agents.batches import ItemTerms, SFTBatch
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


@learners.register("sft")
@dataclass(frozen=True)
class SFTConfig(OptimizerConfig):
    """Online SFT on the preferred responses."""

    lr: float = 2e-4
    """Learning rate."""
    minibatch: int = 32
    """Responses per optimizer step."""
    epochs: int = 2
    """Passes over a round's winners."""

    def build(self, ctx: Context, stack: DefenceStack, temperature: float) -> SFT:
        """The learner of this config; likelihoods are untempered."""
        return SFT(self, ctx, stack)


class SFT(Learner):
    """Updates the policy towards winners."""

    uses = "winners"

    def __init__(self, config: SFTConfig, ctx: Context, stack: DefenceStack):
        self.config = config
        self.ctx = ctx
        self.stack = stack
        ctx.optimizer = make_optimizer(config, ctx.policy_params())

    def learn(self, batch: SFTBatch, seed: int) -> dict[str, float]:
        """``config.epochs`` passes over the round's winners; metrics under ``policy/``."""
        means = Means()
        for mini in minibatches(batch, len(batch.weight), self.config, seed):
            mini = self.stack.feedback(mini)
            if not len(mini.weight):
                continue
            report = update_step(
                self.ctx, self.stack, lambda b=mini: self.run(b), self.config.max_grad_norm
            )
            means.add(report.losses)
        return means.result("policy")

    def run(self, batch: SFTBatch) -> Report:
        """Loss and gradient of one step."""
        tokens = float(batch.sequences.mask.sum())
        return accumulate(
            batch,
            len(batch.weight),
            self.config.micro_batch,
            lambda part: self.item_terms(part, tokens),
        )

    def item_terms(self, batch: SFTBatch, normaliser: float) -> ItemTerms:
        """Per-token losses."""
        logp = response_terms(self.ctx.model, batch.sequences).logp
        extra = {"logp": logp, "mask": batch.sequences.mask, **batch.extra}
        return ItemTerms(-logp, batch.weight[:, None], normaliser, extra)
