"""A defence in a package of its own, found by its entry point."""

from agents.defence import Defence, Report


class SlowStart(Defence):
    """Leaves out the first optimizer steps.

    Args:
        steps: how many; 0 is bitwise no defence.
    """

    constraint, off = "none", "steps=0"

    def __init__(self, steps: int = 1_000_000):
        self.steps, self.seen = steps, 0

    def backward(self, ctx, run):
        self.seen += 1
        return run() if self.seen > self.steps else Report({}, skipped=True)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, ctx, state):
        self.seen = state["seen"]
