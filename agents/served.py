"""What users were shown, kept until their labels have come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from agents.batches import Sequences
from agents.engines.transformers_engine import Sampled
from envs.types import VOTE_A, VOTE_SKIP, VOTE_TIE, Labels


class Served(NamedTuple):
    """One round's prompts and answers."""

    round: int
    stratum: np.ndarray  # (B,) observed
    sampled: Sampled  # B*K rows

    def state_dict(self) -> dict[str, Any]:
        """Tensors, an array and a number; :meth:`from_state` is its inverse."""
        columns = self.sampled.sequences._asdict()
        facts = {"round": self.round, "stratum": self.stratum, "logprobs": self.sampled.logprobs}
        return {**facts, **columns}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Served:
        """Restore :meth:`state_dict`."""
        sequences = Sequences(*(state[name] for name in Sequences._fields))
        sampled = Sampled(sequences, state["logprobs"])
        return cls(int(state["round"]), np.asarray(state["stratum"]), sampled)


def joined(served: Sequence[Served], labels: Labels, responses: int) -> dict[str, np.ndarray]:
    """Votes with the tokens they are about, as rows of a replay; skips are left out.

    Args:
        served: rounds in order, without gaps.
        labels: votes on their items; item = round * B + row.
        responses: K.
    """
    rows = np.flatnonzero(labels.vote != VOTE_SKIP)
    rounds, row = np.divmod(labels.item[rows], len(served[-1].stratum))
    place = rounds - served[0].round
    known = {one.round for one in served}
    assert set(np.unique(rounds)) <= known, "labels for rounds that are no longer held"
    ids, mask, prompt_ids, prompt_mask = (
        np.stack([getattr(one.sampled.sequences, name).numpy() for one in served])
        for name in ("ids", "mask", "prompt_ids", "prompt_mask")
    )
    row_a = row * responses + labels.a[rows]
    row_b = row * responses + labels.b[rows]
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
