"""How well malicious annotators can be told from honest ones, by labels seen.

Everybody gets a score from what an operator sees, her rate of errors so far: wrong answers to gold
questions, or disagreement with the majority of the others on an item, over everything or on items
observed as harmful alone. Rates are shrunk towards the mean of all by one answer, so that who has
hardly answered stands in the middle. People who were never asked for a vote have no part: nobody
recorded on which side they were.

AUC is the chance that a malicious annotator scores above an honest one (ties count half), within a
run, averaged over runs. TPR is the share of malicious annotators above the score that at most 1 %
of the honest ones of all runs of the arm exceed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from envs.annotators.view import consensus, directions
from envs.types import HARMFUL
from envs.usage import UsageError
from sim.analysis.load import Run, by_arm

SEEN = (0.125, 0.25, 0.5, 1.0)
"""Shares of a run's rounds after which people are scored."""
FPR = 0.01
EVIDENCE = ("gold", "gold, harmful", "peers", "peers, harmful")


class _Log(NamedTuple):
    """What there is about the annotators of one run."""

    errors: dict[str, pd.DataFrame]  # by kind: round, annotator, stratum, wrong
    labels: pd.Series  # rounds of all votes cast
    asked: np.ndarray  # (people,) bool, who was ever asked for a vote
    malicious: np.ndarray  # (people,) bool, of those
    rounds: int


def supports(runs: Iterable[Run]) -> bool:
    """Whether a run has malicious annotators and evidence about them."""
    return any(attack_watched(run) for run in runs)


def attack_watched(run: Run) -> bool:
    """Whether ``run`` has ended, is no fork, and has attackers whom a detector watched."""
    watched = bool(run.summary.get("detected")) and not run.fork
    return watched and bool((run.column("feedback/rho_annotators") > 0).any())


def detection_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per attacked arm, kind of evidence and share of the run.

    Returns:
        Columns arm, rho, evidence (of :data:`EVIDENCE`), labels (votes cast by then, mean), runs,
        auc, error (standard error over runs, None for one), tpr, malicious, honest (people who were
        asked in all runs; without both AUC and TPR are NaN).

    Raises:
        ValueError: no run with malicious annotators and evidence about them.
    """
    known = [run for run in runs if attack_watched(run)]
    if not known:
        raise UsageError(
            "runs: none with malicious annotators who were watched; allowed: runs in crowd "
            "collection with gold questions or redundancy >= 2"
        )
    rows: list[dict[str, Any]] = []
    for arm, members in by_arm(known).items():
        logs = [_read(run) for run in members]
        for evidence in EVIDENCE:
            if all(evidence.partition(",")[0] in log.errors for log in logs):
                rows += [
                    {"arm": arm, "rho": members[0].rho, "evidence": evidence}
                    | _row(logs, evidence, share)
                    for share in SEEN
                ]
    return pd.DataFrame(rows)


def _read(run: Run) -> _Log:
    labels = run.table("labels").merge(run.table("truth"), on="label_id", sort=True)
    people = int(run.config["feedback"]["annotators"])
    asked, malicious = np.zeros((2, people), bool)
    asked[labels["annotator"]] = True
    malicious[labels.loc[labels["adversarial"], "annotator"]] = True
    errors = {}
    gold = run.table("gold")
    if len(gold):
        errors["gold"] = gold.assign(wrong=~gold["right"])
    direction = directions(labels["a"], labels["b"], labels["vote"])
    others = consensus(labels["item"].to_numpy(), direction)
    judged = (direction != 0) & (others != 0)
    if judged.any() and "stratum" in labels and labels["stratum"].notna().all():
        errors["peers"] = labels.assign(wrong=direction != others)[judged]
    rounds = int(run.rounds["round"].max())
    return _Log(errors, labels.loc[direction != 0, "round"], asked, malicious, rounds)


def _row(logs: list[_Log], evidence: str, share: float) -> dict[str, Any]:
    scores = [_score(log, evidence, share) for log in logs]
    parted = [
        (score[log.malicious], score[log.asked & ~log.malicious])
        for log, score in zip(logs, scores, strict=True)
    ]
    areas = [auc(*sides) for sides in parted]
    malicious, honest = map(np.concatenate, zip(*parted, strict=True))
    seen = [(log.labels < share * log.rounds).sum() for log in logs]
    spread = np.std(areas, ddof=1) / np.sqrt(len(areas)) if len(areas) > 1 else None
    return {
        "labels": float(np.mean(seen)),
        "runs": len(logs),
        "auc": float(np.mean(areas)),
        "error": spread,
        "tpr": tpr(malicious, honest),
        "malicious": len(malicious),
        "honest": len(honest),
    }


def _score(log: _Log, evidence: str, share: float) -> np.ndarray:
    """(people,) shrunk error rates."""
    kind, _, part = evidence.partition(", ")
    rows = log.errors[kind]
    rows = rows[rows["round"] < share * log.rounds]
    rows = rows[rows["stratum"] == HARMFUL] if part else rows
    people = len(log.malicious)
    count = np.bincount(rows["annotator"], minlength=people)
    wrong = np.bincount(rows["annotator"], rows["wrong"], minlength=people)
    mean = wrong.sum() / max(1, count.sum())
    return (wrong + mean) / (count + 1)


def auc(malicious: np.ndarray, honest: np.ndarray) -> float:
    """Chance that one of (m,) scores is above one of (h,), ties counting half; NaN without both."""
    from scipy.stats import rankdata

    m, h = len(malicious), len(honest)
    if not m or not h:
        return float("nan")
    ranks = rankdata(np.concatenate([malicious, honest]))[:m]
    return float((ranks.sum() - m * (m + 1) / 2) / (m * h))


def tpr(malicious: np.ndarray, honest: np.ndarray, fpr: float = FPR) -> float:
    """Share of (m,) scores above the lowest that at most a share ``fpr`` of (h,) exceed, or NaN."""
    if not len(malicious) or not len(honest):
        return float("nan")
    allowed = int(fpr * len(honest) + 1e-9)
    limit = np.sort(honest)[::-1][allowed]  # whoever is above it: at most ``allowed``
    return float((malicious > limit).mean())
