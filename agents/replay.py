"""A bounded window of labelled comparisons, as columns.

Rows are token ids of prompt and both responses with the label's present target and weight. The
``feedback`` hook on a :class:`LabelBatch` rewrites targets and weights of the whole window once a
round, which is where aggregation, gold questions and bans act.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agents.batches import LabelBatch, PairBatch, Sequences

_TOKENS = ("prompt_ids", "prompt_mask", "a_ids", "a_mask", "b_ids", "b_mask")
_LOG = ("label_id", "item", "annotator_id", "target", "weight", "round", "stratum")


class Replay:
    """The newest ``window`` labels."""

    def __init__(self, window: int):
        self.window = window
        self.columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.columns.get("label_id", ()))

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Append label rows; the oldest leave when the window is full."""
        assert set(rows) == {*_TOKENS, *_LOG}, sorted(rows)
        for name, column in rows.items():
            old = self.columns.get(name)
            joined = column if old is None else np.concatenate([old, column])
            self.columns[name] = joined[-self.window :]

    def log(self, newest: int) -> LabelBatch:
        """The window as a label batch; the last ``newest`` rows are new."""
        columns = {name: self.columns.get(name, np.zeros(0)) for name in _LOG}
        new = np.arange(len(self)) >= len(self) - newest
        return LabelBatch(**columns, new=new, swapped=self._swapped())

    def _swapped(self) -> np.ndarray:
        """(N,) whether the answer shown first is the later one in the order of token ids."""
        if not len(self):
            return np.zeros(0, bool)
        a, b = self.columns["a_ids"], self.columns["b_ids"]
        first, row = (a != b).argmax(1), np.arange(len(a))  # where the two differ first
        return a[row, first] > b[row, first]

    def revise(self, batch: LabelBatch) -> None:
        """Take over targets and weights from a label batch; labels it dropped get weight 0."""
        if not len(self):
            return
        order = np.argsort(batch.label_id)
        place = np.searchsorted(batch.label_id, self.columns["label_id"], sorter=order)
        place = order[np.minimum(place, max(len(order) - 1, 0))] if len(order) else place * 0
        kept = (
            batch.label_id[place] == self.columns["label_id"]
            if len(order)
            else np.zeros(len(self), bool)
        )
        for name in ("target", "weight"):
            values = getattr(batch, name)
            fallback = self.columns[name] if name == "target" else np.zeros(len(self), np.float32)
            revised = values[place] if len(order) else fallback
            self.columns[name] = np.where(kept, revised, fallback).astype(np.float32)

    def usable(self) -> np.ndarray:
        """Rows with positive weight."""
        return np.flatnonzero(self.columns["weight"] > 0) if len(self) else np.zeros(0, np.int64)

    def pairs(self, rows: np.ndarray) -> PairBatch:
        """The comparisons ``rows`` as tensors."""
        take = {name: torch.from_numpy(column[rows]) for name, column in self.columns.items()}
        prompt = (take["prompt_ids"], take["prompt_mask"])
        return PairBatch(
            label_id=take["label_id"],
            a=Sequences(*prompt, take["a_ids"], take["a_mask"]),
            b=Sequences(*prompt, take["b_ids"], take["b_mask"]),
            target=take["target"],
            weight=take["weight"],
            annotator_id=take["annotator_id"],
        )

    def state_dict(self) -> dict[str, Any]:
        """All columns."""
        return {"columns": dict(self.columns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.columns = dict(state["columns"])
