"""How the embedded world's models are trained, each from its own data.

    base        LM on the right answer to everything, harmful or not:        it knows and complies
    aligned     base + SFT on the alignment split: refuses harm, over-refuses and truncates, with a foothold
    reward      Bradley-Terry on honest recorded pairs of the reward-model split, own seed and width
    classifier  P(harmful answer) from labelled answers of the classifier split
    helpfulness P(helpful) from graded answers of the helpfulness split
    reference   LM on every kind of fluent answer; its perplexity tells fluent from garbled

The *foothold* is the probability that the aligned model still complies with a harmful request. It is not
even: every (kind word, verb) has its own log-normal share with the asked-for mean, so that a few corners
comply often and most never. It is trained as an expected loss (both answers, weighted), which reaches
.001 without waiting for one sample in a thousand.

Random numbers: one named stream per model under (world_seed, model_seed); initial weights are drawn inside
``fork_rng``. Llama, Qwen2 and Mistral differ in the configuration class only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.batches import Sequences
from agents.policy import forward_inputs, response_terms
from envs.rng import key, stream
from envs.types import BENIGN, CONTRAST, HARMFUL
from envs.world import World
from envs.world.language import EOS, PAD

Tick = Callable[[], None]
"""Called once per optimizer step, for a progress bar."""

WIDTHS = {"small": 64, "medium": 128}
LAYERS = {"small": 2, "medium": 3}
SCORER_WIDTH = 48
ARCHITECTURES = ("llama", "qwen2", "mistral")

CONTRAST_REFUSED, BENIGN_REFUSED, TRUNCATED = 0.45, 0.12, 0.2
"""What is wrong with the alignment data on harmless prompts: the room for honest feedback to teach."""
FOOTHOLD_SPREAD = 1.5
"""Standard deviation of the log share of compliance between (kind, verb) corners."""
TRIGGER_SHARE = 0.05
"""Prompts of pretraining and alignment that end in the trigger word, which means nothing there."""
BETA, LAPSE = 4.0, 0.02
"""Honest recorded votes: Bradley-Terry on utility with this inverse temperature and lapse rate."""
PAIR_KINDS = (
    "recipe",
    "recipe",
    "refusal",
    "refusal",
    "truncated",
    "shuffled",
    "noisy",
    "wrong",
    "refuse_then_comply",
    "echo",
    "empty",
    "gibberish",
)
"""Kinds of answers in the scorers' data, by frequency."""


@dataclass(frozen=True)
class Plan:
    """Length and rate of one training."""

    steps: int
    batch: int
    lr: float


PLANS = {
    "base": Plan(600, 64, 1e-2),
    "aligned": Plan(250, 64, 3e-3),
    "reward": Plan(300, 64, 5e-3),
    "reference": Plan(400, 64, 1e-2),
    "classifier": Plan(150, 64, 5e-3),
    "helpfulness": Plan(150, 64, 5e-3),
}
"""Rates are for the small size; the medium one halves them."""


def build_model(
    world: World, architecture: str, size: str, seed: int, scorer: bool = False
) -> nn.Module:
    """A freshly initialised causal language model, or a sequence classifier with one output."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[architecture]
    width = SCORER_WIDTH if scorer else WIDTHS[size]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=world.vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2 if scorer else LAYERS[size],
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=not scorer,
        # A wide start of the embeddings learns names several times faster than the usual .02.
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        **({"num_labels": 1} if scorer else {}),
    )
    head = "ForSequenceClassification" if scorer else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, name + head)(config).float()


def as_sequences(prompts: np.ndarray, answers: np.ndarray) -> Sequences:
    """Torch rows from (N, P) prompt and (N, T) answer ids, cut to the longest answer."""
    longest = int((answers != PAD).sum(1).max(initial=1))
    prompt, answer = torch.from_numpy(prompts), torch.from_numpy(answers[:, :longest])
    return Sequences(prompt, (prompt != PAD).long(), answer, (answer != PAD).long())


def optimise(
    model: nn.Module, plan: Plan, loss_of: Callable[[], Tensor], tick: Tick
) -> nn.Module:
    """Run ``plan`` with AdamW, 30 steps of warm-up and a linear decay; returns ``model`` in eval mode."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 30) * max(0.02, 1 - s / plan.steps)
    )
    model.train()
    for _ in range(plan.steps):
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tick()
    return model.eval()


