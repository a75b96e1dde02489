"""Gold questions and Dawid-Skene: guarantees, breakdown, and what they do to labels."""

import numpy as np
import pytest

from agents.annotator_evidence import ErrorTest
from agents.batches import GoldAnswers, LabelBatch
from agents.defence import defences
from agents.defences.dawid_skene import posterior
from envs.types import HARMFUL
from envs.usage import UsageError


def answers(annotator, stratum, wrong):
    return GoldAnswers(np.array(annotator), np.array(stratum), np.array(wrong, bool))


def log(item, annotator, target, swapped=None, stratum=None, first_id=0):
    n = len(item)
    zero = np.zeros(n, np.int64)
    return LabelBatch(
        label_id=np.arange(n) + first_id,
        item=np.array(item),
        annotator_id=np.array(annotator),
        target=np.array(target, np.float32),
        weight=np.ones(n, np.float32),
        round=zero,
        stratum=zero if stratum is None else np.array(stratum),
        new=zero == 0,
        swapped=zero > 0 if swapped is None else np.array(swapped, bool),
    )


class Ctx:
    """What a label hook asks of its context."""

    def __init__(self, gold=None):
        self.gold = gold or answers([], [], [])
        self.metrics = {}

    def log(self, metrics):
        self.metrics.update(metrics)


@pytest.mark.parametrize("strata", [1, 3])
def test_honest_people_are_flagged_no_more_often_than_alpha(strata):
    """4000 people at the limit itself, 60 rounds of one answer and more, alpha .1."""
    rng, people, alpha = np.random.default_rng(0), 4000, 0.1
    test = ErrorTest(0.1, strata)
    for _ in range(60):
        who = np.flatnonzero(rng.random(people) < 0.7)
        who = np.concatenate([who, who[::5]])  # some answer twice in a round
        test.update(who, rng.integers(0, 3, len(who)), rng.random(len(who)) < 0.1)
    share = len(test.flagged(alpha)) / people
    assert 0 < share <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / people)
    assert len(test.flagged(0.0)) == 0


def test_the_bound_holds_when_the_errors_wait_for_the_past():
    """Ville is for any order: a person who slips after a clean record, at the limit on average."""
    rng, people = np.random.default_rng(1), 3000
    test, clean = ErrorTest(0.2, 1), np.zeros(people, np.int64)
    for _ in range(80):
        rate = np.where(clean >= 5, 0.2, 0.05)  # never above the limit, given the past
        wrong = rng.random(people) < rate
        clean = np.where(wrong, 0, clean + 1)
        test.update(np.arange(people), np.zeros(people, np.int64), wrong)
    assert len(test.flagged(0.05)) / people <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / people)


def test_evidence_by_hand():
    """One bet would do: after one wrong and one right answer M = mean over bets of A + 1/3."""
    test = ErrorTest(0.5, 1)
    bets = np.array([0.05, 0.1, 0.2, 0.4]) / 0.25  # 0.5 + 0.8 leaves no bet
    up, down = 1 + bets * 0.5, 1 - bets * 0.5
    test.update(np.array([0]), np.array([0]), np.array([True]))
    first = 0.5 * up
    assert np.exp(test.log_evidence) == pytest.approx([np.mean(first + 0.5)])
    test.update(np.array([0]), np.array([0]), np.array([False]))
    assert np.exp(test.log_evidence) == pytest.approx([np.mean((first + 1 / 6) * down + 1 / 3)])
    assert np.exp(test.peak) == pytest.approx([np.mean(first + 0.5)])


def test_a_good_past_is_no_shelter():
    """Forty right answers, then wrong ones: the mixture of starts needs a few more, not forty."""

    def needed(test, past):
        for _ in range(past):
            test.update(np.array([0]), np.array([HARMFUL]), np.array([False]))
        for count in range(1, 100):
            test.update(np.array([0]), np.array([HARMFUL]), np.array([True]))
            if len(test.flagged(0.05)):
                return count
        return 100

    fresh, sleeper = needed(ErrorTest(0.1), 0), needed(ErrorTest(0.1), 40)
    assert fresh <= 4 and fresh < sleeper <= fresh + 6


