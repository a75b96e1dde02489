"""The four hooks: composition, order, needs, isolation, and what survives an exception."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from agents.context import Context
from agents.defence import PHASES, Defence, DefenceStack, Report, defences, order_warning


class Plane(nn.Module):
    """Two numbers to be learned."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))


class Pull(Defence):
    """Adds the gradient of ``strength / 2 (w - centre)^2``: a refusal loss or a proximal term."""

    def __init__(self, strength, centre):
        self.strength, self.centre = strength, centre

    def backward(self, ctx, run):
        report = run()
        with ctx.isolated_grads(accumulate=True):
            loss = 0.5 * self.strength * ((ctx.model.w - self.centre) ** 2).sum()
            loss.backward()
        return report


class Sharpness(Defence):
    """Takes the gradient of the rest of the chain at its own steepest ascent (SAM)."""

    def __init__(self, rho):
        self.rho = rho

    def backward(self, ctx, run):
        with ctx.isolated_grads():
            run()
            step = {"w": self.rho * ctx.model.w.grad / ctx.model.w.grad.norm()}
        with ctx.perturbed(step):
            return run()


def plane_gradient(*members):
    """The gradient at (1, -1) of a user loss 1/2 (w - 3)^2 under a list of defences."""
    plane = Plane()
    stack = DefenceStack(members, Context("policy", plane, None, None))

    def run():
        loss = 0.5 * ((plane.w - 3) ** 2).sum()
        loss.backward()
        return Report({"loss": loss.item()})

    stack.backward(run)
    assert plane.w.tolist() == [1.0, -1.0]
    return plane.w.grad.tolist()


def test_additive_defences_commute():
    refusal, anchor = Pull(100, -1.0), Pull(2, 0.0)
    assert plane_gradient() == [-2, -4]
    assert plane_gradient(refusal, anchor) == plane_gradient(anchor, refusal) == [200, -6]


def test_perturbing_defences_do_not():
    refusal, sam = Pull(1, -1.0), Sharpness(0.1)
    assert plane_gradient(sam, refusal) == pytest.approx([0, -4.2])
    assert plane_gradient(refusal, sam) == pytest.approx([-0.0447214, -4.0894427])


def test_isolated_gradients_are_restored_or_added():
    plane = Plane()
    ctx = Context("policy", plane, None, None)
    plane.w.grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with ctx.isolated_grads():
        assert plane.w.grad is None
        (5 * plane.w.sum()).backward()
        assert ctx.grad_norm() == pytest.approx(50**0.5)
    assert plane.w.grad.tolist() == [1, 2]
    with ctx.isolated_grads(accumulate=True):
        (5 * plane.w.sum()).backward()
    assert plane.w.grad.tolist() == [6, 7]
    with pytest.raises(KeyError), ctx.isolated_grads():
        (5 * plane.w.sum()).backward()
        raise KeyError
    assert plane.w.grad.tolist() == [6, 7]


def test_perturbation_puts_back_the_saved_bits_also_after_an_exception(tiny):
    """Adding and subtracting would leave some float32 entries changed."""
    stack = tiny.stack()
    model = stack.ctx.model
    before = tiny.weights(model)
    generator = torch.Generator().manual_seed(0)
    deltas = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    with stack.ctx.perturbed(deltas):
        assert not torch.equal(tiny.weights(model), before)
    assert torch.equal(tiny.weights(model), before)
    with pytest.raises(RuntimeError), stack.ctx.perturbed(deltas):
        raise RuntimeError
    assert torch.equal(tiny.weights(model), before)


class Diary(Defence):
    """Writes down what happens to it."""

    def __init__(self, name, log, fails=None):
        self.name, self.log, self.fails = name, log, fails

    def prepare(self, ctx):
        self.log.append(f"{self.name}.prepare")

    def feedback(self, ctx, batch):
        return [*batch, self.name]

    @contextmanager
    def phase(self, ctx, name):
        self.log.append(f"{self.name}>{name}")
        try:
            if self.fails == name:
                raise RuntimeError(name)
            yield
        finally:
            self.log.append(f"{self.name}<{name}")

    def backward(self, ctx, run):
        self.log.append(f"{self.name}(")
        report = run()
        self.log.append(f"{self.name})")
        return report


def test_order_of_the_hooks(tiny):
    log = []
    stack = tiny.stack((Diary("A", log), Diary("B", log)))
    stack.prepare()
    assert log == ["A.prepare", "B.prepare"]
    assert stack.feedback([]) == ["A", "B"]
    log.clear()
    with stack.phase("update"):
        stack.backward(lambda: log.append("run") or Report({}))
    assert log == ["A>update", "B>update", "A(", "B(", "run", "B)", "A)", "B<update", "A<update"]


@pytest.mark.parametrize("name", PHASES)
def test_phases_are_left_in_reverse_after_an_exception(tiny, name):
    log = []
    stack = tiny.stack((Diary("A", log), Diary("B", log), Diary("C", log, fails=name)))
    with pytest.raises(RuntimeError, match=name), stack.phase(name):
        raise AssertionError("never reached")
    assert [e[0] for e in log] == ["A", "B", "C", "C", "B", "A"]
    log.clear()
    stack.members.pop()
    with pytest.raises(KeyError), stack.phase(name):
        raise KeyError
    assert [e[:2] for e in log] == ["A>", "B>", "B<", "A<"]


