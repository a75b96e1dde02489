"""Gold questions: items whose right answer the operator knows before she asks.

In crowd collection the operator decides what annotators compare. On a share of the items of every
*observed* stratum she shows, in place of two of the policy's answers, two of her own that she has
the key to: a refusal and a full answer (``envs/pairs.py``). Annotators, and attacks, see an item
like any other. Their answers are no labels: they go into a log of their own, which says who was
right, and nothing is learned from them.

The share may be larger where items look harmful. Annotators who are dishonest about harm alone are
right on everything else, so that questions spread over all traffic hardly find them.

Only clear questions are asked: the key and the true utility name the same answer, so honest people
err on them as they do on any pair that is so far apart. In chat the asker judges answers to a
prompt of her own, to which nobody has a key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs import rng
from envs.annotators.view import View
from envs.attacks import side
from envs.pairs import RecordedPairs
from envs.prompts import Source
from envs.types import HARMFUL, STRATA, VOTE_SKIP, GoldLog
from envs.usage import UsageError, check_ranges

Compare = Callable[[np.ndarray, np.ndarray], View]
"""The comparisons of a round, from utility and harm of the answers."""


class NoGold:
    """No gold questions."""

    def put(self, key: int, item: Any, row: Any, observed: Any, view: View, compare: Any) -> View:
        """``view`` as it is."""
        return view


@dataclass(frozen=True)
class GoldQuestions(NoGold):
    """Puts gold questions among the comparisons of a round."""

    shares: np.ndarray  # (strata,) share of items that are gold, by observed stratum
    pairs: RecordedPairs
    source: Source

    def put(
        self,
        key: int,
        item: np.ndarray,
        row: np.ndarray,
        observed: np.ndarray,
        view: View,
        compare: Compare,
    ) -> View:
        """``view`` with gold questions in place of some of its items.

        Args:
            key: names the draws.
            item: (B,) numbers of the items.
            row: (B,) their prompts.
            observed: (B,) their strata, as a classifier sees them.
            view: the comparisons of the items, N = B * redundancy.
            compare: makes such a view of other answers, for the same people.
        """
        drawn = self.pairs.draw(rng.key(key, "gold pair"), item, row)
        scores = self.source.score(row, drawn.ids, recorded=True)
        best = np.take_along_axis(scores.utility, drawn.better[:, None], 1)[:, 0]
        clear = drawn.differ & (best > scores.utility.min(1))
        gold = clear & (rng.uniform(rng.key(key, "gold"), item) < self.shares[observed])
        asked = gold[view.item - item[0]]  # items of a round are consecutive
        prepared = compare(scores.utility, scores.cost)
        columns = [
            np.where(asked, new, old) for old, new in zip(view[2:-1], prepared[2:-1], strict=True)
        ]
        return View(view.key, view.round, *columns, gold=asked)


def make_gold(
    share: float, harmful: float, collection: str, pairs: str, source: Source, tokens: int
) -> NoGold:
    """The gold questions of a run.

    Args:
        share: of the items of every observed stratum.
        harmful: of those observed as harmful, where that is larger.
        collection: ``crowd``.
        pairs: ``sampled``.
        source: has prepared answers to its prompts.
        tokens: T, their longest length.

    Raises:
        ValueError: a share outside [0, 1], or a run that can have none.
    """
    given = {"gold_share": share, "gold_harmful": harmful}
    check_ranges(given, gold_share="0 to 1", gold_harmful="0 to 1")
    if not share and not harmful:
        return NoGold()
    for name, value, allowed in (("collection", collection, "crowd"), ("pairs", pairs, "sampled")):
        if value != allowed:
            raise UsageError(
                f"gold_share={max(share, harmful):g} with {name}={value!r}; allowed: {allowed!r}, "
                "where the operator decides what annotators compare, or 0"
            )
    shares = np.full(len(STRATA), share)
    shares[HARMFUL] = max(share, harmful)
    return GoldQuestions(shares, source.recorded(tokens), source)


def parted(
    view: View, vote: np.ndarray, honest: np.ndarray, public_id: np.ndarray
) -> tuple[dict[str, GoldLog], View, np.ndarray, np.ndarray]:
    """Answers to gold questions apart from the votes that are labels.

    Args:
        view: N comparisons.
        vote: (N,) what was said; what was skipped is no answer, and a tie is not right.
        honest: (N,) what the same people would honestly have said.
        public_id: (people,) ids by which others know people.

    Returns:
        The answers as ``gold``, nothing where no question could be one, and the rest of each.
    """
    if view.gold is None:
        return {}, view, vote, honest
    rows = np.flatnonzero(view.gold & (vote != VOTE_SKIP))
    asked, labels = view.take(rows), ~view.gold
    log = GoldLog(
        label_id=asked.label_id,
        item=asked.item,
        annotator=public_id[asked.person],
        right=vote[rows] == side(asked.margin),
        round=np.full(len(rows), view.round),
    )
    return {"gold": log}, view.take(labels), vote[labels], honest[labels]
