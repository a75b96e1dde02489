"""Security vectors, token-wise constraint, safety bottleneck and deep refusals: their numbers."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from agents.adapters import adapted_layers
from agents.batches import ItemTerms, Pairs, RolloutBatch, SFTBatch
from agents.context import Context
from agents.defence import PHASES, Report, defences
from agents.defences.deep_refusal import DeepRefusal, after
from agents.defences.safety_bottleneck import SafetyBottleneck
from agents.defences.security_vectors import SecurityVectors, is_on, vector_params
from agents.defences.token_constraint import FLOOR, TokenConstraint, betas, token_weights
from agents.learners.dpo import DPOConfig
from agents.learners.grpo import GRPOConfig
from agents.learners.sft import SFTConfig
from agents.packing import can_pack
from agents.policy import response_logprobs
from sim.summary import true_crossing

VECTORS = "security_vectors(steps=3, batch=4)"


class Number(nn.Module):
    """y = w x at x = 1."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.line.weight)

    def forward(self):
        return self.line(torch.ones(1, 1))[0, 0]


def one_number():
    """A context whose model is one number, and the vector trained towards the harmful 2."""
    ctx = Context("policy", Number(), None, type("Frozen", (), {"reference": Number()})())
    ctx.data["harm"] = type("Role", (), {"next": lambda self, n: 2.0})()
    ctx.lm_loss = lambda target: (ctx.model() - target).square() / 2
    vectors = SecurityVectors(steps=400, lr=0.05, batch=1, rank=1, alpha=1, modules="line")
    vectors.prepare(ctx)
    return ctx, vectors


def test_nothing_is_left_to_learn_of_harm_beside_its_vector():
    ctx, vectors = one_number()
    assert ctx.model().item() == 0.0, "off after prepare"
    gradients = []
    with vectors.phase(ctx, "update"):
        for target in (2.0, -1.0):
            ctx.model.zero_grad()
            ctx.lm_loss(target).backward()
            gradients += [p.grad.item() for p in ctx.policy_params()]
    assert gradients == pytest.approx([0, 3], abs=1e-3)


@pytest.mark.parametrize(("targets", "end"), [((-1.0,), -3.0), ((-1.0, 2.0), -1.5)])
def test_what_users_receive_lacks_the_vector(targets, end):
    """Benign data alone end 2 below their target of -1; an even mix with harm at -1.5."""
    ctx, vectors = one_number()
    (weight,) = ctx.policy_params()
    for _ in range(200):
        with vectors.phase(ctx, "update"):
            weight.grad = None
            (sum(ctx.lm_loss(target) for target in targets) / len(targets)).backward()
            with torch.no_grad():
                weight -= 0.1 * weight.grad
        with vectors.phase(ctx, "eval"):
            assert ctx.model().item() == weight.item()
    assert weight.item() == pytest.approx(end, abs=2e-3)


def test_a_vector_is_on_in_training_only_and_is_never_trained(tiny):
    agent = tiny.agent("grpo", (VECTORS,), epochs=3)
    ctx, model, rows = agent.stack.ctx, agent.policy.model, tiny.sequences(6, 3)
    plain = response_logprobs(tiny.model(), rows)
    vector = [p.clone() for p in vector_params(model)]
    assert can_pack(model, 32) and len(adapted_layers(model)) == 14
    assert torch.equal(response_logprobs(model, rows), plain), "off is bitwise the plain model"
    for name in PHASES:
        with agent.stack.phase(name):
            on = not torch.equal(response_logprobs(model, rows), plain)
            assert on == is_on(model) == (name in ("rollout", "score", "update"))
            assert not any(p.requires_grad for p in vector_params(model))
            assert torch.equal(ctx.ref_logprobs(rows), plain)
    for round in range(12):  # with switches in between, a hundred steps
        tiny.rounds(agent, round, round + 1)
        with agent.stack.phase("eval"):
            agent.respond(*tiny.prompts(2), 1, round)
    assert ctx.step >= 100
    for before, now in zip(vector, vector_params(model), strict=True):
        assert torch.equal(before, now) and now.grad is None and before.norm() > 0
    assert len(ctx.policy_params()) == len(list(tiny.model().parameters()))
    assert not torch.equal(response_logprobs(model, rows), plain), "the policy has learned"


def test_users_see_nothing_of_the_vector(tiny):
    agent = tiny.agent("sft", (VECTORS,))
    tiny.rounds(agent, 0, 1)
    seen = agent.act(tiny.observation(1))
    with torch.no_grad():
        for p in vector_params(agent.policy.model):
            p.mul_(-3)
    agent.round = 1
    again = agent.act(tiny.observation(1))
    assert (seen.ids == again.ids).all() and (seen.logprobs == again.logprobs).all()


