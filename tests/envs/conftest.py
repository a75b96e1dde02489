"""Playing rounds of the environment with answers that depend on the prompt and the row alone."""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest

import envs  # noqa: F401  (registers the environment)
from envs import rng
from envs.types import Labels, Truth
from envs.world import World

KINDS = ("recipe", "truncated", "refusal", "shuffled")


class Round(NamedTuple):
    observation: dict[str, np.ndarray]  # before the answers
    labels: Labels
    truth: Truth
    info: dict[str, Any]
    reward: float


class Answerer:
    """Answers prompts of world 0 with a fixed mixture of kinds, whatever the attack."""

    def __init__(self):
        self.world = World(0)
        tables = [self.world.table(split) for split in ("online", "attack")]
        tables += [self.world.triggered(table) for table in tables]
        self.keys = {
            ids.tobytes(): key
            for table in tables
            for ids, key in zip(table.ids, table.key, strict=True)
        }

    def key(self, observation):
        return np.array([self.keys[ids.tobytes()] for ids in observation["prompt_ids"]])

    def __call__(self, observation, responses, kinds=KINDS):
        keys = np.repeat(self.key(observation), responses)
        row = np.arange(len(keys))
        which = (rng.uniform(7, keys, row) * len(kinds)).astype(int)
        spoken = [self.world.answers(keys, k, np.random.default_rng(0)) for k in kinds]
        return np.stack(spoken)[which, row].reshape(-1, responses, spoken[0].shape[1])


@pytest.fixture(scope="session")
def answer():
    return Answerer()


@pytest.fixture
def make():
    def make(**arguments):
        arguments = {"batch": 32, "tokens": 20} | arguments
        env = gym.make("FeedbackPoisoning/Live-v0", disable_env_checker=True, **arguments)
        return env.unwrapped

    return make


@pytest.fixture
def play(make, answer):
    """Play ``rounds`` rounds of an environment made with ``arguments``."""

    def play(rounds=2, seed=0, **arguments):
        env = make(**arguments)
        observation, _ = env.reset(seed=seed)
        played = []
        for _ in range(rounds):
            answers = answer(observation, env.action_space.shape[1])
            after, reward, _, _, info = env.step(answers)
            played.append(Round(observation, info["labels"], info["truth"], info, reward))
            observation = after
        return played

    return play


@pytest.fixture
def same():
    """Whether two nested structures of arrays and numbers are equal bit for bit."""

    def same(first, second):
        if isinstance(first, dict):
            keys = first.keys() == second.keys()
            return keys and all(same(first[key], second[key]) for key in first)
        if isinstance(first, list | tuple):
            pairs = zip(first, second, strict=True)
            return len(first) == len(second) and all(same(a, b) for a, b in pairs)
        if isinstance(first, np.ndarray):
            return first.dtype == second.dtype and np.array_equal(first, second)
        return first == second

    return same
