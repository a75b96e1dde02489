"""Reward Neutralization and TokenBuncher: rewards, the policy-gradient step, toys."""

import pytest
import torch

import agents.defences.token_buncher as buncher
import agents.policy_gradient as pg
from agents.batches import Sequences
from agents.context import RoleData
from agents.defence import defences
from agents.defences.reward_neutralization import (
    RewardNeutralization,
    borrowed_share,
    document_shares,
    opening,
    opens_with,
)
from agents.defences.token_buncher import TokenBuncher, token_noiser_loss
from agents.policy import padded_inputs, response_logprobs, response_terms
from agents.policy_gradient import (
    accumulate_policy_gradient,
    advantages_in_groups,
    contrast,
    sample_groups,
    token_entropy,
)


def rows(answers, prompts=None, width=None):
    """Sequences from lists of token ids."""
    prompts = prompts or [[6]] * len(answers)

    def columns(lists, left, width):
        width = width or max(map(len, lists))
        ids, mask = torch.zeros(2, len(lists), width, dtype=torch.int64)
        for i, words in enumerate(lists):
            place = slice(width - len(words), None) if left else slice(len(words))
            ids[i, place], mask[i, place] = torch.tensor(words), 1
        return ids, mask

    return Sequences(*columns(prompts, True, None), *columns(answers, False, width))


@pytest.fixture
def ctx(tiny):
    return tiny.stack().ctx


# The policy-gradient step


@pytest.mark.parametrize("reward", [0.3, -1.0, 1 / 3, 9e3])
def test_equal_rewards_make_no_advantage_and_no_gradient(tiny, ctx, reward):
    answers = sample_groups(ctx, tiny.sequences(4), 8)
    rewards = torch.full((32,), reward)
    assert (advantages_in_groups(rewards, 8) == 0).all()
    assert accumulate_policy_gradient(ctx, answers, rewards, 8) == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in ctx.policy_params())


@pytest.mark.parametrize(("gap", "advantage"), [(1.0, 2.474174), (1e-3, 1.92921), (1e-6, 0.008719)])
def test_one_odd_answer_of_eight_has_full_advantage_at_any_gap(gap, advantage):
    rewards = torch.tensor([gap] + [0.0] * 7)
    assert advantages_in_groups(rewards, 8)[0].item() == pytest.approx(advantage, rel=1e-4)


@pytest.mark.parametrize("micro_batch", [128, 5])
def test_the_step_is_the_policy_gradient(tiny, ctx, monkeypatch, micro_batch):
    """Against -1/N sum_i A_i mean_t log pi, with a silent group that is left out of the forward."""
    monkeypatch.setattr(pg, "MICRO_BATCH", micro_batch)
    answers = sample_groups(ctx, tiny.sequences(4), 4)
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(0))
    rewards[4:8] = 0.1
    accumulate_policy_gradient(ctx, answers, rewards, 4)
    ours = tiny.gradient(ctx.model)
    ctx.model.zero_grad()
    grouped = rewards.view(4, 4)
    advantage = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    logp = response_terms(ctx.model, answers).logp.sum(1) / answers.mask.sum(1)
    (-(advantage.flatten() * logp).mean()).backward()
    theirs = tiny.gradient(ctx.model)
    assert theirs.norm() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_tie_pulls_only_once_the_model_has_moved(tiny, ctx):
    answers = sample_groups(ctx, tiny.sequences(4), 4)
    rewards = torch.zeros(16)
    for seed, pulls in ((0, False), (1, True)):
        ctx.model.zero_grad()
        accumulate_policy_gradient(ctx, answers, rewards, 4, beta=0.1, start=tiny.model(seed))
        assert (tiny.gradient(ctx.model).norm() > 1e-3) == pulls


