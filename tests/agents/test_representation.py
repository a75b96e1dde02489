"""Removal of harmful representations: numbers worked by hand, and what it does to a tiny model."""

import math

import pytest
import torch
import torch.nn.functional as F

from agents.batches import Pairs, Sequences
from agents.defence import defences
from agents.defences.circuit_breakers import Adapters
from agents.defences.rep_noise import rep_noise_loss
from agents.defences.representation_removal import (
    ascent,
    control_vector,
    disagreement,
)
from agents.defences.rmu import steering_loss
from agents.distances import _discrepancy, angle, euclidean, mmd, multiscale_mmd, relu_cosine
from agents.hidden_states import (
    at_depth,
    capture,
    decoder_layers,
    depth_losses,
    down_projection,
    final_norm,
)
from agents.policy import padded_inputs, response_logprobs, response_states, response_terms

NAMES = ("rep_noise", "circuit_breakers", "rmu", "representation_removal")
SPECS = (
    "rep_noise",
    "circuit_breakers",
    "circuit_breakers(variant='seed')",
    "rmu",
    "rmu(variant='seed')",
    "rmu(relative=False, norm=20.0, gaussian=True)",
    "representation_removal(projection='noise', distance='euclidean')",
    "representation_removal(projection='noise', distance='cosine', layers=(2,))",
    "representation_removal(projection='fixed', distance='mmd', states='layer')",
    "representation_removal(projection='original', distance='cosine')",
)


