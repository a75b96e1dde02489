"""Safe RLHF: the multiplier, what it charges under each learner, and that charging helps."""

import math
from dataclasses import replace

import pytest
import torch

from agents.batches import (
    ItemTerms,
    LabelBatch,
    RolloutBatch,
    Sequences,
    SFTBatch,
    weighted_mean,
)
from agents.context import Context
from agents.defence import defences
from agents.defences.safe_rlhf import mixed, next_multiplier, with_margin
from agents.learners.dpo import dpo_loss
from agents.learners.grpo import group_advantages
from agents.learners.ppo import PPOConfig, gae, token_rewards, whiten
from agents.policy import response_logprobs


def context(score):
    return Context("policy", torch.nn.Identity(), None, None, scorers={"cost": score})


def rollouts(tiny, n=6, rewards=None):
    sequences = tiny.sequences(n)
    logp = response_logprobs(tiny.model(), sequences)
    generator = torch.Generator().manual_seed(3)
    return RolloutBatch(
        sequences=sequences,
        group=torch.arange(n) // 3,
        logp_old=logp,
        logp_ref=logp - torch.rand(logp.shape, generator=generator) * sequences.mask,
        rewards={"reward": torch.linspace(-1, 1, n) if rewards is None else rewards},
        weight=torch.ones(n),
    )


def charged(spec, batch, *costs):
    """``batch`` as the defence returns it, called once for each of ``costs``; and the defence."""
    defence, given = defences.create(spec), iter(costs)
    ctx = context(lambda rows: torch.as_tensor(next(given)).expand(len(rows)).float())
    seen = []
    for _ in costs:
        result = defence.feedback(ctx, batch)
        seen.append(ctx.metrics["defence/safe_rlhf/lambda"])
    return result, seen, defence


def test_the_multiplier_rises_by_its_own_size(tiny):
    """From 1 with lr .1 and costs .5 above the limit: xi = .05, .102563, .157964."""
    found, multiplier = [], 1.0
    for _ in range(3):
        multiplier = next_multiplier(multiplier, 0.1 * 0.5, 5.0)
        found.append(multiplier)
    assert [math.log(m) for m in found] == pytest.approx([0.05, 0.102563, 0.157964], abs=1e-6)
    assert found == pytest.approx([1.051271, 1.108008, 1.171124], abs=1e-6)
    _, seen, _ = charged("safe_rlhf(limit=0.1)", rollouts(tiny), 0.6, 0.6, 0.6)
    assert seen == pytest.approx(found, abs=1e-6)


def test_the_multiplier_falls_below_the_limit_and_stops_at_its_bounds():
    assert next_multiplier(1.0, -0.05, 5.0) == pytest.approx(math.exp(-0.05))
    assert math.log(next_multiplier(4.9, 0.1, 5.0)) == pytest.approx(1.609438, abs=1e-6)
    assert next_multiplier(4.9, 1e4, 5.0) == 5.0
    assert next_multiplier(0.0, 0.1, 5.0) == 0.0
    linear = [next_multiplier(m, step, 5.0, True) for m, step in ((1, 0.05), (0.01, -1), (4.9, 1))]
    assert linear == pytest.approx([1.05, 0, 5])


def test_mixes_by_hand():
    advantages = {"reward": torch.tensor([[1.0]]), "cost": torch.tensor([[0.5]])}
    rest = {m: mixed(lambda a: a["reward"], m, advantages).item() for m in (0, 1, 1e9)}
    assert rest == pytest.approx({0: 1.0, 1: 0.25, 1e9: -0.5}, abs=1e-6)


