"""The runs behind a table or a figure of Rosati et al. 2024, as configurations.

    rosati-t1   every label reversed, under every learner, on two data sets
    rosati-f2   a share of the labels reversed, from an aligned and from an unaligned model

Both learn from recorded pairs (``feedback.pairs``): 1,000 comparisons of a refusal or safe answer
with a harmful one, on harmful prompts alone, labelled as the data are and then turned round, each
with probability ρ. Nothing ends a run early.

In the embedded world a data set is one harmful domain, a round has 50 pairs, and learners have the
defaults that were chosen on other worlds. On real text a round is the paper's batch of 8 and the
learning rates are the paper's; GRPO, which the paper has not, takes 1e-6.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agents.engines.transformers_engine import SamplerConfig
from agents.learners.dpo import DPOConfig
from agents.learners.grpo import GRPOConfig
from agents.learners.ppo import PPOConfig
from agents.learners.reward_model import RewardModelConfig
from agents.learners.sft import SFTConfig
from envs.usage import UsageError, check_ranges
from sim import flags
from sim.config import AttackConfig, Config, EvaluationConfig, FeedbackConfig
from sim.papers.published import BATCH, PAIRS, PROMPTS, STAND_INS, TOKENS
from sim.studies import REPORT_WORLDS

RATIOS = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of reversed labels; at .25 and 1 the paper gives numbers."""
EMBEDDED_BATCH = 50
CHECKPOINT_EVERY = 50
"""Rounds; an embedded run has fewer and takes seconds, so it begins anew where it was cut off."""
ON_LABELS = ("sft", "dpo")
"""Learners that never see an answer of the policy's own here."""
PUBLISHED_LEARNERS: dict[str, Any] = {
    "sft": SFTConfig(lr=3e-5, minibatch=BATCH, epochs=1),
    "dpo": DPOConfig(lr=5e-5, minibatch=BATCH, epochs=1),
    "ppo": PPOConfig(lr=1.41e-5, epochs=4),
    "grpo": GRPOConfig(lr=1e-6),
}
OWNED = (
    *("--rho", "--attack", "--defence", "--seed", "--rounds", "--world.seed", "--world.start"),
    *("--world.harm-domains", "--text.model", "--text.data", "--feedback.pairs"),
)
"""Flags of ``run`` that these experiments set themselves."""


@dataclass(frozen=True)
class Asked:
    """What of an experiment is run, and on what."""

    learners: tuple[str, ...]
    """Learner specs."""
    ratios: tuple[float, ...]
    """Shares of reversed labels."""
    data: tuple[str, ...]
    """Data sets: of the embedded world by the paper's names, of real text as ``--data`` has it."""
    worlds: tuple[int, ...] = REPORT_WORLDS
    """World seeds; of no meaning on real text."""
    seeds: int = 1
    """Root seeds, on every world."""
    pairs: int = PAIRS
    """Labelled pairs of a run."""
    model: str | None = None
    """An aligned model, for real text."""
    base: str | None = None
    """The same, unaligned."""
    unaligned: bool = False
    """Whether runs start from the unaligned model too."""
    evaluations: int = 1
    """Measurements of a run, the one before training left out; the last is of its end."""

    def __post_init__(self) -> None:
        """Check the ranges, and that a base has an aligned model beside it."""
        check_ranges(self, seeds=">= 1", pairs=">= 1", evaluations=">= 1")
        for ratio in self.ratios:
            check_ranges({"ratios": ratio}, ratios="0 to 1")
        if self.base and not self.model:
            raise UsageError(f"base={self.base!r} without --model; allowed: both")


def configs(asked: Asked, options: Mapping[str, list[str]] | None = None) -> list[Config]:
    """Every data set, learner, start and ratio on every world and seed.

    Args:
        asked: what is run.
        options: further flags of ``run``, one value each.

    Raises:
        ValueError: a flag that the experiment sets itself, or a bad value.
    """
    options = dict(options or {})
    for flag in options:
        if flag in OWNED or flag.startswith("--attack."):
            raise UsageError(f"{flag} is set by the experiment; allowed: other flags of `run`")
    arms = [
        replace(start, attack=AttackConfig("label_noise", rho=ratio))
        for spec, data in itertools.product(asked.learners, asked.data)
        for start in _starts(_template(asked, spec, options), data, asked)
        for ratio in asked.ratios
    ]
    worlds = (0,) if asked.model else asked.worlds
    return [
        replace(arm, seed=seed, world=replace(arm.world, seed=world))
        for arm, world, seed in itertools.product(arms, worlds, range(asked.seeds))
    ]


def _template(asked: Asked, spec: str, options: dict[str, list[str]]) -> Config:
    """The run of one learner with the further flags, before data and labels are chosen."""
    name, base = spec.partition("(")[0], _text() if asked.model else _embedded()
    if asked.model and name in PUBLISHED_LEARNERS:
        base = replace(base, learner=PUBLISHED_LEARNERS[name])
    base = replace(base, learner=flags.chosen_learner(base, spec))
    if name in ON_LABELS:  # served answers teach it nothing; two are the fewest there can be
        base = replace(base, feedback=replace(base.feedback, responses=2))
    every = max(1, -(-asked.pairs // base.feedback.batch) // asked.evaluations)
    base = replace(base, evaluation=replace(base.evaluation, every=every))
    base = flags.changed(base, options) if options else base
    return replace(base, rounds=-(-asked.pairs // base.feedback.batch))


def _embedded() -> Config:
    people = FeedbackConfig(
        batch=EMBEDDED_BATCH,
        pairs="recorded",
        harmful_share=1.0,
        contrast_share=0.0,
        behaviours=("boltzmann",),  # who says what the data say
    )
    return Config(
        feedback=people,
        evaluation=EvaluationConfig(n_harm=256, n_help=256, n_true=0),
        checkpoint_every=CHECKPOINT_EVERY,
        samples_per_round=1,
    )


def _text() -> Config:
    found = _embedded()
    return replace(
        found,
        feedback=replace(found.feedback, batch=BATCH),
        reward_model=RewardModelConfig(lr=6e-6),
        sampler=SamplerConfig(max_new_tokens=TOKENS),
        evaluation=EvaluationConfig(n_harm=PROMPTS, n_help=PROMPTS, n_true=0),
    )


def _starts(template: Config, data: str, asked: Asked) -> Iterator[Config]:
    """``template`` on ``data``, from the aligned model and where asked from the other."""
    if asked.model:
        models = [asked.model, *([asked.base] if asked.base and asked.unaligned else [])]
        for model in models:
            yield replace(template, text=replace(template.text, model=model, data=data))
        return
    starts: list[Any] = ["aligned", *(["base"] if asked.unaligned else [])]
    for start in starts:
        domains = (STAND_INS[data],)
        yield replace(template, world=replace(template.world, start=start, harm_domains=domains))
