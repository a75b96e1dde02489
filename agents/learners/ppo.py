"""Proximal policy optimisation for language models, as the papers use it (Ziegler et al. 2019).

Per token, with reward model score R on the last one and KL coefficient c:

    r_t = -c (log pi_old - log pi_ref) + [t = last] R
    delta_t = r_t + gamma V_(t+1) - V_t,  A_t = sum_s (gamma lambda)^(s-t) delta_s,  returns = A + V
    L = -min(w A^, clip(w) A^) + vf_coef * 1/2 max((V - returns)^2, (clip(V) - returns)^2)

A^ is A whitened over the batch's tokens. A micro-batch whose mean ratio exceeds ``ratio_limit`` is
zeroed. The adaptive controller moves c by at most 20 % * n / horizon per batch of n: over a
thousand samples it is a constant in practice. Values come from heads on the policy's own last
hidden state, one per reward channel. Their loss stops at the heads unless ``value_trunk`` says
otherwise: through the trunk, as the papers' trainer has it, a hundred rounds of value gradients
erase what a small policy knows. TRL has had no PPO since 1.13; constants follow its legacy trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents import processes
from agents.adapters import has_trained_adapter
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
from agents.models import device_of
from agents.policy import response_states, response_terms
from agents.sharding import shard
from envs.usage import check_ranges


@learners.register("ppo")
@dataclass(frozen=True)
class PPOConfig(OptimizerConfig):
    """PPO: value head, GAE, clipped ratio and value, KL in the reward."""

    lr: float = 5e-4
    """Learning rate."""
    minibatch: int = 256
    """Responses per optimizer step."""
    kl: float = 0.2
    """Coefficient c of the per-token KL penalty; the start value when adaptive."""
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    """Keep c, or steer the sequence KL to ``kl_target``."""
    kl_target: float = 6.0
    """Nats per sequence the adaptive controller aims at."""
    kl_horizon: int = 10_000
    """Samples over which the adaptive controller acts."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage estimate."""
    clip: float = 0.2
    """Ratio clip."""
    value_clip: float = 0.2
    """Value clip around the old value."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    value_lr: float = 1e-3
    """Learning rate of the value heads."""
    value_trunk: bool = False
    """Let the value loss train the policy's trunk too, at ``lr``."""
    ratio_limit: float = 10.0
    """Micro-batches with a larger mean ratio contribute nothing."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_ranges(self, self.section, kl=">= 0", kl_target="> 0", kl_horizon=">= 1")
        check_ranges(self, self.section, gamma="0 to 1", gae_lambda="0 to 1", vf_coef=">= 0")
        check_ranges(self, self.section, value_lr="0 to 1")
        check_ranges(self, self.section, clip="> 0", value_clip="> 0", ratio_limit=">= 1")

    def build(self, ctx: Context, stack: DefenceStack, temperature: float) -> PPO:
        """The learner of this config."""
        return PPO(self, ctx, stack, temperature)


def token_rewards(score: Tensor, mask: Tensor, kl: Tensor, coefficient: float) -> Tensor:
    """(N, T) rewards: -c * kl on every token, plus the (N,) score on the last one."""
    last = torch.zeros_like(kl).scatter_(1, mask.sum(1, keepdim=True).clamp(min=1) - 1, 1.0)
    return (last * score[:, None] - coefficient * kl) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, decay: float) -> Tensor:
    """(N, T) generalised advantage estimates; the backward recursion as one triangular product."""
    length = rewards.shape[1]
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = (rewards + gamma * following - values) * mask
    place = torch.arange(length, device=values.device)
    distance = place[:, None] - place  # s - t
    weights = (gamma * decay) ** distance.clamp(min=0).to(delta) * (distance >= 0)
    return (delta @ weights) * mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit (population) variance over masked entries."""
    count = mask.sum().clamp(min=1)
    mean = (values * mask).sum() / count
    variance = ((values - mean) ** 2 * mask).sum() / count
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def adapt_kl(coefficient: float, kl: float, n: int, target: float, horizon: int) -> float:
    """One step of the proportional controller: c (1 + clip(kl / target - 1, +-.2) n / horizon)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * n / horizon)


class PPO(Learner):
    """Updates the policy from scored rollouts."""

    uses = "rollouts"

    def __init__(
        self, config: PPOConfig, ctx: Context, stack: DefenceStack, temperature: float = 1.0
    ):
        self.config = config
        self.ctx = ctx
        self.stack = stack
        self.temperature = temperature
        self.kl = config.kl
        self.heads = nn.ModuleDict()
        ctx.optimizer = make_optimizer(config, ctx.policy_params())
        self._head("reward")

    def _head(self, channel: str) -> nn.Linear:
        """The value head of ``channel``, created on first sight, zero at birth."""
        if channel not in self.heads:
            config = self.ctx.model.config.get_text_config()
            head = nn.utils.skip_init(nn.Linear, config.hidden_size, 1)
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
            head = head.to(device_of(self.ctx.model))
            self.heads[channel] = shard(head, whole=has_trained_adapter(self.ctx.model))
            group = {"params": list(head.parameters()), "lr": self.config.value_lr}
            self.ctx.optimizer.add_param_group(group)
        return self.heads[channel]

    def learn(self, batch: RolloutBatch, seed: int) -> dict[str, float]:
        """``config.epochs`` passes over ``batch``; returns metrics under ``policy/``."""
        batch, kl = self._advantages(batch)
        means = Means()
        for mini in minibatches(batch, len(batch.group), self.config, seed):
            report = update_step(
                self.ctx,
                self.stack,
                lambda b=mini: self.run(b),
                self.config.max_grad_norm,
                list(self.heads.parameters()),
            )
            means.add(report.losses)
        if self.config.kl_control == "adaptive":
            self.kl = adapt_kl(
                self.kl, kl, len(batch.group), self.config.kl_target, self.config.kl_horizon
            )
        return {**means.result("policy"), "policy/kl_coefficient": self.kl}

    def _advantages(self, batch: RolloutBatch) -> tuple[RolloutBatch, float]:
        """Attach whitened advantages, returns and old values; also the mean sequence KL."""
        config, mask = self.config, batch.sequences.mask
        kl = (batch.logp_old - batch.logp_ref) * mask
        with self.stack.phase("score"), torch.no_grad():
            values = self._values(batch)
        advantages, returns = {}, {}
        for channel, score in batch.rewards.items():
            penalty = self.kl * batch.kl_sign.get(channel, 0.0)
            rewards = token_rewards(score, mask, kl, penalty)
            advantages[channel] = gae(
                rewards, values[channel], mask, config.gamma, config.gae_lambda
            )
            returns[channel] = advantages[channel] + values[channel]
        mixed = whiten(batch.mix(advantages), mask)
        extra = {**batch.extra, "advantage": mixed, "returns": returns, "values": values}
        return replace(batch, extra=extra), float(kl.sum(1).mean())

    def _values(self, batch: RolloutBatch) -> dict[str, Tensor]:
        heads = {channel: self._head(channel) for channel in batch.rewards}

        def values(rows: Tensor) -> Tensor:
            hidden = response_states(self.ctx.model, batch.sequences.take(rows)).float()
            return torch.cat([head(hidden) for head in heads.values()], -1)

        found = processes.by_rows(values, len(batch.group), self.config.micro_batch)
        return dict(zip(heads, found.unbind(-1), strict=True))

    def run(self, batch: RolloutBatch) -> Report:
        """Loss and gradient of one step."""
        normaliser = float(batch.sequences.mask.sum())
        return accumulate(
            batch,
            len(batch.group),
            self.config.micro_batch,
            lambda part: self.item_terms(part, normaliser),
            lambda part, terms: self._value_loss(part, terms, normaliser),
        )

    def item_terms(self, batch: RolloutBatch, normaliser: float) -> ItemTerms:
        """Per-token clipped policy losses."""
        mask, advantage = batch.sequences.mask, batch.extra["advantage"]
        terms = response_terms(self.ctx.model, batch.sequences, self.temperature, hidden=True)
        ratio = (terms.logp - batch.logp_old).exp()
        clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
        loss = torch.max(-advantage * ratio, -advantage * clipped) * mask
        ratios = processes.total((ratio.detach() * mask).sum())
        mean_ratio = ratios / processes.total(mask.sum()).clamp(min=1)
        loss = torch.where(mean_ratio > self.config.ratio_limit, 0.0, loss)
        extra = {
            "logp": terms.logp,
            "logp_ref": batch.logp_ref,
            "mask": mask,
            "hidden": terms.hidden,
            "keep": (mean_ratio <= self.config.ratio_limit).float(),
        }
        return ItemTerms(loss, batch.weight[:, None], normaliser, extra)

    def _value_loss(self, batch: RolloutBatch, terms: ItemTerms, normaliser: float) -> Tensor:
        total = torch.zeros(())
        hidden = terms.extra["hidden"]
        hidden = hidden if self.config.value_trunk else hidden.detach()
        for channel, returns in batch.extra["returns"].items():
            old = batch.extra["values"][channel]
            value = self.heads[channel](hidden.float())[..., 0]
            counted = batch.sequences.mask * batch.weight[:, None]
            total = total + value_loss(value, old, returns, counted, self.config.value_clip)
        return self.config.vf_coef * terms.extra["keep"] * total / normaliser

    def state_dict(self) -> dict[str, Any]:
        """KL coefficient and value heads."""
        return {"kl": self.kl, "heads": self.heads.state_dict(), "channels": list(self.heads)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; heads exist before the optimizer's moments are loaded."""
        self.kl = float(state["kl"])
        for channel in state["channels"]:
            self._head(channel)
        self.heads.load_state_dict(processes.like_all(self.heads.state_dict(), state["heads"]))


def value_loss(value: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Summed 1/2 max of squared errors of the value and of the value clipped around ``old``.

    ``mask`` is (N, T), weights included.
    """
    clipped = old + (value - old).clamp(-clip, clip)
    worst = torch.max((value - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (worst * mask).sum()
