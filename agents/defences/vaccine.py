"""Vaccine: learn under the perturbation of hidden states that hurts most (Huang, Hu & Liu 2024).

With e_l the output of attention block l and g_l = dL/de_l,

    N = sqrt(sum_l |g_l|^2),    eps_l = rho g_l / (N + 1e-7),    step along  grad L(theta; e + eps)

so the policy becomes insensitive to a drift of its embeddings. Two passes of the learner's own
loss: the first tells the g_l and its gradient is thrown away, the second runs perturbed, with the
same random numbers. As in Rosati et al. it acts online, on whatever the learner minimises
(rho 100 there; the authors align by it with rho 2).

``rho`` is the norm over all layers and tokens of the step, so the size per token falls with the
batch; ``defence/vaccine/per_token`` is logged for that reason. Under PPO and GRPO the perturbed
forward changes log pi but not log pi_old: at large rho ratios leave the clip range at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from agents.context import Context
from agents.defence import Defence, Report, Run, defences
from envs.usage import check_ranges

Change = Callable[[int, Tensor], Tensor]
"""From the number of the call and an attention output to what the model goes on with."""


@defences.register("vaccine")
class Vaccine(Defence):
    """Trains at the worst first-order perturbation of every attention output.

    Args:
        rho: norm of the perturbation over the whole step, >= 0; 0 is bitwise no defence.
    """

    constraint, kind, cost = "embedding", "perturbation", "2x"
    paper = "Huang et al. 2024"
    off = "rho=0"

    def __init__(self, rho: float = 2.0):
        self.rho = rho
        check_ranges(self, "vaccine.", rho=">= 0")

    def backward(self, ctx: Context, run: Run) -> Report:
        """The learner's gradient under the perturbation that its first pass found."""
        if self.rho == 0:
            return run()
        slopes: dict[int, Tensor] = {}

        def watch(call: int, states: Tensor) -> Tensor:
            if states.requires_grad:
                states.register_hook(lambda slope: slopes.__setitem__(call, slope.detach()))
            return states

        with ctx.isolated_grads(), ctx.replay_rng(), attention_outputs(ctx.model, watch):
            run()
        if not slopes:  # the learner made no step
            return run()
        squares = torch.stack([slope.float().square().sum() for slope in slopes.values()])
        scale = self.rho / (squares.sum().sqrt() + 1e-7)

        def perturb(call: int, states: Tensor) -> Tensor:
            slope = slopes.get(call)
            return states if slope is None else states + (scale * slope).to(states.dtype)

        with attention_outputs(ctx.model, perturb):
            report = run()
        vectors = sum(slope.numel() // slope.shape[-1] for slope in slopes.values())
        ctx.log(
            {
                "defence/vaccine/gradient_norm": squares.sum().sqrt(),
                "defence/vaccine/per_token": self.rho / vectors**0.5,
            }
        )
        return report


@contextmanager
def attention_outputs(model: nn.Module, change: Change) -> Iterator[None]:
    """Pass every attention block's output through ``change`` while the block lasts.

    Calls are numbered in their order, over layers, forward passes and micro-batches alike. Hooks
    stay until the backward pass is through, for those who form activations again.
    """
    calls = 0

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if isinstance(output, tuple):
            return (change(calls, output[0]), *output[1:])
        return change(calls, output)

    attention = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    handles = [module.register_forward_hook(hook) for module in attention]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
