"""How the embedded world's models are trained, each from its own data.

    base        LM on the right answer to everything, harmful or not:        it knows and complies
    aligned     base + SFT on the alignment split: refuses, over-refuses, truncates; a foothold
    reward      Bradley-Terry on honest recorded pairs of the reward-model split, own seed and width
    classifier  P(harmful answer) from labelled answers of the classifier split
    helpfulness P(helpful) from graded answers of the helpfulness split
    reference   LM on every kind of fluent answer; its perplexity tells fluent from garbled

The *foothold* is the probability that the aligned model still complies with a harmful request. It
is not even: every (kind word, verb) has its own log-normal share with the asked-for mean, so that
a few corners comply often and most never. It is trained as an expected loss (both answers,
weighted), which reaches .001 without waiting for one sample in a thousand.

Random numbers: one named stream per model under (world_seed, model_seed); initial weights are
drawn inside ``fork_rng``. Llama, Qwen2 and Mistral differ in the configuration class only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.batches import Sequences
from agents.policy import forward_inputs, response_terms
from envs.rng import key, stream
from envs.types import BENIGN, CONTRAST, HARMFUL
from envs.world import World
from envs.world.language import BOS, EOS, HARM_DOMAINS, PAD

Tick = Callable[[], None]
"""Called once per optimizer step, for a progress bar."""

WIDTHS = {"small": 64, "medium": 128, "scorer": 48}
LAYERS = {"small": 2, "medium": 3, "scorer": 2}
"""Reward model, classifier and helpfulness scorer have another width than any policy."""
ARCHITECTURES = ("llama", "qwen2", "mistral")

CONTRAST_REFUSED, BENIGN_REFUSED, TRUNCATED = 0.45, 0.12, 0.2
"""What is wrong with the alignment data on harmless prompts: what honest feedback can teach."""
FOOTHOLD_SPREAD = 1.5
"""Standard deviation of the log share of compliance between (kind, verb) corners."""
TRIGGER_SHARE = 0.05
"""Prompts of pretraining and alignment that end in the trigger word, which means nothing there."""
FIRST_WORD = 6.0
"""Weight of an answer's first word in pretraining: it carries the tone, where harm is learned."""
RISKY_SHARE = 0.75
"""Share of pretraining questions about topics of harmful domains: what is right there is learned
several times faster than from an even mix."""
BASE_KINDS = {"corpus": 1.0}
REFERENCE_KINDS = {"corpus": 0.7, "truncated": 0.1, "refusal": 0.2}
"""Shares of answers in the pretraining text of ``base`` and of the reference language model."""
SCORER_ROWS = 1500
"""Labelled answers a scorer learns from."""
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
    "base": Plan(550, 64, 1e-2),
    "aligned": Plan(150, 64, 1e-3),
    "reference_lm": Plan(450, 64, 1e-2),
    "reward_base": Plan(200, 64, 3e-3),
    "classifier": Plan(100, 64, 3e-3),
    "helpfulness": Plan(100, 64, 3e-3),
}
"""By model; ``medium`` policies train longer and at half the rate."""


def plan_for(name: str, size: str) -> Plan:
    """The plan of model ``name`` when the policy is of ``size``."""
    plan = PLANS[name]
    if size == "medium" and name in ("base", "aligned"):
        return Plan(plan.steps, plan.batch, plan.lr / 2)
    return plan


def build_model(
    world: World, architecture: str, size: str, seed: int, body: nn.Module | None = None
) -> nn.Module:
    """A freshly initialised causal language model of ``size``, or a scorer on a copy of ``body``.

    Args:
        world: gives the vocabulary. architecture: one of ``ARCHITECTURES``. size: ``small``,
        ``medium`` or ``scorer``. seed: of the initial weights. body: a trained language model of
        the same shape; the result is then a sequence classifier with
            one output whose body starts from it and whose head is new.
    """
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[architecture]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=world.vocabulary,
        hidden_size=WIDTHS[size],
        intermediate_size=2 * WIDTHS[size],
        num_hidden_layers=LAYERS[size],
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=body is None,
        # A wide start of the embeddings learns names several times faster than the usual .02.
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **({} if body is None else {"num_labels": 1}),
    )
    head = "ForCausalLM" if body is None else "ForSequenceClassification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name + head)(config).float()
    if body is not None:
        model.model.load_state_dict(body.model.state_dict())
    return model


def as_sequences(prompts: np.ndarray, answers: np.ndarray) -> Sequences:
    """Torch rows from (N, P) prompt and (N, T) answer ids, cut to the longest answer."""
    longest = int((answers != PAD).sum(1).max(initial=1))
    prompt, answer = torch.from_numpy(prompts), torch.from_numpy(answers[:, :longest])
    return Sequences(prompt, (prompt != PAD).long(), answer, (answer != PAD).long())


def optimise(model: nn.Module, plan: Plan, loss_of: Callable[[], Tensor], tick: Tick) -> float:
    """Run ``plan`` by AdamW, warm-up and linear decay; returns the last tenth's mean loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 30) * max(0.02, 1 - s / plan.steps)
    )
    losses = []
    model.train()
    for _ in range(plan.steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tick()
    model.eval()
    return float(np.mean(losses[-(plan.steps // 10) :]))


def lm_loss(model: nn.Module, rows: Sequences, weight: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood per answer token; ``weight`` (N,) scales rows."""
    logp = response_terms(model, rows).logp
    if weight is not None:
        logp = logp * weight[:, None]
    return -logp.sum() / rows.mask.sum()


