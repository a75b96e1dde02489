"""Booster: align such that a harmful step helps harm little (Huang et al. 2025, "Booster").

    min_w  f(w) + lambda [h(w) - h(w - alpha u)],    u = grad h / (|grad h| + 1e-7)

with f the loss on refusals, h that on harmful answers. What is weakened is not h itself but its
drop along one normalised harmful step. The direction u counts as a constant, so the gradient is

    grad f + lambda (grad h(w) - grad h(w - alpha u))  ~  grad f + lambda alpha H u

and costs two passes of h beside one of f. The authors align LoRA adapters for 20 epochs at 5e-4
with lambda=5, alpha=.1.

``alpha`` is a length in the space of all trained weights: the same number is a smaller step per
weight in a larger model. Training on refusals alone teaches to refuse everybody; ``retain`` adds
the loss on benign answers, which the authors do not have. A harmful step also gains little where
harm has been learned already: on a model that can do harm and only declines to, the weakening may
find that place, so look at the harmful loss before trusting the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from agents.context import Context
from agents.defence import defences
from agents.offline import OfflineDefence
from envs.usage import check_ranges


@defences.register("booster")
class Booster(OfflineDefence):
    """Aligns on refusals while weakening how much one harmful step would gain.

    Args:
        steps: optimizer steps, >= 0; 0 is bitwise no defence.
        lr: peak learning rate, 0 to 1.
        batch: rows of each data role per step.
        lam: lambda, strength of the weakening, >= 0.
        alpha: length of the simulated harmful step, L2 over all weights, > 0.
        retain: strength of the loss on benign answers, >= 0; the authors' is 0.
    """

    constraint = "meta-learned"
    cost = "4 passes a step"
    paper = "Huang et al. 2025"
    off = "steps=0"

    def __init__(
        self,
        steps: int = 200,
        lr: float = 5e-4,
        batch: int = 32,
        warmup: float = 0.1,
        lam: float = 0.3,
        alpha: float = 0.1,
        retain: float = 1.0,
    ):
        super().__init__(steps, lr, batch, warmup)
        self.lam, self.alpha, self.retain = lam, alpha, retain
        check_ranges(self, f"{self.label}.", lam=">= 0", alpha="> 0", retain=">= 0")
        self.needs = frozenset({"refusal", "harm"} | ({"retain"} if retain else set()))

    def loss(self, ctx: Context, step: int) -> Tensor:
        """f, and what is retained."""
        loss = ctx.lm_loss(ctx.data["refusal"].next(self.batch))
        if self.retain:
            loss = loss + self.retain * ctx.lm_loss(ctx.data["retain"].next(self.batch))
        return loss

    def gradient(self, ctx: Context, step: int) -> float:
        """The gradient of f and of lambda times the drop of h."""
        loss = super().gradient(ctx, step)
        if self.lam == 0:
            return loss
        harm = ctx.data["harm"].next(self.batch)
        shift = along_gradient(ctx, lambda: ctx.lm_loss(harm), -self.alpha)
        add_change(ctx, shift, -self.lam)
        return loss + self.lam * (shift.loss_here - shift.loss_there)


class Shift(NamedTuple):
    """A loss and its gradient at w and at w + distance * u, u its normalised gradient at w."""

    change: dict[str, Tensor]  # by parameter: gradient there minus gradient here
    norm: Tensor  # of the gradient here
    loss_here: float
    loss_there: float


def along_gradient(ctx: Context, loss: Callable[[], Tensor], distance: float) -> Shift:
    """Measure ``loss`` at both ends of a step along its own gradient.

    Weights and gradients are as before afterwards. Both passes see the same random numbers.
    """
    params = {n: p for n, p in ctx.model.named_parameters() if p.requires_grad}
    with ctx.isolated_grads():
        with ctx.replay_rng():
            here = loss()
            here.backward()
        norm = ctx.grad_norm()
        touched = {n: p for n, p in params.items() if p.grad is not None}
        scale = distance / (norm + 1e-7)
        deltas = {n: scale.to(p.dtype) * p.grad for n, p in touched.items()}
        for p in touched.values():
            p.grad.neg_()  # the second backward pass then leaves the difference
        with ctx.perturbed(deltas):
            there = loss()
            there.backward()
        change = {n: p.grad for n, p in touched.items()}
    return Shift(change, norm, float(here.detach()), float(there.detach()))


@torch.no_grad()
def add_change(ctx: Context, shift: Shift, strength: float) -> None:
    """Add ``strength`` times the change of gradient to the accumulated gradients."""
    params = dict(ctx.model.named_parameters())
    for name, change in shift.change.items():
        p = params[name]
        p.grad = strength * change if p.grad is None else p.grad.add_(change, alpha=strength)
