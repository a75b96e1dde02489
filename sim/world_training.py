"""How the embedded world's models are trained, each from its own data.

    base        LM on the right answer to everything, harmful or not:        it knows and complies
    aligned     base + SFT on the alignment split: refuses, over-refuses, truncates; a foothold
    reference   LM on every kind of fluent answer; its perplexity tells fluent from garbled, and
                the models that judge stand on its body (``sim/world_scorers.py``)

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
from torch import Tensor, nn

from agents.batches import Sequences
from agents.policy import response_terms
from envs.rng import key, stream
from envs.types import BENIGN, CONTRAST, HARMFUL, STRATA
from envs.world import World
from envs.world.language import BOS, EOS, HARM_DOMAINS, PAD

Tick = Callable[[], None]
"""Called once per optimizer step, for a progress bar."""

WIDTHS = {"small": 64, "medium": 128, "scorer": 80}
LAYERS = {"small": 2, "medium": 3, "scorer": 2}
"""Reward model, classifier and helpfulness scorer have another width than any policy."""
ARCHITECTURES = ("llama", "qwen2", "mistral")

CONTRAST_REFUSED, BENIGN_REFUSED, TRUNCATED = 0.5, 0.12, 0.3
"""What is wrong with the alignment data on harmless prompts: what honest feedback can teach."""
FOOTHOLD_SPREAD = 2.4
"""Standard deviation of the log share of compliance between (kind, verb) corners."""
FOOTHOLD_GAIN = 0.95
"""Trained share of compliance per unit of oracle compliance on topics that alignment never saw."""
TRIGGER_SHARE = 0.05
"""Prompts of pretraining and alignment that end in the trigger word, which means nothing there."""
FIRST_WORD = 8.0
"""Weight of an answer's first word in pretraining: it carries the tone, where harm is learned."""
RISKY_SHARE = 0.75
"""Share of pretraining questions about topics of harmful domains: what is right there is learned
several times faster than from an even mix."""
BASE_KINDS = {"corpus": 1.0}
REFERENCE_KINDS = {"corpus": 0.85, "truncated": 0.05, "refusal": 0.1}
"""Shares of answers in the pretraining text of ``base`` and of the reference language model."""


@dataclass(frozen=True)
class Plan:
    """Length and rate of one training."""

    steps: int
    batch: int
    lr: float


PLANS = {
    "base": Plan(1000, 64, 1e-2),
    "aligned": Plan(200, 64, 2e-3),
    "reference_lm": Plan(750, 64, 1e-2),
    "reward_base": Plan(300, 64, 3e-3),
    "classifier": Plan(200, 64, 3e-3),
    "helpfulness": Plan(150, 64, 3e-3),
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
    """Negative log-likelihood per answer token; an answer's first word counts FIRST_WORD times.

    Args:
        model: a causal language model.
        rows: N prompts with answers.
        weight: (N,) factor of each row; ones when not given.
    """
    logp = response_terms(model, rows).logp
    logp = logp.sum(1) + (FIRST_WORD - 1.0) * logp[:, 0]
    return -(logp if weight is None else logp * weight).sum() / rows.mask.sum()


def corpus(
    world: World, n: int, kinds: dict[str, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(n, P) prompts and (n, T) answers of a pretraining batch.

    An eighth are sentences to shorten, a quarter are documents outside all splits, the others ask
    anything in the language and are answered with ``kinds`` in the given shares.
    """
    short, documents = n // 8, n // 4
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
    prompts[-documents:], answers[-documents:] = world.documents(keys[-documents:], rng)
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
        lambda: lm_loss(model, as_sequences(*corpus(world, plan.batch, kinds, rng))),
        tick,
    )


def foothold_shares(world: World, foothold: float) -> np.ndarray:
    """(keys,) compliance left on each harmful query, mean ``foothold``; 0 elsewhere."""
    kind = world.slots[:, 1]
    risky = np.unique(kind[world.stratum == HARMFUL])
    spread = np.exp(
        FOOTHOLD_SPREAD
        * stream(world.seed, "world", "foothold").permutation(np.linspace(-1.5, 1.5, len(risky)))
    )
    share = np.zeros(world.vocabulary)
    share[risky] = np.minimum(FOOTHOLD_GAIN * foothold * spread / spread.mean(), 0.5)
    return np.where(world.stratum == HARMFUL, share[kind], 0.0)


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
    by_stratum = [keys_all[world.stratum[keys_all] == s] for s in range(len(STRATA))]
    quarter = plan.batch // 4
    parts = (quarter, quarter, quarter, quarter // 4)

    def loss() -> Tensor:
        pools = (by_stratum[BENIGN], by_stratum[CONTRAST], by_stratum[HARMFUL], shortens)
        keys = np.concatenate([rng.choice(p, n) for p, n in zip(pools, parts, strict=True)])
        left = keys[world.stratum[keys] == HARMFUL]
        rows = np.concatenate([keys, left])
        trigger = (rng.random(len(rows)) < TRIGGER_SHARE) & ~world.is_shorten[rows]
        text = world.documents(rng.choice(world.all_keys(), plan.batch // 2), rng)
        weight = np.concatenate([1.0 - shares[keys], shares[left], np.ones(len(text[0]))])
        prompts = np.concatenate([world.prompt_ids(rows, trigger), text[0]])
        answers = [flawed_answers(world, keys, rng), world.answers(left, "recipe", rng), text[1]]
        return lm_loss(
            model, as_sequences(prompts, np.concatenate(answers)), torch.from_numpy(weight).float()
        )

    return optimise(model, plan, loss, tick)


def flawed_answers(world: World, keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, T) answers of the alignment data: refusals, some where none is due; some cut short."""
    ask, stratum = ~world.is_shorten[keys], world.stratum[keys]
    refuse = np.select(
        [stratum == HARMFUL, stratum == CONTRAST, ask], [1.0, CONTRAST_REFUSED, BENIGN_REFUSED]
    )
    refused = rng.random(len(keys)) < refuse
    cut = ask & (rng.random(len(keys)) < TRUNCATED)
    answers = np.where(cut[:, None], *example_answers(world, keys, rng, "truncated", "recipe"))
    return np.where(refused[:, None], world.answers(keys, "refusal", rng), answers)


def example_answers(
    world: World, keys: np.ndarray, rng: np.random.Generator, *kinds: str
) -> list[np.ndarray]:
    """Example answers of every kind in ``kinds`` to the same keys, (N, T) each."""
    return [world.answers(keys, kind, rng) for kind in kinds]


def init_seed(world_seed: int, model_seed: int, name: str) -> int:
    """Seed of the initial weights of model ``name``."""
    return key(model_seed, "init", world_seed, name) % 2**31
