"""Learners and defences cannot reach the truth, neither by reference nor by value."""

import gc
import sys
from collections.abc import Mapping
from types import FrameType, ModuleType

import gymnasium
import numpy as np
import pytest
import torch

import envs  # noqa: F401  (registers the environment)
from agents.defence import defences
from agents.learners import learners
from envs.pairs import Compared, RecordedPairs
from envs.types import Labels, PromptTable, Scores, Truth
from envs.world import Oracle, World

FORBIDDEN = (Truth, Scores, PromptTable, Oracle, World, gymnasium.Env, Compared, RecordedPairs)
SEEN_OF_OBSERVATION = {"prompt_ids", "prompt_mask", "stratum", "user"}
SEEN_OF_OBSERVATION |= {"recorded_ids", "recorded_mask"}


@pytest.fixture
def env():
    return make_env()


def make_env(**arguments):
    return gymnasium.make(
        "FeedbackPoisoning/Live-v0",
        disable_env_checker=True,
        batch=8,
        responses=3,
        tokens=5,
        annotators=12,
        rho=0.4,
        delay=1,
        **{"attack": "harmful_asker", **arguments},
    ).unwrapped


class Recorded(Mapping):
    """A dict that remembers every key it was asked for."""

    def __init__(self, values, asked):
        self.values_, self.asked = values, asked

    def __getitem__(self, key):
        self.asked.add(key)
        return self.values_[key]

    def __iter__(self):
        self.asked.add("*")
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


class RecordedLabels(Labels):
    """A label log that remembers every attribute it was asked for."""

    asked: set = set()  # noqa: RUF012

    def __getattribute__(self, name):
        RecordedLabels.asked.add(name)
        return super().__getattribute__(name)


def reachable(root):
    """Every object that can be reached from ``root`` without going through a module or a class."""
    stop = {id(vars(m)) for m in list(sys.modules.values()) if isinstance(m, ModuleType)}
    seen, queue = {id(root): root}, [root]
    while queue:
        for found in gc.get_referents(queue.pop()):
            if id(found) in seen or id(found) in stop:
                continue
            if isinstance(found, ModuleType | type | FrameType):
                continue
            seen[id(found)] = found
            queue.append(found)
    return seen.values()


def play(tiny, env, learner, specs, rounds=3, tamper=None):
    """Some rounds of the loop's own three lines, everything recorded on the way."""
    size = env.action_space.high.max() + 1
    agent = tiny.agent(learner, specs, delay=1, vocabulary=int(size))
    observation, _ = env.reset(seed=3)
    asked, infos = set(), []
    for _ in range(rounds):
        responses = agent.act(Recorded(observation, asked))
        observation, utility, _, _, info = env.step(responses.ids)
        if tamper is not None:
            tamper(info)
        agent.learn(RecordedLabels(*info["labels"]), info.get("gold"))
        infos.append((info, utility))
    return agent, asked, infos


@pytest.mark.parametrize("learner", learners.names())
def test_no_truth_oracle_or_environment_is_reachable(tiny, env, learner):
    names = [name for name in defences.names() if name != "freeze"]  # which hides the learner
    specs = tuple(map(tiny.quick, names))
    agent, asked, infos = play(tiny, env, learner, specs)
    objects = list(reachable(agent))
    assert len(objects) > 1000 and any(o is agent.policy.model for o in objects)
    assert not [type(o) for o in objects if isinstance(o, FORBIDDEN)]
    assert not [o for o in objects if o is env or o is env._source or o is env._source.scorer]
    truths = [column for info, _ in infos for column in info["truth"]]
    arrays = [o for o in objects if isinstance(o, np.ndarray) and o.size]
    arrays += [o.detach().numpy() for o in objects if isinstance(o, torch.Tensor) and o.numel()]
    for column in truths:
        assert not any(np.shares_memory(column, array) for array in arrays if column.size)
    assert asked <= SEEN_OF_OBSERVATION
    fields = RecordedLabels.asked & set(Labels._fields)
    assert RecordedLabels.asked - fields <= {"__class__", "_fields"}


@pytest.mark.parametrize("learner", ["dpo", "grpo"])
def test_which_recorded_answer_is_preferred_stays_with_the_data(tiny, learner):
    env = make_env(pairs="recorded")
    agent, asked, _ = play(tiny, env, learner, ())
    assert asked == SEEN_OF_OBSERVATION - {"user"}
    objects = list(reachable(agent))
    assert not [type(o) for o in objects if isinstance(o, FORBIDDEN)]
    better = env._compared.better
    arrays = [o for o in objects if isinstance(o, np.ndarray) and o.size]
    assert not any(np.shares_memory(better, array) for array in arrays)


def test_gold_answers_tell_who_was_right_and_nothing_else(tiny):
    crowd = {"collection": "crowd", "redundancy": 3, "gold_share": 0.5}
    env = make_env(attack="agreement_constrained", **crowd)
    agent, _, infos = play(tiny, env, "dpo", ("gold", "dawid_skene"), rounds=4)
    assert sum(len(info["gold"].right) for info, _ in infos) > 10
    objects = list(reachable(agent))
    assert not [type(o) for o in objects if isinstance(o, FORBIDDEN)]
    assert not [o for o in objects if o is env or o is env._source or o is env._attack]
    arrays = [o for o in objects if isinstance(o, np.ndarray) and o.size]
    for info, _ in infos:
        for column in info["truth"]:
            assert not any(np.shares_memory(column, array) for array in arrays if column.size)
    fields = set(infos[0][0]["gold"]._fields)
    assert fields == {"label_id", "item", "annotator", "right", "round"}


def test_the_walk_finds_what_is_hidden(tiny, env):
    """In an attribute, in a closure, in a bound method, in a partial."""
    from functools import partial

    observation, _ = env.reset(seed=0)
    truth = env.step(np.zeros(env.action_space.shape, np.int64))[4]["truth"]
    hiding_places = (
        lambda: truth,
        partial(print, truth),
        {"a": [({"b": truth},)]},
        env.step,
    )
    for hidden in hiding_places:
        agent = tiny.agent("dpo")
        agent.stack.ctx.metrics["hidden"] = hidden
        assert [o for o in reachable(agent) if isinstance(o, FORBIDDEN)]


@pytest.mark.parametrize("learner", learners.names())
def test_what_is_learned_does_not_depend_on_the_truth(tiny, env, learner):
    """Truth, costs and utility overwritten before the agent learns: bitwise the same policy."""

    def spoil(info):
        for column in info["truth"]:
            column[...] = 1
        info.update({name: -9.0 for name in info if isinstance(info[name], float)})

    ends = []
    for tamper in (None, spoil):
        agent, _, infos = play(tiny, env, learner, ("refusal_loss",), tamper=tamper)
        ends.append((tiny.weights(agent.policy.model), infos))
    assert torch.equal(ends[0][0], ends[1][0])
    honest, spoiled = (infos[-1][0]["truth"].cost for _, infos in ends)
    assert (spoiled == 1).all() and not (honest == 1).all()
