"""KL anchor: stay near the reference's whole distribution on benign answers and on refusals.

    L = L_learner + alpha mean_t KL(pi_ref(. | x, y_<t) || pi(. | x, y_<t))

over the response tokens of equally many rows of ``retain`` and ``refusal``, or with the two
distributions changed round. Against the reference the forward direction is distillation of the old
model (Li & Hoiem 2016, *Learning without Forgetting*): it covers all the reference might say. The
backward one only forbids what the reference would not. Learners pull to the reference on what users
asked; this pulls on aligned data of the defender's own.

At the start the term and its gradient are 0, so it resists a drift and never causes one. Under Adam
``alpha`` acts through ``defence/kl_anchor/grad_ratio``, logged for that reason. The distributions
are those of the output embedding on the final states, before a family's caps on logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agents.batches import Sequences
from agents.context import Context
from agents.defence import Defence, Report, Run, defences
from agents.policy import TILE, response_states
from agents.sharding import as_forward
from envs.usage import UsageError, check_ranges

DIRECTIONS = ("forward", "backward")


@defences.register("kl_anchor")
class KLAnchor(Defence):
    """Adds alpha times the KL to the reference on benign answers and refusals to every step.

    Args:
        alpha: strength per nat and token, >= 0; 0 is bitwise no defence.
        direction: ``forward``, KL(reference || policy), or ``backward``, KL(policy || reference).
        batch: rows of each of the two data roles per step.
    """

    needs = frozenset({"refusal", "retain"})
    constraint, cost = "loss", "2.3x"
    paper = "Li & Hoiem 2016"
    off = "alpha=0"

    def __init__(self, alpha: float = 1.0, direction: str = "forward", batch: int = 16):
        if direction not in DIRECTIONS:
            raise UsageError(f"kl_anchor.direction={direction!r}; allowed: {', '.join(DIRECTIONS)}")
        self.alpha, self.direction, self.batch = alpha, direction, batch
        check_ranges(self, "kl_anchor.", alpha=">= 0", batch=">= 1")

    def backward(self, ctx: Context, run: Run) -> Report:
        """The learner's gradient plus alpha times that of the KL."""
        report = run()
        if self.alpha == 0:
            return report
        rows = Sequences.concatenate(
            [ctx.data[role].next(self.batch) for role in ("retain", "refusal")]
        )
        with ctx.phase("serve"), ctx.added_grads("kl_anchor"):
            kl = mean_kl(ctx.model, ctx.reference, rows, self.direction)
            (self.alpha * kl).backward()
        ctx.log({"defence/kl_anchor/kl": kl.detach()})
        return report._replace(skipped=False)


@as_forward
def mean_kl(model: nn.Module, reference: nn.Module, sequences: Sequences, direction: str) -> Tensor:
    """Mean KL over response tokens between the next-token distributions of two models, in nats.

    No more logits than a tile exist at once; beyond one, the backward pass forms them again.
    """
    real = sequences.mask.bool()
    states = response_states(model, sequences)[real]  # (R, d)
    with torch.no_grad():
        anchors = response_states(reference, sequences)[real]

    def tile(states: Tensor, anchors: Tensor) -> Tensor:
        policy = log_probabilities(model, states)
        with torch.no_grad():
            kept = as_forward(log_probabilities)(reference, anchors)
        p, q = (kept, policy) if direction == "forward" else (policy, kept)
        return F.kl_div(q, p, reduction="sum", log_target=True)

    rows = max(1, TILE // model.get_output_embeddings().weight.shape[0])
    if len(states) <= rows:
        return tile(states, anchors) / len(states)
    again = {"use_reentrant": False, "preserve_rng_state": False}
    parts = zip(states.split(rows), anchors.split(rows), strict=True)
    total = torch.stack([checkpoint(tile, *part, **again) for part in parts]).sum()
    return total / len(states)


def log_probabilities(model: nn.Module, states: Tensor) -> Tensor:
    """(R, V) in float32 at least, from the states before the head."""
    logits = model.get_output_embeddings()(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