def test_strata_find_what_the_stream_hides():
    """Wrong on harmful questions alone, a tenth of all: plain in its part, not in the whole."""
    stratified, pooled = ErrorTest(0.1), ErrorTest(0.1, 1)
    for round in range(40):
        stratum = np.array([HARMFUL if round % 10 == 0 else round % 2])
        for test in (stratified, pooled):
            test.update(np.array([0]), stratum, stratum == HARMFUL)
    assert len(stratified.flagged(0.05)) == 1 and len(pooled.flagged(0.05)) == 0


def test_banned_people_lose_past_and_future_labels():
    gold = defences.create("gold")
    votes = log([0, 1, 2, 3], [0, 1, 0, 2], [1, 0, 1, 0])
    quiet = gold.feedback(Ctx(), votes)
    assert (quiet.weight == 1).all() and gold.banned.size == 0
    wrong = Ctx(answers([0] * 5 + [1] * 5, [HARMFUL] * 10, [True] * 5 + [False] * 5))
    changed = gold.feedback(wrong, votes)
    assert gold.banned.tolist() == [0] and changed.weight.tolist() == [0, 1, 0, 1]
    assert wrong.metrics == {"defence/gold/banned": 1, "defence/gold/answers": 10}
    again = defences.create("gold")
    again.load_state_dict(None, gold.state_dict())
    assert again.feedback(Ctx(), votes).weight.tolist() == [0, 1, 0, 1], "later rounds too"
    split = defences.create("gold(people=1000)")
    split.feedback(wrong, votes)
    assert split.banned.size == 0, "more people, more evidence for each"


def world(q, rho, own=False, items=600, people=40, votes=8, seed=0, share=1.0):
    """Votes of a crowd whose attackers invert the truth (or their own label) on some items."""
    rng = np.random.default_rng(seed)
    bad = np.arange(people) < round(rho * people)
    who = np.concatenate([rng.permutation(people)[:votes] for _ in range(items)])
    item = np.repeat(np.arange(items), votes)
    truth, hit = rng.random(items) < 0.5, rng.random(items) < share
    right = rng.random(len(item)) < q
    right = np.where(bad[who] & hit[item], ~right if own else False, right)
    return item, who, truth[item] == right, truth, hit


def accuracy(q, rho, model="one_coin", **more):
    item, who, first, truth, _ = world(q, rho, **more)
    found = posterior(item, who, first, model)
    return float(((found > 0.5) == truth[item]).mean())


@pytest.mark.parametrize("model", ["one_coin", "confusion"])
@pytest.mark.parametrize("q, below, above", [(0.65, 0.175, 0.275), (0.75, 0.3, 0.375), (0.85, 0.375, 0.45)])  # fmt: skip  # noqa: E501
def test_breakdown_at_one_minus_one_over_two_q(q, below, above, model):
    assert below < 1 - 1 / (2 * q) < above
    assert accuracy(q, below, model) > 0.85 and accuracy(q, above, model) < 0.15


def test_inverting_the_own_label_breaks_at_one_half():
    assert accuracy(0.75, 0.45, own=True) > 0.85 and accuracy(0.75, 0.55, own=True) < 0.15


def test_by_stratum_finds_those_who_lie_in_one():
    """A quarter of the people invert a tenth of the items: the whole trusts them, the part not."""
    item, who, first, truth, hit = world(0.85, 0.25, share=0.1, items=1500)
    batch = log(item, who, first.astype(float), stratum=np.where(hit[item], HARMFUL, 0))
    wrong = {}
    for by in ("all", "stratum"):
        target = defences.create(f"dawid_skene(by={by!r})").feedback(Ctx(), batch).target
        wrong[by] = float((((target > 0.5) != truth[item])[hit[item]]).mean())
    assert wrong["stratum"] < 0.5 * wrong["all"], wrong


