"""Dawid-Skene: what several people say of a pair, weighed by how often each of them is right.

The answer that is truly better is hidden; annotator j names it with probability q_j (one coin), or
with a confusion matrix over the two answers. EM finds both (Dawid & Skene 1979; Zhang et al. 2016),
here crowd-kit's, on the votes that the window holds. A label's target becomes the posterior that
the answer shown first is the better one, so that votes of people who are often wrong count for
little, and those of people who are wrong more often than not count against themselves.

Nobody tells EM which of two camps is honest. Attackers who know the truth and always vote against
it take over from the share

    rho* = 1 - 1 / (2 q)

of annotators on, q the honest accuracy (.231, .333, .412 at .65, .75, .85), since the others then
look wrong more often than not; those who turn round their own noisy votes, from one half on. Gold
questions are what tells the camps apart. By stratum EM runs on every observed stratum apart, which
finds those who are dishonest in one of them alone, on fewer votes.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from agents.batches import LabelBatch
from agents.context import Context
from agents.defence import Defence, defences
from envs.usage import UsageError, check_ranges

MODELS = {"one_coin": "OneCoinDawidSkene", "confusion": "DawidSkene"}
BY = ("all", "stratum")


@defences.register("dawid_skene")
class DawidSkene(Defence):
    """Replaces votes by the posterior of an EM over annotators' accuracies (extra ``crowd``).

    Args:
        strength: share of the posterior in a label's target, 0 to 1; 0 is bitwise no defence.
        by: ``all``, or ``stratum`` for every observed stratum apart.
        model: ``one_coin``, or ``confusion``, whose two answers are told apart by their token ids.
        iterations: most EM steps, >= 1.
    """

    needs, constraint = frozenset({"log:redundant"}), "labels"
    paper, off = "Dawid & Skene 1979", "strength=0"

    def __init__(
        self,
        strength: float = 1.0,
        by: str = "all",
        model: str = "one_coin",
        iterations: int = 60,
    ):
        given = {"strength": strength, "iterations": iterations}
        check_ranges(given, "dawid_skene.", strength="0 to 1", iterations=">= 1")
        for name, value, allowed in (("by", by, BY), ("model", model, tuple(MODELS))):
            if value not in allowed:
                raise UsageError(f"dawid_skene.{name}={value!r}; allowed: {', '.join(allowed)}")
        self.strength, self.by, self.model, self.iterations = strength, by, model, iterations
        self.label_id, self.vote = np.zeros(0, np.int64), np.zeros(0, np.float32)

    def prepare(self, ctx: Context) -> None:
        """Refuse a machine without crowd-kit before anything is trained.

        Raises:
            ValueError: it is not installed.
        """
        if self.strength:
            check_installed()

    def feedback(self, ctx: Context, batch: Any) -> Any:
        """Set the targets of the window from its votes."""
        if not isinstance(batch, LabelBatch) or not self.strength:
            return batch
        vote = self._votes(batch)
        decided = (vote != 0.5) & (batch.weight > 0)
        target = batch.target.astype(np.float64)
        first = (vote > 0.5) ^ batch.swapped  # for the answer that comes first by token ids
        for rows in self._parts(batch, decided):
            found = posterior(
                batch.item[rows], batch.annotator_id[rows], first[rows], self.model, self.iterations
            )
            shown = np.where(batch.swapped[rows], 1 - found, found)
            target[rows] = (1 - self.strength) * vote[rows] + self.strength * shown
        turned = (np.sign(target - 0.5) != np.sign(vote - 0.5))[decided]
        ctx.log({"defence/dawid_skene/turned": float(turned.mean()) if turned.size else 0.0})
        return replace(batch, target=target.astype(np.float32))

    def _votes(self, batch: LabelBatch) -> np.ndarray:
        """(N,) targets as they were cast: the window holds those of an earlier posterior."""
        fresh = ~np.isin(batch.label_id, self.label_id)
        cast = batch.target.astype(np.float32)
        if len(self.label_id):
            order = np.argsort(self.label_id)
            place = np.searchsorted(self.label_id, batch.label_id, sorter=order)
            known = self.vote[order[np.minimum(place, len(order) - 1)]]
            cast = np.where(fresh, cast, known)
        self.label_id, self.vote = batch.label_id.copy(), cast
        return cast

    def _parts(self, batch: LabelBatch, decided: np.ndarray) -> list[np.ndarray]:
        """Row numbers that are fitted together; none without an item that two people decided."""
        strata = np.unique(batch.stratum) if self.by == "stratum" else [None]
        parts = [np.flatnonzero(decided & ((s is None) | (batch.stratum == s))) for s in strata]
        return [rows for rows in parts if len(np.unique(batch.item[rows])) < len(rows)]

    def state_dict(self) -> dict[str, Any]:
        """The votes of the window as they were cast."""
        return {"label_id": self.label_id, "vote": self.vote}

    def load_state_dict(self, ctx: Context, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.label_id, self.vote = np.asarray(state["label_id"]), np.asarray(state["vote"])


def check_installed() -> None:
    """Refuse where crowd-kit is not installed.

    Raises:
        ValueError: it is not.
    """
    if find_spec("crowdkit") is None:
        raise UsageError(
            "defence dawid_skene: crowd-kit is not installed; allowed: after "
            "pip install 'poisonloop[crowd]'"
        )


def posterior(
    item: np.ndarray,
    annotator: np.ndarray,
    first: np.ndarray,
    model: str = "one_coin",
    iterations: int = 60,
) -> np.ndarray:
    """(N,) probability that the first answer of each vote's item is the better one.

    Args:
        item: (N,) what was voted on.
        annotator: (N,) who voted.
        first: (N,) bool, for the first answer of the item.
        model: of :data:`MODELS`.
        iterations: most EM steps.

    Raises:
        ValueError: crowd-kit is not installed.
    """
    check_installed()
    import pandas as pd
    from crowdkit.aggregation import classification

    if first.all() or not first.any():  # one answer alone has no other to be told from
        return first.astype(np.float64)
    data = pd.DataFrame({"task": item, "worker": annotator, "label": first.astype(np.int64)})
    fit = getattr(classification, MODELS[model])(n_iter=iterations).fit(data)
    return fit.probas_[1].reindex(item).to_numpy(np.float64)
