"""What users were shown, and what they compare, kept until their labels have come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.batches import NO_ANSWERS, GoldAnswers, Sequences
from agents.engines.transformers_engine import Sampled
from envs.types import VOTE_A, VOTE_SKIP, VOTE_TIE, GoldLog, Labels, Responses


class Served(NamedTuple):
    """One round's prompts and answers."""

    round: int
    stratum: np.ndarray  # (B,) observed
    sampled: Sampled  # B*K rows
    recorded: Sequences | None = None  # B*2 rows, compared in place of what is served

    @property
    def compared(self) -> Sequences:
        """B*n rows, the answers that labels are about."""
        return self.sampled.sequences if self.recorded is None else self.recorded

    def state_dict(self) -> dict[str, Any]:
        """Tensors, an array and a number; :meth:`from_state` is its inverse."""
        columns = self.sampled.sequences._asdict()
        facts = {"round": self.round, "stratum": self.stratum, "logprobs": self.sampled.logprobs}
        recorded = {} if self.recorded is None else {"recorded": self.recorded._asdict()}
        return {**facts, **columns, **recorded}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Served:
        """Restore :meth:`state_dict`."""
        sequences = Sequences(*(state[name] for name in Sequences._fields))
        sampled = Sampled(sequences, state["logprobs"])
        held = state.get("recorded")
        recorded = held and Sequences(*(held[name] for name in Sequences._fields))
        return cls(int(state["round"]), np.asarray(state["stratum"]), sampled, recorded)


def recorded_pairs(observation: Mapping[str, np.ndarray]) -> Sequences | None:
    """The B*2 recorded answers that an observation shows, where it has any."""
    if "recorded_ids" not in observation:
        return None
    names = ("prompt_ids", "prompt_mask", "recorded_ids", "recorded_mask")
    given = [torch.from_numpy(np.asarray(observation[name], np.int64)) for name in names]
    prompts = [column.repeat_interleave(2, 0) for column in given[:2]]
    return Sequences(*prompts, *(column.flatten(0, 1) for column in given[2:]))


def answered(served: Sequence[Served], gold: GoldLog | None) -> GoldAnswers:
    """Answers to gold questions with the observed strata of their items."""
    if gold is None:
        return NO_ANSWERS
    rounds, row = np.divmod(gold.item, len(served[-1].stratum))
    strata = np.stack([one.stratum for one in served])
    return GoldAnswers(gold.annotator, strata[rounds - served[0].round, row], ~gold.right)


def joined(served: Sequence[Served], labels: Labels) -> dict[str, np.ndarray]:
    """Votes with the tokens they are about, as rows of a replay; skips are left out.

    Args:
        served: rounds in order, without gaps.
        labels: votes on their items; item = round * B + row.
    """
    rows = np.flatnonzero(labels.vote != VOTE_SKIP)
    rounds, row = np.divmod(labels.item[rows], len(served[-1].stratum))
    place = rounds - served[0].round
    known = {one.round for one in served}
    assert set(np.unique(rounds)) <= known, "labels for rounds that are no longer held"
    ids, mask, prompt_ids, prompt_mask = (
        np.stack([getattr(one.compared, name).numpy() for one in served])
        for name in ("ids", "mask", "prompt_ids", "prompt_mask")
    )
    each = ids.shape[1] // len(served[-1].stratum)  # K, or 2 of a recorded pair
    row_a = row * each + labels.a[rows]
    row_b = row * each + labels.b[rows]
    vote = labels.vote[rows]
    return {
        "prompt_ids": prompt_ids[place, row_a],
        "prompt_mask": prompt_mask[place, row_a],
        "a_ids": ids[place, row_a],
        "a_mask": mask[place, row_a],
        "b_ids": ids[place, row_b],
        "b_mask": mask[place, row_b],
        "label_id": labels.label_id[rows],
        "item": labels.item[rows],
        "annotator_id": labels.annotator[rows],
        "target": np.where(vote == VOTE_TIE, 0.5, vote == VOTE_A).astype(np.float32),
        "weight": labels.weight[rows].astype(np.float32),
        "round": labels.round[rows],
        "stratum": np.stack([one.stratum for one in served])[place, row],
    }


def prompts_of(observation: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """(B, P) token ids and mask of an observation's prompts."""
    ids, mask = observation["prompt_ids"], observation["prompt_mask"]
    return torch.from_numpy(np.asarray(ids, np.int64)), torch.from_numpy(np.asarray(mask, np.int64))


def responses_of(sampled: Sampled, k: int, version: int) -> Responses:
    """What crosses to the environment: (B, K, T) answers of policy ``version``, K = ``k``."""
    ids, mask = sampled.sequences.ids.numpy(), sampled.sequences.mask.numpy()
    shape = (len(ids) // k, k, ids.shape[1])
    return Responses(
        ids.reshape(shape),
        mask.reshape(shape).astype(np.int8),
        sampled.logprobs.numpy().reshape(shape),
        version,
    )
