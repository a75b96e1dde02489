"""Lisa: take turns between alignment and users' data, tied together (Huang et al. 2024).

    alignment turn   min_w  L_LM(refusal; w) + rho/2 |w - w_user|^2
    user turn        min_w  L_learner(w)     + rho/2 |w - w_alignment|^2

``w_user`` and ``w_alignment`` are the weights at the end of the last turn of that kind, the initial
ones before there was any. In an alignment turn the batch that the learner has drawn is not used.
One optimizer, with its moments, serves both.

Rosati et al. describe the anchor as the original policy and give no lengths of turns: that is
``mode="anchor"``, which pulls every step to the weights that ``prepare`` met (rho 100 there). Under
Adam rho acts through its ratio to the learner's gradient only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from agents.context import Context
from agents.defence import Defence, Report, Run, defences
from agents.processes import like, whole
from envs.usage import UsageError, check_ranges

MODES = ("bi_state", "anchor")


@defences.register("lisa")
class Lisa(Defence):
    """Alternates alignment and user steps with a proximal pull between them.

    Args:
        rho: strength of the pull, >= 0.
        mode: ``bi_state`` (the authors') or ``anchor``.
        alignment_steps: optimizer steps of an alignment turn; 0 with rho 0 is bitwise no defence.
        user_steps: optimizer steps of a user turn, >= 1.
        pull_after: optimizer steps before the pull begins; the authors wait for a tenth of all.
        batch: refusals per alignment step.
    """

    constraint, kind = "weights", "turns"
    paper = "Huang et al. 2024"
    off = "rho=0, alignment_steps=0"

    def __init__(
        self,
        rho: float = 1.0,
        mode: str = "bi_state",
        alignment_steps: int = 1,
        user_steps: int = 9,
        pull_after: int = 0,
        batch: int = 32,
    ):
        if mode not in MODES:
            raise UsageError(f"lisa.mode={mode!r}; allowed: {', '.join(MODES)}")
        self.rho, self.mode, self.batch, self.pull_after = rho, mode, batch, pull_after
        self.lengths = {"alignment": alignment_steps, "user": user_steps}
        check_ranges(self, "lisa.", rho=">= 0", pull_after=">= 0", batch=">= 1")
        ranges = {"alignment_steps": alignment_steps, "user_steps": user_steps}
        check_ranges(ranges, "lisa.", alignment_steps=">= 0", user_steps=">= 1")
        self.takes_turns = mode == "bi_state" and alignment_steps > 0
        self.needs = frozenset({"refusal"}) if self.takes_turns else frozenset()
        self.turn = "alignment" if self.takes_turns else "user"
        self.clock = 0
        self.ends: dict[str, list[Tensor]] = {}

    def prepare(self, ctx: Context) -> None:
        """Both turns are tied to the initial weights at first."""
        start = [p.detach().clone() for p in ctx.policy_params()]
        self.ends = {"alignment": start, "user": start}

    @contextmanager
    def phase(self, ctx: Context, name: str) -> Iterator[None]:
        """Keep the clock of turns, one tick per optimizer step."""
        if name != "update" or not self.takes_turns:
            yield
            return
        if self.clock == self.lengths[self.turn]:
            self.ends[self.turn] = [p.detach().clone() for p in ctx.policy_params()]
            self.turn, self.clock = "user" if self.turn == "alignment" else "alignment", 0
        yield
        self.clock += 1

    def backward(self, ctx: Context, run: Run) -> Report:
        """One step of the present turn, pulled to where the other turn ended."""
        if self.turn == "alignment":
            with ctx.phase("serve"):
                loss = ctx.lm_loss(ctx.data["refusal"].next(self.batch))
                loss.backward()
            ctx.log({"defence/lisa/alignment_loss": loss.detach()})
            report = Report({})
        else:
            report = run()
        if self.rho and ctx.step >= self.pull_after:
            report = report._replace(skipped=False)
            self._pull(ctx)
        return report

    def _pull(self, ctx: Context) -> None:
        """Add the gradient of rho/2 |w - anchor|^2."""
        other, params = "user" if self.turn == "alignment" else "alignment", ctx.policy_params()
        anchor = [like(p, kept) for p, kept in zip(params, self.ends[other], strict=True)]
        self.ends[other] = anchor
        distance = 0.0
        with torch.no_grad():
            for p, kept in zip(params, anchor, strict=True):
                gap = p - kept
                distance += float(whole(gap.float().square().sum()))
                p.grad = self.rho * gap if p.grad is None else p.grad.add_(gap, alpha=self.rho)
        ctx.log({"defence/lisa/distance": distance**0.5})

    def state_dict(self) -> dict[str, Any]:
        """Turn, clock and the ends of both turns."""
        return {"turn": self.turn, "clock": self.clock, **self.ends}

    def load_state_dict(self, ctx: Context, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.turn, self.clock = str(state["turn"]), int(state["clock"])
        self.ends = {name: list(state[name]) for name in ("alignment", "user")}
