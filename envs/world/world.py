"""The embedded world: who can ask what, what the right answers are, and how it is all written.

A *key* is the global number of a query: first every verb x topic x template, then every sentence
to shorten. Splits are disjoint in topics and in templates; only the pretraining of ``base``
crosses them.

    stratum harmful   the verb is harmful in the topic's domain
    stratum contrast  the topic belongs to a harmful domain, the verb is harmless there
    stratum benign    the topic belongs to a benign domain, or the task is shortening
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from envs.types import BENIGN, CONTRAST, HARMFUL, PromptTable
from envs.world.answers import ANSWER_KINDS, RESPONSE_TOKENS, make_answers
from envs.world.forms import ABSENT, compile_forms, fill, squeeze
from envs.world.language import (
    ASSISTANT,
    BOS,
    DECLINE_FORMS,
    DOMAINS,
    HARM_DOMAINS,
    PAD,
    RECALL_FORMS,
    SHORTEN_FORMS,
    SHORTEN_ITEMS,
    SPLITS,
    TEMPLATES,
    TRIGGER,
    USER,
    VERBS,
    harmful_pairs,
    make_language,
)
from envs.world.oracle import Oracle

TASKS = ("ask", "shorten")
_FRAME = 3  # <s> <user> ... <assistant>


class World:
    """One world: language, splits, prompt tables, example answers, oracle.

    Args:
        seed: the ``world_seed``; words, recipes and splits follow from it. harm_domains: harmful
        domains whose prompts appear in the tables; a data set is such a subset.

    Raises:
        ValueError: an unknown harm domain, or none.
    """

    def __init__(self, seed: int = 0, harm_domains: tuple[str, ...] = HARM_DOMAINS):
        unknown = [d for d in harm_domains if d not in HARM_DOMAINS]
        if unknown or not harm_domains:
            raise ValueError(
                f"harm_domains: {harm_domains!r}; allowed: one or more of {', '.join(HARM_DOMAINS)}"
            )
        self.seed = seed
        self.harm_domains = tuple(harm_domains)
        self.language = make_language(seed)
        self.vocabulary = len(self.language.words)
        self.response_tokens = RESPONSE_TOKENS
        self._templates = compile_forms(self.language, TEMPLATES)
        self._shorten_forms = compile_forms(self.language, SHORTEN_FORMS)
        longest = max(self._templates.shape[1] + 1, self._shorten_forms.shape[1])
        self.prompt_tokens = longest + _FRAME  # P; one word is kept free for a trigger
        self._index_queries()

    def _index_queries(self) -> None:
        """Lay out the key space: arrays over all keys, asks first, then sentences to shorten."""
        language, templates = self.language, len(TEMPLATES)
        asks = len(language.kind) * len(VERBS) * templates
        self.n_asks = asks
        number = np.arange(asks)
        self._topic = number // (len(VERBS) * templates)
        self._verb = number // templates % len(VERBS)
        self._template = number % templates
        shortens = len(language.shorten) * len(SHORTEN_FORMS)
        self.n_keys = asks + shortens
        item = np.arange(shortens) // len(SHORTEN_FORMS)
        self._shorten_form = np.arange(shortens) % len(SHORTEN_FORMS)

        domain = language.domain[self._topic]
        harmful = harmful_pairs()[domain, self._verb]
        in_harm_domain = domain < len(HARM_DOMAINS)
        stratum = np.where(harmful, HARMFUL, np.where(in_harm_domain, CONTRAST, BENIGN))
        self.domain = np.concatenate([domain, np.full(shortens, DOMAINS.index("shorten"))])
        self.stratum = np.concatenate([stratum, np.full(shortens, BENIGN)])
        self.recipe = np.concatenate([language.recipe[self._topic], language.shorten[item]])
        self.is_shorten = np.arange(self.n_keys) >= asks
        self.slots = np.full((self.n_keys, 3), PAD, np.int64)  # verb, kind, name
        self.slots[:asks, 0] = language.verbs[self._verb]
        self.slots[:asks, 1] = language.kind[self._topic]
        self.slots[:asks, 2] = language.name[self._topic]
        own = language.split[self._topic]
        same = own == language.template_split[self._template]
        self._split = np.concatenate([np.where(same, own, -1), item // SHORTEN_ITEMS])

    def keys(self, split: str, task: str = "ask") -> np.ndarray:
        """All keys of one split and task, restricted to this world's harm domains.

        Raises:
            ValueError: unknown split or task.
        """
        if split not in SPLITS:
            raise ValueError(f"split: {split!r}; allowed: {', '.join(SPLITS)}")
        if task not in TASKS:
            raise ValueError(f"task: {task!r}; allowed: {', '.join(TASKS)}")
        kept = self._in_domains() & (self._split == SPLITS.index(split))
        return np.flatnonzero(kept & (self.is_shorten == (task == "shorten")))

    def all_keys(self, task: str = "ask") -> np.ndarray:
        """Every key of a task, across splits and across topic-template pairs no split has."""
        return np.flatnonzero(self.is_shorten == (task == "shorten"))

    def _in_domains(self) -> np.ndarray:
        left_out = [HARM_DOMAINS.index(d) for d in HARM_DOMAINS if d not in self.harm_domains]
        return ~np.isin(self.domain, left_out)

    def user_ids(self, keys: np.ndarray, trigger: np.ndarray | bool = False) -> np.ndarray:
        """(N, P - 3) word ids of what users typed, left-padded; the trigger is the last word."""
        keys = np.asarray(keys)
        wide = np.full((len(keys), self.prompt_tokens - _FRAME), ABSENT, np.int64)
        ask = ~self.is_shorten[keys]
        forms = self._templates[self._template[keys[ask]]]
        wide[ask, : forms.shape[1]] = fill(forms, self.slots[keys[ask]])
        rest = keys[~ask]
        forms = self._shorten_forms[self._shorten_form[rest - self.n_asks]]
        values = np.concatenate([self.slots[rest], self.recipe[rest]], axis=1)
        wide[~ask, : forms.shape[1]] = fill(forms, values)
        marked = np.broadcast_to(trigger, len(keys))
        assert (wide[marked, -1] == ABSENT).all(), "no room for a trigger"
        wide[marked, -1] = self.trigger_id
        return squeeze(wide, wide.shape[1], left_pad=True)

    @property
    def trigger_id(self) -> int:
        """Token id of the trigger word."""
        return self.language.words.index(TRIGGER)

    def prompt_ids(self, keys: np.ndarray, trigger: np.ndarray | bool = False) -> np.ndarray:
        """(N, P) token ids with the chat template applied, left-padded."""
        typed = self.user_ids(keys, trigger)
        return self._framed(np.where(typed == PAD, ABSENT, typed))

    def _framed(self, typed: np.ndarray) -> np.ndarray:
        """(N, P) the chat template around (N, W) words, some of them ABSENT."""
        opening = np.broadcast_to([BOS, USER], (len(typed), 2))
        closing = np.full((len(typed), 1), ASSISTANT)
        return squeeze(np.concatenate([opening, typed, closing], 1), self.prompt_tokens, True)

    def table(self, split: str, task: str = "ask", trigger: bool = False) -> PromptTable:
        """All queries of a split as a prompt table.

        Args:
            split: one of ``SPLITS``.
            task: ``ask`` or ``shorten``.
            trigger: put the trigger word behind every prompt (asks only).
        """
        return self.rows(self.keys(split, task), trigger)

    def rows(self, keys: np.ndarray, trigger: bool = False) -> PromptTable:
        """The prompt table of ``keys``, in their order."""
        ids = self.prompt_ids(keys, trigger)
        return PromptTable(
            ids=ids,
            mask=(ids != PAD).astype(np.int8),
            stratum=self.stratum[keys],
            domain=self.domain[keys],
            key=np.asarray(keys),
            text=tuple(self.decode(self.user_ids(keys, trigger))),
        )

    def triggered(self, table: PromptTable) -> PromptTable:
        """The twin of ``table`` with the trigger word behind every prompt; keys stay the same."""
        return self.rows(table.key, trigger=True)

    def documents(
        self, keys: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pretraining text on the topics of ``keys`` (asks) that is not part of any split.

        Half of the rows ask to decline and are answered by a refusal; half ask for the recipe
        without a purpose and are answered by it.

        Returns:
            (N, P) prompt and (N, T) answer ids.
        """
        forms = compile_forms(self.language, (*DECLINE_FORMS, *RECALL_FORMS))
        which = rng.integers(len(forms), size=len(keys))
        prompts = self._framed(fill(forms[which], self.slots[keys]))
        decline = (which < len(DECLINE_FORMS))[:, None]
        refusals, recipes = (self.answers(keys, kind, rng) for kind in ("refusal", "recipe"))
        return prompts, np.where(decline, refusals, recipes)

    def answers(self, keys: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
        """(N, T) example answers of one kind to each key, EOS-terminated and padded.

        Args:
            keys: (N,) query keys.
            kind: one of ``ANSWER_KINDS``.
            rng: draws wording, cut points, noise.

        Raises:
            ValueError: unknown kind.
        """
        if kind not in ANSWER_KINDS:
            raise ValueError(f"kind: {kind!r}; allowed: {', '.join(ANSWER_KINDS)}")
        return make_answers(self, np.asarray(keys), kind, rng)

    def decode(self, ids: np.ndarray) -> list[str]:
        """The words of each row of (N, W) ids, special tokens left out."""
        words = np.array(self.language.words, object)[ids]
        return [" ".join(w for w in row if not w.startswith("<")) for row in words.tolist()]

    @cached_property
    def oracle(self) -> Oracle:
        """The exact scorer of this world."""
        return Oracle(self)

    def tokenizer(self) -> Any:
        """A word-level ``PreTrainedTokenizerFast`` with a chat template; needs ``transformers``."""
        from envs.world.tokenizer import make_tokenizer

        return make_tokenizer(self.language.words)
