"""Group-relative policy optimisation (Shao et al. 2024).

K responses to one prompt are each other's baseline:

    A_i = (r_i - mean_g r) / (std_g r + 1e-4)                            sample std (n - 1)
    L   = -min(w A, clip(w, 1 - eps, 1 + eps) A) + beta (e^d - d - 1)
    w   = pi / pi_old,    d = log pi_ref - log pi

averaged over tokens of a sequence and then over sequences (``loss_type="grpo"``), or over all
tokens of the step (``"dapo"``). With ``kl_correction`` the KL term is multiplied by w, which makes
its gradient that of the reverse KL (DeepSeek-V3.2 2025). The group std makes the step invariant to
the reward's scale, so shrinking a hostile reward does nothing. Loss and gradient equal
``trl.GRPOTrainer``'s on the same batch (tests).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from agents.batches import ItemTerms, RolloutBatch
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


@learners.register("grpo")
@dataclass(frozen=True)
class GRPOConfig(OptimizerConfig):
    """GRPO: group-normalised rewards, clipped ratio, optional k3 KL to the reference."""

    lr: float = 5e-4
    """Learning rate."""
    minibatch: int = 256
    """Responses per optimizer step."""
    beta: float = 0.1
    """Weight of the k3 estimate of KL(pi || pi_ref)."""
    clip: float = 0.2
    """Ratio clip epsilon."""
    kl_correction: bool = False
    """Multiply the KL term by the ratio, as TRL does by default."""
    loss_type: Literal["grpo", "dapo"] = "grpo"
    """Average over a sequence's tokens first (grpo) or over all tokens (dapo)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_ranges(self, self.section, beta=">= 0", clip="> 0")

    def build(self, ctx: Context, stack: DefenceStack, temperature: float) -> GRPO:
        """The learner of this config."""
        return GRPO(self, ctx, stack, temperature)


def group_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    """(N,) rewards normalised within groups by mean and sample std."""
    index = group.unique(return_inverse=True)[1]
    count = torch.bincount(index).to(rewards)
    mean = torch.zeros_like(count).index_add_(0, index, rewards) / count
    centred = rewards - mean[index]
    square = torch.zeros_like(count).index_add_(0, index, centred**2)
    std = (square / (count - 1).clamp(min=1)).sqrt()
    return centred / (std[index] + 1e-4)


def grpo_token_loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor,
    advantage: Tensor,
    clip: float,
    beta: float,
    kl_correction: bool = False,
) -> Tensor:
    """(N, T) per-token loss; ``advantage`` is (N, T)."""
    ratio = (logp - logp_old).exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if beta == 0:
        return loss
    d = logp_ref - logp
    kl = d.exp() - d - 1
    return loss + beta * (ratio * kl if kl_correction else kl)


class GRPO(Learner):
    """Updates the policy from scored rollouts."""

    uses = "rollouts"

    def __init__(
        self, config: GRPOConfig, ctx: Context, stack: DefenceStack, temperature: float = 1.0
    ):
        self.config = config
        self.ctx = ctx
        self.stack = stack
        self.temperature = temperature
        ctx.optimizer = make_optimizer(config, ctx.policy_params())

    def learn(self, batch: RolloutBatch, seed: int) -> dict[str, float]:
        """``config.epochs`` passes over ``batch``; returns metrics under ``policy/``."""
        shape = batch.sequences.ids.shape
        advantages = {
            name: group_advantages(rewards, batch.group)[:, None].expand(shape)
            for name, rewards in batch.rewards.items()
        }
        batch = replace(batch, extra={**batch.extra, "advantage": batch.mix(advantages)})
        means = Means()
        for mini in minibatches(batch, len(batch.group), self.config, seed):
            report = update_step(
                self.ctx, self.stack, lambda b=mini: self.run(b), self.config.max_grad_norm
            )
            means.add(report.losses)
        return means.result("policy")

    def run(self, batch: RolloutBatch) -> Report:
        """Loss and gradient of one step."""
        mask = batch.sequences.mask
        normaliser = float(mask.sum() if self.config.loss_type == "dapo" else len(mask))
        return accumulate(
            batch,
            len(mask),
            self.config.micro_batch,
            lambda part: self.item_terms(part, normaliser),
        )

    def item_terms(self, batch: RolloutBatch, normaliser: float) -> ItemTerms:
        """Per-token losses, divided by each sequence's length under ``loss_type="grpo"``."""
        mask = batch.sequences.mask
        logp = response_terms(self.ctx.model, batch.sequences, self.temperature).logp
        loss = grpo_token_loss(
            logp,
            batch.logp_old,
            batch.logp_ref,
            batch.extra["advantage"],
            self.config.clip,
            self.config.beta,
            self.config.kl_correction,
        )
        loss = loss * mask
        if self.config.loss_type == "grpo":
            loss = loss / mask.sum(1, keepdim=True).clamp(min=1)
        extra = {"logp": logp, "logp_ref": batch.logp_ref, "mask": mask}
        return ItemTerms(loss, batch.weight[:, None], normaliser, extra)
