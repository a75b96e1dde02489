"""TAR+RepNoise: tamper resistance measured by representation noising (Rosati et al.).

    L_TR := CE(refusal) + beta * noise - alpha * log(1 + ascent)   at every look at attacked weights

in place of the entropy; all else as in :mod:`agents.defences.tar`. So after a simulated attack the
model should refuse, its harmful activations should look like noise, and harmful answers should be
unlikely at every depth. The terms are those of :mod:`agents.defences.rep_noise`, on pairs whose
prompts no adversary trains on. The sum of the weights, and so ``scale`` and ``inner_steps``,
multiplies the ascent too.

RepNoise first and TAR from its result is the list ``[rep_noise, tar]``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.context import Context
from agents.defence import defences
from agents.defences.rep_noise import rep_noise_loss
from agents.defences.tar import ADVERSARIES, TAR
from envs.usage import check_ranges


@defences.register("tar_rep_noise")
class TARRepNoise(TAR):
    """Meta-learns weights that refuse, with noised harmful activations, after simulated attacks.

    Args:
        steps: outer optimizer steps, >= 0; 0 is bitwise no defence.
        alpha: strength of the ascent of the harmful loss, >= 0.
        beta: strength of the noise, >= 0.

    The other arguments are those of :class:`agents.defences.tar.TAR`.
    """

    needs = frozenset({"harm", "pair_heldout", "retain"})
    paper = "Rosati et al."
    held_out = "pair_heldout"

    def __init__(
        self,
        steps: int = 40,
        lr: float = 2e-3,
        batch: int = 16,
        warmup: float = 0.1,
        inner_steps: int = 16,
        every: int = 4,
        tasks: int = 1,
        adversary_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3),
        adversaries: tuple[str, ...] = ADVERSARIES,
        scale: float = 4.0,
        decay: float = 0.0625,
        weights: str = "exponential",
        retain: float = 1.0,
        representation: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.1,
    ):
        super().__init__(
            steps=steps,
            lr=lr,
            batch=batch,
            warmup=warmup,
            inner_steps=inner_steps,
            every=every,
            tasks=tasks,
            adversary_lrs=adversary_lrs,
            adversaries=adversaries,
            scale=scale,
            decay=decay,
            weights=weights,
            retain=retain,
            representation=representation,
        )
        self.alpha, self.beta = alpha, beta
        check_ranges(self, f"{self.label}.", alpha=">= 0", beta=">= 0")

    def tamper_loss(self, ctx: Context, held_out: Any) -> Tensor:
        """RepNoise's loss on held-out pairs."""
        return rep_noise_loss(ctx.model, held_out, self.alpha, self.beta, ctx.rng)
