"""How the models that judge are trained, on data of their own: reward model and two scorers.

    reward       Bradley-Terry on honest recorded pairs of the reward-model split
    classifier   P(harmful answer) from labelled answers of the classifier split
    helpfulness  P(helpful) from graded answers of the helpfulness split

All stand on copies of the reference language model's body, never on the policy's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.policy import sequence_rewards
from envs.types import STRATA
from envs.world import World
from envs.world.language import SPECIAL, UNK
from sim.world_training import Plan, Tick, as_sequences, example_answers, optimise

SCORER_ROWS = 4000
"""Labelled answers a scorer learns from."""
SCORER_STRATA = {"classifier": (0.25, 0.25, 0.5), "helpfulness": (0.45, 0.45, 0.1)}
"""Shares of benign, contrast and harmful prompts in the scorers' data."""
LABEL_ERRORS = 0.05
"""Share of the harm classifier's labels that people got wrong."""
WORD_DROPOUT = 0.15
"""Share of prompt words hidden while a scorer is trained."""
RECORDED_KINDS = {
    "recipe": 4,
    "refusal": 4,
    "truncated": 3,
    "noisy": 2,
    "refuse_then_comply": 2,
    "shuffled": 1,
    "echo": 1,
    "empty": 1,
    "gibberish": 1,
}
"""Parts of each kind of answer in the scorers' data. Wrong orders are few, as in real logs: if they
were common, a reward model would learn its own topics by heart and distrust all others."""
BETA, LAPSE = 4.0, 0.02
"""Honest recorded votes: Bradley-Terry on utility with this inverse temperature and lapse rate."""


def mixed_answers(world: World, keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, T) answers whose kinds are drawn in the parts of ``RECORDED_KINDS``."""
    answers = np.stack(example_answers(world, keys, rng, *RECORDED_KINDS))
    parts = np.array(list(RECORDED_KINDS.values()), float)
    which = rng.choice(len(parts), len(keys), p=parts / parts.sum())
    return answers[which, np.arange(len(keys))]


def honest_pairs(
    world: World, split: str, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs with honest votes: keys (n,), chosen (n, T), rejected (n, T); ties are skipped."""
    keys = rng.choice(world.keys(split), n)
    a, b = mixed_answers(world, keys, rng), mixed_answers(world, keys, rng)
    gap = world.oracle.score(keys, a).utility - world.oracle.score(keys, b).utility
    p_first = (1 - LAPSE) / (1 + np.exp(-BETA * gap)) + LAPSE / 2
    first = (rng.random(n) < p_first)[:, None]
    kept = gap != 0
    return keys[kept], np.where(first, a, b)[kept], np.where(first, b, a)[kept]


def train_reward(
    world: World, model: nn.Module, plan: Plan, rng: np.random.Generator, tick: Tick
) -> float:
    """Bradley-Terry: minimise -log sigmoid(r(chosen) - r(rejected)) on honest recorded pairs."""

    def loss() -> Tensor:
        keys, chosen, rejected = honest_pairs(world, "reward_model", plan.batch, rng)
        prompts = world.prompt_ids(np.concatenate([keys, keys]))
        rewards = sequence_rewards(model, as_sequences(prompts, np.concatenate([chosen, rejected])))
        good, bad = rewards.chunk(2)
        return -F.logsigmoid(good - bad).mean()

    return optimise(model, plan, loss, tick)


def train_scorer(
    world: World,
    model: nn.Module,
    plan: Plan,
    name: str,
    rng: np.random.Generator,
    tick: Tick,
) -> float:
    """Logistic regression of a graded property on a fixed, limited set of labelled answers.

    ``classifier`` is told harmful when at least half of a harmful request was met, with
    LABEL_ERRORS of its labels wrong; ``helpfulness`` is told the help given. Prompt words drop
    out, so that a topic's name alone does not decide.
    """
    keys = scorer_keys(world, name, name, SCORER_ROWS, rng)
    answers = mixed_answers(world, keys, rng)
    scores = world.oracle.score(keys, answers)
    label = scores.help
    if name == "classifier":
        label = (scores.cost >= 0.5) != (rng.random(SCORER_ROWS) < LABEL_ERRORS)
    data = as_sequences(world.prompt_ids(keys), answers)
    target = torch.from_numpy(np.asarray(label, np.float32))

    def loss() -> Tensor:
        pick = torch.from_numpy(rng.integers(SCORER_ROWS, size=plan.batch))
        rows = data.take(pick)
        lost = torch.from_numpy(rng.random(rows.prompt_ids.shape) < WORD_DROPOUT)
        lost &= rows.prompt_ids >= len(SPECIAL)
        rows = rows._replace(prompt_ids=rows.prompt_ids.masked_fill(lost, UNK))
        return F.binary_cross_entropy_with_logits(sequence_rewards(model, rows), target[pick])

    return optimise(model, plan, loss, tick)


def scorer_keys(
    world: World, name: str, split: str, n: int, rng: np.random.Generator
) -> np.ndarray:
    """(n,) queries of ``split`` in the strata shares that scorer ``name`` learns from."""
    keys = world.keys(split)
    by_stratum = [rng.choice(keys[world.stratum[keys] == s], n) for s in range(len(STRATA))]
    which = rng.choice(len(STRATA), n, p=SCORER_STRATA[name])
    return np.stack(by_stratum)[which, np.arange(n)]
