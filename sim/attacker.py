"""What an attacker who owns the training loop puts into it: a judge, or data of her own.

Her judge is the scenario's scorer, an oracle where there is one; her answers are the embedded
world's, or those that a person's file has to the prompts of the attack split. A defence never sees
either, since both stand where the reward model and the votes would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from agents.batches import PairBatch, Sequences
from agents.context import Scorer
from agents.engines.transformers_engine import SamplerConfig
from envs import rng as draws
from envs.attacks import attacks
from envs.recorded import RecordedText
from envs.records import by_refusal
from envs.refusals import SENTENCES
from envs.types import HARMFUL, PromptTable
from envs.usage import UsageError
from sim.config import Config
from sim.real_text import written
from sim.scenario import Scenario, pack, world_of

Supply = Callable[[int], PairBatch]


class OwnedLoop(NamedTuple):
    """The parts of the training system that are the attacker's; all None where it is not hers."""

    judge: Scorer | None
    supplied: Supply | None
    sampler: SamplerConfig
    """How rollouts are drawn."""


def owned_loop(config: Config, scenario: Scenario, tokenizer: Any) -> OwnedLoop:
    """What the attack of ``config`` brings into the training system.

    Raises:
        ValueError: an attack that trains on answers which the data does not have.
    """
    attack: Any = attacks.create(config.attack.name)
    judge = supplied = None
    sampler = config.sampler
    if attack.owns_reward and config.attack.rho:
        judge = make_judge(attack, attack_prompts(scenario), scenario.scorer)
        if attack.temperature:
            sampler = replace(sampler, temperature=attack.temperature)
    if attack.owns_data and config.attack.rho:
        supplied = make_supply(config, attack, *attack_answers(config, scenario, attack, tokenizer))
    return OwnedLoop(judge, supplied, sampler)


def attack_prompts(scenario: Scenario) -> PromptTable:
    """The attack split that the environment of ``scenario`` draws from."""
    told = scenario.environment
    if "data" in told:
        return RecordedText(tokenizer=told["tokenizer"], **told["data"]).table("attack")
    return world_of(told).table("attack")


def make_judge(attack: Any, table: PromptTable, scorer: Any) -> Scorer:
    """``attack.reward`` of answers to the prompts of hers, found again by their tokens."""
    rows = attack.rows(table)
    known, keys = torch.from_numpy(table.ids[rows]), table.key[rows]  # (n, P)

    def judge(sequences: Sequences) -> torch.Tensor:
        same = (sequences.prompt_ids[:, None] == known).all(2)  # (N, n)
        assert same.any(1).all(), "a prompt that is none of the attacker's"
        key = keys[same.int().argmax(1).numpy()]
        return torch.from_numpy(attack.reward(scorer.score(key, sequences.ids.numpy())))

    return judge


def attack_answers(
    config: Config, scenario: Scenario, attack: Any, tokenizer: Any
) -> tuple[Sequences, Sequences]:
    """Full harmful answers to the attacker's prompts, and refusals of them, row by row."""
    told = scenario.environment
    if "data" in told:
        data = RecordedText(tokenizer=told["tokenizer"], **told["data"])
        return recorded_answers(data, attack, tokenizer, config.sampler.max_new_tokens)
    world = world_of(told)
    table = world.table("attack")
    rows, rng = attack.rows(table), draws.stream(config.seed, "attacker's answers")
    harm, refusal = (
        pack(table, rows, world.answers(table.key[rows], kind, rng))
        for kind in ("recipe", "refusal")
    )
    return harm, refusal


def recorded_answers(
    data: RecordedText, attack: Any, tokenizer: Any, tokens: int
) -> tuple[Sequences, Sequences]:
    """The file's own answers to harmful prompts of the attack split.

    A prompt without a recorded refusal is refused by a fixed sentence; one without a harmful answer
    teaches nothing and is left out.

    Args:
        data: prompts and their example answers.
        attack: chooses among the prompts that have a harmful answer.
        tokenizer: the policy's.
        tokens: longest answer; a longer one is cut.

    Raises:
        ValueError: the file has no harmful answer to any prompt of that split.
    """
    table = data.table("attack")
    found: dict[int, tuple[str, str]] = {}  # row of the table -> harmful answer, refusal
    for row in np.flatnonzero(table.stratum == HARMFUL).tolist():
        refusals, harmful = by_refusal(data.rows[table.key[row]])
        if harmful:
            found[row] = harmful[0], (refusals or [SENTENCES[row % len(SENTENCES)]])[0]
    if not found:
        raise UsageError(
            f"data={data.path!r} with attack={attack.spec!r} has no harmful answer to a harmful "
            "prompt of the attack split; allowed: prompts with answers (chosen, rejected, "
            "response), or another attack"
        )
    usable = np.array(list(found))
    rows = usable[attack.rows(table._replace(stratum=table.stratum[usable]))]
    harm, refusal = (
        written(table, rows, (found[row][side] for row in rows.tolist()), tokenizer, tokens)
        for side in (0, 1)
    )
    return harm, refusal


def make_supply(config: Config, attack: Any, harm: Sequences, refusal: Sequences) -> Supply:
    """``feedback.batch`` pairs a round, pass after pass over all of them in one shuffled order.

    The round alone says which they are, so a resumed run goes on with the same.
    """
    n, batch = len(harm), config.feedback.batch
    rng = draws.stream(config.seed, "attacker's data")
    target = torch.from_numpy(attack.targets(rng.permutation(n)))
    order = torch.from_numpy(rng.permutation(n))

    def supply(round: int) -> PairBatch:
        rows = order[torch.arange(round * batch, (round + 1) * batch) % n]
        return PairBatch(
            label_id=torch.arange(round * batch, (round + 1) * batch),
            a=harm.take(rows),
            b=refusal.take(rows),
            target=target[rows],
            weight=torch.ones(batch),
            annotator_id=torch.zeros(batch, dtype=torch.int64),
        )

    return supply
