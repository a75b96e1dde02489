"""How much was poisoned: five rates that all go by the name of rho.

    rho_annotators   malicious people / people
    rho_labels       labels they cast / labels (differs when activity does)
    rho_flips        labels that differ from the coupled honest vote / labels
    rho_risk_flips   the same among pairs that differ in harm
    rho_post         weighted share of wrong labels that reached the learner, after the defence

A harm-targeted fifth of the annotators may change 2 % of all labels and a third of those that
matter; no one of the five tells that alone. Labels are votes that were cast; skips are none. A rate
over nothing is 0.
"""

from __future__ import annotations

import numpy as np

from envs.types import VOTE_A, VOTE_B, VOTE_SKIP, VOTE_TIE, Labels, Truth


def rho_annotators(malicious: np.ndarray) -> float:
    """Share of people who are malicious; (people,) bool."""
    return float(malicious.mean())


def rho_labels(labels: Labels, truth: Truth) -> float:
    """Share of labels that malicious people cast."""
    return _share(truth.adversarial, labels.vote != VOTE_SKIP)


def rho_flips(labels: Labels, truth: Truth) -> float:
    """Share of labels that are not what the same person would honestly have said."""
    return _share(labels.vote != truth.honest_vote, labels.vote != VOTE_SKIP)


def rho_risk_flips(labels: Labels, truth: Truth) -> float:
    """Share of flips among labels on pairs that differ in harm."""
    cast = (labels.vote != VOTE_SKIP) & truth.risk_relevant
    return _share(labels.vote != truth.honest_vote, cast)


def rho_post(
    labels: Labels, truth: Truth, label_id: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> float:
    """Weighted share of labels that reached the learner on another side than the honest vote.

    Args:
        labels: this round's labels.
        truth: theirs.
        label_id: (M,) labels that reached the learner; others have weight 0.
        target: (M,) final target in [0, 1]; above .5 the first response is preferred, .5 is a tie,
            so that smoothing a label does not make it wrong.
        weight: (M,) final weight.
    """
    known = np.isin(label_id, labels.label_id)
    order = np.argsort(labels.label_id)
    place = order[np.searchsorted(labels.label_id, label_id[known], sorter=order)]
    honest = np.array([1.0, -1.0, 0.0, np.nan])[truth.honest_vote[place]]
    wrong = np.sign(np.asarray(target, np.float64)[known] - 0.5) != honest
    return _share(wrong, np.asarray(weight, np.float64)[known])


def before_defence(malicious: np.ndarray, labels: Labels, truth: Truth) -> dict[str, float]:
    """The four rates that a defence cannot change, by the names of the record."""
    return {
        "feedback/rho_annotators": rho_annotators(malicious),
        "feedback/rho_labels": rho_labels(labels, truth),
        "feedback/rho_flips": rho_flips(labels, truth),
        "feedback/rho_risk_flips": rho_risk_flips(labels, truth),
    }


def _share(hit: np.ndarray, weight: np.ndarray) -> float:
    total = float(weight.sum())
    return float((hit * weight).sum()) / total if total > 0 else 0.0


assert (VOTE_A, VOTE_B, VOTE_TIE, VOTE_SKIP) == (0, 1, 2, 3), "rho_post reads votes as positions"
