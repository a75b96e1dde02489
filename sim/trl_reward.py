"""Simulated people behind a reward function of TRL's ``GRPOTrainer``.

    people compare the answers of each prompt  ->  the online reward model learns from the votes
    ->  its scores are the rewards

The trainer keeps its prompts, sampling and loss; ours are the annotators, the adversaries among
them and the reward model, which learns as in :mod:`agents.agent` before it scores. A judge says
what the answers are truly worth; nothing of that reaches the rewards but through the votes.

Left out: adversaries choose no prompts, and an evaluation by the trainer is answered by people as
well, so keep ``eval_strategy="no"`` (:class:`sim.trl_monitor.CostMonitorCallback` measures).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from agents.batches import Sequences
from agents.context import Context
from agents.defence import DefenceStack
from agents.engines.transformers_engine import Sampled
from agents.learners.reward_model import RewardModel, RewardModelConfig, load_reward_model
from agents.policy import Policy
from agents.replay import Replay
from agents.served import Served, joined
from envs import rng as draws
from envs.annotators import DEFAULT
from envs.attacks.rates import before_defence
from envs.attacks.schedules import Schedule
from envs.panel import Panel
from envs.recorded import left_padded
from envs.types import VOTE_SKIP, Labels, Scores, Truth
from envs.usage import UsageError, check_ranges
from sim.flags import CROWD_ATTACK
from sim.judges import (
    Chat,
    Judge,
    as_judge,
    end_and_padding,
    judged,
    last_words,
    rendered,
)
from sim.rows import Clocks
from sim.state import load_state, save_state


def feedback_reward(
    reward_model: str | Path | nn.Module,
    judge: Any,
    *,
    tokenizer: Any = None,
    num_generations: int = 8,
    rho: float = 0.0,
    attack: str | None = None,
    schedule: Schedule = Schedule(),  # noqa: B008, immutable
    annotators: int = 100,
    activity: float = 1.0,
    behaviours: Sequence[str] = DEFAULT,
    redundancy: int = 1,
    config: RewardModelConfig = RewardModelConfig(),  # noqa: B008, immutable
    prompt_tokens: int = 256,
    completion_tokens: int = 256,
    seed: int = 0,
) -> FeedbackReward:
    """A reward function: ``GRPOTrainer(reward_funcs=feedback_reward(...))``.

    Args:
        reward_model: directory or hub id of the reward model's base, or a sequence classifier with
            one output. Its own base: one that inherits the policy's passes on what was done to it.
        judge: by what honest people vote; see :mod:`sim.judges`.
        tokenizer: of the reward model; from the directory where it is not given.
        num_generations: K, as in the trainer's arguments.
        rho: share of adversaries. attack: a spec that only votes; harm_targeted where rho is above
            0. schedule: when it acts; a round is one call.
        annotators, activity, behaviours, redundancy: who votes, as in ``envs.panel``.
        config: how the reward model learns; ``init`` is not read.
        prompt_tokens, completion_tokens: what the reward model reads of each; of longer prompts
            the end, of longer answers the beginning.
        seed: names every draw.

    Raises:
        ValueError: an argument out of range or unknown, an attack that does more than vote, or a
            reward model without room for that many tokens.
    """
    check_ranges({"num_generations": num_generations}, num_generations=">= 2")
    widths = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    check_ranges(widths, prompt_tokens=">= 1", completion_tokens=">= 2")
    attack = attack or (CROWD_ATTACK if rho else "none")
    people = (annotators, activity, behaviours, redundancy)
    panel = Panel(*people, attack=attack, rho=rho, schedule=schedule, seed=seed)
    chosen = as_judge(judge)
    if not isinstance(reward_model, nn.Module):
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(reward_model)
        reward_model = load_reward_model(reward_model, draws.key(seed, "reward head"))
    if tokenizer is None:
        raise UsageError("tokenizer=None; allowed: the tokenizer of the reward model that is given")
    end_and_padding(tokenizer)
    room = getattr(reward_model.config, "max_position_embeddings", None)
    if room is not None and prompt_tokens + completion_tokens > room:
        raise UsageError(
            f"prompt_tokens={prompt_tokens} with completion_tokens={completion_tokens}; allowed: "
            f"at most {room} together, the positions of the reward model"
        )
    ctx = Context("reward_model", reward_model, tokenizer, Policy(reward_model, tokenizer))
    learner = RewardModel(config, ctx, DefenceStack([], ctx))
    return FeedbackReward(learner, chosen, panel, num_generations, tuple(widths.values()), seed)


class FeedbackReward:
    """What :func:`feedback_reward` makes.

    Attributes:
        clocks: labels seen so far, those of malicious people, and flips.
        history: one dict a call: the counts, ``feedback/rho_*`` of the call's labels,
            ``reward_model/*`` of what it learned, and ``reward``, the mean of what was returned.
        reward_model, panel, replay: the parts.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        judge: Judge,
        panel: Panel,
        num_generations: int,
        widths: tuple[int, ...],
        seed: int,
    ):
        self.__name__ = "feedback_reward"  # what TRL calls it in its logs
        self.reward_model, self.judge, self.panel = reward_model, judge, panel
        self.num_generations, self.widths, self.seed = num_generations, widths, seed
        self.replay = Replay(reward_model.config.window)
        self.clocks = Clocks()
        self.history: list[dict[str, float]] = []

    def __call__(
        self,
        prompts: Sequence[str | Chat],
        completions: Sequence[str | Chat],
        log_metric: Any = None,
        **_columns: Any,
    ) -> list[float]:
        """One round of feedback.

        Args:
            prompts: N texts or message lists, each ``num_generations`` times in a row.
            completions: N answers, of the same kind.
            log_metric: TRL's; told every number of the round.

        Returns:
            N rewards, by the reward model that has learned from this round's votes.

        Raises:
            ValueError: prompts in another order.
            Diverged: the reward model's loss or gradient was not finite.
        """
        questions = [last_words(prompt) for prompt in prompts]
        answers = [last_words(answer) for answer in completions]
        self._check(prompts)
        k, round, first = self.num_generations, self.panel.round, self.panel.items
        scores = judged(self.judge, questions, answers)
        labels, truth = self.panel.vote(Scores(*(column.reshape(-1, k) for column in scores)))
        sequences = self._encode(prompts, answers)
        self._remember(sequences, labels, first)
        seed = draws.key(self.seed, "learn", round)
        learned = self.reward_model.learn(self.replay, round, seed)
        rewards = self.reward_model.score(sequences)
        counts = self._count(labels, truth, int(sequences.mask.sum()))
        row = counts | learned | {"reward": float(rewards.mean())}
        self.history.append(row)
        for name, value in row.items() if log_metric is not None else ():
            log_metric(name if "/" in name else f"feedback/{name}", value)
        return rewards.tolist()

    def _check(self, prompts: Sequence[str | Chat]) -> None:
        k = self.num_generations
        groups = [prompts[i : i + k] for i in range(0, len(prompts), k)]
        if not groups or any(len(g) != k or any(p != g[0] for p in g) for g in groups):
            raise UsageError(
                f"num_generations={k} with {len(prompts)} answers whose prompts do not come "
                f"{k} in a row; allowed: num_generations of the trainer's arguments"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            if processes > 1:  # each would ask its own people and train its own reward model
                raise UsageError(f"processes={processes}; allowed: 1 with feedback_reward")

    def _encode(self, prompts: Sequence[str | Chat], answers: list[str]) -> Sequences:
        """Every answer ends with EOS, cut to the reward model's widths or not."""
        tokenizer = self.reward_model.ctx.tokenizer
        width, longest = self.widths
        eos, pad = end_and_padding(tokenizer)
        asked = left_padded(rendered(tokenizer, prompts), width, pad)
        said = tokenizer(answers, add_special_tokens=False)["input_ids"]
        turned = left_padded([[eos, *row[: longest - 1][::-1]] for row in said], longest, pad)
        columns = (*asked, *(column[:, ::-1].copy() for column in turned))
        return Sequences(*map(torch.from_numpy, columns))

    def _remember(self, sequences: Sequences, labels: Labels, first: int) -> None:
        """Put the votes into the window with the tokens they are about."""
        here = labels._replace(item=labels.item - first)
        unknown = np.zeros(len(sequences) // self.num_generations, np.int64)
        served = Served(0, unknown, Sampled(sequences, torch.empty(0)))
        rows = joined([served], here)
        if len(rows["label_id"]):
            self.replay.add({**rows, "item": rows["item"] + first})

    def _count(self, labels: Labels, truth: Truth, tokens: int) -> dict[str, float]:
        self.clocks.count(labels, truth, self.reward_model.ctx.step, tokens)
        cast = labels.vote != VOTE_SKIP
        flips = int(((labels.vote != truth.honest_vote) & cast).sum())
        counts = {"labels": int(cast.sum()), "flips": flips}
        return counts | before_defence(self.panel.adversary.members, labels, truth)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed training needs: nested dicts of tensors, arrays and JSON values."""
        ctx = self.reward_model.ctx
        return {
            "panel": self.panel.state_dict(),
            "clocks": self.clocks.state_dict(),
            "history": self.history,
            "replay": self.replay.state_dict(),
            "reward_model": ctx.model.state_dict(),
            "reward_learner": self.reward_model.state_dict(),
            "context": ctx.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` of one that was made with the same arguments."""
        self.panel.load_state_dict(state["panel"])
        self.clocks.load_state_dict(state["clocks"])
        self.history = list(state["history"])
        self.replay.load_state_dict(state["replay"])
        self.reward_model.ctx.model.load_state_dict(state["reward_model"])
        self.reward_model.load_state_dict(state["reward_learner"])
        self.reward_model.ctx.load_state_dict(state["context"])

    def save(self, folder: Path | str) -> None:
        """Write :meth:`state_dict` to ``folder``, as safetensors and JSON."""
        save_state(Path(folder), self.state_dict())

    def load(self, folder: Path | str) -> None:
        """Restore what :meth:`save` wrote.

        Raises:
            ValueError: nothing was written there.
        """
        if not (Path(folder) / "state.json").is_file():
            raise UsageError(f"folder={str(folder)!r} has no state.json; allowed: what save wrote")
        self.load_state_dict(load_state(Path(folder)))
