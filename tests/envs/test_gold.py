"""Gold questions: asked like any item, filed apart, known to the operator alone."""

import numpy as np
import pytest

from envs.annotators.view import View
from envs.attacks import Attack
from envs.types import HARMFUL, VOTE_SKIP
from envs.usage import UsageError

CROWD = {"collection": "crowd", "redundancy": 3, "batch": 128}
GOLD = {**CROWD, "gold_share": 0.2}


def test_without_a_share_nothing_changes(play, same):
    plain, zero = play(2, **CROWD), play(2, **CROWD, gold_share=0.0, gold_harmful=0.0)
    assert same(plain, zero) and "gold" not in plain[0].info


def test_labels_and_answers_part_the_votes(play):
    for plain, gold in zip(play(3, **CROWD), play(3, **GOLD), strict=True):
        log = gold.info["gold"]
        both = np.concatenate([gold.labels.label_id, log.label_id])
        assert len(np.unique(both)) == len(both) and set(both) <= set(plain.labels.label_id)
        assert not set(gold.labels.item) & set(log.item)
        people = dict(zip(plain.labels.label_id, plain.labels.annotator, strict=True))
        assert [people[i] for i in log.label_id] == log.annotator.tolist()
        kept = np.isin(plain.labels.label_id, gold.labels.label_id)
        assert (plain.labels.vote[kept] == gold.labels.vote).all(), "arms stay paired"
        assert len(gold.truth.honest_vote) == len(gold.labels.vote)


def test_the_share_is_that_of_every_observed_stratum(play):
    arguments = {**CROWD, "batch": 4096, "redundancy": 1, "gold_share": 0.05, "gold_harmful": 0.3}
    (played,) = play(1, **arguments)
    log, stratum = played.info["gold"], played.observation["stratum"]
    for s in range(3):
        share = np.isin(np.flatnonzero(stratum == s), log.item).mean()
        assert share == pytest.approx(0.3 if s == HARMFUL else 0.05, abs=0.03)


def test_honest_people_are_right_but_for_slips(play):
    rounds = play(4, **GOLD, behaviours=["boltzmann(beta=4.0)", "lapse(rate=0.1)"])
    right = np.concatenate([p.info["gold"].right for p in rounds])
    assert len(right) > 200 and right.mean() == pytest.approx(0.95, abs=0.03)
    perfect = play(2, **GOLD, behaviours=["boltzmann(beta=-1)"])
    assert all(p.info["gold"].right.all() for p in perfect)


def test_dishonesty_about_harm_shows_in_the_harmful_stratum_alone(play):
    exact = {"behaviours": ["boltzmann(beta=-1)"], "stratum_error": 0.0}
    wrong = np.zeros(3)
    for p in play(4, **GOLD, **exact, attack="harm_targeted", rho=0.5):
        log, bad = p.info["gold"], p.truth.malicious
        stratum = p.observation["stratum"][log.item % 128]
        assert log.right[~bad[log.annotator]].all()
        mine = bad[log.annotator]
        assert (log.right[mine] == (stratum[mine] != HARMFUL)).all()
        wrong += np.bincount(stratum[~log.right], minlength=3)
    assert wrong[HARMFUL] > 5 and wrong.sum() == wrong[HARMFUL]


def test_malicious_people_are_told_by_public_id(play):
    for p in play(2, **CROWD, attack="always_flip", rho=0.3):
        assert (p.truth.malicious[p.labels.annotator] == p.truth.adversarial).all()
        assert p.truth.malicious.mean() == 0.3


class Looks(Attack):
    """Writes down what it sees."""

    spec = "looks"
    seen: list[View]

    def vote(self, view, honest):
        self.seen.append(view)
        return honest


def test_attacks_cannot_tell_gold_from_other_items(make, answer):
    env, looks = make(**GOLD), Looks()
    looks.seen = []
    env._attack = looks
    observation, _ = env.reset(seed=0)
    info = env.step(answer(observation, 4))[4]
    (view,) = looks.seen
    assert view.gold is None
    gold = np.isin(view.item, info["gold"].item)
    assert gold.any() and not gold.all()
    ordinary = set(np.round(np.abs(view.margin[~gold]), 3))
    assert set(np.round(np.abs(view.margin[gold]), 3)) <= ordinary, "no margin gives it away"


def test_late_answers_are_those_of_their_own_round(play):
    now, late = play(5, **GOLD), play(5, **GOLD, delay=2)
    for first, second in zip(now[:3], late[2:], strict=True):
        a, b = first.info["gold"], second.info["gold"]
        assert (a.label_id == b.label_id).all() and (a.right == b.right).all()
        assert (b.round == a.round + 2).all()
    assert all(len(p.info["gold"].right) == 0 for p in late[:2])


def test_skips_are_no_answers(play):
    (p,) = play(1, **GOLD)
    assert (p.labels.vote == VOTE_SKIP).any(), "ordinary items may not differ at all"
    votes = np.bincount(p.info["gold"].item)
    assert set(votes[votes > 0]) == {3}, "gold questions always do"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gold_share": 1.5}, "gold_share=1.5; allowed: 0 to 1"),
        ({"gold_harmful": -0.1}, "gold_harmful=-0.1; allowed: 0 to 1"),
        ({"gold_share": 0.1, "collection": "chat"}, "collection='chat'; allowed: 'crowd'"),
        ({"gold_harmful": 0.1, "pairs": "recorded"}, "pairs='recorded'; allowed: 'sampled'"),
    ],
)
def test_what_cannot_be_asked_is_refused(make, arguments, message):
    with pytest.raises(UsageError, match=message):
        make(**{"collection": "crowd", **arguments})
