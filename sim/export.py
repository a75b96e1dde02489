"""A run's comparisons as a data set for trainers of preferences, TRL's above all.

    preference   prompt, chosen, rejected          DPOTrainer
    unpaired     prompt, completion, label         KTOTrainer; two rows a comparison
    reward       chosen, rejected, both with the prompt inside          RewardTrainer

Every row carries the ``round`` of its vote, the ``annotator_id`` and the ``label_id``. Votes are
those that were cast, before any defence changed or weighted them: a poisoned log as its owner has
it. What is true of them stays out unless it is asked for.

Answers are words: whether one came to its end or was cut at ``sampler.max_new_tokens`` is not in
them, and trainers write EOS behind either.

A run keeps the words of its first ``samples_per_round`` labels of each round only; what was not
kept cannot be exported, and is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from envs.types import VOTE_A, VOTE_B, VOTE_SKIP, VOTE_TIE, VOTES
from envs.usage import UsageError
from sim.analysis.load import Run

FORMATS = {"preference": "DPOTrainer", "unpaired": "KTOTrainer", "reward": "RewardTrainer"}
"""What is written, and which of TRL's trainers takes it."""
DATA = "data/train.parquet"
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Counts:
    """Where a run's labels went."""

    labels: int
    """Recorded, skips and ties included."""
    ties: int
    skips: int
    unrecorded: int
    """Decided comparisons whose words the run did not keep."""
    comparisons: int
    """Exported."""


def collect(run: Run) -> tuple[pd.DataFrame, Counts]:
    """The decided comparisons of a run that were kept in words, in the order of their labels.

    Returns:
        One row a comparison: ``prompt``, ``chosen``, ``rejected`` as they were said, ``round``,
            ``annotator_id``, ``label_id``, and the truth: ``honest_vote`` (``chosen``,
            ``rejected``, ``tie`` or ``skip``), ``adversarial``, ``flipped``.

    Raises:
        ValueError: damaged tables, or no such comparison.
    """
    labels, samples = run.table("labels"), run.table("samples")
    votes = labels["vote"].to_numpy() if len(labels) else np.zeros(0, np.int8)
    decided = np.isin(votes, (VOTE_A, VOTE_B))
    sides = [VOTES[VOTE_A], VOTES[VOTE_B]]
    kept = samples[samples["vote"].isin(sides)] if len(samples) else samples
    counts = Counts(
        labels=len(votes),
        ties=int((votes == VOTE_TIE).sum()),
        skips=int((votes == VOTE_SKIP).sum()),
        unrecorded=int(decided.sum()) - len(kept),
        comparisons=len(kept),
    )
    if not len(kept):
        raise UsageError(
            f"run={str(run.path)!r} kept {len(samples)} of its {counts.labels} labels in words, "
            "none of them decided; allowed: a run with samples_per_round above 0 and votes for a "
            "side"
        )
    kept = kept.sort_values("label_id", ignore_index=True)
    first = (kept["vote"] == VOTES[VOTE_A]).to_numpy()
    better, worse = np.where(first, "chosen", "rejected"), np.where(first, "rejected", "chosen")
    honest = kept["honest_vote"].to_numpy()
    found = pd.DataFrame(
        {
            "prompt": kept["prompt"],
            "chosen": np.where(first, kept["answer_a"], kept["answer_b"]),
            "rejected": np.where(first, kept["answer_b"], kept["answer_a"]),
            "round": kept["round"],
            "annotator_id": kept["annotator"],
            "label_id": kept["label_id"],
            "honest_vote": np.select([honest == side for side in sides], [better, worse], honest),
            "adversarial": kept["adversarial"],
            "flipped": kept["vote"] != kept["honest_vote"],
        }
    )
    return found, counts


LOG = ("round", "annotator_id", "label_id")
TRUTH = ("honest_vote", "adversarial", "flipped")


def columns(
    found: pd.DataFrame, format: str, conversational: bool = False, with_truth: bool = False
) -> Columns:
    """What one format writes of the comparisons of :func:`collect`.

    In plain text an answer begins with a space, so that prompt + answer is what a reader sees and
    tokenizers find the same boundary with and without the answer.
    """
    prompt = [_user(p) if conversational else p for p in found["prompt"]]
    said = {
        name: [_assistant(a) if conversational else f" {a}" for a in found[name]]
        for name in ("chosen", "rejected")
    }
    rest = {name: found[name].tolist() for name in (*LOG, *(TRUTH if with_truth else ()))}
    if format == "preference":
        return {"prompt": prompt, **said, **rest}
    if format == "reward":
        joined = {n: [p + a for p, a in zip(prompt, v, strict=True)] for n, v in said.items()}
        return {**joined, **rest}
    assert format == "unpaired", format
    completion = [a for pair in zip(*said.values(), strict=True) for a in pair]
    return {
        "prompt": _twice(prompt),
        "completion": completion,
        "label": [True, False] * len(prompt),
        **{name: _twice(values) for name, values in rest.items()},
    }


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _twice(values: list[Any]) -> list[Any]:
    return [value for value in values for _ in range(2)]


def write(folder: Path, written: Columns, card: str) -> None:
    """Write the table and ``README.md`` into ``folder``; equal arguments give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / DATA).parent.mkdir()
    pq.write_table(pa.table(written), folder / DATA, compression="zstd")
    (folder / "README.md").write_text(card, encoding="utf-8")