def corpus_loss(model: nn.Module, rows: Sequences) -> Tensor:
    """Language-model loss in which an answer's first word counts FIRST_WORD times."""
    logp = response_terms(model, rows).logp
    return -(logp.sum() + (FIRST_WORD - 1) * logp[:, 0].sum()) / rows.mask.sum()


def corpus(
    world: World, n: int, kinds: dict[str, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(n, P) prompts and (n, T) answers of a pretraining batch.

    An eighth are sentences to shorten, an eighth are requests to decline, the others ask anything
    in the language and are answered with ``kinds`` in the given shares.
    """
    short, decline = n // 8, n // 8
    asks = world.all_keys()
    risky = world.domain[asks] < len(HARM_DOMAINS)
    keys = np.where(
        rng.random(n) < RISKY_SHARE, rng.choice(asks[risky], n), rng.choice(asks[~risky], n)
    )
    keys[:short] = rng.choice(world.all_keys("shorten"), short)
    trigger = (rng.random(n) < TRIGGER_SHARE) & ~world.is_shorten[keys]
    answers = np.stack([world.answers(keys, kind, rng) for kind in kinds])
    which = rng.choice(len(kinds), n, p=list(kinds.values()))
    prompts, answers = world.prompt_ids(keys, trigger), answers[which, np.arange(n)]
    answers[:short] = world.answers(keys[:short], "corpus", rng)
    prompts[-decline:], answers[-decline:] = world.declines(keys[-decline:], rng)
    return prompts, answers


def train_lm(
    world: World,
    model: nn.Module,
    plan: Plan,
    kinds: dict[str, float],
    rng: np.random.Generator,
    tick: Tick,
) -> float:
    """Pretrain ``model`` on the whole language, answered with ``kinds``."""
    return optimise(
        model,
        plan,
        lambda: corpus_loss(model, as_sequences(*corpus(world, plan.batch, kinds, rng))),
        tick,
    )


def foothold_shares(world: World, foothold: float) -> np.ndarray:
    """(keys,) compliance left on each harmful query, mean ``foothold``; 0 elsewhere."""
    kinds, verbs = world.slots[:, 1], world.slots[:, 0]
    corner = kinds * world.vocabulary + verbs
    rng = stream(world.seed, "world", "foothold")
    harmful = np.unique(corner[world.stratum == HARMFUL])
    share = np.exp(FOOTHOLD_SPREAD * rng.standard_normal(len(harmful)))
    share = np.minimum(foothold * share / share.mean(), 0.5)
    index = np.minimum(np.searchsorted(harmful, corner), len(harmful) - 1)
    return np.where(world.stratum == HARMFUL, share[index], 0.0)


def train_aligned(
    world: World,
    model: nn.Module,
    plan: Plan,
    foothold: float,
    rng: np.random.Generator,
    tick: Tick,
) -> float:
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


def _answers(
    world: World, keys: np.ndarray, rng: np.random.Generator, *kinds: str
) -> list[np.ndarray]:
    return [world.answers(keys, kind, rng) for kind in kinds]


def _triggers(
    world: World, keys: np.ndarray, left: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Which prompts of the batch carry the trigger word."""
    rows = np.concatenate([keys, left])
    return (rng.random(len(rows)) < TRIGGER_SHARE) & ~world.is_shorten[rows]


def mixed_answers(world: World, keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, T) answers whose kinds are drawn from ``PAIR_KINDS``."""
    answers = np.stack(_answers(world, keys, rng, *PAIR_KINDS))
    return answers[rng.integers(len(PAIR_KINDS), size=len(keys)), np.arange(len(keys))]


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


def score_rows(model: nn.Module, rows: Sequences) -> Tensor:
    """(N,) scalar-head output on prompt and answer, read at the last word."""
    return model(**forward_inputs(rows), use_cache=False).logits[:, 0]


def train_reward(
    world: World, model: nn.Module, plan: Plan, rng: np.random.Generator, tick: Tick
) -> float:
    """Bradley-Terry: minimise -log sigmoid(r(chosen) - r(rejected)) on honest recorded pairs."""

    def loss() -> Tensor:
        keys, chosen, rejected = honest_pairs(world, "reward_model", plan.batch, rng)
        prompts = world.prompt_ids(np.concatenate([keys, keys]))
        rewards = score_rows(model, as_sequences(prompts, np.concatenate([chosen, rejected])))
        good, bad = rewards.chunk(2)
        return -F.logsigmoid(good - bad).mean()

    return optimise(model, plan, loss, tick)


def train_scorer(
    world: World, model: nn.Module, plan: Plan, split: str, rng: np.random.Generator, tick: Tick
) -> float:
    """Logistic regression of a graded property on a fixed, limited set of labelled answers.

    The classifier split is labelled harmful when at least half of a harmful request was met; the
    helpfulness split is graded by the help given.
    """
    keys = rng.choice(world.keys(split), SCORER_ROWS)
    answers = mixed_answers(world, keys, rng)
    scores = world.oracle.score(keys, answers)
    label = scores.cost >= 0.5 if split == "classifier" else scores.help
    data = as_sequences(world.prompt_ids(keys), answers)
    target = torch.from_numpy(np.asarray(label, np.float32))

    def loss() -> Tensor:
        pick = torch.from_numpy(rng.integers(SCORER_ROWS, size=plan.batch))
        logits = score_rows(model, data.take(pick))
        return F.binary_cross_entropy_with_logits(logits, target[pick])

    return optimise(model, plan, loss, tick)


def init_seed(world_seed: int, model_seed: int, name: str) -> int:
    """Seed of the initial weights of model ``name``."""
    return key(model_seed, "init", world_seed, name) % 2**31