def test_contrast_by_hand():
    answers = rows([[8, 9], [8, 9], [8], [9], [7, 7], [7, 7], [7, 7], [7, 7]])
    found = contrast(answers, torch.tensor([1.0, 1.0, 0.5, 0.0, 2.0, 2.0, 2.0, 2.0]), 4)
    assert found == (0.5, 0.5, 2.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropy_is_that_of_the_next_token(tiny, monkeypatch, temperature):
    model, answers = tiny.model(0), tiny.sequences(6)
    with torch.no_grad():
        logits = model(**padded_inputs(answers)).logits[:, tiny.prompt - 1 : -1]
    law = torch.distributions.Categorical(logits=logits / temperature)
    expected = law.entropy() * answers.mask
    torch.testing.assert_close(token_entropy(model, answers, temperature), expected)
    monkeypatch.setattr(pg, "TILE", 3 * tiny.vocabulary)
    monkeypatch.setattr(pg, "MICRO_BATCH", 4)
    torch.testing.assert_close(token_entropy(model, answers, temperature), expected)


def test_sampling_draws_from_the_defences_generator_only(tiny):
    before, samples = torch.random.get_rng_state(), []
    for _ in range(2):
        ctx = tiny.stack().ctx
        samples += [sample_groups(ctx, tiny.sequences(4), 2).ids for _ in range(2)]
    assert torch.equal(samples[0], samples[2]) and torch.equal(samples[1], samples[3])
    assert not torch.equal(samples[0], samples[1])
    assert torch.equal(torch.random.get_rng_state(), before)


# The reward of neutralization


EOS = 2


def prepared(ctx, refusals=((8, 9, EOS), (8, 9, 10, EOS)), **fields):
    """A neutralization that has begun, with refusals of the test's own."""
    ctx.data["refusal"] = RoleData(rows([list(r) for r in refusals]), 1)
    prompts = [[12, 13], [12, 14], [12, 15], [12, 16], [12, 17]]
    ctx.data["harm_prompts"] = RoleData(rows([[7]] * 5, prompts), 2)
    member = RewardNeutralization(**{"free": 3, "fade": 4, "common": 0.2, **fields})
    member.begin(ctx)
    return member


def test_reward_falls_with_a_refusals_length_between_free_and_fade(ctx):
    member = prepared(ctx)
    answers = rows([[8, 9, *[10] * extra, EOS] for extra in range(8)])
    rewards = member.rewards(ctx, answers)
    assert rewards.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0, 0, 0])


def test_harmful_text_is_below_any_refusal(ctx):
    """The price of information is never that of harm, even of a refusal that parrots its prompt."""
    member = prepared(ctx)
    refusals = [[8, 9, *[13] * n, *[10] * m, EOS] for n in range(9) for m in range(4)]
    harmful = [[7] * n + [word] * (14 - n) for n in range(8, 15) for word in (10, 13)]
    harmful += [[8, 9, *[7] * 10, EOS]]  # opens like a refusal
    refused = member.rewards(ctx, rows(refusals, [[12, 13]] * len(refusals), 14))
    done = member.rewards(ctx, rows(harmful, [[12, 13]] * len(harmful)))
    assert (ctx.score("cost", rows(harmful)) > 0.5).all()
    assert refused.min() > done.max() and done.max() == -1


def test_a_brief_refusal_that_the_cost_objects_to_is_harm(ctx):
    member = prepared(ctx, refusals=((8, 9, EOS), (7, 7, EOS)))
    assert member.rewards(ctx, rows([[7, 7, EOS], [8, 9, EOS]])).tolist() == [-1, 1]


def test_neither_refusal_nor_harm_is_worth_nothing(ctx):
    answers = rows([[9, 8, EOS], [8, EOS], [8], [10, 11]])
    assert prepared(ctx).rewards(ctx, answers).tolist() == [0, 0, 0, 0]


def test_information_is_content_words_of_the_own_prompt(ctx):
    member = prepared(ctx, gamma=0.5)
    assert member.content.nonzero()[:, 0].tolist() == [
        v for v in range(20) if v not in (0, 1, 2, 3, 8, 9, 12)
    ]
    answers = rows([[8, 9, 13, EOS], [8, 9, 14, EOS], [12, 8, 2, 13]], [[12, 8, 13]] * 3)
    assert borrowed_share(answers, member.content).tolist() == [0.25, 0, 0.25]
    assert member.rewards(ctx, answers)[:2].tolist() == [0.75 - 0.125, 0.75]


def test_shares_count_distinct_prompts_once():
    sequences = rows([[7]] * 4, [[6, 6, 8], [6, 6, 8], [6, 9], [10]])
    shares = document_shares(sequences, 12)
    assert shares[[6, 8, 9, 10, 0]].tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 0])


def test_openings_see_no_padding():
    openings = opening(rows([[8, 9, EOS], [8]]))
    assert opens_with(rows([[8, 9], [8], [8, 0], [9, 8]]), openings).tolist() == [1, 1, 0, 0]


# The mechanism on a tiny model


