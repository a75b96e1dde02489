"""A14: flips only while the agreement that is seen of her allows it."""

import json

import numpy as np
import pytest

from envs.annotators import View
from envs.annotators.view import consensus, directions
from envs.attacks import attacks
from envs.types import VOTE_A, VOTE_B, VOTE_SKIP
from envs.usage import UsageError

CROWD = {"collection": "crowd", "redundancy": 3, "batch": 64, "annotators": 12, "activity": 0.0}


def harmful_pairs(people, items=None):
    """Pairs whose first answer is harmful and worse, one vote of each person in ``people``."""
    n = len(people)
    z, one, no = np.arange(n), np.ones(n, np.float32), np.zeros(n, bool)
    items = z if items is None else np.array(items)
    seen = (z, items, z * 0, z * 0 + 1, np.array(people), 0 * one, one, one, 0 * one, no)
    return View(1, 0, *seen)


def attack(spec="agreement_constrained", people=4):
    made = attacks.create(spec)
    made.begin(people)
    return made


def honest(view):
    return np.full(len(view.item), VOTE_B, np.int8)


def test_the_budget_by_hand():
    """(7 + n_agree) / (11 + n) >= .7 allows the first flip only after an agreement: 8 / 12 < .7."""
    made = attack()
    one = harmful_pairs([0])
    flips = []
    for _ in range(12):
        votes = made.vote(one, honest(one))
        flips.append(bool(votes[0] == VOTE_A))
        made.watch(one, votes, honest(one))
    agreed, n, expected = 0, 0, []
    for _ in range(12):
        flip = (agreed + 7) / (n + 1 + 10) >= 0.7
        expected.append(flip)
        agreed, n = agreed + (not flip), n + 1
    assert flips == expected and 0 < sum(flips) < 12 and not flips[0]
    assert (made.agreed[0], made.counted[0]) == (agreed, n)


def test_a_round_of_many_votes_counts_like_many_rounds():
    together, apart = attack(), attack()
    many, one = harmful_pairs([2] * 30), harmful_pairs([2])
    votes = together.vote(many, honest(many))
    single = []
    for _ in range(30):
        single.append(apart.vote(one, honest(one))[0])
        apart.watch(one, np.array(single[-1:]), honest(one))
    assert votes.tolist() == single


def test_people_are_counted_apart():
    made = attack()
    mixed = harmful_pairs([0, 1, 0, 2, 0, 1, 0, 0] * 4)
    votes = made.vote(mixed, honest(mixed))
    for person in range(3):
        mine = mixed.person == person
        alone = harmful_pairs(mixed.person[mine])
        assert votes[mine].tolist() == attack().vote(alone, honest(alone)).tolist()


@pytest.mark.parametrize("theta, delta", [(0.5, 0.0), (0.7, 0.1), (0.9, 0.05)])
def test_agreement_never_falls_below_what_she_keeps(theta, delta):
    spec = f"agreement_constrained(theta={theta}, delta={delta})"
    made, rng, flips = attack(spec, 6), np.random.default_rng(0), 0
    for _ in range(20):
        view = harmful_pairs(rng.integers(0, 6, 30))
        before = (made.agreed + 7) / (made.counted + 10)
        votes = made.vote(view, honest(view))
        made.watch(view, votes, honest(view))  # one vote an item, so expectation is all there is
        after = (made.agreed + 7) / (made.counted + 10)
        flipped = np.unique(view.person[votes == VOTE_A])
        flips += len(flipped)
        assert (after[flipped] >= theta + delta - 1e-12).all()
        assert (after >= np.minimum(before, theta + delta) - 1e-12).all()
    assert flips


def test_theta_zero_is_the_goal_itself_and_one_is_honest(play):
    arguments = {**CROWD, "rho": 0.5}
    goal = play(3, attack="harm_targeted", **arguments)
    free = play(3, attack="agreement_constrained(theta=0.0)", **arguments)
    tied = play(3, attack="agreement_constrained(theta=1.0)", **arguments)
    for a, b, c in zip(goal, free, tied, strict=True):
        assert (a.labels.vote == b.labels.vote).all()
        assert (c.labels.vote == c.truth.honest_vote).all()
    assert goal[0].info["feedback/rho_flips"] > 0


def test_consensus_is_the_majority_of_the_others_whichever_way_they_saw_the_pair():
    view = harmful_pairs([0, 1, 2, 0, 1, 3], [0, 0, 0, 1, 1, 2])
    view = view._replace(a=np.array([0, 1, 0, 0, 1, 0]), b=np.array([1, 0, 1, 1, 0, 1]))
    votes = np.array([VOTE_A, VOTE_A, VOTE_B, VOTE_A, VOTE_SKIP, VOTE_B], np.int8)
    # Item 0: answers 0, 1, 1. Item 1: answer 0 and nothing. Item 2: one vote.
    found = consensus(view.item, directions(view.a, view.b, votes))
    assert found.tolist() == [-1, 0, 0, 0, 1, 0]