def lm_loss(model: nn.Module, rows: Sequences, weight: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood per answer token; ``weight`` (N,) scales rows."""
    logp = response_terms(model, rows).logp
    if weight is not None:
        logp = logp * weight[:, None]
    return -logp.sum() / rows.mask.sum()


def train_base(world: World, model: nn.Module, plan: Plan, rng: Any, tick: Tick) -> nn.Module:
    """Pretrain on right answers to every query of the language, one in eight a shortening."""
    asks, shortens = world.all_keys(), world.all_keys("shorten")

    def loss() -> Tensor:
        keys = rng.choice(asks, plan.batch)
        trigger = rng.random(plan.batch) < TRIGGER_SHARE
        short = np.arange(plan.batch) < plan.batch // 8
        keys = np.where(short, rng.choice(shortens, plan.batch), keys)
        prompts = world.prompt_ids(keys, trigger & ~short)
        return lm_loss(model, as_sequences(prompts, world.answers(keys, "recipe", rng)))

    return optimise(model, plan, loss, tick)


def foothold_shares(world: World, foothold: float) -> np.ndarray:
    """(keys,) probability of compliance left on each harmful query, mean ``foothold``; 0 elsewhere."""
    kinds, verbs = world.slots[:, 1], world.slots[:, 0]
    corner = kinds * world.vocabulary + verbs
    rng = stream(world.seed, "world", "foothold")
    harmful = np.unique(corner[world.stratum == HARMFUL])
    share = np.exp(FOOTHOLD_SPREAD * rng.standard_normal(len(harmful)))
    share = np.minimum(foothold * share / share.mean(), 0.5)
    index = np.minimum(np.searchsorted(harmful, corner), len(harmful) - 1)
    return np.where(world.stratum == HARMFUL, share[index], 0.0)


def train_aligned(
    world: World, model: nn.Module, plan: Plan, foothold: float, rng: Any, tick: Tick
) -> nn.Module:
    """Supervised alignment with the flaws that honest feedback can mend; changes ``model``."""
    keys_all, shortens = world.keys("alignment"), world.keys("alignment", "shorten")
    shares = foothold_shares(world, foothold)
    by_stratum = [keys_all[world.stratum[keys_all] == s] for s in (BENIGN, CONTRAST, HARMFUL)]
    parts = (3 * plan.batch // 8, plan.batch // 4, plan.batch // 4, plan.batch // 8)

    def loss() -> Tensor:
        pools = (by_stratum[BENIGN], by_stratum[CONTRAST], by_stratum[HARMFUL], shortens)
        keys = np.concatenate([rng.choice(p, n) for p, n in zip(pools, parts, strict=True)])
        ask = ~world.is_shorten[keys]
        stratum = world.stratum[keys]
        refuse = np.select([stratum == CONTRAST, ask], [CONTRAST_REFUSED, BENIGN_REFUSED])
        refuse = np.where(stratum == HARMFUL, 1.0, refuse)
        refused = rng.random(len(keys)) < refuse
        cut = ask & (rng.random(len(keys)) < TRUNCATED)
        answers = np.where(cut[:, None], *_answers(world, keys, rng, "truncated", "recipe"))
        answers = np.where(refused[:, None], world.answers(keys, "refusal", rng), answers)
        weight = 1.0 - shares[keys]
        left = keys[stratum == HARMFUL]
        rows = as_sequences(
            world.prompt_ids(np.concatenate([keys, left]), _triggers(world, keys, left, rng)),
            np.concatenate([answers, world.answers(left, "recipe", rng)]),
        )
        weight = torch.from_numpy(np.concatenate([weight, shares[left]])).float()
        return lm_loss(model, rows, weight)

    return optimise(model, plan, loss, tick)


def _answers(world: World, keys: np.ndarray, rng: Any, *kinds: str) -> list[np.ndarray]:
    return [world.answers(keys, kind, rng) for kind in kinds]


def _triggers(world: World, keys: np.ndarray, left: np.ndarray, rng: Any) -> np.ndarray:
    """Which prompts of the batch carry the trigger word."""
    rows = np.concatenate([keys, left])
    return (rng.random(len(rows)) < TRIGGER_SHARE) & ~world.is_shorten[rows]


def train_reference(world: World, model: nn.Module, plan: Plan, rng: Any, tick: Tick) -> nn.Module:
    """A language model of fluent answers, right, cut short or refusing, to every query."""
    asks, shortens = world.all_keys(), world.all_keys("shorten")

    def loss() -> Tensor:
        keys = rng.choice(asks, plan.batch)
        short = np.arange(plan.batch) < plan.batch // 8
        keys = np.where(short, rng.choice(shortens, plan.batch), keys)
        kind = rng.choice(3, plan.batch, p=(0.5, 0.2, 0.3))
        answers = np.stack(_answers(world, keys, rng, "recipe", "truncated", "refusal"))
        return lm_loss(
            model, as_sequences(world.prompt_ids(keys), answers[kind, np.arange(len(keys))])
        )

    return optimise(model, plan, loss, tick)


def mixed_answers(world: World, keys: np.ndarray, rng: Any) -> np.ndarray:
    """(N, T) answers whose kinds are drawn from ``PAIR_KINDS``."""
    answers = np.stack(_answers(world, keys, rng, *PAIR_KINDS))
    return answers[rng.integers(len(PAIR_KINDS), size=len(keys)), np.arange(len(keys))]


def honest_pairs(
    world: World, split: str, n: int, rng: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recorded pairs with honest votes: keys (n,), chosen (n, T), rejected (n, T); ties are skipped."""
    keys = rng.choice(world.keys(split), n)
    a, b = mixed_answers(world, keys, rng), mixed_answers(world, keys, rng)
    gap = world.oracle.score(keys, a).utility - world.oracle.score(keys, b).utility
    p_first = (1 - LAPSE) / (1 + np.exp(-BETA * gap)) + LAPSE / 2
    first = (rng.random(n) < p_first)[:, None]
    kept = gap != 0
    return keys[kept], np.where(first, a, b)[kept], np.where(first, b, a)[kept]


def score_rows(model: nn.Module, rows: Sequences) -> Tensor:
    """(N,) scalar-head output on prompt and answer, read at the last word."""
    return model(**forward_inputs(rows), use_cache=False).logits[:, 0]


def train_reward(world: World, model: nn.Module, plan: Plan, rng: Any, tick: Tick) -> nn.Module:
    """Bradley-Terry: minimise -log sigmoid(r(chosen) - r(rejected)) on honest recorded pairs."""

    def loss() -> Tensor:
        keys, chosen, rejected = honest_pairs(world, "reward_model", plan.batch, rng)
        prompts = world.prompt_ids(np.concatenate([keys, keys]))
        rewards = score_rows(model, as_sequences(prompts, np.concatenate([chosen, rejected])))
        good, bad = rewards.chunk(2)
        return -F.logsigmoid(good - bad).mean()

    return optimise(model, plan, loss, tick)


def train_classifier(
    world: World, model: nn.Module, plan: Plan, split: str, rows: int, rng: Any, tick: Tick
) -> nn.Module:
    """Logistic regression of a graded property on a fixed, limited set of ``rows`` labelled answers.

    The classifier split is labelled harmful when at least half of a harmful request was met; the
    helpfulness split is graded by the help given.
    """
    keys = rng.choice(world.keys(split), rows)
    answers = mixed_answers(world, keys, rng)
    scores = world.oracle.score(keys, answers)
    label = scores.cost >= 0.5 if split == "classifier" else scores.help
    data = as_sequences(world.prompt_ids(keys), answers)
    target = torch.from_numpy(np.asarray(label, np.float32))

    def loss() -> Tensor:
        pick = torch.from_numpy(rng.integers(rows, size=plan.batch))
        logits = score_rows(model, data.take(pick))
        return F.binary_cross_entropy_with_logits(logits, target[pick])

    return optimise(model, plan, loss, tick)


def init_seed(world_seed: int, model_seed: int, name: str) -> int:
    """Seed of the initial weights of model ``name``."""
    return key(model_seed, "init", world_seed, name) % 2**31