def test_the_window_holds_the_latest_costs_and_the_batchs_own_count_at_once(tiny):
    batch = rollouts(tiny)
    _, seen, defence = charged("safe_rlhf(window=8, limit=0.5)", batch, 1.0, 0.0)
    assert seen[0] == pytest.approx(math.exp(0.1 * 0.5)), "the first batch moves it already"
    # two of the first batch's six costs are left: a mean of 2/8, a quarter below the limit
    assert seen[1] == pytest.approx(seen[0] * math.exp(-0.1 * 0.25 * seen[0]))
    assert defence.costs.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_batch_larger_than_the_window_counts_whole():
    """256 costs, the first half 1: a mean of .5 and not 0, which the last 128 have."""
    defence, ctx = defences.create("safe_rlhf(window=128)"), context(None)
    defence.multiplier_after(ctx, torch.arange(256).lt(128).float())
    assert ctx.metrics["defence/safe_rlhf/mean_cost"] == 0.5
    defence.multiplier_after(ctx, torch.ones(64))
    assert ctx.metrics["defence/safe_rlhf/mean_cost"] == 0.5, "64 of 1 beside the last 64 of 0"


def test_the_multiplier_waits(tiny):
    _, seen, _ = charged("safe_rlhf(delay=2)", rollouts(tiny), 1.0, 1.0, 1.0)
    assert seen[:2] == [1, 1] and seen[2] > 1


@pytest.mark.parametrize(
    "spec",
    [
        "safe_rlhf(start=0)",
        "safe_rlhf(start=0, shaping=True)",
        "safe_rlhf(start=0, lr=0, parametrisation='linear')",
    ],
)
def test_without_strength_there_is_no_channel(tiny, spec):
    def never(_rows):
        raise AssertionError("scored")

    for batch in (rollouts(tiny), tiny.pairs(4)):
        assert defences.create(spec).feedback(context(never), batch) is batch


def test_a_linear_multiplier_can_leave_zero(tiny):
    _, seen, _ = charged("safe_rlhf(start=0, parametrisation='linear')", rollouts(tiny), 1.0)
    assert seen == pytest.approx([0.09])


def test_labels_and_empty_batches_pass(tiny):
    defence, ctx = defences.create("safe_rlhf"), context(lambda rows: 1 / 0)
    empty = tiny.pairs(4)
    empty = replace(empty, weight=empty.weight[:0])
    log = LabelBatch(*[torch.ones(3).numpy()] * 9)
    assert defence.feedback(ctx, log) is log and defence.feedback(ctx, empty) is empty
    assert not ctx.metrics and not defence.batches


@pytest.mark.parametrize("start", [0.1, 1, 5])
@pytest.mark.parametrize("k", [0.0, 0.3])
def test_ppo_weighs_kl_as_without_the_defence(tiny, start, k):
    """Mixing both channels equals one channel (r - lambda c) / (1 + lambda) with the same k."""
    agent = tiny.agent("ppo", (f"safe_rlhf(start={start}, lr=0)",), kl=k)
    ctx, batch = agent.stack.ctx, rollouts(tiny)
    costs = torch.rand(6, generator=torch.Generator().manual_seed(1))
    ctx._scorers["cost"] = lambda rows: costs
    found, _ = agent.learner._advantages(agent.stack.feedback(batch))
    assert list(agent.learner.heads) == ["reward", "cost"], "a value head for each channel"
    mask = batch.sequences.mask
    kl = (batch.logp_old - batch.logp_ref) * mask
    one = (batch.rewards["reward"] - start * costs) / (1 + start)
    config = PPOConfig()
    rewards = token_rewards(one, mask, kl, k)
    expected = gae(rewards, torch.zeros_like(kl), mask, config.gamma, config.gae_lambda)
    torch.testing.assert_close(found.extra["advantage"], whiten(expected, mask))
    without = gae(token_rewards(one, mask, kl, 0.0), torch.zeros_like(kl), mask, 1.0, 0.95)
    same = torch.allclose(found.extra["advantage"], whiten(without, mask), atol=1e-3)
    assert same == (k == 0)


