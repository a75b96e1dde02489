"""The training system as one object: answer users, then learn from what they said.

``act`` samples what users are shown (phase ``serve``). ``learn`` takes the votes and runs, in
order: the label hooks on the window's log, the reward model, then the policy learner on whatever it
uses (rollouts scored by the *updated* reward model, labelled pairs, or voted winners). It returns
each label's final target and weight, which the outside world scores against the truth the agent
never sees.

An attacker may own the loop: then her judge stands in for the reward model, or her own pairs for
the replay, and votes are not learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.adapters import load_own_state, own_state
from agents.batches import (
    NO_ANSWERS,
    GoldAnswers,
    LabelBatch,
    PairBatch,
    RolloutBatch,
    Sequences,
    moved,
    winners,
)
from agents.context import Scorer
from agents.defence import NOBODY, DefenceStack, StopLearning
from agents.engines.mismatch import corrected
from agents.engines.transformers_engine import Sampled
from agents.learners.reward_model import RewardModel
from agents.learners.update import Diverged, Learner
from agents.policy import Policy, response_logprobs
from agents.processes import all_whole
from agents.replay import Replay
from agents.served import Served, answered, joined, prompts_of, recorded_pairs, responses_of
from envs import rng as draws
from envs.types import GoldLog, Labels, Responses


class Learned(NamedTuple):
    """What one call of ``learn`` did with each label, and its metrics."""

    label_id: np.ndarray  # (N,)
    target: np.ndarray  # (N,) final, after defences
    weight: np.ndarray  # (N,) final
    metrics: dict[str, float]
    banned: np.ndarray = NOBODY  # ids of annotators whom defences no longer hear


class Agent:
    """Policy, sampler, reward model and learner, wrapped by defences.

    Args:
        judge: what an attacker scores rollouts with in place of ``reward_model``.
        supplied: the pairs she trains on in a round, in place of the votes.
        rollout_sampler: samples for training where that is at another temperature than evaluation.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Any,
        learner: Learner,
        reward_model: RewardModel | None,
        stack: DefenceStack,
        replay: Replay,
        responses: int,
        delay: int,
        seed: int,
        judge: Scorer | None = None,
        supplied: Callable[[int], PairBatch] | None = None,
        rollout_sampler: Any = None,
    ):
        self.policy = policy
        self.sampler = sampler
        self.rollout_sampler = rollout_sampler or sampler
        self.temperature = policy.temperature
        if rollout_sampler is not None:
            self.temperature = rollout_sampler.config.temperature
        self.judge = judge
        self.supplied = supplied
        self.learner = learner
        self.reward_model = reward_model
        self.stack = stack
        self.replay = replay
        self.responses = responses  # K
        self.delay = delay
        self.seed = seed
        self.round = 0
        self.served: list[Served] = []

    def act(self, observation: Mapping[str, np.ndarray]) -> Responses:
        """Answer one round of prompts, K responses each.

        Args:
            observation: ``prompt_ids`` (B, P), ``prompt_mask``, ``stratum`` (observed), ``user``,
                and what people compare where it is recorded: ``recorded_ids`` (B, 2, T), its mask.
        """
        prompts = prompts_of(observation)
        sampled = self._sample(*prompts, self.responses, "serve", draws.key(self.seed, self.round))
        stratum = np.asarray(observation["stratum"])
        self.served.append(Served(self.round, stratum, sampled, recorded_pairs(observation)))
        self.served = self.served[-(self.delay + 1) :]
        return responses_of(sampled, self.responses, self.policy.version)

    def respond(self, prompt_ids: Tensor, prompt_mask: Tensor, k: int, seed: int) -> Sampled:
        """Sample for evaluation (phase ``eval``); changes nothing the learner uses."""
        return self._sample(prompt_ids, prompt_mask, k, "eval", seed)

    def learn(self, labels: Labels, gold: GoldLog | None = None) -> Learned:
        """Learn from the labels that arrived this round.

        Args:
            labels: the votes.
            gold: who answered gold questions right, for defences.

        Raises:
            Diverged: a non-finite loss, gradient or sampling distribution.
        """
        owned = self.judge is not None or self.supplied is not None
        count = 0 if owned else self._remember(labels)
        seed = draws.key(self.seed, "learn", self.round)
        metrics: dict[str, float] = {}
        self.sampler.rest()
        try:
            answers = answered(self.served, None if owned else gold)
            if count or len(answers.wrong):
                self.replay.revise(self._aggregate(self.replay.log(count), answers))
            if self.reward_model is not None:
                metrics |= self.reward_model.learn(self.replay, self.round, seed)
            metrics |= self._learn_policy(count, seed)
        except StopLearning as stop:
            self.stack.ctx.log({f"defence/stopped/{stop}": 1.0})
        self.round += 1
        self.policy.version = self.round
        metrics |= self._logged() | self.sampler.told()
        if not count:
            empty = np.zeros(0, np.float32)
            return Learned(NOBODY, empty, empty, metrics, self._banned())
        fate = (self.replay.columns[name][-count:].copy() for name in Learned._fields[:3])
        return Learned._make([*fate, metrics, self._banned()])

    def _banned(self) -> np.ndarray:
        """Ids of annotators whom any defence has banned."""
        found = [member.banned for stack in self.stacks().values() for member in stack.acting]
        return np.unique(np.concatenate([NOBODY, *found]))

    def _logged(self) -> dict[str, float]:
        """What defences logged this round; those of the reward model under its name."""
        found: dict[str, float] = {}
        for name, stack in self.stacks().items():
            prefix = "" if name == "policy" else f"{name}/"
            found |= {f"{prefix}{key}": value for key, value in stack.ctx.metrics.items()}
            stack.ctx.metrics = {}
        return found

    def _aggregate(self, log: LabelBatch, answers: GoldAnswers = NO_ANSWERS) -> LabelBatch:
        """The label hooks, once for each defence in the list, whichever learners it targets."""
        met: set[int] = set()
        for stack in self.stacks().values():
            stack.ctx.gold = answers
            for place, member in zip(stack.places, stack.members, strict=True):
                if stack.acting and place not in met:
                    log = member.feedback(stack.ctx, log)
                    met.add(place)
        return log

    def _learn_policy(self, count: int, seed: int) -> dict[str, float]:
        if self.learner.uses == "rollouts":
            return self._learn_from_rollouts(seed)
        rows = np.arange(len(self.replay) - count, len(self.replay))
        rows = rows[self.replay.columns["weight"][rows] > 0] if count else rows
        pairs = self.replay.pairs(rows) if len(rows) else None
        if self.supplied is not None:
            pairs = self.supplied(self.round)
        if pairs is not None:
            pairs = moved(pairs, self.stack.ctx.device)
        if pairs is not None and self.learner.uses == "winners":
            batch = winners(pairs)
            return self.learner.learn(batch, seed) if len(batch.weight) else {}
        return {} if pairs is None else self.learner.learn(pairs, seed)

    def proxy(self, sequences: Sequences) -> np.ndarray | None:
        """(N,) what the reward model gives responses; None without one, or with an attacker's."""
        if self.reward_model is None or self.judge is not None:
            return None
        return self.reward_model.score(sequences).double().cpu().numpy()

    def _learn_from_rollouts(self, seed: int) -> dict[str, float]:
        score = self.judge or (self.reward_model and self.reward_model.score)
        assert score is not None, "rollout learners need a reward model, or the attacker's judge"
        assert self.policy.reference is not None
        sampled = self.served[-1].sampled
        if self.stack.splits_serving:
            prompts = sampled.sequences.take(torch.arange(0, len(sampled.logprobs), self.responses))
            sampled = self._sample(
                prompts.prompt_ids,
                prompts.prompt_mask,
                self.responses,
                "rollout",
                draws.key(seed, "rollout"),
            )
        sequences = sampled.sequences
        with self.stack.phase("score"):
            logp_ref = response_logprobs(self.policy.reference, sequences, self.temperature)
            rewards = score(sequences)
        batch = RolloutBatch(
            sequences=sequences,
            group=torch.arange(len(sequences)) // self.responses,
            logp_old=sampled.logprobs,
            logp_ref=logp_ref,
            rewards={"reward": rewards},
            weight=torch.ones(len(sequences)) if sampled.weight is None else sampled.weight,
        )
        kl = ((sampled.logprobs - logp_ref) * sequences.mask).sum(1).mean()
        metrics = {"reward": float(rewards.mean()), "policy/kl_rollout": float(kl)}
        batch = moved(batch, self.stack.ctx.device)
        self.sampler.rest()
        return metrics | self.learner.learn(self.stack.feedback(batch), seed)

    def _sample(self, ids: Tensor, mask: Tensor, k: int, phase: str, seed: int) -> Sampled:
        sampler = self.sampler if phase == "eval" else self.rollout_sampler
        try:
            with self.stack.phase(phase):
                sampler.load(self.policy.model, self.policy.version, self._weights_of(phase))
                sampled = sampler.sample(self.policy.model, ids, mask, k, seed)
                if phase == "eval" or sampler.correction == "exact":
                    return sampled
                mode = (sampler.config.temperature, sampler.correction)
                sampled, gaps = corrected(self.policy.model, sampled, *mode)
                sampler.metrics.update(gaps)
                return sampled
        except FloatingPointError as error:
            raise Diverged(str(error)) from error

    def _weights_of(self, phase: str) -> str:
        """A name for the weights that answer in ``phase``: one for all where no defence tells."""
        return phase if self.stack.has_phases else ""

    def _remember(self, labels: Labels) -> int:
        """Put the votes into the window with the tokens they are about; returns how many."""
        rows = joined(self.served, labels)
        if not len(rows["label_id"]):
            return 0
        self.replay.add(rows)
        return min(len(rows["label_id"]), self.replay.window)

    def load_policy(self, weights: Mapping[str, Tensor]) -> None:
        """Answer with an earlier policy, as ``ctx.exported`` gave it."""
        self.stack.ctx.load_weights(weights)
        self.sampler.forget()

    def close(self) -> None:
        """Let go of what the sampler holds outside this process's memory."""
        self.sampler.close()

    def stacks(self) -> dict[str, DefenceStack]:
        """Every learner's defences by the learner's name."""
        reward = {} if self.reward_model is None else {"reward_model": self.reward_model.stack}
        return {"policy": self.stack, **reward}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: nested dicts of tensors, arrays and JSON values."""
        assert self.policy.reference is not None
        state: dict[str, Any] = {
            "round": self.round,
            "policy": own_state(self.policy.model),
            "reference": own_state(self.policy.reference),
            "learner": self.learner.state_dict(),
            "contexts": {name: stack.ctx.state_dict() for name, stack in self.stacks().items()},
            "defences": {name: stack.state_dict() for name, stack in self.stacks().items()},
            "replay": self.replay.state_dict(),
            "served": [served.state_dict() for served in self.served],
        }
        if self.reward_model is not None:
            state["reward_model"] = own_state(self.reward_model.ctx.model)
            state["reward_learner"] = self.reward_model.state_dict()
        return all_whole(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the defences have recreated their structure already."""
        if self.reward_model is not None:
            load_own_state(self.reward_model.ctx.model, state["reward_model"])
            self.reward_model.load_state_dict(state["reward_learner"])
        load_own_state(self.policy.model, state["policy"])
        assert self.policy.reference is not None
        load_own_state(self.policy.reference, state["reference"])
        self.learner.load_state_dict(state["learner"])
        for name, stack in self.stacks().items():
            stack.ctx.load_state_dict(state["contexts"][name])
        self.replay.load_state_dict(state["replay"])
        self.served = [Served.from_state(served) for served in state["served"]]
        self.round = self.policy.version = int(state["round"])
