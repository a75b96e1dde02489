"""Two null controls that stand in every table.

A defence that merely stops learning looks safe. ``freeze`` is that defence in its pure form and
``small_lr`` its gradual form; a real defence must keep the policy safe *and* retain what honest
feedback teaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agents.context import Context
from agents.defence import Defence, Report, Run, defences
from envs.usage import check_ranges


@defences.register("freeze")
class Freeze(Defence):
    """No update at all: the learner's step is never run."""

    def backward(self, ctx: Context, run: Run) -> Report:
        """Make no gradient."""
        return Report({}, skipped=True)


@defences.register("small_lr")
class SmallLearningRate(Defence):
    """Divides the policy's learning rate, not that of value heads, during every update.

    Args:
        divisor: >= 1; 1 is bitwise no defence.
    """

    off = "divisor=1"

    def __init__(self, divisor: float = 100.0):
        self.divisor = divisor
        check_ranges(self, "small_lr.", divisor=">= 1")

    @contextmanager
    def phase(self, ctx: Context, name: str) -> Iterator[None]:
        """Lower the rate on entering ``update``; restore the saved value on leaving."""
        if name != "update":
            yield
            return
        policy = {id(p) for p in ctx.policy_params()}
        groups = [
            group
            for group in ctx.optimizer.param_groups
            if any(id(p) in policy for p in group["params"])
        ]
        saved = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] / self.divisor
        try:
            yield
        finally:
            for group, rate in zip(groups, saved, strict=True):
                group["lr"] = rate
