"""Who asks what: honest users draw from one split, adversarial askers from another.

Honest traffic is a mixture of three strata (benign, contrast, harmful) with fixed shares, uniform
within a stratum. Prompts are drawn for everybody as if all were honest and overwritten afterwards,
so two runs that differ in the attack share all the prompts it did not touch. All draws are
counters: the prompts of round t are a pure function of (key, t), whatever was answered before.

A deployed system sees a stratum only through a classifier, which here errs with a stated
probability and then names one of the other two strata at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, MultiBinary

from envs import rng
from envs.attacks import Attack
from envs.costs import Scorer
from envs.pairs import RecordedPairs, world_pairs
from envs.types import BENIGN, CONTRAST, HARMFUL, STRATA, PromptTable, Scores
from envs.usage import UsageError, check_ranges


@dataclass(frozen=True)
class Source:
    """Prompts, their scorer and the vocabulary they are written in."""

    honest: PromptTable
    """What honest users ask (split ``online``)."""
    attack: PromptTable
    """What adversarial askers may bring (split ``attack``)."""
    triggered: tuple[PromptTable, PromptTable] | None
    """Twins of both tables with the trigger word in every prompt, where there is one."""
    scorer: Scorer
    """Says how harmful and how useful a response is."""
    vocabulary: int
    """V, number of token ids."""
    eos: int
    """Token that ends a response."""
    pad: int
    """Token behind it."""
    domains: Mapping[str, int]
    """Numbers of the domains to report harm for, by name."""
    recorded_scorer: Scorer
    """Says it of recorded answers."""
    recorded: Callable[[int], RecordedPairs]
    """Makes the recorded comparisons of all rows, in answers of so many tokens."""

    @cached_property
    def tables(self) -> tuple[PromptTable, PromptTable | None]:
        """All rows, honest ones first, without and with the trigger."""
        twin = None if self.triggered is None else _stack(*self.triggered)
        return _stack(self.honest, self.attack), twin

    def score(self, row: np.ndarray, ids: np.ndarray, recorded: bool = False) -> Scores:
        """(B, K) scores of the (B, K, T) answers to (B,) rows, read up to their first EOS."""
        scorer = self.recorded_scorer if recorded else self.scorer
        flat = ids.reshape(-1, ids.shape[2])
        ends = flat == self.eos
        said = np.cumsum(ends, axis=1) - ends == 0  # up to and including the first EOS
        keys = np.repeat(self.tables[0].key[row], ids.shape[1])
        scores = scorer.score(keys, np.where(said, flat, self.pad))
        return Scores(*(column.reshape(ids.shape[:2]) for column in scores))


def _stack(first: PromptTable, second: PromptTable) -> PromptTable:
    assert first.ids.shape[1] == second.ids.shape[1], "tables of one source have one prompt width"
    arrays = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in PromptTable._fields
        if name != "text"
    }
    return PromptTable(**arrays, text=first.text + second.text)


def world_source(seed: int, harm_domains: list[str] | None) -> Source:
    """The embedded world as a source.

    Raises:
        ValueError: an unknown harm domain.
    """
    from envs.world import DOMAINS, HARM_DOMAINS, World
    from envs.world.language import EOS, PAD

    world = World(seed, HARM_DOMAINS if harm_domains is None else tuple(harm_domains))
    honest, attack = world.table("online"), world.table("attack")
    keys = np.concatenate([honest.key, attack.key])
    return Source(
        honest=honest,
        attack=attack,
        triggered=(world.triggered(honest), world.triggered(attack)),
        scorer=world.oracle,
        vocabulary=world.vocabulary,
        eos=EOS,
        pad=PAD,
        domains={name: DOMAINS.index(name) for name in world.harm_domains},
        recorded_scorer=world.oracle,
        recorded=lambda tokens: world_pairs(world, keys, tokens),
    )


def make_source(
    world: int, harm_domains: list[str] | None, data: Any, tokenizer: str | None, scorer: Any
) -> Source:
    """Prompts of the embedded world, or of ``data`` where it is given.

    Raises:
        ValueError: an unknown harm domain, or data that cannot be read.
    """
    if data is None:
        return world_source(world, harm_domains)
    from envs.scorers import recorded_source

    return recorded_source(data, tokenizer, scorer)


class Asked(NamedTuple):
    """One round of prompts, as they truly are."""

    row: np.ndarray  # (B,) int64, row of Source.tables
    person: np.ndarray  # (B,) int64, who asks
    triggered: np.ndarray  # (B,) bool


@dataclass(frozen=True)
class Traffic:
    """Draws prompts for B users a round.

    Raises:
        ValueError: shares outside [0, 1], above 1 together, or of strata the source lacks.
    """

    source: Source
    batch: int
    harmful_share: float
    contrast_share: float
    stratum_error: float
    trigger_share: float

    def __post_init__(self) -> None:
        """Check the shares against each other and against the prompts there are."""
        check_ranges(self, harmful_share="0 to 1", contrast_share="0 to 1")
        check_ranges(self, stratum_error="0 to 1", trigger_share="0 to 1")
        if self.harmful_share + self.contrast_share > 1:
            raise UsageError(
                f"contrast_share={self.contrast_share} with harmful_share={self.harmful_share}; "
                f"allowed: at most {1 - self.harmful_share:g}"
            )
        there = set(np.unique(self.source.honest.stratum).tolist())
        if self.harmful_share > 0 and HARMFUL not in there:
            raise UsageError(f"harmful_share={self.harmful_share}; allowed: 0 (no harmful prompts)")
        if self.harmful_share < 1 and not there & {BENIGN, CONTRAST}:
            raise UsageError(f"harmful_share={self.harmful_share}; allowed: 1 (no other prompts)")
        if self.trigger_share > 0 and self.source.triggered is None:
            raise UsageError(f"trigger_share={self.trigger_share}; allowed: 0 (no trigger word)")

    @cached_property
    def _rows(self) -> list[np.ndarray]:
        """Honest rows by stratum; benign and contrast stand in for each other where one lacks."""
        rows = [np.flatnonzero(self.source.honest.stratum == s) for s in range(len(STRATA))]
        for missing, other in ((BENIGN, CONTRAST), (CONTRAST, BENIGN)):
            if not len(rows[missing]):
                rows[missing] = rows[other]
        return rows

    def honest(self, key: int, round: int, person: np.ndarray) -> Asked:
        """What the (B,) people would ask in ``round`` if all were honest."""
        slot = np.arange(self.batch)

        def draw(purpose: str) -> np.ndarray:
            return rng.uniform(rng.key(key, purpose), round, slot)

        mix = draw("stratum")
        limits = [self.harmful_share, self.harmful_share + self.contrast_share]
        stratum = np.select([mix < limits[0], mix < limits[1]], [HARMFUL, CONTRAST], BENIGN)
        pick, row = draw("prompt"), np.zeros(self.batch, np.int64)
        for s, rows in enumerate(self._rows):
            mine = stratum == s
            row[mine] = rows[(pick[mine] * len(rows)).astype(np.int64)]
        return Asked(row, person, draw("trigger") < self.trigger_share)

    def overwrite(
        self, asked: Asked, attack: Attack, hostile: np.ndarray, key: int, round: int
    ) -> Asked:
        """``asked`` with the attack's prompts where the (B,) askers are hostile.

        Raises:
            ValueError: what the attack brings are no rows of its split.
        """
        draw = rng.uniform(rng.key(key, "attack prompt"), round, np.arange(self.batch))
        brought = attack.prompts(self.source.attack, draw)
        row = asked.row
        if brought is not None:
            self._check_rows(attack, brought)
            row = np.where(hostile, len(self.source.honest.key) + brought, row)
        return asked._replace(
            row=row, triggered=asked.triggered | (hostile & attack.appends_trigger)
        )

    def _check_rows(self, attack: Attack, brought: np.ndarray) -> None:
        top = len(self.source.attack.key) - 1
        rows = np.asarray(brought)
        whole = rows.shape == (self.batch,) and np.issubdtype(rows.dtype, np.integer)
        if not whole or rows.min() < 0 or rows.max() > top:
            raise UsageError(
                f"attack={attack.spec!r}: prompts are {rows.dtype} of shape {rows.shape}; "
                f"allowed: whole numbers of shape {(self.batch,)} from 0 to {top}"
            )

    def ids(self, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        """(B, P) int64 token ids and int8 mask of the prompts."""
        plain, twin = self.source.tables
        ids, mask = plain.ids[asked.row], plain.mask[asked.row]
        if twin is None:
            return ids, mask
        marked = asked.triggered[:, None]
        return np.where(marked, twin.ids[asked.row], ids), np.where(
            marked, twin.mask[asked.row], mask
        )

    def spaces(self, people: int) -> dict[str, gym.Space]:
        """Of what :meth:`shown` gives, and of the ``user`` who is one of ``people``."""
        shape = (self.batch, self.source.tables[0].ids.shape[1])
        return {
            "prompt_ids": Box(0, self.source.vocabulary - 1, shape, np.int64),
            "prompt_mask": MultiBinary(shape),
            "stratum": Box(0, len(STRATA) - 1, shape[:1], np.int64),
            "user": Box(0, people - 1, shape[:1], np.int64),
        }

    def shown(self, asked: Asked, key: int, round: int) -> dict[str, np.ndarray]:
        """One round's prompts and their observed strata."""
        ids, mask = self.ids(asked)
        return {"prompt_ids": ids, "prompt_mask": mask, "stratum": self.seen_as(asked, key, round)}

    def seen_as(self, asked: Asked, key: int, round: int) -> np.ndarray:
        """(B,) int64 strata as a classifier reports them."""
        return self.observed(self.source.tables[0].stratum[asked.row], key, round)

    def observed(self, stratum: np.ndarray, key: int, round: int) -> np.ndarray:
        """(B,) int64 reports of a classifier on true strata."""
        slot = np.arange(self.batch)
        wrong = rng.uniform(rng.key(key, "stratum error"), round, slot) < self.stratum_error
        shift = 1 + (rng.uniform(rng.key(key, "stratum guess"), round, slot) < 0.5)
        return np.where(wrong, (stratum + shift) % len(STRATA), stratum)