def made(spec, **arguments):
    """The defence of ``spec`` with further arguments."""
    given = [spec[spec.index("(") + 1 : -1]] if "(" in spec else []
    given += [f"{key}={value!r}" for key, value in arguments.items()]
    return defences.create(f"{spec.partition('(')[0]}({', '.join(given)})")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt2(tiny):
    """A model that cannot pack, whose matrices are transposed and whose layers are called h."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 1, "eos_token_id": tiny.eos}
    sizes = {"vocab_size": tiny.vocabulary, "n_positions": 32, "n_embd": 16, "n_layer": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_head=2, **sizes, **ends)).eval()


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# Hidden states.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_captured_states_are_transformers_own(tiny, family):
    model = tiny.model() if family == "llama" else gpt2(tiny)
    rows = tiny.sequences(6, 1, shared=2)
    seen = capture(model, rows)
    assert not hooks(model)
    out = model(**padded_inputs(rows), output_hidden_states=True).hidden_states
    assert len(seen.layers) == len(out) == len(seen.mlp) + 1
    prompt = rows.prompt_ids.shape[1]
    for ours, theirs in zip(seen.layers[:-1], out, strict=False):
        answers = theirs[:, prompt:][rows.mask.bool()]
        torch.testing.assert_close(ours[seen.answers][rows.mask.bool()], answers)
        before = theirs[:, prompt - 1 : -1][rows.mask.bool()]
        torch.testing.assert_close(ours[seen.before][rows.mask.bool()], before)
        everything = theirs[padded_inputs(rows)["attention_mask"].bool()]
        torch.testing.assert_close(ours[seen.tokens].sum(0), everything.sum(0))
        assert len(seen.tokens) == len(everything)
    last = final_norm(model)(seen.layers[-1])[seen.before][rows.mask.bool()]
    torch.testing.assert_close(last, response_states(model, rows)[rows.mask.bool()])


def test_mlp_outputs_are_the_mlps(tiny):
    model, rows = tiny.model(), tiny.sequences(4, 1)
    kept = []
    handle = decoder_layers(model)[1].mlp.register_forward_hook(lambda m, a, out: kept.append(out))
    model(**padded_inputs(rows))
    handle.remove()
    prompt = rows.prompt_ids.shape[1]
    expected = kept[0][:, prompt:][rows.mask.bool()]
    seen = capture(model, rows)
    torch.testing.assert_close(seen.mlp[1][seen.answers][rows.mask.bool()], expected)


def test_a_forward_pass_ends_at_the_last_layer_asked_for(tiny):
    model, rows = tiny.model(), tiny.sequences(4, 1)
    part, whole = capture(model, rows, last=1), capture(model, rows)
    assert len(part.layers) == 2 and len(part.mlp) == 1
    assert torch.equal(part.layers[1], whole.layers[1]) and not hooks(model)
    part.layers[1].sum().backward()
    assert decoder_layers(model)[1].mlp.down_proj.weight.grad is None
    assert decoder_layers(model)[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_a_failing_forward_leaves_no_hooks(tiny):
    model = tiny.model()
    with pytest.raises(IndexError):
        capture(model, tiny.sequences(2)._replace(ids=torch.full((2, 5), 999)))
    assert not hooks(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_depth_reads_the_models_own_loss(tiny, family):
    model = tiny.model() if family == "llama" else gpt2(tiny)
    rows = tiny.sequences(4, 1)
    losses = depth_losses(model, capture(model, rows), rows, rows.mask.bool())
    own = -response_logprobs(model, rows).sum() / rows.mask.sum()
    assert losses[-1].item() == pytest.approx(own.item(), rel=1e-5)
    first = capture(model, rows).layers[0][capture(model, rows).before][rows.mask.bool()]
    logits = model.get_output_embeddings()(final_norm(model)(first))
    shallow = F.cross_entropy(logits, rows.ids[rows.mask.bool()])
    assert losses[0].item() == pytest.approx(shallow.item(), rel=1e-5)


def test_depths_pass_the_head_a_tile_at_a_time(tiny, monkeypatch):
    """Same losses and gradients where no tile holds more than a few logits."""
    found = []
    for tile in (2**24, 60):
        monkeypatch.setattr("agents.policy.TILE", tile)
        model, rows, sizes = tiny.model(), tiny.sequences(4, 1), []
        model.get_output_embeddings().register_forward_hook(
            lambda m, a, out, sizes=sizes: sizes.append(out.numel())
        )
        losses = depth_losses(model, capture(model, rows), rows, rows.mask.bool())
        losses.sum().backward()
        found.append((losses.detach(), tiny.gradient(model), max(sizes)))
    torch.testing.assert_close(found[0][:2], found[1][:2])
    assert found[1][2] <= 60 < found[0][2]


@pytest.mark.parametrize(("layers", "expected"), [(2, [1, 2, 1]), (32, [10, 20, 8])])
def test_default_layers_follow_the_depth(monkeypatch, layers, expected):
    monkeypatch.setattr("agents.hidden_states.decoder_layers", lambda model: [None] * layers)
    assert [at_depth(None, share) for share in (10 / 32, 20 / 32, 8 / 32)] == expected


# Distances.


def test_mmd_of_two_points_is_a_constant_with_a_gradient():
    """Rates 4, 2, 1, .5, .25: 10 - 2 sum exp(-r), slope 4 sum r exp(-r)."""
    for far in (1.0, 0.5, 30.0):
        x = torch.zeros(1, 1, requires_grad=True)
        value = multiscale_mmd(x, torch.full((1, 1), far))
        assert value.item() == pytest.approx(6.1862764, abs=1e-5)
        value.backward()
        slope = 4 * sum(r * math.exp(-r) for r in (4, 2, 1, 0.5, 0.25)) / far
        assert x.grad.item() == pytest.approx(-slope, rel=1e-5)
    assert slope * 30 / 0.5 == pytest.approx(9.678, abs=1e-3)


def test_mmd_of_equal_samples_is_zero_and_has_no_scale():
    x, y = torch.randn(6, 9, generator=generator()), torch.randn(6, 9, generator=generator(1))
    assert multiscale_mmd(x, x).abs() < 1e-6
    assert multiscale_mmd(x, y).item() == pytest.approx(multiscale_mmd(70 * x, 70 * y).item())
    assert multiscale_mmd(x, 3 + y) > multiscale_mmd(x, 1 + y) > multiscale_mmd(x, y)


@pytest.mark.parametrize(("n", "floor"), [(4, 1.54657), (8, 0.77328), (16, 0.38664)])
def test_mmd_of_one_law_stays_at_its_floor(n, floor):
    draws = [torch.randn(n, 20_000, generator=generator(s)) for s in (0, 1)]
    assert multiscale_mmd(*draws).item() == pytest.approx(floor, rel=0.01)


def test_biased_mmd_of_gaussians_with_one_kernel():
    """Bandwidth 4, three dimensions, n = 200, means one apart: .089552 expected."""
    draws, n = generator(), 200
    found = []
    for _ in range(100):
        pooled = torch.randn(2 * n, 3, generator=draws)
        pooled[:n, 0] += 1
        kernel = torch.exp(-torch.cdist(pooled, pooled).square() / 4)
        found.append(_discrepancy(kernel, n).item())
    spread = torch.tensor(found)
    assert spread.mean().item() == pytest.approx(0.089552, abs=4 * spread.std().item() / 10)
    assert spread.std() < 0.03


def test_mmd_where_all_points_coincide_is_zero_without_gradient():
    x = torch.ones(3, 2, requires_grad=True)
    multiscale_mmd(x, torch.ones(3, 2)).backward()
    assert torch.equal(x.grad, torch.zeros(3, 2))


def test_half_precision_is_widened():
    wide_apart = 300 * torch.randn(8, 4096, generator=generator())
    value = multiscale_mmd(wide_apart.half(), (wide_apart + 300).half())
    assert value.dtype == torch.float32 and torch.isfinite(value)


@pytest.mark.parametrize(
    ("state", "value", "gradient"),
    [
        ((1.0, 0.0), 1.0, (0.0, 0.0)),
        ((1.0, 1.0), 0.70711, (0.35355, -0.35355)),
        ((0.0, 1.0), 0.0, (0.0, 0.0)),
        ((-1.0, 0.0), 0.0, (0.0, 0.0)),
    ],
)
def test_relu_cosine_by_hand(state, value, gradient):
    h = torch.tensor([state], requires_grad=True)
    loss = relu_cosine(h, torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-5)
    torch.testing.assert_close(h.grad[0], torch.tensor(gradient), atol=1e-5, rtol=0)
    assert float(h.grad[0] @ h.detach()[0]) == pytest.approx(0, abs=1e-6), "no change of length"


def test_distances_read_masked_tokens_only():
    mask = torch.tensor([[True, False]])
    z = torch.tensor([[[3.0, 4.0], [1e6, 0.0]]])
    goal = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    assert euclidean(z, goal, mask).item() == 5
    assert angle(z, 2 * z, mask).item() == pytest.approx(0, abs=1e-6)
    pair = z.repeat(2, 1, 1), goal.repeat(2, 1, 1)
    other = pair[0].clone()
    other[:, 1] = -7
    same = mask.repeat(2, 1)
    assert mmd(*pair, same) == mmd(other, pair[1], same)


# The general loss.


def rows(answers, prompt=7):
    """Answers as lists of tokens to one prompt."""
    width = max(map(len, answers))
    ids = torch.tensor([a + [0] * (width - len(a)) for a in answers])
    mask = torch.tensor([[1] * len(a) + [0] * (width - len(a)) for a in answers])
    given = torch.full((len(answers), 2), prompt)
    return Sequences(given, torch.ones_like(given), ids, mask)


def test_tokens_that_disagree():
    """The common word is left out, padding is never in, widths may differ."""
    harm, refusal = disagreement(Pairs(rows([[8, 9, 10, 2], [8, 2]]), rows([[8, 11, 2], [9, 2]])))
    assert harm.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert refusal.tolist() == [[False, True, True], [True, False, False]]


def test_a_padded_place_differs_from_a_real_token_of_the_same_id():
    """No id means padding: 0 may be a word."""
    harm, _ = disagreement(Pairs(rows([[8, 0]]), rows([[8]])))
    assert harm.tolist() == [[False, True]]


def test_without_strength_it_is_training_on_refusals(tiny):
    """alpha = beta = 0 on answers with nothing in common, and by hand on three tokens."""
    model = tiny.model()
    pairs = Pairs(rows([[8, 9, 10]]), rows([[11, 12, 2]]))
    loss = rep_noise_loss(model, pairs, 0, 0, generator())
    ids = torch.tensor([[7, 7, 11, 12, 2]])
    logits = model(input_ids=ids).logits[0, 1:4]
    by_hand = -sum(logits[i].log_softmax(0)[t] for i, t in enumerate((11, 12, 2))) / 3
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_masked_loss_leaves_common_tokens_out(tiny):
    model = tiny.model()
    pairs = Pairs(rows([[8, 9, 2]]), rows([[8, 12, 13, 2]]))
    loss = rep_noise_loss(model, pairs, 0, 0, generator())
    logp = response_terms(model, pairs.refusal).logp[0]
    assert loss.item() == pytest.approx(-logp[1:].mean().item(), rel=1e-5)


def test_ascent_counts_the_last_depth_twice_and_is_bounded(tiny, monkeypatch):
    model, pairs = tiny.model(), tiny.roles()["pair"].sequences
    mask, _ = disagreement(pairs)
    losses = torch.tensor([1.0, 2.0, 4.0])
    name = "agents.defences.representation_removal.depth_losses"
    monkeypatch.setattr(name, lambda *_: losses)
    assert ascent(model, None, pairs, mask).item() == pytest.approx(11 / 3)
    losses = torch.tensor([1.0, 2.0, 400.0], requires_grad=True)
    value = ascent(model, None, pairs, mask)
    value.backward()
    assert value.item() == pytest.approx((3 + 4 * math.log(tiny.vocabulary)) / 3)
    assert losses.grad[2] == 0 and losses.grad[0] > 0, "a bounded depth stops, the others go on"


def test_gradient_of_the_logarithm(tiny):
    """-alpha / (1 + l) grad l."""
    alpha, pairs = 0.7, tiny.roles()["pair"].sequences

    def gradient(job):
        model = tiny.model()
        value = job(model)
        value.backward()
        return tiny.gradient(model), value.item()

    harmful, _ = disagreement(pairs)
    slope, size = gradient(lambda m: ascent(m, capture(m, pairs.harm), pairs, harmful))
    both, _ = gradient(lambda m: rep_noise_loss(m, pairs, alpha, 0, generator()))
    refusing, _ = gradient(lambda m: rep_noise_loss(m, pairs, 0, 0, generator()))
    assert slope.norm() > 0.1
    torch.testing.assert_close(both - refusing, -alpha / (1 + size) * slope, rtol=1e-3, atol=1e-5)


def test_noise_term_is_the_mean_mmd_over_layers(tiny):
    model, pairs = tiny.model(), tiny.roles()["pair"].sequences
    noise, harmful = generator(3), disagreement(pairs)[0]
    seen = capture(model, pairs.harm)
    terms = []
    for states in seen.mlp:
        z = states[seen.answers] * harmful[:, :, None]
        xi = torch.randn(z.shape, generator=noise) * harmful[:, :, None]
        terms.append(multiscale_mmd(z.flatten(1), xi.flatten(1)))
    expected = 0.3 * sum(terms) / len(terms)
    loss = rep_noise_loss(model, pairs, 0, 0.3, generator(3))
    assert (loss - rep_noise_loss(model, pairs, 0, 0, generator())).item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_answers_that_agree_everywhere_give_a_finite_loss(tiny):
    same = tiny.sequences(4, 2)
    model = tiny.model()
    loss = rep_noise_loss(model, Pairs(same, same), 1, 1, generator())
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(tiny.gradient(model)).all()


# Every member.


@pytest.mark.parametrize("spec", SPECS)
def test_preparing_leaves_weights_and_nothing_else(tiny, spec):
    stack = tiny.stack((made(spec, steps=3, batch=4),))
    model = stack.ctx.model
    names, before = [n for n, _ in model.named_parameters()], tiny.weights(model)
    state = torch.get_rng_state()
    stack.prepare()
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, _ in model.named_parameters()] == names and not hooks(model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    after = tiny.weights(model)
    assert not torch.equal(after, before) and torch.isfinite(after).all()
    again = tiny.stack((made(spec, steps=3, batch=4),))
    again.prepare()
    assert torch.equal(tiny.weights(again.ctx.model), after), "only the seed decides"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_cannot_pack(tiny, name):
    stack = tiny.stack((made(name, steps=2, batch=4),))
    stack.ctx.model = gpt2(tiny)
    before = tiny.weights(stack.ctx.model)
    stack.prepare()
    assert not torch.equal(tiny.weights(stack.ctx.model), before)
    assert not hooks(stack.ctx.model)


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_leaves_no_trace(tiny, name, monkeypatch):
    stack = tiny.stack((made(name, steps=3, batch=4),))
    before = tiny.weights(stack.ctx.model)

    def fail(*_args, **_more):
        raise ZeroDivisionError

    monkeypatch.setattr(type(stack.members[0]), "loss", fail)
    with pytest.raises(ZeroDivisionError):
        stack.prepare()
    model = stack.ctx.model
    assert torch.equal(tiny.weights(model), before) and not hooks(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rep_noise(alpha=-1)", r"rep_noise.alpha=-1; allowed: >= 0"),
        ("rmu(norm=0)", r"rmu.norm=0; allowed: > 0"),
        ("rmu(variant='x')", r"rmu.variant='x'; allowed: authors, seed"),
        ("circuit_breakers(rank=0)", r"circuit_breakers.rank=0; allowed: >= 1"),
        ("circuit_breakers(layers=(0,))", r"circuit_breakers.layers=\(0,\); allowed: >= 1"),
        ("representation_removal(projection='x')", r"allowed: noise, fixed, original"),
        (
            "representation_removal(projection='original')",
            r"distance='mmd'; allowed: cosine with projection 'original'",
        ),
        ("representation_removal(states='x')", r"allowed: mlp, layer"),
    ],
)
def test_bad_arguments_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        defences.create(spec)


@pytest.mark.parametrize(
    "spec",
    ["rep_noise(layers=(3,))", "rmu(layer=3)", "circuit_breakers(layers=(1, 3))"],
)
def test_layers_that_do_not_exist_are_refused(tiny, spec):
    with pytest.raises(ValueError, match=r"allowed: 1 to 2"):
        tiny.stack((spec,)).prepare()


def test_the_roles_a_variant_needs():
    assert made("rmu").needs == made("circuit_breakers").needs == {"harm", "retain"}
    assert made("rmu", variant="seed").needs == made("rep_noise").needs == {"pair", "retain"}
    assert made("rep_noise", retain=0).needs == {"pair"}, "the published loss"


# RepNoise.


def test_rep_noise_raises_harm_and_keeps_refusals(tiny):
    """The loss of harmful text rises at every depth; the MMD falls towards its floor."""
    stack = tiny.stack((made("rep_noise", beta=1.0, steps=150, lr=3e-3, batch=8),))
    ctx, pairs = stack.ctx, tiny.roles()["pair"].sequences
    mask = disagreement(pairs)[0]

    def measured():
        with torch.no_grad():
            seen = capture(ctx.model, pairs.harm)
            depths = depth_losses(ctx.model, seen, pairs.harm, mask)
            z = seen.mlp[-1][seen.answers]
            noise = torch.randn(z.shape, generator=generator(5))
            return depths, ctx.lm_loss(pairs.refusal), mmd(z, noise, mask)

    depths, refusals, apart = measured()
    stack.prepare()
    deeper, kept, nearer = measured()
    assert (deeper[1:] > depths[1:] + 0.5).all()
    assert kept < refusals - 0.5
    assert nearer < apart


# Circuit Breakers.


def breaker(tiny, **arguments):
    stack = tiny.stack((made("circuit_breakers", batch=8, **arguments),))
    return stack, stack.members[0]


def test_schedule_ends_half_way():
    member = made("circuit_breakers", steps=150)
    assert member.schedule(0) == pytest.approx((10 / 300, 10 * (1 - 1 / 300)))
    assert member.schedule(149) == pytest.approx((5, 5))


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_adapters_that_start_at_zero_have_no_gradient(tiny, spread):
    """Rerouting starts at 1, where a cosine is flat; retaining starts at 0."""
    stack, member = breaker(tiny, layers=(1, 2))
    ctx = stack.ctx
    member.adapters = Adapters(list(decoder_layers(ctx.model)), 4, ctx.rng, spread)
    retain, reroute = member.parts(ctx)
    reroute.backward()
    grads = [p.grad.abs().max().item() for p in member.adapters.parameters()]
    if spread == 0:
        assert reroute.item() == pytest.approx(1, abs=1e-6) and retain.item() < 1e-5
        assert max(grads) < 1e-5
    else:
        assert max(grads) > 1e-3
        assert retain.item() > 0


def test_merged_adapters_are_the_model_that_was_trained(tiny):
    for model in (tiny.model(), gpt2(tiny)):
        prompts = tiny.sequences(4, 3)
        plain = response_logprobs(model, prompts)
        adapters = Adapters(list(decoder_layers(model)), 4, generator(), spread=0.3)
        adapted = response_logprobs(model, prompts)
        adapters.on = False
        assert torch.equal(response_logprobs(model, prompts), plain)
        adapters.remove()
        adapters.merge()
        torch.testing.assert_close(response_logprobs(model, prompts), adapted)
        assert (adapted - plain).abs().max() > 1e-3


def test_rerouting_leaves_one_and_benign_states_stay(tiny):
    stack, member = breaker(tiny, steps=150, lr=1e-2)
    ctx = stack.ctx
    original = tiny.model()
    stack.prepare()

    def moved(role):
        now, before = (capture(m, tiny.roles()[role].sequences) for m in (ctx.model, original))
        return relu_cosine(now.layers[1][now.tokens], before.layers[1][now.tokens]).item()

    assert moved("harm") < 0.75, "turned away"
    assert moved("retain") > moved("harm") + 0.1


def test_layers_above_the_target_stay(tiny):
    stack, _ = breaker(tiny, layers=(1,), steps=3)
    layers = decoder_layers(stack.ctx.model)
    before = [tiny.weights(layer) for layer in layers]
    stack.prepare()
    assert not torch.equal(tiny.weights(layers[0]), before[0])
    assert torch.equal(tiny.weights(layers[1]), before[1])


# RMU.


def test_control_vector_and_loss_at_the_origin():
    control = control_vector(4096, 20.0, generator())
    assert control.norm().item() == pytest.approx(20, rel=1e-6)
    h = torch.zeros(3, 4096, requires_grad=True)
    loss = steering_loss(h, control)
    assert loss.item() == pytest.approx(0.0976563, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(h.grad, 2 * (h.detach() - control) / h.numel())
    ones = torch.ones(4096)
    assert float(control @ ones / 20 / ones.norm()) == pytest.approx(0.866, abs=0.01)
    even = control_vector(4096, 20.0, generator(), gaussian=True)
    assert abs(float(even @ ones / 20 / ones.norm())) < 0.05


@pytest.mark.parametrize(("layer", "trained"), [(1, [0]), (0, [0, 1])])
def test_only_down_projections_move(tiny, layer, trained):
    stack = tiny.stack((made("rmu", layer=layer, steps=3, batch=4),))
    model = stack.ctx.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stack.prepare()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [f"model.layers.{i}.mlp.down_proj.weight" for i in trained]


def test_benign_states_are_held_to_the_original(tiny):
    """At first nothing has moved; then the original weights are what it is measured from."""
    stack = tiny.stack((made("rmu", layer=2, batch=4),))
    rmu, ctx = stack.members[0], stack.ctx
    rmu.target = 2
    rmu.begin(ctx)
    assert rmu.retain_loss(ctx).item() == 0
    weight = down_projection(decoder_layers(ctx.model)[1]).weight
    with torch.no_grad():
        weight += 0.5
    held = weight.detach().clone()
    assert rmu.retain_loss(ctx).item() > 0.01
    assert torch.equal(weight, held), "own weights are put back"


def test_relative_norm_counts_in_lengths_of_the_states(tiny):
    stack = tiny.stack((made("rmu", norm=3.0, batch=64),))
    rmu, ctx = stack.members[0], stack.ctx
    rmu.begin(ctx)
    seen = capture(ctx.model, tiny.roles()["harm"].sequences)
    natural = seen.layers[2][seen.tokens].norm(dim=-1).mean().item()
    assert rmu.control.norm().item() == pytest.approx(3 * natural, rel=0.1)


def test_harmful_states_reach_the_vector(tiny):
    stack = tiny.stack(
        (made("rmu", layer=2, norm=8.0, relative=False, steps=150, lr=3e-2, batch=8),)
    )
    ctx = stack.ctx
    harm, original = tiny.roles()["harm"].sequences, tiny.model()
    stack.prepare()
    control = stack.members[0].control

    def along(model):
        seen = capture(model, harm)
        states = seen.layers[2][seen.tokens]
        return F.cosine_similarity(states, control[None]).mean().item()

    assert along(ctx.model) > along(original) + 0.1


def test_variants_of_one_form_agree(tiny):
    """RepNoise is the general form with noise and MMD over MLP outputs."""
    ends = []
    for spec in ("rep_noise", "representation_removal(projection='noise', distance='mmd')"):
        stack = tiny.stack((made(spec, beta=0.2, steps=3, batch=4),))
        stack.prepare()
        ends.append(tiny.weights(stack.ctx.model))
    assert torch.equal(*ends)
