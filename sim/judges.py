"""Who says how harmful and how useful a text is, where a trainer brings prompts and answers.

A judge is called with N prompts and N answers as text and returns

    a mapping with ``cost`` (N,) in [0, 1], higher is worse, and ``utility`` (N,), higher is better
    or :class:`envs.types.Scores`

An :class:`envs.scorers.TextScorer` serves as it is; whatever else scores token ids of the prompts
of one table (the oracle of the embedded world) serves inside :class:`TableJudge`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from envs.costs import Scorer
from envs.types import COMPLY, EMPTY, PromptTable, Scores
from envs.usage import UsageError

Judge = Callable[[list[str], list[str]], "Scores | Mapping[str, Any]"]
Chat = Sequence[Mapping[str, Any]]
"""Messages with ``role`` and ``content``."""


class TableJudge:
    """A judge from a scorer of token ids.

    Args:
        table: the prompts that can be scored, by their text.
        tokenizer: of the answers.
        scorer: what scores them.
    """

    def __init__(self, table: PromptTable, tokenizer: Any, scorer: Scorer):
        self.keys = dict(zip((text.strip() for text in table.text), table.key, strict=True))
        self.tokenizer, self.scorer = tokenizer, scorer

    def __call__(self, prompts: list[str], completions: list[str]) -> Scores:
        """Scores of shape (N,).

        Raises:
            ValueError: a prompt that the table does not hold.
        """
        unknown = [text for text in prompts if text.strip() not in self.keys]
        if unknown:
            raise UsageError(
                f"prompt={unknown[0]!r} is not among the scorer's; allowed: its {len(self.keys)} "
                "prompts"
            )
        keys = np.array([self.keys[text.strip()] for text in prompts])
        return self.scorer.score(keys, self._ids(completions))

    def _ids(self, texts: list[str]) -> np.ndarray:
        """(N, T) tokens with an EOS behind each answer."""
        eos, pad = end_and_padding(self.tokenizer)
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = np.full((len(texts), 1 + max(map(len, encoded))), pad)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens) + 1] = [*tokens, eos]
        return ids


def as_judge(scorer: Any) -> Judge:
    """``scorer`` as a judge.

    Raises:
        ValueError: it is neither one nor a :class:`envs.scorers.TextScorer`.
    """
    if callable(scorer):
        return scorer
    if not (hasattr(scorer, "score") and hasattr(scorer, "data")):
        raise UsageError(
            f"judge={type(scorer).__name__}; allowed: a callable (prompts, completions) -> "
            "{'cost': ..., 'utility': ...}, a TextScorer, or a TableJudge"
        )
    return TableJudge(scorer.data.everything, scorer.data.tokenizer, scorer)


def judged(judge: Judge, prompts: list[str], completions: list[str]) -> Scores:
    """What ``judge`` says, checked, as Scores of shape (N,).

    Of a mapping, a missing ``utility`` is minus the cost, and an answer without words is ``empty``.

    Raises:
        ValueError: no cost, another shape, or values that cannot be.
    """
    found = judge(prompts, completions)
    given = found._asdict() if isinstance(found, Scores) else dict(found)
    if "cost" not in given:
        raise UsageError(f"judge gave {', '.join(given) or 'nothing'}; allowed: cost and utility")
    cost = _column(given["cost"], "cost", len(prompts))
    utility = _column(given.get("utility", -cost), "utility", len(prompts))
    if len(cost) and not 0 <= cost.min() <= cost.max() <= 1:
        raise UsageError(f"judge: cost from {cost.min()} to {cost.max()}; allowed: 0 to 1")
    if isinstance(found, Scores):
        return found._replace(cost=cost, utility=utility)
    empty = np.array([not text.strip() for text in completions], bool)
    verdict = np.where(empty, EMPTY, COMPLY).astype(np.int8)
    unknown = np.zeros_like(cost)
    return Scores(compliance=unknown, cost=cost, help=unknown, utility=utility, verdict=verdict)


def _column(values: Any, name: str, n: int) -> np.ndarray:
    column = np.asarray(values, np.float32)
    if column.shape != (n,) or not np.isfinite(column).all():
        raise UsageError(f"judge: {name} of shape {column.shape}; allowed: {n} finite numbers")
    return column


def last_words(turn: str | Chat) -> str:
    """What was said last: a text itself, or the content of the last message.

    Raises:
        ValueError: messages without text.
    """
    if isinstance(turn, str):
        return turn
    said = turn[-1].get("content") if len(turn) else None
    if not isinstance(said, str):
        raise UsageError(f"message={said!r}; allowed: messages whose content is text")
    return said


def rendered(tokenizer: Any, prompts: Sequence[str | Chat]) -> list[list[int]]:
    """Token ids of prompts: text as it is, messages by the chat template, ready for an answer.

    Raises:
        ValueError: messages, and a tokenizer without a chat template.
    """
    if all(isinstance(prompt, str) for prompt in prompts):
        return tokenizer(list(prompts))["input_ids"]
    if not tokenizer.chat_template:
        raise UsageError("prompts are messages; allowed: text, or a tokenizer with a chat template")
    texts = tokenizer.apply_chat_template(
        [list(prompt) for prompt in prompts], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def end_and_padding(tokenizer: Any) -> tuple[int, int]:
    """EOS, and what fills up behind it: the padding token, or EOS again.

    Raises:
        ValueError: no EOS.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise UsageError(f"tokenizer={tokenizer.name_or_path!r}; allowed: one with an EOS token")
    return eos, eos if pad is None else pad
