"""The online reward model: Bradley-Terry on a bounded replay of human comparisons.

    L = -t log sigma(r(a) - r(b)) - (1 - t) log sigma(r(b) - r(a))          per-label weights

A language model with a scalar head, on a base of its own: one that inherited a defended policy's
representations would pass the defence's blindness off as safety. It is trained a few steps every
round on labels drawn uniformly from the last ``window``; it is a learner like any other, so the
``feedback`` and ``backward`` hooks apply to it. In PPO and GRPO this is where poisoned preferences
enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.adapters import load_own_state, own_state
from agents.batches import ItemTerms, PairBatch, Sequences, moved
from agents.context import Context
from agents.defence import DefenceStack, Report
from agents.learners.update import (
    Means,
    OptimizerConfig,
    accumulate,
    make_optimizer,
    update_step,
)
from agents.models import device_of
from agents.policy import sequence_rewards
from agents.processes import by_rows
from agents.replay import Replay
from envs import rng as draws
from envs.usage import check_ranges


@dataclass(frozen=True)
class RewardModelConfig(OptimizerConfig):
    """How the online reward model learns."""

    section = "reward_model."

    lr: float = 2e-3
    """Learning rate."""
    minibatch: int = 64
    """Labels per step."""
    micro_batch: int = 64
    """Labels per forward and backward."""
    steps: int = 4
    """Optimizer steps per round."""
    window: int = 1024
    """Labels kept for replay, newest first out last."""
    init: Literal["warm", "cold", "policy"] = "warm"
    """Own base warm-started on honest pairs, own base cold, or a copy of the policy."""
    reset_every: int = 0
    """Return to the initial weights every so many rounds; 0 never."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_ranges(self, self.section, steps=">= 0", window=">= 1", reset_every=">= 0")


def load_reward_model(
    path: str | Path, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """A sequence classifier with one output from ``path``; ``seed`` draws a missing head."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()  # that a language model has no head is no news here
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, use_safetensors=True, dtype=dtype
            )
    finally:
        logging.set_verbosity(said)
    return model.to(device).eval()


@torch.no_grad()
def scores(model: nn.Module, sequences: Sequences, batch: int = 256) -> Tensor:
    """(N,) outputs of a one-number head without gradient, ``batch`` rows at a time.

    The rows go to the model's device; what is found of them comes back to theirs.
    """
    here, there = sequences.ids.device, device_of(model)

    def rewards(rows: Tensor) -> Tensor:
        return sequence_rewards(model, sequences.take(rows).to(there)).to(here)

    return by_rows(rewards, len(sequences), batch)


class RewardModel:
    """Scores responses, and learns from labels."""

    def __init__(self, config: RewardModelConfig, ctx: Context, stack: DefenceStack):
        self.config = config
        self.ctx = ctx
        self.stack = stack
        self.initial = {k: v.clone() for k, v in self._weights().items()}
        ctx.optimizer = make_optimizer(config, ctx.policy_params())

    def _weights(self) -> dict[str, Tensor]:
        return own_state(self.ctx.model) if self.config.reset_every else {}

    def score(self, sequences: Sequences) -> Tensor:
        """(N,) rewards without gradient."""
        return scores(self.ctx.model, sequences)

    def learn(self, replay: Replay, round: int, seed: int) -> dict[str, float]:
        """``config.steps`` steps on uniform draws from ``replay``; metrics ``reward_model/*``."""
        if self.config.reset_every and round and round % self.config.reset_every == 0:
            load_own_state(self.ctx.model, self.initial)
            self.ctx.optimizer = make_optimizer(self.config, self.ctx.policy_params())
        means = Means()
        usable = replay.usable()
        for step in range(self.config.steps if len(usable) else 0):
            counters = np.arange(self.config.minibatch)
            picks = draws.uniform(draws.key(seed, "replay", step), counters) * len(usable)
            pairs = replay.pairs(usable[picks.astype(np.int64)])
            batch = self.stack.feedback(moved(pairs, device_of(self.ctx.model)))
            if not len(batch.target):
                continue
            report = update_step(
                self.ctx, self.stack, lambda b=batch: self.run(b), self.config.max_grad_norm
            )
            means.add(report.losses)
        return means.result("reward_model")

    def run(self, batch: PairBatch) -> Report:
        """Loss and gradient of one step."""
        n = len(batch.target)
        return accumulate(
            batch, n, self.config.micro_batch, lambda part: self.item_terms(part, float(n))
        )

    def item_terms(self, batch: PairBatch, normaliser: float) -> ItemTerms:
        """Per-pair Bradley-Terry losses; a and b share one forward pass."""
        both = Sequences.concatenate([batch.a, batch.b])
        reward_a, reward_b = sequence_rewards(self.ctx.model, both).split(len(batch.target))
        delta = reward_a - reward_b
        loss = -batch.target * F.logsigmoid(delta) - (1 - batch.target) * F.logsigmoid(-delta)
        extra = {"delta": delta, "beta": torch.ones(()), "target": batch.target, **batch.extra}
        return ItemTerms(loss, batch.weight, normaliser, extra)

    def state_dict(self) -> dict[str, Any]:
        """The weights to reset to, where resets are on."""
        return {"initial": self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.initial = dict(state["initial"])
