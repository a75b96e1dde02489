"""Gradient penalty: keep the weights where harmful data pull little.

    L = L_learner + lambda |grad h|^2,    h = L_LM(harm)

Its gradient is 2 lambda H g with g = grad h and H the Hessian of h, found without second
derivatives from one more gradient at a distance r along g:

    H g  ~  |g| [grad h(w + r g/|g|) - g] / r

exact where h is quadratic. Suggested by Rosati et al. as a cheap stand-in for TAR. Besides flat
places where harm cannot be learned, the penalty also likes the place where harm has been learned,
since g is zero there too; ``defence/gradient_penalty/harm_loss`` tells the two apart. Under Adam
``lam`` acts through its ratio to the learner's gradient only.
"""

from __future__ import annotations

from agents.context import Context
from agents.defence import Defence, Report, Run, defences
from agents.defences.booster import add_change, along_gradient
from envs.usage import check_ranges


@defences.register("gradient_penalty")
class GradientPenalty(Defence):
    """Adds lambda times the squared gradient norm of the harmful loss to every optimizer step.

    Args:
        lam: lambda, strength, >= 0; 0 is bitwise no defence.
        distance: r, length of the finite difference, L2 over all weights, > 0; too short and
            rounding shows, too long and h is no longer quadratic.
        batch: harmful rows per step.
    """

    needs = frozenset({"harm"})
    constraint, cost = "meta-learned", "3x"
    paper = "Rosati et al."
    off = "lam=0"

    def __init__(self, lam: float = 0.1, distance: float = 1e-3, batch: int = 32):
        self.lam, self.distance, self.batch = lam, distance, batch
        check_ranges(self, "gradient_penalty.", lam=">= 0", distance="> 0", batch=">= 1")

    def backward(self, ctx: Context, run: Run) -> Report:
        """The learner's gradient plus that of the penalty."""
        report = run()
        if self.lam == 0:
            return report
        rows = ctx.data["harm"].next(self.batch)
        shift = along_gradient(ctx, lambda: ctx.lm_loss(rows), self.distance)
        strength = 2 * self.lam * float(shift.norm) / self.distance
        with ctx.added_grads("gradient_penalty"):
            add_change(ctx, shift, strength)
        ctx.log(
            {
                "defence/gradient_penalty/harm_loss": shift.loss_here,
                "defence/gradient_penalty/harm_gradient": shift.norm,
            }
        )
        return report._replace(skipped=False)