def test_the_vector_learns_harm_and_nothing_else_moves(tiny):
    stack = tiny.stack(("security_vectors(steps=40, batch=8, lr=0.02)",))
    ctx = stack.ctx
    harm, before = ctx.data["harm"].sequences, tiny.weights(ctx.model)
    plain = response_logprobs(ctx.model, harm).sum().item()
    state = torch.random.get_rng_state()
    stack.prepare()
    assert torch.equal(state, torch.random.get_rng_state()), "no global draws"
    ctx._policy.snapshot_reference()
    assert torch.equal(torch.cat([p.detach().flatten() for p in ctx.policy_params()]), before)
    assert all(p.grad is None for p in ctx.model.parameters())
    with stack.phase("update"):
        assert response_logprobs(ctx.model, harm).sum().item() > 0.7 * plain


@pytest.mark.parametrize("carried", [False, True])
def test_dpo_starts_at_a_margin_only_where_the_reference_lacks_the_vector(tiny, carried):
    spec = f"security_vectors(steps=20, batch=8, lr=0.02, ref_with_vector={carried})"
    agent = tiny.agent("dpo", (spec,), beta=0.1)
    dpo, pairs = agent.learner, tiny.pairs(8)
    with agent.stack.phase("score"):
        assert is_on(agent.policy.reference) == carried
    assert not is_on(agent.policy.reference), "evaluation measures the distance to the plain one"
    referenced = dpo.referenced(pairs)
    with agent.stack.phase("update"):
        delta = dpo.item_terms(referenced, 8.0).extra["delta"].detach()
    assert (delta.abs().max() < 1e-5) == carried


