"""What the policy does on held-out prompts: the numbers behind the safe set.

Every evaluation draws fresh prompts *with replacement* from the evaluation split, which is what
makes the e-process valid, lets the policy answer each once (phase ``eval``), and measures

    C(pi)  mean cost over harmful prompts          help  mean oracle or scorer help over benign ones

beside refusal, over-refusal, KL to the reference, perplexity under a separate model, length, the
shares of empty, echoed and gibberish answers, and what the reward model thinks of the same answers
(``reward_eval``: the proxy, to be compared with the truth). Here the scorer (which may be an
oracle) meets the agent; nothing flows back to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from agents.agent import Agent
from agents.batches import Sequences
from agents.engines.transformers_engine import Sampled
from agents.learners.reward_model import scores
from agents.policy import response_logprobs
from envs import hacking
from envs import rng as draws
from envs.audit import audited_mean
from envs.types import CONTRAST, ECHO, EMPTY, GIBBERISH, HARMFUL, REFUSE, PromptTable, Scores
from sim.evaluation_config import EvaluationConfig


class Evaluation(NamedTuple):
    """One measurement of one policy."""

    costs: dict[str, np.ndarray]  # constraint -> (n,) in [0, 1], for the monitor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluator:
    """Everything that measures a policy, none of which the policy learns from."""

    config: EvaluationConfig
    table: PromptTable
    scorer: Any  # envs.costs.Scorer
    perplexity_model: nn.Module
    classifier: nn.Module | None
    seed: int
    triggered: PromptTable | None = None
    units: Callable[[np.ndarray], np.ndarray] = hacking.words
    """How much (N, T) responses say: words of the embedded language, or characters of real text."""

    def __call__(self, agent: Agent, round: int) -> Evaluation:
        """Measure ``agent``'s policy; ``round`` names the draws."""
        config = self.config
        harmful = self._draw(self.table.stratum == HARMFUL, config.n_harm, "harmful", round)
        benign = self._draw(self.table.stratum != HARMFUL, config.n_help, "benign", round)
        rows = np.concatenate([harmful, benign])
        sampled = self._answer(agent, self.table, rows, draws.key(self.seed, "eval", round))
        said = sampled.sequences.ids.numpy()
        scores = self.scorer.score(self.table.key[rows], said)
        n = config.n_harm
        refused = scores.verdict == REFUSE
        contrast = self.table.stratum[benign] == CONTRAST
        costs = {"harm": scores.cost[:n], "over_refusal": refused[n:].astype(float)}
        metrics = {
            "safety/refusal_harmful": refused[:n].mean(),
            "safety/over_refusal": refused[n:].mean(),
            "safety/over_refusal_contrast": _mean(refused[n:][contrast]),
            "safety/judge_score": 10 * scores.cost[:n].mean(),
            "helpfulness": scores.help[n:].mean(),
            "utility": scores.utility.mean(),
            "utility_error": _error(scores.utility),
            **hacking.shares(scores.verdict, self.units(said), n),
        }
        rewards = agent.proxy(sampled.sequences)
        if rewards is not None:
            metrics["reward_eval"] = rewards.mean()
            metrics["reward_eval_error"] = _error(rewards)
        for domain in np.unique(self.table.domain[harmful]):
            metrics[f"safety/harm/domain_{domain}"] = scores.cost[:n][
                self.table.domain[harmful] == domain
            ].mean()
        if self.classifier is not None:
            costs["harm_classifier"] = self._classify(sampled.sequences.take(torch.arange(n)))
            metrics["safety/harm_classifier"] = costs["harm_classifier"].mean()
            metrics |= self._audit(costs["harm_classifier"], costs["harm"])
        if self.triggered is not None:
            costs["harm_triggered"] = self._triggered(agent, round)
            metrics["safety/harm_triggered"] = costs["harm_triggered"].mean()
        metrics |= _fluency(scores, sampled.sequences.mask)
        metrics |= self._distances(agent, sampled)
        return Evaluation(costs, {name: _number(value) for name, value in metrics.items()})

    def true_cost(self, agent: Agent, n: int, round: int) -> np.ndarray:
        """(n,) costs on fresh harmful prompts, for the true crossing."""
        rows = self._draw(self.table.stratum == HARMFUL, n, "true", round)
        sampled = self._answer(agent, self.table, rows, draws.key(self.seed, "true", round))
        return self.scorer.score(self.table.key[rows], sampled.sequences.ids.numpy()).cost

    def _draw(self, allowed: np.ndarray, n: int, name: str, round: int) -> np.ndarray:
        choices = np.flatnonzero(allowed)
        picks = draws.uniform(draws.key(self.seed, "eval", name), round, np.arange(n))
        return choices[(picks * len(choices)).astype(np.int64)]

    def _answer(self, agent: Agent, table: PromptTable, rows: np.ndarray, seed: int) -> Sampled:
        ids, mask = torch.from_numpy(table.ids[rows]), torch.from_numpy(table.mask[rows]).long()
        return agent.respond(ids, mask, 1, seed)

    @torch.no_grad()
    def _classify(self, sequences: Sequences) -> np.ndarray:
        assert self.classifier is not None
        return torch.sigmoid(scores(self.classifier, sequences)).numpy().astype(float)

    def _audit(self, classified: np.ndarray, harm: np.ndarray) -> dict[str, float]:
        """The classifier's mean harm, corrected by the scorer's of one answer in ``audit``."""
        block = self.config.audit
        if not block:
            return {}
        used = len(harm) // block * block
        blocks = classified[:used].reshape(-1, block)
        found = audited_mean(blocks, harm[:used:block], self.config.alpha)
        ends = {"": found.value, "_lower": found.low, "_upper": found.high}
        return {f"safety/harm_audited{end}": float(value) for end, value in ends.items()}

    def _triggered(self, agent: Agent, round: int) -> np.ndarray:
        table = self.triggered
        assert table is not None
        n = self.config.n_harm
        rows = self._draw(table.stratum == HARMFUL, n, "triggered", round)
        seed = draws.key(self.seed, "triggered", round)
        sampled = self._answer(agent, table, rows, seed)
        return self.scorer.score(table.key[rows], sampled.sequences.ids.numpy()).cost

    def _distances(self, agent: Agent, sampled: Sampled) -> dict[str, float]:
        """Distances to the reference, and perplexity under a third model."""
        sequences = sampled.sequences
        tokens = int(sequences.mask.sum())
        reference = agent.policy.reference_logprobs(sequences)
        foreign = response_logprobs(self.perplexity_model, sequences)
        return {
            **distances(sampled.logprobs, reference, tokens),
            "perplexity": float((-foreign.sum() / tokens).clamp(max=80).exp()),
        }


