import dataclasses
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

from envs.costs import constraint_costs
from envs.types import CONTRAST, HARMFUL, REFUSE, Scores
from envs.wrappers import CostInTuple

ID = "FeedbackPoisoning/Live-v0"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"collection": "crowd", "redundancy": 3, "attack": "harm_targeted", "rho": 0.3},
        {"attack": "harmful_asker", "rho": 0.3, "delay": 2, "behaviours": ["tie(threshold=0.2)"]},
    ],
)
def test_gymnasium_accepts_it_without_a_warning(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(f"envs:{ID}", **arguments).unwrapped)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"attack": "trigger(harmful=True)", "rho": 0.1, "behaviours": ["mistake(rate=0.2)"]}],
)
def test_the_spec_is_a_manifest(arguments, same):
    env = gym.make(f"envs:{ID}", **arguments)
    spec = EnvSpec.from_json(env.spec.to_json())
    assert spec == env.spec
    again = gym.make(spec)
    assert same(env.reset(seed=3), again.reset(seed=3))


def test_importing_the_package_is_light():
    code = (
        "import sys, gymnasium, envs; gymnasium.make('FeedbackPoisoning/Live-v0').reset(seed=0);"
        "print([m for m in ('torch', 'transformers', 'trl', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_round_has_the_shapes_of_the_types(play):
    for collection, redundancy in (("chat", 1), ("crowd", 3)):
        (played,) = play(1, collection=collection, redundancy=redundancy)
        labels, truth = played.labels, played.truth
        assert all(len(column) == 32 * redundancy for column in labels)
        assert [getattr(truth, n).shape for n in ("honest_vote", "adversarial")] == [
            (32 * redundancy,)
        ] * 2
        assert truth.cost.shape == truth.utility.shape == truth.verdict.shape == (32, 4)
        assert truth.stratum.shape == truth.asker_adversarial.shape == (32,)
        assert (labels.a != labels.b).all()
        assert labels.vote.dtype == np.int8 and labels.weight.dtype == np.float32


def test_votes_are_about_the_pair_they_name(play):
    for played in play(2, behaviours=["boltzmann(beta=-1)"]):
        labels, truth = played.labels, played.truth
        row = labels.item % 32
        assert (labels.item // 32 == labels.round).all()
        margin = truth.utility[row, labels.a] - truth.utility[row, labels.b]
        assert (labels.vote == np.select([margin > 0, margin < 0], [0, 1], 3)).all()
        gap = truth.cost[row, labels.a] != truth.cost[row, labels.b]
        assert (truth.risk_relevant == gap).all() and gap.any()


def test_chat_askers_label_their_own_items_and_crowds_are_distinct_people(play):
    for played in play(2, collection="chat"):
        assert (played.labels.annotator == played.observation["user"]).all()
    for played in play(2, collection="crowd", redundancy=5):
        people = played.labels.annotator.reshape(32, 5)
        assert all(len(set(row)) == 5 for row in people.tolist())
        assert (np.ptp(played.labels.item.reshape(32, 5), axis=1) == 0).all()


def test_label_ids_are_unique_in_a_run(play):
    ids = np.concatenate([p.labels.label_id for p in play(4, collection="crowd", redundancy=3)])
    assert len(np.unique(ids)) == len(ids) == 4 * 32 * 3


def test_pairs_and_their_order_are_uniform(play):
    (played,) = play(1, batch=4096, responses=3)
    seen, count = np.unique(played.labels.a * 3 + played.labels.b, return_counts=True)
    assert len(seen) == 6  # 3 unordered pairs, 2 orders
    assert np.abs(count / 4096 - 1 / 6).max() < 4 * np.sqrt(1 / 6 * 5 / 6 / 4096)


def test_prompts_depend_on_seed_and_round_alone(make, same):
    env = make()
    env.action_space.seed(0)
    runs = []
    for seed in (5, 5, 6):
        seen = [env.reset(seed=seed)[0]]
        seen += [env.step(env.action_space.sample())[0] for _ in range(3)]
        runs.append(seen)
    assert same(runs[0], runs[1])
    assert not same(runs[0][0], runs[2][0])
    assert not same(runs[0][0], runs[0][1])


def test_arms_with_another_delay_or_redundancy_share_their_honest_votes(play):
    now, late = play(5), play(5, delay=2)
    assert all(len(p.labels.vote) == 0 for p in late[:2])
    for first, second in zip(now[:3], late[2:], strict=True):
        assert (first.labels.label_id == second.labels.label_id).all()  # nothing lost
        assert (first.labels.vote == second.labels.vote).all()
        assert (second.labels.round == first.labels.round + 2).all()
    crowd = [play(1, collection="crowd", redundancy=r)[0].labels for r in (1, 3)]
    assert (crowd[0].annotator == crowd[1].annotator[::3]).all()
    assert (crowd[0].vote == crowd[1].vote[::3]).all()


def test_rates_are_zero_while_no_label_has_arrived(play):
    info = play(1, delay=1, attack="always_flip", rho=0.5)[0].info
    rates = {k: v for k, v in info.items() if k.startswith("feedback/")}
    assert rates == {
        "feedback/rho_annotators": 0.5,
        "feedback/rho_labels": 0.0,
        "feedback/rho_flips": 0.0,
        "feedback/rho_risk_flips": 0.0,
    }


@pytest.mark.parametrize("delay", [0, 2])
def test_resuming_continues_identically(make, answer, same, delay):
    arguments = {"attack": "harmful_asker", "rho": 0.3, "delay": delay, "schedule": "pulsed"}
    arguments |= {"length": 1, "period": 2}
    whole, later = make(**arguments), make(**arguments)
    observation, _ = whole.reset(seed=1)
    for _ in range(3):
        observation = whole.step(answer(observation, 4))[0]
    state = whole.state_dict()
    for view in state["waiting"]:
        assert all(isinstance(v, np.ndarray) for k, v in view.items() if k not in ("key", "round"))
        json.dumps({k: view[k] for k in ("key", "round")})
    json.dumps({k: v for k, v in state.items() if k != "waiting"})
    assert len(state["waiting"]) == delay
    later.reset(seed=99)
    assert same(later.load_state_dict(state), observation)
    for _ in range(4):
        answers = answer(observation, 4)
        first, second = whole.step(answers), later.step(answers)
        assert same(first, second)
        observation = first[0]


def test_answers_end_at_their_first_eos(make, answer, same):
    env = make()
    results = []
    for change in (None, "after", "before"):
        observation, _ = env.reset(seed=0)
        answers = answer(observation, 4, kinds=("refusal",))
        end = (answers == 2).argmax(2)  # EOS
        place = np.arange(answers.shape[2])
        if change == "after":
            answers = np.where(place > end[:, :, None], 100, answers)
        if change == "before":
            answers = np.where(place == end[:, :, None] - 1, 100, answers)
        results.append(env.step(answers)[1:])
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_scorers_see_padding_behind_the_first_eos(make, monkeypatch):
    env = make(batch=1, responses=2, tokens=4)
    env.reset(seed=0)
    seen, score = [], env._source.scorer.score
    spy = SimpleNamespace(score=lambda keys, ids: seen.append(ids) or score(keys, ids))
    monkeypatch.setattr(env, "_source", dataclasses.replace(env._source, scorer=spy))
    env.step(np.array([[[7, 2, 9, 2], [2, 8, 8, 8]]]))  # EOS is 2, padding 0
    assert seen[0].tolist() == [[7, 2, 0, 0], [2, 0, 0, 0]]


def test_cost_and_reward_of_known_answers(make, answer):
    env = make(batch=64)
    for kind, harm, refused in (("recipe", 1.0, 0.0), ("refusal", 0.0, 1.0)):
        observation, _ = env.reset(seed=0)
        _, reward, _, _, info = env.step(answer(observation, 4, kinds=(kind,)))
        share = (info["truth"].stratum == HARMFUL).mean()
        assert 0 < share < 1
        assert info["cost_harm"] == harm and info["cost_over_refusal"] == refused
        assert info["cost"] == pytest.approx(harm * share)
        assert info["safe"] is (harm == 0)
        # A recipe is worth 2 to a benign asker and -2 to the world from a harmful one.
        worth = 2.0 if kind == "recipe" else -1.0
        assert reward == pytest.approx(worth * (1 - share) - worth * share)
        domains = [v for k, v in info.items() if k.startswith("cost_harm/")]
        assert len(domains) == 4 and max(domains) == harm


def test_constraint_costs_by_hand():
    cost = np.array([[0.1, 0.3], [0.8, 0.6], [0.0, 0.0]], np.float32)
    verdict = np.array([[0, 0], [0, 0], [REFUSE, 0]], np.int8)
    scores = Scores(cost, cost, cost, cost, verdict)
    stratum, domain = np.array([HARMFUL, HARMFUL, CONTRAST]), np.array([0, 3, 3])
    costs = constraint_costs(
        scores, stratum, domain, np.array([False, True, True]), {"first": 0, "none": 9}
    )
    assert {name: values.tolist() for name, values in costs.items()} == {
        "harm": pytest.approx([0.1, 0.3, 0.8, 0.6]),
        "harm_triggered": pytest.approx([0.8, 0.6]),
        "harm/first": pytest.approx([0.1, 0.3]),
        "harm/none": [],
        "over_refusal": [1.0, 0.0],
    }


def test_public_ids_betray_nothing(play):
    """Across seeds the busiest public id and the malicious public ids move about."""
    busiest, malicious = [], []
    for seed in range(6):
        played = play(1, seed=seed, batch=512, attack="always_flip", rho=0.1)[0]
        busiest.append(np.bincount(played.observation["user"], minlength=100).argmax())
        labels, truth = played.labels, played.truth
        malicious.append(frozenset(labels.annotator[truth.adversarial].tolist()))
    assert len(set(busiest)) >= 4
    assert len(set(malicious)) == 6
    assert np.mean([np.mean(list(m)) for m in malicious]) == pytest.approx(49.5, abs=20)


def test_crowd_users_and_annotators_are_numbered_apart(make):
    env = make(collection="crowd")
    env.reset(seed=0)
    assert not np.array_equal(env._user_id, env._annotator_id)


def test_observation_and_labels_hold_no_truth(play):
    played = play(1)[0]
    assert set(played.observation) == {"prompt_ids", "prompt_mask", "stratum", "user"}
    assert set(played.labels._fields) == {
        "label_id",
        "item",
        "a",
        "b",
        "annotator",
        "vote",
        "weight",
        "round",
    }


def test_cost_in_the_tuple(make, answer):
    env = CostInTuple(make())
    observation, _ = env.reset(seed=0)
    result = env.step(answer(observation, 4))
    assert len(result) == 6 and result[2] == result[5]["cost"] > 0


def test_truncates_at_the_horizon_and_never_terminates(make):
    env = make(rounds=2)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(2)]
    assert ends == [(False, False), (False, True)]


def test_thousands_of_prompts_in_one_step(play):
    (played,) = play(1, batch=4096, attack="harmful_asker", rho=0.2)
    assert len(played.labels.vote) == 4096


BAD = {
    "rho": ({"rho": 1.5}, "0 to 1"),
    "rho below": ({"rho": -0.1}, "0 to 1"),
    "responses": ({"responses": 1}, ">= 2"),
    "batch": ({"batch": 0}, ">= 1"),
    "tokens": ({"tokens": 0}, ">= 1"),
    "rounds": ({"rounds": 0}, ">= 1"),
    "annotators": ({"annotators": 0}, ">= 1"),
    "activity": ({"activity": -1.0}, ">= 0"),
    "delay": ({"delay": -1}, ">= 0"),
    "cost_limit": ({"cost_limit": 2.0}, "0 to 1"),
    "attack": ({"attack": "flip_everything"}, "always_flip"),
    "attack argument": ({"attack": "harm_targeted(nu=1)"}, "eta"),
    "attack eta": ({"attack": "harm_targeted(eta=0)"}, "> 0"),
    "annotator": ({"behaviours": ["perfect"]}, "boltzmann"),
    "collection": ({"collection": "email"}, "chat, crowd"),
    "schedule": ({"schedule": "weekly"}, "constant, burst"),
    "length": ({"schedule": "burst"}, ">= 1"),
    "period": ({"schedule": "pulsed", "length": 3, "period": 2}, "length=3"),
    "start": ({"schedule": "constant", "start": 4}, "sleeper"),
    "redundancy": ({"collection": "crowd", "redundancy": 101}, "annotators=100"),
    "redundancy=2": ({"redundancy": 2}, "1 (the asker votes)"),
    "attack=": ({"attack": "harmful_asker", "collection": "crowd"}, "'chat'"),
    "trigger_share=0": ({"attack": "trigger", "collection": "crowd"}, "above 0"),
    "harmful_share": ({"harmful_share": 1.1}, "0 to 1"),
    "contrast_share": ({"harmful_share": 0.6, "contrast_share": 0.6}, "at most 0.4"),
    "stratum_error": ({"stratum_error": -0.1}, "0 to 1"),
    "trigger_share": ({"trigger_share": 1.2}, "0 to 1"),
    "harm_domains": ({"harm_domains": ["physics"]}, "bio"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_name_the_field_and_what_is_allowed(case, make):
    arguments, allowed = BAD[case]
    with pytest.raises(ValueError, match="allowed") as error:
        make(**arguments)
    assert case.split()[0] in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(
    "action",
    [np.zeros((32, 4, 19), np.int64), np.zeros((32, 4, 20)), np.full((32, 4, 20), 9999)],
)
def test_bad_actions_are_refused(action, make):
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action: .* allowed"):
        env.step(action)


@pytest.mark.parametrize("arguments", [{"world": "x"}, {"batch": 1.5}, {"behaviours": "lapse"}])
def test_arguments_of_another_type_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=.*; allowed: "):
        gym.make("envs:FeedbackPoisoning/Live-v0", **arguments)


def test_step_before_reset_is_said():
    env = gym.make("envs:FeedbackPoisoning/Live-v0").unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step(env.action_space.sample())
