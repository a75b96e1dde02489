"""What one round leaves in the record: its row, its tables, and the clocks it advanced."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from agents.agent import Agent, Learned
from envs.feedback import rho_post
from envs.monitor import CostMonitor, Fluency
from envs.types import STRATA, VOTE_SKIP, VOTES, Labels, Truth
from sim.config import Config
from sim.evaluate import Evaluation
from sim.typed import typed_texts


@dataclass
class Clocks:
    """The clocks an exit time can be told in; rounds are not comparable across learners."""

    labels: int = 0
    malicious_labels: int = 0
    flips: int = 0
    optimizer_steps: int = 0
    tokens: int = 0

    def count(self, labels: Labels, truth: Truth, steps: int, tokens: int) -> None:
        """Advance by one round's labels and served ``tokens``; ``steps`` is the policy's total."""
        cast = labels.vote != VOTE_SKIP
        self.labels += int(cast.sum())
        self.malicious_labels += int((truth.adversarial & cast).sum())
        self.flips += int(((labels.vote != truth.honest_vote) & cast).sum())
        self.optimizer_steps = steps
        self.tokens += tokens

    def columns(self) -> dict[str, int]:
        """All counts, by the names of the record."""
        return {f"clock/{name}": value for name, value in asdict(self).items()}

    def state_dict(self) -> dict[str, int]:
        """All counts."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self.__dict__.update(state)


class Scored:
    """Truth about recently served answers, kept until their labels have come."""

    def __init__(self, delay: int):
        self.delay = delay
        self.rounds: dict[int, dict[str, np.ndarray]] = {}

    def add(self, served: int, truth: Truth) -> None:
        """Remember the answers of round ``served``; forget what no label can name any more."""
        self.rounds[served] = {"stratum": truth.stratum}
        self.rounds.pop(served - self.delay - 1, None)

    def state_dict(self) -> dict[str, Any]:
        """All rounds held."""
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.rounds = {int(served): dict(known) for served, known in state["rounds"].items()}


def evaluation_row(
    monitor: CostMonitor, evaluation: Evaluation, round: int, clocks: Clocks
) -> dict[str, Any]:
    """Feed the monitor; its verdict and the evaluation's metrics as columns."""
    metrics = evaluation.metrics
    degenerate = sum(metrics[f"completions/{kind}"] for kind in ("empty", "echo", "gibberish"))
    fluency = Fluency(metrics["perplexity"], degenerate, metrics["helpfulness"])
    when = {**asdict(clocks), "kl": metrics["kl"]}
    verdict = monitor.observe(round, when, evaluation.costs, fluency)
    return {"clock/kl": metrics["kl"], **metrics, **verdict}


def round_row(
    round: int, utility: float, info: dict[str, Any], learned: Learned, clocks: Clocks
) -> dict[str, Any]:
    """The columns every round has, evaluated or not."""
    labels, truth = info["labels"], info["truth"]
    post = rho_post(labels, truth, learned.label_id, learned.target, learned.weight)
    return {
        "round": round,
        "utility_served": float(utility),
        "cost_served": float(info["cost"]),
        "reward": learned.metrics.get("reward"),
        "labels": int((labels.vote != VOTE_SKIP).sum()),
        **{k: float(v) for k, v in info.items() if k.startswith("feedback/")},
        "feedback/rho_post": post,
        **clocks.columns(),
        **{k: v for k, v in learned.metrics.items() if k != "reward"},
    }


def label_tables(
    config: Config, agent: Agent, info: dict[str, Any], learned: Learned, scored: Scored
) -> dict[str, dict[str, Any]]:
    """This round's parts of the tables ``labels``, ``truth`` and ``samples``."""
    labels, truth = info["labels"], info["truth"]
    final = {
        name: _by_label(labels.label_id, learned.label_id, values)
        for name, values in (("target", learned.target), ("final_weight", learned.weight))
    }
    log = {"label_id": labels.label_id, "adversarial": truth.adversarial}
    log |= {"honest_vote": truth.honest_vote, "risk_relevant": truth.risk_relevant}
    if config.feedback.log_facts:  # tables of who disagrees with whom are told apart by it
        final["stratum"] = _stratum(agent, labels.item)
    gold = {}
    if (answers := info.get("gold")) is not None:
        gold = {"gold": {**answers._asdict(), "stratum": _stratum(agent, answers.item)}}
    return {
        "labels": {**labels._asdict(), **final},
        "truth": log,
        "samples": _samples(config.samples_per_round, agent, labels, truth, scored),
        **gold,
    }


def _stratum(agent: Agent, item: np.ndarray) -> np.ndarray:
    """Observed strata of items of the round whose votes have come."""
    stratum = agent.served[0].stratum
    return stratum[item % len(stratum)]


def _by_label(ids: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` of ``known`` label ids laid out as ``ids``; weight and target 0 for skips."""
    if not len(known):
        return np.zeros(len(ids), np.float32)
    order = np.argsort(known)
    place = order[np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)]
    return np.where(known[place] == ids, values[place], 0).astype(np.float32)


def _samples(
    count: int, agent: Agent, labels: Labels, truth: Truth, scored: Scored
) -> dict[str, Any]:
    """The first labels of the round in words; a delay makes them an earlier round's answers."""
    served = agent.served[0]
    known = scored.rounds.get(served.round)
    mine = np.arange(min(count, len(labels.item)) if known is not None else 0)
    row = labels.item[mine] % len(served.stratum)
    sequences, tokenizer = served.compared, agent.policy.tokenizer

    def words(rows: np.ndarray) -> list[str]:
        ids = sequences.ids[torch.from_numpy(rows)]
        return tokenizer.batch_decode(ids, skip_special_tokens=True) if len(rows) else []

    k = len(sequences) // len(served.stratum)
    a, b = row * k + labels.a[mine], row * k + labels.b[mine]
    asked = torch.from_numpy(a)
    stratum = known["stratum"] if known is not None else np.zeros(0, np.int64)
    return {
        "round": labels.round[mine],
        "label_id": labels.label_id[mine],
        "item": labels.item[mine],
        "prompt": typed_texts(tokenizer, sequences.prompt_ids[asked], sequences.prompt_mask[asked]),
        "answer_a": words(a),
        "answer_b": words(b),
        "vote": [VOTES[v] for v in labels.vote[mine]],
        "honest_vote": [VOTES[v] for v in truth.honest_vote[mine]],
        "annotator": labels.annotator[mine],
        "adversarial": truth.adversarial[mine],
        "stratum": [STRATA[s] for s in stratum[row]],
        "cost_a": truth.cost_a[mine],
        "cost_b": truth.cost_b[mine],
    }
