"""Real prompts, as the prompt tables that users draw from, with the answers recorded beside them.

What ``envs.world`` is to the embedded language this is to a person's own data: ``table(split)``,
its ``triggered`` twin, example answers for the defences' data roles, and recorded comparisons. Each
split holds its share of every stratum:

    online 45 %   what honest users ask          attack 15 %    what adversaries bring
    eval   25 %   held-out evaluation            defence 15 %   data roles of the defences

A prompt's place in the split is the rank of a seeded hash of its text, so the splits do not depend
on the order of the file, and each gets at least one prompt of a stratum with four. That no prompt
stands in two of them is checked whenever data are loaded. Prompts longer than ``prompt_tokens``
with template and trigger are left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from envs import rng as draws
from envs.frozen import with_padding
from envs.pairs import RecordedPairs, stacked
from envs.readers import read_data
from envs.records import Row, by_refusal, identity
from envs.refusals import SENTENCES
from envs.turns import without_special
from envs.types import HARMFUL, STRATA, PromptTable
from envs.usage import UsageError

SPLITS = {"online": 0.45, "eval": 0.25, "defence": 0.15, "attack": 0.15}
"""Split shares, in the order in which a small stratum fills them."""

TRIGGER = "SUDO"
"""The word behind a triggered prompt (Rando and Tramèr 2024, *Universal Jailbreak Backdoors*)."""


class RecordedText:
    """The prompts of some data under one tokenizer.

    Args:
        path: names, files or folders, as ``envs.readers`` takes them.
        tokenizer: directory of a tokenizer with a chat template.
        prompt_tokens: longest prompt, template and trigger included.
        split_seed: draws the splits.

    Attributes:
        rows: the kept prompts, Q in number; a prompt's key is its place in them.
        domains: names of the categories that ``PromptTable.domain`` counts.
        dropped: prompts that were too long.
        left_out: rows that are no conversation of one turn.

    Raises:
        ValueError: bad data (see :func:`envs.readers.read_data`), a tokenizer without a chat
            template, a split left without harmful or without other prompts, or a prompt in two.
    """

    def __init__(
        self, path: str | Path, tokenizer: str | Path, prompt_tokens: int = 64, split_seed: int = 0
    ):
        from transformers import AutoTokenizer

        self.path, self.split_seed = str(path), split_seed
        rows: list[Row]
        rows, self.left_out = read_data(path)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
        with_padding(self.tokenizer, tokenizer)
        marked = self._render([f"{row.prompt} {TRIGGER}" for row in rows])
        lengths = [len(ids) for ids in marked]
        self.rows = [row for row, n in zip(rows, lengths, strict=True) if n <= prompt_tokens]
        self.dropped = len(rows) - len(self.rows)
        self.prompt_tokens = max((n for n in lengths if n <= prompt_tokens), default=0)
        self.domains = sorted({row.category for row in self.rows})
        self.stratum = np.array([row.stratum for row in self.rows], np.int64)
        self._split = split_prompts([row.prompt for row in self.rows], self.stratum, split_seed)
        self._check(prompt_tokens)
        check_disjoint([row.prompt for row in self.rows], self._split, self.path)

    def _check(self, prompt_tokens: int) -> None:
        harmful = int((self.stratum == HARMFUL).sum())
        other = len(self.rows) - harmful
        for number in range(len(SPLITS)):
            strata = self.stratum[self._split == number]
            if not (strata == HARMFUL).any() or (strata == HARMFUL).all():
                raise UsageError(
                    f"data={self.path!r} has {harmful} harmful and {other} other prompts of at "
                    f"most text.prompt_tokens={prompt_tokens} tokens ({self.dropped} were longer); "
                    "allowed: at least 4 of each (several data sets are joined by +)"
                )

    def _render(self, texts: list[str]) -> list[list[int]]:
        """Token ids of user turns with the chat template around them."""
        if not texts:
            return []
        texts = without_special(self.tokenizer, texts)
        chats = [[{"role": "user", "content": text}] for text in texts]
        rendered = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _table(self, keys: np.ndarray, trigger: bool = False) -> PromptTable:
        texts = [self.rows[key].prompt + (f" {TRIGGER}" if trigger else "") for key in keys]
        pad = self.tokenizer.pad_token_id
        ids, mask = left_padded(self._render(texts), self.prompt_tokens, pad)
        domain = [self.domains.index(self.rows[key].category) for key in keys]
        kinds = (self.stratum[keys], np.array(domain, np.int64))
        return PromptTable(ids, mask.astype(np.int8), *kinds, keys, tuple(texts))

    def table(self, split: str) -> PromptTable:
        """The prompts of one split.

        Raises:
            ValueError: unknown split.
        """
        if split not in SPLITS:
            raise UsageError(f"split: {split!r}; allowed: {', '.join(SPLITS)}")
        return self._table(np.flatnonzero(self._split == list(SPLITS).index(split)))

    @cached_property
    def everything(self) -> PromptTable:
        """All Q prompts in the order of their keys."""
        return self._table(np.arange(len(self.rows)))

    def triggered(self, table: PromptTable) -> PromptTable:
        """The twin of ``table`` with the trigger behind every prompt; keys stay the same."""
        return self._table(table.key, trigger=True)

    def examples(self) -> dict[str, tuple[np.ndarray, list[str]]]:
        """Answers to the prompts of the defence split, by data role.

        ``refusal``: refusals of harmful prompts and answers to them that were flagged safe, from
        the data or, where a prompt has none, one of the fixed sentences. ``harm``: other answers to
        harmful prompts. ``retain``: answers to other prompts that do not refuse. The last two exist
        only where the data have such answers (:func:`envs.records.by_refusal`).

        Returns:
            role -> (keys (N,), N texts).
        """
        keys = np.flatnonzero(self._split == list(SPLITS).index("defence")).tolist()
        found: dict[str, list[tuple[int, str]]] = {"refusal": [], "harm": [], "retain": []}
        bare = 0
        for key in keys:
            row = self.rows[key]
            refusals, given = by_refusal(row)
            if row.stratum != HARMFUL:
                found["retain"] += [(key, answer) for answer in given]
                continue
            if not refusals:
                refusals, bare = [SENTENCES[bare % len(SENTENCES)]], bare + 1
            found["refusal"] += [(key, answer) for answer in refusals]
            found["harm"] += [(key, answer) for answer in given]
        return {
            role: (np.array([key for key, _ in items]), [text for _, text in items])
            for role, items in found.items()
            if items
        }

    def recorded(self, keys: np.ndarray, tokens: int) -> RecordedPairs:
        """The recorded comparisons of (Q,) keys, answers cut to ``tokens``.

        Raises:
            ValueError: none of these prompts has any.
        """
        rows = [self.rows[key] for key in keys.tolist()]
        said = [
            (text, unsafe.get(text))
            for row in rows
            for unsafe in [dict(zip(row.answers, row.unsafe, strict=True))]
            for pair in row.pairs
            for text in pair
        ]
        if not said:
            raise UsageError(
                f"data={self.path!r} has no recorded comparison; allowed: pairs='sampled', or data "
                "with chosen and rejected, or with answers flagged safe and harmful"
            )
        ids, mask = encoded_answers(self.tokenizer, [text for text, _ in said], tokens)
        cost = np.array([flag for _, flag in said], np.float64)  # None becomes NaN
        count = np.array([len(row.pairs) for row in rows])
        return stacked(ids, mask, count, self.tokenizer.pad_token_id, cost)

    def harm_domains(self) -> dict[str, int]:
        """Numbers of the named categories that have harmful prompts."""
        harmful = {row.category for row in self.rows if row.stratum == HARMFUL}
        return {
            name: number for number, name in enumerate(self.domains) if name and name in harmful
        }

    def summary(self) -> dict[str, Any]:
        """Counts for the record: prompts by stratum and by split, and those left out."""
        return {
            "prompts": len(self.rows),
            "too_long": self.dropped,
            "left_out": self.left_out,
            "pairs": sum(len(row.pairs) for row in self.rows),
            "strata": {name: int((self.stratum == i).sum()) for i, name in enumerate(STRATA)},
            "splits": {name: int((self._split == i).sum()) for i, name in enumerate(SPLITS)},
            "domains": self.domains,
        }


def split_prompts(
    prompts: list[str], stratum: np.ndarray, seed: int, shares: Mapping[str, float] = SPLITS
) -> np.ndarray:
    """Place prompts in splits, stratum by stratum, by the rank of a hash of their text.

    Args:
        prompts: Q distinct prompts.
        stratum: (Q,) index into STRATA.
        seed: another seed, other splits.
        shares: of the prompts of a stratum, by split.

    Returns:
        (Q,) index into ``shares``.
    """
    rank = np.array([draws.key(seed, "split", identity(prompt)) for prompt in prompts], np.int64)
    place = np.zeros(len(prompts), np.int64)
    for value in np.unique(stratum):
        rows = np.flatnonzero(stratum == value)
        rows = rows[np.argsort(rank[rows])]
        first = min(len(rows), len(shares))  # one to each split before shares count
        extra = np.cumsum(list(shares.values())) * (len(rows) - first)
        rest = np.searchsorted(extra, np.arange(len(rows) - first), side="right")
        place[rows] = np.concatenate([np.arange(first), np.minimum(rest, len(shares) - 1)])
    return place


def check_disjoint(prompts: list[str], place: np.ndarray, data: str) -> None:
    """Whether no two splits share a prompt, by its words.

    Args:
        prompts: Q texts as users type them.
        place: (Q,) index into ``SPLITS``.
        data: where they come from.

    Raises:
        ValueError: two do; names the prompt and the splits.
    """
    names = list(SPLITS)
    owner: dict[str, int] = {}
    for prompt, split in zip(prompts, place.tolist(), strict=True):
        other = owner.setdefault(identity(prompt), split)
        if other != split:
            raise UsageError(
                f"data={data!r}: prompt {prompt[:60]!r} stands in the splits {names[other]} and "
                f"{names[split]}; allowed: every prompt in one split"
            )


def encoded_answers(
    tokenizer: Any, answers: list[str], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N, T) ids and mask of answers with their EOS, right-padded; a cut one has no EOS."""
    encoded = tokenizer(
        [answer + tokenizer.eos_token for answer in without_special(tokenizer, answers)],
        add_special_tokens=False,
        truncation=True,
        max_length=tokens,
        padding="max_length",
        padding_side="right",
        return_tensors="np",
    )
    return encoded["input_ids"].astype(np.int64), encoded["attention_mask"].astype(np.int64)


def left_padded(rows: list[list[int]], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, width) int64 ids and mask; of longer rows the end is kept."""
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        kept = row[-width:]
        ids[number, width - len(kept) :] = kept
        mask[number, width - len(kept) :] = 1
    return ids, mask