def test_each_value_head_learns_its_own_channels_return(tiny):
    agent = tiny.agent("ppo", ("safe_rlhf",), kl=0.0, value_lr=0.05)
    agent.stack.ctx._scorers["cost"] = lambda rows: torch.full((len(rows),), 0.8)
    tiny.rounds(agent, 0, 12)
    sequences = tiny.sequences(16, 9)
    with torch.no_grad():
        values = agent.learner._values(
            replace(rollouts(tiny, 16), sequences=sequences, rewards={"reward": 0, "cost": 0})
        )
    mean = (values["cost"] * sequences.mask).sum() / sequences.mask.sum()
    assert mean.item() == pytest.approx(0.8, abs=0.15)


def test_grpo_normalises_each_channel_before_it_mixes(tiny):
    batch = rollouts(tiny, rewards=torch.tensor([3.0, 1, 2, 0, 0, 5]))
    costs = torch.tensor([0.1, 0.2, 0.9, 0.4, 0.4, 0.1])
    found, _, _ = charged("safe_rlhf(start=2, lr=0)", batch, costs)
    normal = {name: group_advantages(r, batch.group) for name, r in found.rewards.items()}
    by_hand = (normal["reward"] - 2 * normal["cost"]) / 3
    torch.testing.assert_close(found.mix(normal), by_hand)
    scaled = {**normal, "cost": group_advantages(costs / 1000, batch.group)}
    assert (found.mix(scaled) - by_hand).abs().max() < 0.5, "scale counts for nothing in a group"


def test_shaping_is_one_channel_at_a_fixed_price(tiny):
    batch = rollouts(tiny)
    found, seen, _ = charged("safe_rlhf(start=0.5, shaping=True)", batch, 0.6, 1.0)
    assert list(found.rewards) == ["reward"] and seen == [0.5, 0.5]
    torch.testing.assert_close(found.rewards["reward"], batch.rewards["reward"] - 0.5)
    assert found.mix is batch.mix and found.kl_sign == batch.kl_sign


@pytest.mark.parametrize("start", [0.5, 3.0])
def test_bandit_ends_at_its_limit(start):
    """Arms of reward and cost (1, 0), limit .5: both arms alike at the multiplier 1.

    The KL penalty of both channels damps the cycle that descent and ascent make of a saddle.
    """
    logit, k = torch.tensor(1.0, dtype=torch.float64), 0.1
    chance = torch.zeros(2, dtype=torch.float64)
    ctx = context(lambda rows: chance[:1])
    defence = defences.create(f"safe_rlhf(limit=0.5, lr=0.01, start={start}, window=1)")
    rows = Sequences(*(torch.ones(1, 1, dtype=torch.int64) for _ in range(4)))
    batch = RolloutBatch(rows, None, None, None, {"reward": None}, torch.ones(1))
    arms = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for _ in range(2500):
        chance[0] = torch.sigmoid(logit)
        chance[1] = 1 - chance[0]
        found = defence.feedback(ctx, batch)
        kl = k * (2 * chance).log()
        advantage = found.mix({c: arms - s * kl for c, s in found.kl_sign.items()})[0]
        logit = logit + 0.5 * chance[0] * chance[1] * (advantage[0] - advantage[1])
    assert chance[0].item() == pytest.approx(0.5, abs=1e-4)
    assert defence.multiplier == pytest.approx(1.0, abs=1e-4)


def pair_terms(delta, target, gap, beta=0.1):
    extra = {
        "delta": delta,
        "beta": torch.tensor(beta),
        "target": target,
        "cost_a": gap.clamp(min=0),
        "cost_b": (-gap).clamp(min=0),
    }
    return ItemTerms(dpo_loss(delta, target, beta), torch.ones(()), 1.0, extra)