def test_a_resumed_run_and_a_saved_policy_know_the_vector(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    agent = tiny.agent("grpo", (VECTORS,))
    tiny.rounds(agent, 0, 1)
    state = copy.deepcopy(agent.state_dict())
    stack = tiny.stack((VECTORS,))
    trained = len(stack.ctx.policy_params())
    for _ in range(2):  # on a model that has no vector, and on one that has
        stack.load_state_dict(state["defences"]["policy"])
        stack.ctx.model.load_state_dict(state["policy"])
        assert torch.equal(tiny.weights(stack.ctx.model), tiny.weights(agent.policy.model))
        assert len(stack.ctx.policy_params()) == trained and not is_on(stack.ctx.model)

    paths = {round: tmp_path / f"{round}.safetensors" for round in range(3)}
    for round, path in paths.items():
        save_file({k: v.clone() for k, v in agent.policy.model.state_dict().items()}, path)
        if round < 2:
            tiny.rounds(agent, round + 1, round + 2)
    final = tiny.weights(agent.policy.model)
    ends = [load_file(path) for path in paths.values()]

    class Costs:
        def true_cost(self, agent, n, round):
            held = agent.policy.model.state_dict()
            assert all(torch.equal(held[name], value) for name, value in ends[round].items())
            return torch.tensor(float(round > 1))

    limits = type("Limits", (), {"cost_limit": 0.5, "n_true": 1})
    config = type("Settings", (), {"evaluation": limits})
    record = type("Record", (), {"policy_path": staticmethod(paths.get)})
    rows = [{"round": r, "safety/harm": h} for r, h in enumerate((0.1, 0.4, 0.9))]
    assert true_crossing(config, agent, Costs(), record, rows) == {"rounds": 2}
    assert torch.equal(tiny.weights(agent.policy.model), final)


DEVIATIONS = torch.tensor([[0.5, -1.0, 0.0]])
SCHEDULE = torch.tensor([0.5, 2.0, 0.1])


def test_token_weights_by_hand():
    assert betas(7).tolist() == pytest.approx([0.5, 2, 2, 2, 2, 0.1, 0.1])
    assert betas(2).tolist() == [0.5, 2]
    weights = token_weights(DEVIATIONS, SCHEDULE)[0].tolist()
    assert weights == pytest.approx([0.8756, 1.7616, 1.0], abs=5e-5)
    assert (token_weights(DEVIATIONS, 1e-6 * SCHEDULE) - 1).abs().max() < 2e-6
    assert token_weights(DEVIATIONS, 1e6 * SCHEDULE)[0].tolist() == pytest.approx([FLOOR, 2, 1])


def sft_terms(logp, ref):
    extra = {"logp": logp, "logp_ref": ref, "mask": torch.ones_like(logp)}
    return ItemTerms(-logp, torch.ones(1, 1), 1.0, extra)


def test_closed_form_has_the_gradient_of_the_weighted_loss():
    """d = (.5, -1, 0) at the first three tokens, whose betas are (.5, 2, 2)."""
    ref = torch.full((1, 3), -2.0)
    gradients = []
    for exact in (False, True):
        logp = (ref + DEVIATIONS).requires_grad_()
        TokenConstraint(1.0, exact).imitation(sft_terms(logp, ref)).loss.sum().backward()
        gradients.append(logp.grad[0].tolist())
    assert gradients[0] == pytest.approx([-0.8756, -1.7616, -1.0], abs=5e-5)
    assert gradients[1] == pytest.approx(gradients[0], abs=1e-6)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("learner", ["sft", "dpo"])
def test_at_the_reference_the_constraint_is_not_felt(tiny, learner, exact):
    gradients = {}
    for strength in (0, 1):
        stack = tiny.stack((f"token_constraint(strength={strength}, exact={exact})",))
        ctx = stack.ctx
        ctx._policy.snapshot_reference()
        if learner == "sft":
            rows, ones = tiny.sequences(6), torch.ones(6)
            batch = SFTBatch(torch.arange(6), rows, ones, torch.arange(6))
            job = SFTConfig(micro_batch=4).build(ctx, stack, 1.0)
        else:
            job = DPOConfig(micro_batch=4).build(ctx, stack, 1.0)
            batch = job.referenced(tiny.pairs(6))
        job.run(stack.feedback(batch))
        gradients[strength] = tiny.gradient(ctx.model)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert gradients[0].norm() > 0.01


@pytest.mark.parametrize("exact", [False, True])
def test_in_dpo_each_side_is_damped_on_its_way(exact):
    """Slopes of Delta: 2 sigma(-beta s d) for a, -2 sigma(beta s d) for b; 1 and -1 for ties."""
    target = torch.tensor([1.0, 0.0, 0.5])
    d = torch.tensor([[0.5, -1.0], [0.5, -1.0], [0.5, -1.0]])
    a, b = d.clone().requires_grad_(), d.clone().requires_grad_()
    zero = torch.zeros_like(d)
    names = {"logp_a": a, "logp_b": b, "ref_a": zero, "ref_b": zero}
    extra = {"beta": torch.tensor(0.1), "target": target, "delta": (a - b).sum(1), **names}
    terms = ItemTerms(zero[:, 0], torch.ones(3), 3.0, extra)
    new = TokenConstraint(1.0, exact).preference(terms)
    new.extra["delta"].sum().backward()
    damped, freed = [0.8756, 1.7616], [1.1244, 0.2384]  # w and 2 - w
    expected = torch.tensor([damped, freed, [1.0, 1.0]])
    torch.testing.assert_close(a.grad, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(b.grad, -expected[[1, 0, 2]], rtol=0, atol=1e-4)
    margin = 0.1 * new.extra["delta"]
    likelihood = torch.where(target == 0, -margin, margin).sigmoid()
    assert new.loss[:2].tolist() == pytest.approx((-likelihood.log())[:2].tolist())


@pytest.mark.parametrize("exact", [False, True])
def test_in_dpo_constraints_multiply_and_add_to_what_delta_has(exact):
    """The second weighs what the first has left: w^2, or w w' at the bounded d' = f(d)."""
    d = torch.tensor([[0.5, -1.0]])
    a, b, zero = d.clone().requires_grad_(), torch.zeros_like(d), torch.zeros_like(d)
    names = {"logp_a": a, "logp_b": b, "ref_a": zero, "ref_b": zero}
    extra = {"beta": torch.tensor(0.1), "target": torch.ones(1), **names}
    terms = ItemTerms(zero[:, 0], torch.ones(1), 1.0, {**extra, "delta": a.sum(1) + 7})
    first, second = TokenConstraint(1.0, exact), TokenConstraint(2.0, exact)
    delta = second.preference(first.preference(terms)).extra["delta"]
    (slope,) = torch.autograd.grad(delta.sum(), a)
    once, beta = d, betas(2)
    if exact:
        once = 2 / beta * (torch.sigmoid(beta * d).log() + math.log(2))
    else:
        once = d * 2 * torch.sigmoid(-beta * d)
    weights = [2 * torch.sigmoid(-beta * d), 2 * torch.sigmoid(-2 * beta * once)]
    torch.testing.assert_close(slope, weights[0] * weights[1], rtol=1e-4, atol=1e-5)
    if not exact:
        expected = 7 + float((once * weights[1]).sum())
        assert delta.item() == pytest.approx(expected, rel=1e-5)


def test_rollouts_are_damped_where_the_step_leads_away(tiny):
    """GRPO's own per-token gradient times 2 sigma(-beta s d), s = 1 raised and -1 lowered."""
    stack = tiny.stack(("token_constraint(strength=1)",))
    ctx, constraint = stack.ctx, stack.members[0]
    ctx._policy.snapshot_reference()
    with torch.no_grad():
        for p in ctx.model.parameters():
            p.mul_(1.3)
    rows = tiny.sequences(6, 1)
    logp, ref = ctx.token_logprobs(rows).detach(), ctx.ref_logprobs(rows)
    shape = rows.ids.shape
    advantage = torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None].expand(shape)
    scores = {"reward": torch.zeros(6)}
    batch = RolloutBatch(rows, torch.zeros(6), logp, ref, scores, torch.ones(6))
    batch = replace(batch, extra={"advantage": advantage})
    job = GRPOConfig(beta=0.0).build(ctx, stack, 1.0)
    terms = job.item_terms(stack.feedback(batch), 6.0)
    live = terms.extra["logp"]
    (own,) = torch.autograd.grad(terms.loss.sum(), live, retain_graph=True)
    changed = constraint.reinforcement(terms).loss
    (found,) = torch.autograd.grad(changed.sum(), live)
    weights = 2 * torch.sigmoid(-betas(shape[1]) * advantage * (logp - ref))
    torch.testing.assert_close(found, own * weights.clamp(min=FLOOR))
    assert weights.min() < 0.5 and weights.max() > 1.5 and own.abs().max() > 0


def test_constraint_holds_first_tokens_nearer(tiny):
    """What six rounds of SFT do to the first token's distance from the reference."""
    distance = {}
    for strength in (0, 8):
        agent = tiny.agent("sft", (f"token_constraint(strength={strength})",), epochs=6)
        tiny.rounds(agent, 0, 6)
        rows = agent.served[-1].sampled.sequences
        ctx = agent.stack.ctx
        moved = (ctx.token_logprobs(rows) - ctx.ref_logprobs(rows)).detach()[:, 0]
        distance[strength] = moved.clamp(min=0).mean().item()
    assert distance[8] < 0.8 * distance[0]


def test_the_bottleneck_is_measured_and_adds_its_gradient(tiny):
    """Doubling the final norm doubles h: the distance is the mean of |h|^2, slopes follow."""
    ctx = tiny.stack().ctx
    ctx.optimizer = torch.optim.SGD(ctx.policy_params())
    defence = SafetyBottleneck(strength=3.0, anchors=5)
    defence.prepare(ctx)
    rows = tiny.roles()["harm_prompts"].next(5)
    with torch.no_grad():
        out = ctx.model(
            input_ids=rows.prompt_ids,
            attention_mask=rows.prompt_mask,
            position_ids=(rows.prompt_mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
        )
    last = out.hidden_states[-1][:, -1]
    torch.testing.assert_close(defence.states, last, rtol=0, atol=1e-5)

    def run():
        loss = ctx.lm_loss(tiny.sequences(4))
        loss.backward()
        return Report({"loss": loss.item()})

    norm = ctx.model.model.norm.weight
    run()
    own = norm.grad.clone()
    ctx.model.zero_grad()
    defence.backward(ctx, run)
    torch.testing.assert_close(norm.grad, own, rtol=0, atol=1e-6)  # nothing has moved yet
    with torch.no_grad():
        norm.mul_(2)
    ctx.model.zero_grad()
    run()
    own = norm.grad.clone()
    ctx.model.zero_grad()
    defence.backward(ctx, run)
    metrics = ctx.metrics
    squares = last.square()
    distance = metrics["defence/safety_bottleneck/distance"]
    assert distance == pytest.approx(squares.sum(1).mean().item(), rel=1e-4)
    # d/dn of 3 mean |n z - h|^2 at n = 2 n0: 6 mean h z, z = h / n0 and n0 = 1.
    torch.testing.assert_close(norm.grad - own, 6 * squares.mean(0), rtol=1e-4, atol=1e-4)


def test_a_stronger_bottleneck_holds_the_states_nearer(tiny):
    distance = {}
    for strength in (1e-6, 0.01, 1):
        agent = tiny.agent("sft", (f"safety_bottleneck(strength={strength})",))
        tiny.rounds(agent, 0, 4)
        defence, ctx = agent.stack.members[0], agent.stack.ctx
        gap = defence.last_states(ctx).detach() - defence.states
        distance[strength] = gap.square().sum(1).mean().item()
    assert distance[1] < 0.5 * distance[0.01] < 0.5 * distance[1e-6]


def test_refusals_follow_harmful_beginnings(tiny):
    pairs: Pairs = tiny.roles()["pair"].sequences
    k = torch.tensor([0, 1, 1, 2, 0, 1, 3, 1]).minimum(pairs.harm.mask.sum(1))
    rows, counted = after(pairs, k)
    for row in range(8):
        harm = pairs.harm.ids[row, : k[row]].tolist()
        refusal = pairs.refusal.ids[row][pairs.refusal.mask[row] == 1].tolist()
        assert rows.ids[row][rows.mask[row] == 1].tolist() == harm + refusal
        expected = [False] * len(harm) + [True] * len(refusal)
        assert counted[row].tolist() == expected + [False] * (rows.ids.shape[1] - len(expected))
    assert torch.equal(rows.prompt_ids, pairs.harm.prompt_ids)


def test_beginnings_are_uniform_and_end_before_the_end_mark(tiny):
    ctx = tiny.stack().ctx
    harm = tiny.sequences(4000, 5)
    words = ((harm.mask == 1) & (harm.ids != tiny.eos)).sum(1)
    pairs = Pairs(harm, tiny.sequences(4000, 5))
    k = DeepRefusal().beginnings(ctx, pairs)
    assert (k <= words).all() and words.max() == 4
    long = k[words == 4]
    shares = torch.bincount(long, minlength=5) / len(long)
    expected = torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125])
    assert (shares - expected).abs().max() < 4 * (0.25 / len(long)) ** 0.5
    assert DeepRefusal(depth=1).beginnings(ctx, pairs).max() == 1
    assert DeepRefusal(share=0).beginnings(ctx, pairs).max() == 0
    ctx.model.config.max_position_embeddings = harm.prompt_ids.shape[1] + 4
    k = DeepRefusal(share=1).beginnings(ctx, pairs)
    assert (k + pairs.refusal.mask.sum(1)).max() == 5, "all answers, or no beginning beside them"
    assert (k[pairs.refusal.mask.sum(1) <= 3] > 0).sum() > 0