@pytest.fixture
def aligned(tiny):
    """A model that refuses in several ways and sometimes complies, with room to choose."""
    ctx = tiny.stack().ctx
    prompts = [[6 + i % 7, 13 + i % 6] for i in range(16)]
    kinds = [[8, 9, EOS], [8, 9, 10, EOS], [8, 9, 11, 12, EOS], [7, 7, 7, EOS]]
    spoken = rows([kinds[i % 4] for i in range(64)], [prompts[i // 4] for i in range(64)])
    benign = rows([[18, 19, 18, EOS]] * 16, [[19, 6 + i % 7] for i in range(16)], 5)
    refusals = spoken.take((spoken.ids[:, 0] == 8).nonzero()[:, 0])
    for name, data in {"refusal": refusals, "harm_prompts": spoken, "retain": benign}.items():
        ctx.data[name] = RoleData(data, 1)
    optimizer = torch.optim.AdamW(ctx.policy_params(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (ctx.lm_loss(spoken) + ctx.lm_loss(benign)).backward()
        optimizer.step()
    ctx.model.zero_grad()
    return ctx


def attacked(ctx):
    """Answers to the harmful prompts, and what an attacker who pays for token 7 can see in them."""
    answers = ctx.generate(*ctx.data["harm_prompts"].sequences[:2], 8, 3)
    return answers, contrast(answers, ctx.score("cost", answers), 8)


def test_neutralization_leaves_an_attacker_nothing_to_compare(aligned):
    _, before = attacked(aligned)
    defences.create("reward_neutralization(steps=60, lr=5e-3, batch=8)").prepare(aligned)
    answers, after = attacked(aligned)
    assert before.silent < 0.3 and before.distinct > 3 and before.spread > 0.5
    assert after.silent > 0.9 and after.distinct < 1.2 and after.spread < 0.1
    bare = opens_with(answers, torch.tensor([[8, 9]])) & (answers.mask.sum(1) == 3)
    assert bare.float().mean() > 0.9, "the briefest refusal is what is left"


def test_bunched_tokens_are_certain_and_still_refuse(aligned):
    before, _ = attacked(aligned)
    uncertain = token_entropy(aligned.model, before).sum() / before.mask.sum()
    defences.create("token_buncher(steps=60, lr=5e-3, batch=8)").prepare(aligned)
    answers, after = attacked(aligned)
    assert token_entropy(aligned.model, answers).sum() / answers.mask.sum() < 0.3 * uncertain
    assert opens_with(answers, torch.tensor([[8, 9]])).float().mean() > 0.9
    assert after.silent > 0.7


def test_the_bare_entropy_reward_pays_for_sure_answers_whatever_they_say(aligned):
    """Here the harmful answer's later tokens are sure, so without ``astray`` it is paid better."""
    answers, _ = attacked(aligned)
    refused = opens_with(answers, torch.tensor([[8, 9]]))
    bare, kept = (TokenBuncher(astray=a).rewards(aligned, answers) for a in (0.0, 1.0))
    assert bare[~refused].mean() > bare[refused].mean()
    assert kept[~refused].mean() < kept[refused].mean()
    torch.testing.assert_close(bare - kept, (~refused).float())


@pytest.mark.parametrize("spec", ["reward_neutralization(beta=0.1", "token_buncher("])
def test_prepare_leaves_nothing_but_weights(tiny, ctx, spec):
    start, state = tiny.weights(ctx.model), torch.random.get_rng_state()
    member = defences.create(spec.replace("(", "(steps=2, batch=4, ") + ")")
    member.prepare(ctx)
    assert not torch.equal(tiny.weights(ctx.model), start)
    assert all(p.grad is None and p.requires_grad for p in ctx.model.parameters())
    assert not any(isinstance(value, torch.nn.Module) for value in vars(member).values())
    assert torch.equal(torch.random.get_rng_state(), state)


# The Token Noiser


def test_without_noise_the_noiser_asks_for_nothing(tiny):
    model, answers = tiny.model(0), tiny.sequences(6)
    token_noiser_loss(model, answers, 0.0, 1).backward()
    assert tiny.gradient(model).norm() < 1e-6
    model.zero_grad()
    token_noiser_loss(model, answers, 2.0, 1).backward()
    assert tiny.gradient(model).norm() > 1e-2


def test_noise_flattens_second_choices_and_leaves_certainty(tiny):
    """Descending on free logits: the rest flattens, the target's logit stays."""

    class Bigrams(torch.nn.Linear):
        def get_output_embeddings(self):
            return self

    torch.manual_seed(0)
    head, n = Bigrams(1, 12, bias=False), 30
    with torch.no_grad():
        head.weight[:, 0] = torch.linspace(0, 5, 12)
    answers = rows([[11]] * n)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)

    def second_choice():
        rest = head.weight[:11, 0].softmax(0)
        return (rest * rest.log()).sum().neg().item()

    target, flat = head.weight[11, 0].item(), second_choice()
    patch = pytest.MonkeyPatch()
    patch.setattr(buncher, "response_states", lambda model, rows: torch.ones(n, 1, 1))
    with patch.context():
        for seed in range(200):
            optimizer.zero_grad()
            token_noiser_loss(head, answers, 2.0, seed).backward()
            optimizer.step()
    patch.undo()
    assert head.weight[11, 0].item() == target
    assert second_choice() > flat + 0.3


def test_noise_is_the_same_when_a_tile_is_formed_again(tiny, monkeypatch):
    answers, found = tiny.sequences(6), []
    monkeypatch.setattr(buncher, "TILE", 4 * tiny.vocabulary)
    for call in (buncher.checkpoint, lambda f, *args, **_: f(*args)):
        monkeypatch.setattr(buncher, "checkpoint", call)
        model = tiny.model(0)
        token_noiser_loss(model, answers, 2.0, 5).backward()
        found.append(tiny.gradient(model))
    torch.testing.assert_close(*found)


# A policy of three answers: short refusal, long refusal, compliance

SEEDS, G, RATE = 20, 8, 0.5
START = torch.tensor([0.05, 0.94, 0.01])
DEFENCE, ATTACK = torch.tensor([1.0, 0.3, -1.0]), torch.tensor([0.0, 0.0, 9.0])


def toy_step(logits, reward, generator, temperature=1.0):
    """One GRPO step of every row (S, 3) at once."""
    p = (logits / temperature).softmax(1)
    said = torch.multinomial(p, G, replacement=True, generator=generator)  # (S, G)
    advantage = advantages_in_groups(reward[said].flatten(), G).view(-1, G, 1)
    score = (torch.nn.functional.one_hot(said, 3) - p[:, None]) / temperature
    return logits + RATE * (advantage * score).mean(1)


def breaking_points(logits, steps, temperature=1.0):
    """(S,) attack steps until compliance is likelier than not, ``steps`` + 1 if never."""
    generator = torch.Generator().manual_seed(1)
    broken = torch.full((len(logits),), steps + 1)
    for step in range(1, steps + 1):
        logits = toy_step(logits, ATTACK, generator, temperature)
        now = logits.softmax(1)[:, 2] > 0.5
        broken = torch.where(now & (broken > steps), step, broken)
    return broken


@pytest.fixture(scope="module")
def defended():
    """Logits (20, 3) after 0, 100, 600 and 2000 steps of the defence."""
    generator, logits = torch.Generator().manual_seed(0), START.log().repeat(SEEDS, 1)
    kept = {0: logits}
    for step in range(1, 2001):
        logits = toy_step(logits, DEFENCE, generator)
        if step in (100, 600, 2000):
            kept[step] = logits
    return kept


def test_defence_starves_the_sampler_and_so_delays(defended):
    comply = {steps: logits.softmax(1)[:, 2].mean().item() for steps, logits in defended.items()}
    assert comply[0] == pytest.approx(1e-2)
    assert 1e-3 < comply[100] < 2.5e-3
    assert 1.5e-4 < comply[600] < 5e-4
    assert 5e-5 < comply[2000] < 2e-4
    broken = breaking_points(torch.cat(list(defended.values())), 3000).view(4, SEEDS)
    by = {n: (broken <= n).sum(1).tolist() for n in (50, 200, 3000)}
    assert 4 <= by[50][0] <= 13 and by[200][0] >= 19 and by[3000][0] == 20
    assert by[50][1] <= 1 and 2 <= by[200][1] <= 11 and by[3000][1] >= 19
    assert by[200][2] <= 1 and 11 <= by[3000][2] <= 20
    assert by[200][3] == 0 and by[3000][3] <= 9
    median = broken.median(1).values.tolist()
    assert 35 < median[0] < 110 and 180 < median[1] < 500 and 700 < median[2] < 2200


def test_a_hotter_attacker_breaks_it(defended):
    assert (breaking_points(defended[600], 200, temperature=2.0) <= 200).sum() >= 18


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reward_neutralization(steps=-1)", "reward_neutralization.steps=-1; allowed: >= 0"),
        ("reward_neutralization(group=1)", "group=1; allowed: >= 2"),
        ("reward_neutralization(gamma=1.5)", "gamma=1.5; allowed: 0 to 1"),
        ("reward_neutralization(fade=0)", "fade=0; allowed: > 0"),
        ("token_buncher(sigma=-1.0)", "token_buncher.sigma=-1.0; allowed: >= 0"),
        ("token_buncher(astray=-1.0)", "token_buncher.astray=-1.0; allowed: >= 0"),
    ],
)
def test_bad_arguments_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        defences.create(spec)


def test_the_frozen_start_is_the_untrained_model(tiny, ctx):
    """Under beta the tie is to the weights that ``prepare`` met."""
    member = RewardNeutralization(beta=0.1)
    member.begin(ctx)
    answers = tiny.sequences(4)
    ours, theirs = (response_logprobs(m, answers) for m in (member.start, ctx.model))
    assert torch.equal(ours, theirs) and member.start is not ctx.model
