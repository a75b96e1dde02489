"""Everything a run needs from outside the training system, found or built before training starts.

A scenario is a set of paths, tables and scorers with one shape, whether it comes from the embedded
world or from a person's own model and data. Nothing later asks which it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.batches import Pairs, Sequences, distinct_prompts
from agents.context import Scorer
from agents.learners.reward_model import load_reward_model, scores
from agents.models import freeze_copy
from envs import rng as draws
from envs.types import CONTRAST, HARMFUL, PromptTable
from envs.usage import UsageError
from envs.world import HARM_DOMAINS, World
from sim.config import Config


@dataclass(frozen=True)
class Scenario:
    """Models, prompts, scorers and data roles of one run."""

    tokenizer: Path
    policy: Path
    reward_model: Path
    perplexity_model: Path
    classifier: Path | None
    table: PromptTable
    """Evaluation split."""
    triggered: PromptTable | None
    """Its twin with the trigger in every prompt, where there is one."""
    scorer: Any
    """Costs and utilities for evaluation; an oracle where one exists."""
    environment: dict[str, Any]
    """What the environment is told beyond the feedback and attack configs (JSON values)."""
    roles: dict[str, Sequences | Pairs]
    """Data roles for defences."""
    harm_source: str
    """Where ``safety/harm`` comes from, for the manifest."""
    hashes: dict[str, str] = field(default_factory=dict)
    scorers: dict[str, Scorer] = field(default_factory=dict)
    """Learned scorers that defences may ask; never the oracle."""
    prepared: int = 0
    """Leading defences of the run's list that ``policy`` already has in its weights."""
    data: dict[str, Any] = field(default_factory=dict)
    """Counts and bounds taken from a person's own data, for the manifest."""


def make_scenario(config: Config, progress: bool = False) -> Scenario:
    """The embedded world's scenario, or the one of ``config.text``."""
    if config.text.model:
        from sim.real_text import text_scenario

        scenario = text_scenario(config)
    else:
        scenario = world_scenario(config, progress)
    if not config.defences:
        return scenario
    from sim.defended import with_defended_policy

    return with_defended_policy(config, scenario, progress)


def world_scenario(config: Config, progress: bool = False) -> Scenario:
    """Build or find the embedded models, and the tables and roles of their world."""
    from sim.bootstrap import WorldModelsConfig, build

    chosen = config.world
    models = build(
        WorldModelsConfig(
            world_seed=chosen.seed,
            model_seed=chosen.model_seed,
            foothold=chosen.foothold,
            size=chosen.size,
            architecture=chosen.architecture,
        ),
        progress=progress,
    )
    world = world_of(chosen.told)
    longest, tokens = world.prompt_tokens, config.sampler.max_new_tokens
    check_lengths(getattr(models, chosen.start), longest, tokens, f"prompts of {longest} tokens")
    table = world.table("eval")
    reward = {
        "warm": models.reward_base,
        "cold": models.reward_base_cold,
        "policy": getattr(models, chosen.start),
    }
    return Scenario(
        tokenizer=models.tokenizer,
        policy=getattr(models, chosen.start),
        reward_model=reward[config.reward_model.init],
        perplexity_model=models.reference_lm,
        classifier=models.classifier,
        table=table,
        triggered=world.triggered(table),
        scorer=world.oracle,
        environment=chosen.told,
        roles=world_roles(world),
        harm_source="oracle of the embedded world",
        hashes=models.hashes,
        scorers={"cost": probability_of_harm(models.classifier)},
    )


def world_of(told: Mapping[str, Any]) -> World:
    """The embedded world that an environment was told to be (``WorldConfig.told``)."""
    return World(told["world"], tuple(told.get("harm_domains", HARM_DOMAINS)))


def probability_of_harm(classifier: Path) -> Scorer:
    """A learned cost: the sigmoid of a sequence classifier that reads the policy's token ids."""
    loaded: list[torch.nn.Module] = []

    def score(sequences: Sequences) -> torch.Tensor:
        if not loaded:
            loaded.append(freeze_copy(load_reward_model(classifier, 0)))
        return torch.sigmoid(scores(loaded[0], sequences))

    return score


