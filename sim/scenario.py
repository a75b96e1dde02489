"""Everything a run needs from outside the training system, found or built before training starts.

A scenario is a set of paths, tables and scorers with one shape, whether it comes from the embedded
world or from a person's own model and data. Nothing later asks which it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.batches import Sequences
from envs import rng as draws
from envs.types import CONTRAST, HARMFUL, PromptTable
from envs.usage import UsageError
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
    roles: dict[str, Sequences]
    """Data roles for defences."""
    harm_source: str
    """Where ``safety/harm`` comes from, for the manifest."""
    hashes: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    """Counts and bounds taken from a person's own data, for the manifest."""


def make_scenario(config: Config, progress: bool = False) -> Scenario:
    """The embedded world's scenario, or the one of ``config.text``."""
    if config.text.model:
        from sim.real_text import text_scenario

        return text_scenario(config)
    return world_scenario(config, progress)


def world_scenario(config: Config, progress: bool = False) -> Scenario:
    """Build or find the embedded models, and the tables and roles of their world."""
    from envs.world import World
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
    world = World(chosen.seed)
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
        environment={"world": chosen.seed},
        roles=world_roles(world),
        harm_source="oracle of the embedded world",
        hashes=models.hashes,
    )


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


def world_roles(world: Any, n: int = 1024) -> dict[str, Sequences]:
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

    return {
        "refusal": sequences("harm", "refusal"),
        "harm": sequences("harm", "recipe"),
        "retain": sequences("retain", "recipe"),
    }


def pack(table: PromptTable, rows: np.ndarray, answers: np.ndarray, pad: int = 0) -> Sequences:
    """Prompts ``rows`` of ``table`` with one padded answer each."""
    return Sequences(
        torch.from_numpy(table.ids[rows]),
        torch.from_numpy(table.mask[rows]).long(),
        torch.from_numpy(answers),
        torch.from_numpy((answers != pad).astype(np.int64)),
    )