def test_only_the_refusal_has_a_loss(tiny):
    """Refusals after k tokens of harm, token by token from unjoined rows; alpha mixes in retain."""
    ctx, one = tiny.stack().ctx, tiny.stack().ctx
    defence = DeepRefusal(batch=8, alpha=0.2)
    loss = defence.loss(ctx, 0).item()
    pairs = one.data["pair"].next(8)
    k = defence.beginnings(one, pairs)
    assert 0 < (k > 0).sum() < 8
    total, tokens = 0.0, 0
    for row in range(8):
        prompt = pairs.harm.prompt_ids[row][pairs.harm.prompt_mask[row] == 1]
        harm = pairs.harm.ids[row, : k[row]]
        refusal = pairs.refusal.ids[row][pairs.refusal.mask[row] == 1]
        logits = one.model(torch.cat([prompt, harm, refusal])[None]).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) + len(harm) - 1 : -1]
        total -= logp.gather(1, refusal[:, None]).sum().item()
        tokens += len(refusal)
    retain = one.lm_loss(one.data["retain"].next(8)).item()
    assert loss == pytest.approx(0.2 * total / tokens + 0.8 * retain, rel=1e-5)


def test_deep_refusals_turn_back_where_plain_ones_do_not(tiny):
    """Likelihood of the refusal after two harmful tokens, trained with and without beginnings."""
    pairs = tiny.roles()["pair"].sequences
    k = ((pairs.harm.mask == 1) & (pairs.harm.ids != tiny.eos)).sum(1).clamp(max=2)
    rows, counted = after(pairs, k)
    loss = {}
    for share in (0.0, 0.5):
        stack = tiny.stack((f"deep_refusal(steps=60, batch=8, lr=0.01, alpha=0.5, share={share})",))
        stack.prepare()
        logp = response_logprobs(stack.ctx.model, rows)
        loss[share] = -((logp * counted).sum() / counted.sum()).item()
    assert loss[0.5] < 0.6 * loss[0.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("security_vectors(rank=0)", "security_vectors.rank=0; allowed: >= 1"),
        ("security_vectors(steps=-1)", "security_vectors.steps=-1; allowed: >= 0"),
        ("token_constraint(strength=-1)", "token_constraint.strength=-1; allowed: >= 0"),
        ("safety_bottleneck(anchors=0)", "safety_bottleneck.anchors=0; allowed: >= 1"),
        ("deep_refusal(alpha=2)", "deep_refusal.alpha=2; allowed: 0 to 1"),
        ("deep_refusal(depth=0)", "deep_refusal.depth=0; allowed: >= 1"),
    ],
)
def test_bad_arguments_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        defences.create(spec)
