"""Safety bottleneck: pin what the model makes of harmful prompts (Lu et al. 2026).

    L = L_learner + strength * mean over anchors x of |h(x; theta) - h(x; theta_0)|^2

with h(x) the final, normed hidden state of a prompt's last token, the only thing the first word of
the answer is read from. Weights have many ways around a constraint on weights; this state is the
bottleneck that all of them pass. Anchors are a few fixed harmful prompts (in the paper a single one
goes a long way), theta_0 the weights that ``prepare`` met. h is held, not what is read from it: an
output layer of its own may still move, and so may all later tokens.

The square sums over dimensions, so ``strength`` does not transfer between widths, and its gradient
is zero at the start; ``defence/safety_bottleneck/grad_ratio`` tells what it weighs later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.batches import Sequences
from agents.context import Context
from agents.defence import Defence, Report, Run, defences
from agents.policy import response_states
from envs.usage import check_ranges


@defences.register("safety_bottleneck")
class SafetyBottleneck(Defence):
    """Pulls the hidden states that harmful prompts end in back to where they were.

    Args:
        strength: of the pull, >= 0; 0 is bitwise no defence.
        anchors: harmful prompts drawn once, >= 1; all are used in every step.
    """

    needs = frozenset({"harm_prompts"})
    constraint, cost = "representation", "1.5x"
    paper = "Lu et al. 2026"
    off = "strength=0"

    def __init__(self, strength: float = 1.0, anchors: int = 64):
        self.strength, self.anchors = strength, anchors
        check_ranges(self, "safety_bottleneck.", strength=">= 0", anchors=">= 1")
        self.prompts: Sequences | None = None
        self.states: Tensor | None = None  # (anchors, d) at theta_0, float32

    def prepare(self, ctx: Context) -> None:
        """Draw the anchors and note where they end now."""
        if self.strength == 0:
            return
        drawn = ctx.data["harm_prompts"].next(self.anchors)
        # The state before an answer's first token; which token that is does not matter.
        self.prompts = drawn._replace(ids=drawn.ids[:, :1], mask=torch.ones_like(drawn.mask[:, :1]))
        with torch.no_grad():
            self.states = self.last_states(ctx)

    def last_states(self, ctx: Context) -> Tensor:
        """(anchors, d) final hidden state of every anchor's last token, at least float32."""
        assert self.prompts is not None, "prepare draws the anchors"
        states = response_states(ctx.model, self.prompts)[:, 0]
        return states.to(torch.promote_types(states.dtype, torch.float32))

    def backward(self, ctx: Context, run: Run) -> Report:
        """The learner's gradient plus that of the pull."""
        report = run()
        if self.strength == 0:
            return report
        with ctx.phase("serve"), ctx.added_grads("safety_bottleneck"):
            distance = (self.last_states(ctx) - self.states).square().sum(1).mean()
            (self.strength * distance).backward()
        ctx.log({"defence/safety_bottleneck/distance": distance.detach()})
        return report._replace(skipped=False)

    def state_dict(self) -> dict[str, Any]:
        """The anchors and their states."""
        if self.prompts is None:
            return {}
        return {**self.prompts._asdict(), "states": self.states}

    def load_state_dict(self, ctx: Context, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if state:
            self.prompts = Sequences(*(state[name] for name in Sequences._fields))
            self.states = state["states"]