def test_dpo_ends_where_the_lagrangian_does():
    """Votes of a reward gap 1, cost gaps .5, 0, -.2 at 2: beta Delta = 1 - 2 gap has no slope."""
    gap = torch.tensor([0.5, 0.0, -0.2], dtype=torch.float64)
    delta = ((1 - 2 * gap) / 0.1).requires_grad_()
    target = torch.sigmoid(torch.ones(3, dtype=torch.float64))
    with_margin(weighted_mean, 2.0, pair_terms(delta, target, gap)).backward()
    torch.testing.assert_close(delta.grad, torch.zeros_like(gap), atol=1e-8, rtol=0)
    plain = pair_terms(delta, target, gap).loss.sum()
    slope = torch.autograd.grad(plain, delta)[0]
    assert slope[0] < -0.02 and abs(slope[1]) < 1e-8 and slope[2] > 0.005


def test_a_loss_before_it_sees_the_margin():
    seen = {}

    def robust(terms):
        seen.update(terms.extra)
        return weighted_mean(terms)

    delta, target = torch.tensor([2.0]), torch.tensor([1.0])
    loss = with_margin(robust, 3.0, pair_terms(delta, target, torch.tensor([0.4])))
    assert seen["delta"].item() == pytest.approx(2 + 1.2 / 0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(0.2 + 1.2))), rel=1e-5)


def test_dpo_takes_the_margin_from_both_answers(tiny):
    """Through the learner, whole or in micro-batches."""
    losses = []
    for micro in (8, 3):
        agent = tiny.agent("dpo", ("safe_rlhf(start=2, lr=0)",), micro_batch=micro)
        pairs = agent.learner.referenced(tiny.pairs(8))
        losses.append(agent.learner.run(agent.stack.feedback(pairs)).losses["loss"])
    terms = agent.learner.item_terms(pairs, 8.0)
    a, b = (agent.stack.ctx.score("cost", side) for side in (pairs.a, pairs.b))
    assert (a != b).any()
    shifted = dpo_loss(terms.extra["delta"] + 2 * (a - b) / 0.1, pairs.target, 0.1)
    expected = (shifted * pairs.weight).mean().item()
    assert losses == pytest.approx([expected, expected], rel=1e-5)


def test_sft_pays_for_costly_winners(tiny):
    batch = SFTBatch(torch.arange(3), tiny.sequences(3), torch.tensor([1, 1, 2.0]), torch.zeros(3))
    costs = torch.tensor([0.0, 0.9, 0.25])
    found, _, _ = charged("safe_rlhf(start=2, lr=0)", batch, costs)
    assert found.weight.tolist() == pytest.approx([1, 0, 1])


def share_of_low_words(rows):
    """(N,) share of an answer's words among the first half of the vocabulary."""
    said = rows.mask * (rows.ids >= 6)
    return ((rows.ids < 13) * said).sum(1) / said.sum(1).clamp(min=1)


@pytest.mark.parametrize(("learner", "rounds"), [("sft", 8), ("dpo", 8), ("ppo", 20), ("grpo", 8)])
def test_a_price_makes_the_policy_cheaper(tiny, learner, rounds):
    found = {}
    for start in (0, 5):
        agent = tiny.agent(learner, (f"safe_rlhf(start={start}, limit=0.05)",), lr=1e-2)
        agent.stack.ctx._scorers["cost"] = share_of_low_words
        tiny.rounds(agent, 0, rounds)
        sequences = agent.respond(*tiny.prompts(24, 77), 16, 5).sequences
        found[start] = float(share_of_low_words(sequences).mean())
    assert found[5] < 0.8 * found[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("limit=0.0", r"safe_rlhf.limit=0.0; allowed: > 0, <= 1"),
        ("lr=2.0", r"safe_rlhf.lr=2.0; allowed: 0 to 1"),
        ("start=6.0", r"safe_rlhf.start=6.0; allowed: 0 to 5.0"),
        ("window=0", r"safe_rlhf.window=0; allowed: >= 1"),
        ("delay=-1", r"safe_rlhf.delay=-1; allowed: >= 0"),
        ("parametrisation='log'", r"parametrisation='log'; allowed: exponential, linear"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        defences.create(f"safe_rlhf({arguments})")
