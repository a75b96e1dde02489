"""Who would have been found out, and when: detectors that watch and do nothing.

Every annotator is tested for erring more often than honest people do
(``agents/annotator_evidence.py``), by what an operator could see, whether or not a defence acts:

    gold        answers to gold questions, observed strata apart     gold_all    the same, pooled
    peers       disagreement with the majority of the others on      peers_all   the same, pooled
                an item, observed strata apart

Whoever's evidence reaches 1 / alpha is flagged, for good. Only here is that joined with the truth:
an attack is *detected* by a detector when it has flagged at least half of the malicious annotators,
and by ``ban`` when a defence has banned the first of them. Honest people who are flagged or banned
are counted beside it.

The bound on false flags is for gold: whoever answers at most ``GOLD_ERROR`` of the questions wrong.
How often honest people disagree with each other depends on the pairs that the policy of the day
offers, so ``PEER_ERROR`` is a guess, and as attackers become many honest people disagree with
*them*. Detectors exist where the log lets them: gold with gold questions, peers with several votes
an item.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from agents.annotator_evidence import ErrorTest
from envs.annotators.view import consensus, directions
from envs.types import STRATA
from sim.rows import Clocks

ALPHA = 0.05
"""Chance that an honest person is ever flagged by one detector."""
GOLD_ERROR, PEER_ERROR = 0.1, 0.25
"""Error rates up to which people count as honest."""
FOUND = 0.5
"""Share of the malicious annotators who are flagged when an attack counts as detected."""


class Detection:
    """Detectors of one run.

    Args:
        gold: whether gold questions are asked.
        peers: whether items have several votes.
    """

    def __init__(self, gold: bool, peers: bool):
        kinds = [("gold", GOLD_ERROR)] * gold + [("peers", PEER_ERROR)] * peers
        self.tests = {
            name + suffix: ErrorTest(limit, strata)
            for name, limit in kinds
            for suffix, strata in (("", len(STRATA)), ("_all", 1))
        }
        self.watching = bool(self.tests)
        self.found: dict[str, dict[str, int]] = {}
        self.honest: dict[str, int] = {}
        self.answers = 0

    def see(
        self,
        round: int,
        info: dict[str, Any],
        stratum: np.ndarray,
        banned: np.ndarray,
        clocks: Clocks,
    ) -> dict[str, float | None]:
        """Take in one round; returns its columns ``detect/...``.

        Args:
            round: its number.
            info: what the environment told, the truth included.
            stratum: (B,) observed, of the items whose votes have come.
            banned: ids of those whom defences have banned.
            clocks: as they stand after the round.
        """
        if not self.watching:
            return {}
        for name, evidence in self._evidence(info, stratum).items():
            for suffix in ("", "_all"):
                self.tests[name + suffix].update(*evidence)
        malicious = info["truth"].malicious
        flagged = {name: test.flagged(ALPHA) for name, test in self.tests.items()}
        columns: dict[str, float | None] = {}
        for name, ids in {**flagged, "ban": banned}.items():
            caught, number = int(malicious[ids].sum()), int(malicious.sum())
            self.honest[name] = len(ids) - caught
            columns[f"detect/{name}"] = caught / number if number else None
            columns[f"detect/{name}_honest"] = self.honest[name]
            needed = 1 if name == "ban" else max(1, FOUND * number)
            if caught >= needed and name not in self.found:
                self.found[name] = {"rounds": round, **asdict(clocks)}
        if "gold" in self.tests:
            self.answers += len(info["gold"].right)
            columns["detect/gold_answers"] = self.answers
        return columns

    def _evidence(
        self, info: dict[str, Any], stratum: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Ids, strata and errors, by kind of detector."""
        found = {}
        if "gold" in self.tests:
            gold = info["gold"]
            found["gold"] = (gold.annotator, stratum[gold.item % len(stratum)], ~gold.right)
        if "peers" in self.tests:
            labels = info["labels"]
            direction = directions(labels.a, labels.b, labels.vote)
            others = consensus(labels.item, direction)
            rows = np.flatnonzero((direction != 0) & (others != 0))
            place = stratum[labels.item[rows] % len(stratum)]
            found["peers"] = (labels.annotator[rows], place, (direction != others)[rows])
        return found

    def summary(self) -> dict[str, Any]:
        """Clocks at detection by detector, None where it never came, and honest people flagged."""
        if not self.watching:
            return {}
        names = [*self.tests, "ban"]
        return {
            "detected": {name: self.found.get(name) for name in names},
            "false_flags": {name: self.honest.get(name, 0) for name in self.tests},
            "false_bans": self.honest.get("ban", 0),
        }

    def state_dict(self) -> dict[str, Any]:
        """Evidence, and what was found when."""
        tests = {name: test.state_dict() for name, test in self.tests.items()}
        counts = {"honest": self.honest, "answers": self.answers}
        return {"tests": tests, "found": self.found, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for name, test in self.tests.items():
            test.load_state_dict(state["tests"][name])
        self.found, self.honest = dict(state["found"]), dict(state["honest"])
        self.answers = int(state["answers"])