def check_lengths(policy: Path, prompt_tokens: int, tokens: int, prompts: str) -> None:
    """Prompt and response must fit the positions that the model has; ``prompts`` names the former.

    Raises:
        ValueError: they do not.
    """
    known = json.loads((policy / "config.json").read_text()).get("max_position_embeddings")
    if known is not None and prompt_tokens + tokens > known:
        raise UsageError(
            f"{prompts} with sampler.max_new_tokens={tokens}; "
            f"allowed: together at most {known}, the positions of {str(policy)!r}"
        )


def with_derived_roles(roles: dict[str, Sequences]) -> dict[str, Sequences | Pairs]:
    """``roles`` and those that follow from them.

    Rows of ``harm`` with a refusal of the same prompt make the role ``pair``. A quarter of the
    distinct harmful prompts is held out: ``harm`` and ``pair`` lose them to ``harm_heldout`` and
    ``pair_heldout``.
    """
    derived: dict[str, Sequences | Pairs] = dict(roles)
    harm, refusal = roles.get("harm"), roles.get("refusal")
    if harm is None:
        return derived
    derived["harm_prompts"] = harm
    _, owner = distinct_prompts(harm.prompt_ids, harm.prompt_mask)
    kept = owner % 4 != 0 if len(owner.unique()) > 1 else torch.ones(len(owner), dtype=torch.bool)
    derived |= _parted("harm", harm, kept)
    if refusal is not None:
        rows, partner = _same_prompt(harm, refusal)
        derived |= _parted("pair", Pairs(harm.take(rows), refusal.take(partner)), kept[rows])
    return derived


def _parted(name: str, data: Any, kept: torch.Tensor) -> dict[str, Any]:
    """``data`` by role: what is kept, and what is held out, where either has rows."""
    parts = {name: kept, f"{name}_heldout": ~kept}
    return {part: data.take(rows.nonzero()[:, 0]) for part, rows in parts.items() if rows.any()}


def _same_prompt(harm: Sequences, refusal: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ``harm`` that have a refusal of their prompt, and a row of ``refusal`` for each."""
    prompts = torch.cat([harm.prompt_ids, refusal.prompt_ids])
    _, owner = distinct_prompts(prompts, torch.cat([harm.prompt_mask, refusal.prompt_mask]))
    mine, theirs = owner.split([len(harm), len(refusal)])
    partner = torch.full((int(owner.max()) + 1,), -1)
    partner[theirs] = torch.arange(len(refusal))
    rows = (partner[mine] >= 0).nonzero()[:, 0]
    return rows, partner[mine[rows]]


def world_roles(world: Any, n: int = 1024) -> dict[str, Sequences | Pairs]:
    """Refusals, harmful and retained answers from the defence split, which nothing else uses."""
    rng = draws.stream(world.seed, "defence roles")
    table = world.table("defence")
    harmful = np.flatnonzero(table.stratum == HARMFUL)
    retained = np.flatnonzero(table.stratum != HARMFUL)
    contrast = np.flatnonzero(table.stratum == CONTRAST)
    assert len(contrast), "retained answers cover contrast prompts"
    rows = {"harm": rng.choice(harmful, n), "retain": rng.choice(retained, n)}

    def sequences(name: str, kind: str) -> Sequences:
        picked = rows[name]
        return pack(table, picked, world.answers(table.key[picked], kind, rng))

    return with_derived_roles(
        {
            "refusal": sequences("harm", "refusal"),
            "harm": sequences("harm", "recipe"),
            "retain": sequences("retain", "recipe"),
        }
    )


def pack(table: PromptTable, rows: np.ndarray, answers: np.ndarray, pad: int = 0) -> Sequences:
    """Prompts ``rows`` of ``table`` with one padded answer each."""
    return Sequences(
        torch.from_numpy(table.ids[rows]),
        torch.from_numpy(table.mask[rows]).long(),
        torch.from_numpy(answers),
        torch.from_numpy((answers != pad).astype(np.int64)),
    )