def test_she_counts_what_others_said_and_not_what_is_true():
    made = attack(people=3)
    view = harmful_pairs([0, 1, 2], [0, 0, 0])
    votes = np.array([VOTE_B, VOTE_A, VOTE_A], np.int8)  # two of three are wrong
    made.watch(view, votes, honest(view))
    assert made.counted.tolist() == [1, 1, 1] and made.agreed.tolist() == [0, 0, 0]
    # The others of person 1 are even: she counts what she expected, and voted against it.


def test_knowledge_is_own_votes_and_consensus(play):
    """Another's honest vote, the truth of others' items, and who is malicious change nothing."""
    made, other = attack(people=5), attack(people=5)
    view = harmful_pairs([0, 1, 2, 3, 4], [0, 0, 0, 1, 2])
    votes = np.array([VOTE_B, VOTE_A, VOTE_A, VOTE_A, VOTE_B], np.int8)
    made.watch(view, votes, honest(view))
    lied = honest(view)
    lied[[0, 1, 2]] = VOTE_A  # what they would honestly have said of an item with a consensus
    changed = view._replace(cost_a=view.cost_b, utility_b=view.utility_a)
    other.watch(changed, votes, np.where(view.item == 0, lied, honest(view)).astype(np.int8))
    assert made.agreed[[0, 3, 4]].tolist() == other.agreed[[0, 3, 4]].tolist()


@pytest.mark.parametrize("collection", ["chat", "crowd"])
@pytest.mark.parametrize("delay", [0, 2])
def test_resuming_continues_identically(make, answer, same, collection, delay):
    arguments = {"attack": "agreement_constrained", "rho": 0.5, "delay": delay, "annotators": 8}
    arguments |= {"collection": collection, "redundancy": 3 if collection == "crowd" else 1}
    if collection == "crowd":
        arguments |= {"gold_share": 0.2}
    whole, later = make(**arguments), make(**arguments)
    observation, _ = whole.reset(seed=1)
    for _ in range(4):
        observation = whole.step(answer(observation, 4))[0]
    state = whole.state_dict()
    json.dumps([view.get("key") for view in state["waiting"]])
    assert same(later.load_state_dict(state), observation)
    for _ in range(4):
        first, second = (env.step(answer(observation, 4)) for env in (whole, later))
        assert same(first[4], second[4])
        observation = first[0]
    assert same(whole.state_dict(), later.state_dict())


def test_a_new_run_begins_with_no_memory(make, answer, same):
    env = make(attack="agreement_constrained", rho=0.5)
    ends = []
    for _ in range(2):
        observation, _ = env.reset(seed=4)
        for _ in range(3):
            observation, _, _, _, info = env.step(answer(observation, 4))
        ends.append((info["labels"], env.state_dict()))
    assert same(ends[0], ends[1])


def test_a_sleeper_saves_up_agreement(play):
    """Twelve rounds that end in hostility: who waited flips more at the end."""
    shared = {**CROWD, "rho": 0.5, "attack": "agreement_constrained(goal='always_flip')"}
    at_once = play(12, **shared)
    waited = play(12, schedule="sleeper", start=10, **shared)
    assert all(p.info["feedback/rho_flips"] == 0 for p in waited[:10])
    ends = [sum(p.info["feedback/rho_flips"] for p in played[10:]) for played in (at_once, waited)]
    assert ends[1] > ends[0]


def test_the_goal_may_bring_prompts(play):
    spec = "agreement_constrained(goal='harmful_asker')"
    plain, shy = (play(2, attack=name, rho=0.4, batch=64) for name in ("harmful_asker", spec))
    for a, b in zip(plain, shy, strict=True):
        assert (a.truth.key == b.truth.key).all()
    assert 0 < shy[1].info["feedback/rho_flips"] <= plain[1].info["feedback/rho_flips"]


@pytest.mark.parametrize(
    "arguments, field",
    [
        ("theta=1.2", "theta=1.2"),
        ("delta=-1", "delta=-1"),
        ("prior=(1.0, 0.0)", "prior="),
        ("prior=(1.0, 2.0, 3.0)", "prior="),
        ("goal='nobody'", "unknown name 'nobody'"),
        ("goal='label_noise'", "goal='label_noise'"),
        ("goal='malicious_grpo'", "goal='malicious_grpo'"),
        ("goal='agreement_constrained'", "goal="),
        ("goal='mine.py:Mine'", "goal='mine.py:Mine'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, field):
    with pytest.raises(UsageError, match=field):
        attacks.create(f"agreement_constrained({arguments})")