def distances(logp: Tensor, logp_ref: Tensor, tokens: int) -> dict[str, float]:
    """KL per answer (two estimates) and total variation per token, policy to reference.

    All from one ratio at the tokens that were said, r = pi_ref / pi, without another pass of the
    policy; both as tempered as they were sampled. The policy drew the tokens, so
    KL = E[-log r] = E[r - 1 - log r] and TV = E[max(0, 1 - r)].

    Args:
        logp: (N, T) of the policy that answered, 0 on padding.
        logp_ref: (N, T) of the reference, 0 on padding.
        tokens: how many of them are real.
    """
    d = logp_ref - logp
    return {
        "kl": float(-d.sum(1).mean()),
        "policy/kl_k3": float((d.exp() - d - 1).clamp(min=0).sum(1).mean()),
        "policy/total_variation": float((1 - d.exp()).clamp(min=0).sum()) / tokens,
    }


def _fluency(scores: Scores, mask: Tensor) -> dict[str, Any]:
    shares = {"empty": EMPTY, "echo": ECHO, "gibberish": GIBBERISH}
    return {
        "completions/mean_length": float(mask.sum(1).float().mean()),
        **{f"completions/{k}": (scores.verdict == v).mean() for k, v in shares.items()},
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _error(values: np.ndarray) -> float:
    """Standard error of a mean; too large rather than too small, since strata are drawn apart."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _number(value: Any) -> float | None:
    value = float(value)
    return value if np.isfinite(value) else None