def test_targets_are_told_in_the_order_each_person_saw():
    """Two careful people against one who is always wrong, and answers shown either way round."""
    rng = np.random.default_rng(0)
    item, who = np.repeat(np.arange(60), 3), np.tile([0, 1, 2], 60)
    better_first = rng.random(60) < 0.5  # by token ids
    swapped = rng.random(180) < 0.5
    says_first = better_first[item] ^ (who == 2)
    target = says_first ^ swapped  # shown first is preferred
    made = defences.create("dawid_skene")
    found = made.feedback(Ctx(), log(item, who, target, swapped)).target
    assert ((found > 0.5) == (better_first[item] ^ swapped)).all()


def test_later_rounds_start_from_the_votes_and_not_from_posteriors():
    item, who, first, *_ = world(0.8, 0.3, items=80)
    votes = log(item, who, first.astype(float))
    made, once = defences.create("dawid_skene"), defences.create("dawid_skene")
    target = once.feedback(Ctx(), votes).target
    for _ in range(3):
        seen = made.feedback(Ctx(), votes)
        votes = log(item, who, seen.target)  # what the window holds after a round
    assert (seen.target == target).all()
    resumed = defences.create("dawid_skene")
    resumed.load_state_dict(None, made.state_dict())
    assert (resumed.feedback(Ctx(), votes).target == target).all()


@pytest.mark.parametrize("by", ["all", "stratum"])
def test_nothing_to_aggregate_is_left_alone(by):
    for votes in (log([], [], []), log([0, 1], [0, 1], [1, 0]), log([0, 0], [0, 1], [0.5, 1])):
        made = defences.create(f"dawid_skene(by={by!r})")
        assert (made.feedback(Ctx(), votes).target == votes.target).all()


def test_unanimous_votes_stay():
    made = defences.create("dawid_skene")
    same = log([0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1])
    assert made.feedback(Ctx(), same).target.tolist() == [1, 1, 1, 1]


def test_without_crowd_kit_the_pip_line_is_said(tiny, monkeypatch):
    from agents.defences import dawid_skene

    monkeypatch.setattr(dawid_skene, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"crowd-kit is not installed.*pip install 'poisonloop"):
        tiny.agent("dpo", ("dawid_skene",))
    tiny.agent("dpo", ("dawid_skene(strength=0)",))


@pytest.mark.parametrize("spec", ["gold", "dawid_skene"])
def test_what_the_log_lacks_is_named(tiny, spec):
    stack = tiny.stack((spec,))
    stack.ctx._log = frozenset()
    with pytest.raises(UsageError, match=r"needs log:\w+: .*feedback\.collection crowd"):
        stack.prepare()


@pytest.mark.parametrize(
    "spec, field",
    [
        ("gold(alpha=0.7)", "gold.alpha=0.7"),
        ("gold(honest_error=0.0)", "gold.honest_error=0.0"),
        ("gold(people=0)", "gold.people=0"),
        ("dawid_skene(strength=2)", "dawid_skene.strength=2"),
        ("dawid_skene(by='person')", "by='person'; allowed: all, stratum"),
        ("dawid_skene(model='x')", "model='x'; allowed: one_coin, confusion"),
    ],
)
def test_bad_arguments_are_refused(spec, field):
    with pytest.raises(UsageError, match=field):
        defences.create(spec)


def test_gold_answers_reach_the_hook_though_no_label_came(tiny):
    from envs.types import VOTE_SKIP, GoldLog

    agent = tiny.agent("dpo", ("gold",))
    agent.act(tiny.observation(0))
    skipped = tiny.labels(0)._replace(vote=np.full(8, VOTE_SKIP, np.int8))
    n = 6
    fails = GoldLog(np.arange(n), np.full(n, 2), np.full(n, 3), np.zeros(n, bool), np.zeros(n))
    learned = agent.learn(skipped, fails)
    assert learned.banned.tolist() == [3] and not len(learned.label_id)
    agent.act(tiny.observation(1))
    labels = tiny.labels(1)
    after = agent.learn(labels)
    assert (after.weight[labels.annotator == 3] == 0).all()
    assert (after.weight[labels.annotator != 3] > 0).all()
