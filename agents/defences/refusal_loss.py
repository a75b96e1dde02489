"""Refusal Loss: keep refusing while learning anything else.

    L = L_learner + alpha * L_LM(refusal)

An extra language-model loss on refusals to harmful prompts, added to whatever the learner
minimises. Form and strength as in Rosati et al., *Evaluating Defences against Unsafe Feedback in
RLHF* (alpha an integer, 100 there); the idea of auxiliary safety data is Qi et al. 2024, whose
alpha/(1 - alpha) is this alpha.

Under Adam the strength acts through the ratio of gradient norms only, so ``alpha`` does not
transfer between learners; ``defence/refusal_loss/grad_ratio`` is logged for that reason.
"""

from __future__ import annotations

from agents.context import Context
from agents.defence import Defence, Report, Run, defences
from envs.usage import check_ranges


@defences.register("refusal_loss")
class RefusalLoss(Defence):
    """Adds alpha times the language-model loss on refusals to every optimizer step.

    Args:
        alpha: strength, >= 0; 0 is bitwise no defence.
        batch: refusals per step.
    """

    needs = frozenset({"refusal"})
    constraint, cost = "loss", "2x"
    paper = "Qi et al. 2024; Rosati et al."
    off = "alpha=0"

    def __init__(self, alpha: float = 1.0, batch: int = 32):
        self.alpha = alpha
        self.batch = batch
        check_ranges(self, "refusal_loss.", alpha=">= 0", batch=">= 1")

    def backward(self, ctx: Context, run: Run) -> Report:
        """The learner's gradient plus alpha times the refusal gradient."""
        report = run()
        if self.alpha == 0:
            return report
        with ctx.phase("serve"), ctx.added_grads("refusal_loss"):
            loss = ctx.lm_loss(ctx.data["refusal"].next(self.batch))
            (self.alpha * loss).backward()
        ctx.log({"defence/refusal_loss/loss": loss.detach()})
        return report._replace(skipped=False)
