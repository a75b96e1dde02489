"""A defence of one's own in fifteen lines: refusals stay as likely as they were before training.

    poisonloop run --rho .2 --defence "examples/own_defence.py:KeepRefusals(strength=20)"
    poisonloop score examples/own_defence.py:KeepRefusals

Of each optimizer step it adds the gradient of

    strength * mean over tokens of (log pi - log pi_ref)^2     on 32 harmful prompts, refused

to the learner's own. It keeps no state: the rows drawn and the reference are saved with the run.
"""

from agents.defence import Defence


class KeepRefusals(Defence):
    """Holds the log-probabilities of refusals where training found them."""

    needs, constraint, cost, off = frozenset({"refusal"}), "loss", "2x", "strength=0"

    def __init__(self, strength: float = 10.0):
        self.strength = strength

    def backward(self, ctx, run):
        """Make the learner's gradient, then add ours."""
        report = run()
        if self.strength:
            rows = ctx.data["refusal"].next(32)
            change = ctx.token_logprobs(rows) - ctx.ref_logprobs(rows)
            (self.strength * change.square().sum() / rows.mask.sum()).backward()
        return report