def phases_of(tiny, learner, splits=False):
    log = []
    diary = Diary("A", log)
    diary.feedback = lambda ctx, batch: batch
    diary.splits_serving = splits
    agent = tiny.agent(learner, (diary,), epochs=1)
    log.clear()
    tiny.rounds(agent, 0, 1)
    agent.respond(*tiny.prompts(2), 1, 0)
    return [e[2:] for e in log if e[1] == ">"]


def test_phases_a_learner_goes_through(tiny):
    """Rollout learners reuse what users were shown, unless a defence serves another policy."""
    grpo = phases_of(tiny, "grpo")
    assert grpo[:2] == ["serve", "score"] and set(grpo[2:-1]) == {"update"} and grpo[-1] == "eval"
    assert phases_of(tiny, "grpo", splits=True)[:3] == ["serve", "rollout", "score"]
    assert phases_of(tiny, "ppo")[:3] == ["serve", "score", "score"]
    assert phases_of(tiny, "dpo")[:3] == ["serve", "score", "update"]
    assert phases_of(tiny, "sft")[:2] == ["serve", "update"]


def test_missing_needs_are_named_before_anything_is_prepared(tiny):
    log = []
    greedy = Diary("A", log)
    greedy.needs = frozenset({"refusal", "gold", "score:truth"})
    greedy.spec = "greedy(k=1)"
    stack = tiny.stack((Diary("B", log), greedy))
    with pytest.raises(ValueError, match=r"defence greedy\(k=1\): needs gold, score:truth; this"):
        stack.prepare()
    assert log == []


def test_prepare_has_neither_optimizer_nor_reference(tiny):
    class Curious(Defence):
        def prepare(self, ctx):
            with pytest.raises(RuntimeError, match="optimizer"):
                ctx.optimizer  # noqa: B018
            with pytest.raises(RuntimeError, match="reference"):
                ctx.ref_logprobs(ctx.data["refusal"].sequences)
            self.loss = ctx.lm_loss(ctx.data["refusal"].next(3)).item()

    curious = Curious()
    agent = tiny.agent("grpo", (curious,))
    assert curious.loss > 0
    assert agent.stack.ctx.ref_logprobs(tiny.sequences(2)).shape == (2, tiny.answer)
    assert agent.stack.ctx.optimizer.param_groups


def test_what_prepare_does_is_in_the_reference(tiny):
    class Shift(Defence):
        def prepare(self, ctx):
            with torch.no_grad():
                ctx.model.lm_head.weight.add_(1.0)

    agent = tiny.agent("grpo", (Shift(),))
    assert torch.equal(tiny.weights(agent.policy.reference), tiny.weights(agent.policy.model))
    assert not torch.equal(tiny.weights(agent.policy.model), tiny.weights(tiny.model(0)))


def test_hooks_fire_for_their_targets_only(tiny):
    log = []
    mine, other = Diary("A", log), Diary("B", log)
    other.targets = frozenset({"reward_model"})
    assert tiny.stack((mine, other)).members == [mine]
    assert tiny.stack((mine, other), "reward_model").members == [other]


def test_a_skipping_chain_drops_the_batch(tiny):
    class Every2nd(Defence):
        turn = 0

        def backward(self, ctx, run):
            self.turn += 1
            return run() if self.turn % 2 else Report({}, skipped=True)

    agent = tiny.agent("sft", (Every2nd(),), minibatch=2, epochs=1)
    learned = tiny.rounds(agent, 0, 1)[0]
    assert agent.stack.members[0].turn == 4  # 7 decided labels
    assert learned.metrics["policy/loss"] > 0


def test_role_data_is_endless_seeded_and_resumable(tiny):
    role, again = (tiny.roles()["refusal"] for _ in range(2))
    first, second = role.next(5), role.next(5)
    assert not torch.equal(first.ids, second.ids)
    again.drawn = 5
    assert torch.equal(again.next(5).ids, second.ids)
    many = role.next(4000).ids
    rows = (many[:, None] == role.sequences.ids[None]).all(-1).float().argmax(1)
    counts = torch.bincount(rows, minlength=8)
    distinct = torch.unique(role.sequences.ids, dim=0)
    assert len(torch.unique(rows)) == len(distinct) and counts.max() < 4000 * 0.5


def test_an_unusual_order_is_told():
    """Offline first; then additive terms, turn-takers, perturbations of the learner's loss."""

    class Early(Defence):
        offline, registered = True, "early"

    class Turns(Defence):
        kind, registered = "turns", "turns"

    class Inner(Defence):
        kind, registered = "perturbation", "inner"

    additive = Defence()
    assert order_warning([Early(), additive, Turns(), Inner()]) is None
    assert order_warning([]) is None
    assert "turns (turns) stands before Defence (additive)" in order_warning([Turns(), additive])
    assert "before early (offline)" in order_warning([additive, Early()])
    twice = [defences.create("freeze"), defences.create("freeze")]
    assert order_warning(twice) == "freeze stands twice in the list, and acts twice"
    assert order_warning([defences.create("lisa"), defences.create("lisa(rho=2)")]) is None


def test_slips_in_a_persons_own_defence_are_named(tiny):
    class Slip(Defence):
        needs = "refusal"

    with pytest.raises(ValueError, match=r"Slip: needs='refusal'; allowed: a set .*frozenset"):
        tiny.stack((Slip(),)).prepare()

    class Forgets(Defence):
        def backward(self, ctx, run):
            run()

    stack = tiny.stack((Forgets(),))
    with pytest.raises(ValueError, match=r"Forgets: backward returned None; allowed: a Report"):
        stack.backward(lambda: Report({}))
