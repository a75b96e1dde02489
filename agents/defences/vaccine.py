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

Under activation checkpointing a backward pass forms outputs again; they are taken for those of
their block's latest call, so every forward pass must have its backward pass before the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agents import processes
from agents.context import Context
from agents.defence import Defence, Report, Run, defences
from envs.usage import UsageError, check_ranges

Change = Callable[[Any, Tensor], Tensor]
"""From which call it is and an attention output to what the model goes on with."""


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

    def prepare(self, ctx: Context) -> None:
        """See that there is attention to perturb.

        Raises:
            UsageError: there is none.
        """
        if self.rho and not attention_blocks(ctx.model):
            raise UsageError(
                f"vaccine: {type(ctx.model).__name__} has nothing to perturb; "
                "allowed: a model with modules whose class name ends in Attention"
            )

    def backward(self, ctx: Context, run: Run) -> Report:
        """The learner's gradient under the perturbation that its first pass found."""
        if self.rho == 0:
            return run()
        slopes: dict[Any, Tensor] = {}

        def watch(call: Any, states: Tensor) -> Tensor:
            if states.requires_grad:
                states.register_hook(lambda slope: slopes.__setitem__(call, slope.detach()))
            return states

        with ctx.isolated_grads(), ctx.replay_rng(), attention_outputs(ctx.model, watch):
            run()
        if not slopes:  # the learner made no step
            return run()
        squares = torch.stack([slope.float().square().sum() for slope in slopes.values()])
        norm = processes.total(squares.sum()).sqrt()
        scale = self.rho / (norm + 1e-7)

        def perturb(call: Any, states: Tensor) -> Tensor:
            slope = slopes.get(call)
            return states if slope is None else states + (scale * slope).to(states.dtype)

        with attention_outputs(ctx.model, perturb):
            report = run()
        # Rows that do not count have slopes of 0.
        vectors = sum(slope.numel() // slope.shape[-1] for slope in slopes.values() if slope.any())
        vectors = int(processes.total(torch.tensor(vectors)))
        ctx.log(
            {
                "defence/vaccine/gradient_norm": norm,
                "defence/vaccine/per_token": self.rho / vectors**0.5,
            }
        )
        return report


def attention_blocks(module: nn.Module) -> list[nn.Module]:
    """The attention blocks in ``module``, told by their class's name; none within another."""
    if type(module).__name__.endswith("Attention"):
        return [module]
    found = [block for child in module.children() for block in attention_blocks(child)]
    return list(dict.fromkeys(found))  # layers may share one


@contextmanager
def attention_outputs(model: nn.Module, change: Change) -> Iterator[None]:
    """Pass every attention block's output through ``change`` while the block lasts.

    A call is known by its block and its number among that block's. Hooks must stay until the
    backward pass is through, for models that form activations again there.
    """
    blocks = attention_blocks(model)
    calls = [0] * len(blocks)

    def hook(block: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:  # else within a backward pass: formed again
            calls[block] += 1
        call = (block, calls[block])
        if isinstance(output, tuple):
            return (change(call, output[0]), *output[1:])
        return change(call, output)

    handles = [m.register_forward_hook(partial(hook, i)) for i, m in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
