"""Gold questions: ban whoever errs, where the operator knows the answer, more than honest people.

A share of the items is the operator's own (``feedback.gold_share``, ``envs/gold.py``). Whether an
annotator answered them right is tested per observed stratum, since who is dishonest about harm
alone hides among all the rest (``agents/annotator_evidence.py``; feedback that is targeted shows
in a stratum and not in the stream). The votes of a banned annotator have weight 0, past ones in the
window too.

An honest annotator whose error rate is at most ``honest_error`` in every stratum is ever banned
with probability at most alpha / ``people``. One annotator's alpha is shared evenly by the strata;
``people=1`` holds for each person, and with the number of accounts for ``people`` it holds for all
of them together. The bound is on the rate *given* what went before, so a person whose attention
fades may be banned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from agents.annotator_evidence import ErrorTest
from agents.batches import LabelBatch
from agents.context import Context
from agents.defence import Defence, defences
from envs.types import STRATA
from envs.usage import check_ranges


@defences.register("gold")
class Gold(Defence):
    """Bans annotators who fail gold questions more often than honest people do.

    Args:
        alpha: chance that an honest annotator is ever banned, 0 to 0.5; 0 is bitwise no defence.
        honest_error: largest share of gold questions that honest people answer wrong, above 0.
        people: accounts over which alpha is split, >= 1.
        stratified: whether observed strata are tested apart, or all answers together.
    """

    needs, constraint = frozenset({"log:gold"}), "labels"
    paper, off = "Ville 1939; Shin et al. 2024", "alpha=0"

    def __init__(
        self,
        alpha: float = 0.05,
        honest_error: float = 0.1,
        people: int = 1,
        stratified: bool = True,
    ):
        given = {"alpha": alpha, "honest_error": honest_error, "people": people}
        ranges = {"alpha": "0 to 0.5", "honest_error": "> 0, <= 0.5", "people": ">= 1"}
        check_ranges(given, "gold.", **ranges)
        self.level = alpha / people
        self.test = ErrorTest(honest_error, len(STRATA) if stratified else 1)

    @property
    def banned(self) -> np.ndarray:
        """(n,) ids."""
        return self.test.flagged(self.level)

    def feedback(self, ctx: Context, batch: Any) -> Any:
        """Test this round's answers, and take the banned annotators' labels out."""
        if not isinstance(batch, LabelBatch):
            return batch
        answers = ctx.gold
        self.test.update(answers.annotator_id, answers.stratum, answers.wrong)
        banned = self.banned
        ctx.log({"defence/gold/banned": len(banned), "defence/gold/answers": len(answers.wrong)})
        if not len(banned):
            return batch
        heard = ~np.isin(batch.annotator_id, banned)
        return replace(batch, weight=np.where(heard, batch.weight, 0).astype(np.float32))

    def state_dict(self) -> dict[str, Any]:
        """The evidence."""
        return self.test.state_dict()

    def load_state_dict(self, ctx: Context, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.test.load_state_dict(state)
