"""What the reward function of a ``trl.GRPOTrainer`` does in the bench: people, votes, reward model.

The plain loop a person would write: one forward for both sides of the pairs, binary cross-entropy
on the difference of rewards (which is Bradley-Terry), fused AdamW, a window of the last votes. It
meets the same environment with the same prompts as ours does and takes the same number of steps on
minibatches of the same size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agents.learners.reward_model import load_reward_model
from agents.policy import load_tokenizer
from envs.types import VOTE_A, VOTE_B, VOTE_SKIP
from sim.bench.rounds import Stopwatch
from sim.config import Config
from sim.factory import make_env
from sim.scenario import Scenario


class PlainRewardLoop:
    """Ask people, train on their votes, score."""

    def __init__(self, config: Config, scenario: Scenario, watch: Stopwatch):
        self.config, self.watch = config, watch
        self.env = make_env(config, scenario)
        self.observation, _ = self.env.reset(seed=config.seed)
        self.model = load_reward_model(scenario.reward_model, 0)
        self.model.config.pad_token_id = load_tokenizer(scenario.tokenizer).pad_token_id
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.reward_model.lr, weight_decay=0.0, fused=True
        )
        self.rng = np.random.default_rng(config.seed)
        self.pairs = torch.zeros(0)  # (N, 2, 2, P + T): a and b, ids and mask; newest last
        self.targets = torch.zeros(0)
        self.tokens: list[int] = []  # response tokens by round
        self.steps = self.rounds = 0

    def rewards(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Rewards of one round's answers, prompt-major."""
        people = self.config.feedback
        width = self.config.sampler.max_new_tokens
        answers = torch.zeros(len(completion_ids), width, dtype=torch.int64)
        mask = torch.zeros_like(answers)
        for row, ids in enumerate(completion_ids):
            answers[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        with self.watch.stage("label"):
            prompts = torch.from_numpy(np.asarray(self.observation["prompt_ids"]))
            seen = torch.from_numpy(np.asarray(self.observation["prompt_mask"])).long()
            shape = (people.batch, people.responses, width)
            self.observation, _, _, _, info = self.env.step(answers.view(shape).numpy())
        prompts, seen = (c.repeat_interleave(people.responses, 0) for c in (prompts, seen))
        rows = torch.stack([torch.cat([prompts, answers], 1), torch.cat([seen, mask], 1)], 1)
        with self.watch.stage("reward_model"):
            self._remember(info["labels"], rows)
            self._train()
        with self.watch.stage("score"), torch.no_grad():
            rewards = self._score(rows)
        self.rounds += 1
        self.tokens.append(int(mask.sum()))
        return rewards.tolist()

    def _score(self, rows: Tensor) -> Tensor:
        ids, mask = rows.unbind(1)
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]

    def _remember(self, labels: Any, rows: Tensor) -> None:
        kept = labels.vote != VOTE_SKIP
        place = labels.item[kept] % self.config.feedback.batch * self.config.feedback.responses
        a, b = rows[place + labels.a[kept]], rows[place + labels.b[kept]]
        window = self.config.reward_model.window
        pairs = torch.stack([a, b], 1)
        self.pairs = torch.cat([self.pairs, pairs] if len(self.pairs) else [pairs])[-window:]
        vote = labels.vote[kept]
        target = np.select([vote == VOTE_A, vote == VOTE_B], [1.0, 0.0], 0.5)
        self.targets = torch.cat([self.targets, torch.from_numpy(target).float()])[-window:]

    def _train(self) -> None:
        chosen = self.config.reward_model
        for _ in range(chosen.steps if len(self.targets) else 0):
            pick = torch.from_numpy(self.rng.integers(len(self.targets), size=chosen.minibatch))
            rewards = self._score(self.pairs[pick].flatten(0, 1)).view(-1, 2)
            loss = F.binary_cross_entropy_with_logits(
                rewards[:, 0] - rewards[:, 1], self.targets[pick]
            )
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), chosen.max_grad_norm)
            self.optimizer.step()
            self.steps += 1


def ask_ahead(config: Config, scenario: Scenario, rounds: int) -> list[str]:
    """The prompts of the first rounds as text; without an attack no answer changes them."""
    env, tokenizer = make_env(config, scenario), load_tokenizer(scenario.tokenizer)
    silence = np.zeros(env.action_space.shape, np.int64)
    observation, _ = env.reset(seed=config.seed)
    texts: list[str] = []
    for _ in range(rounds):
        ids = [
            row[seen == 1].tolist()
            for row, seen in zip(observation["prompt_ids"], observation["prompt_mask"], strict=True)
        ]
        texts += tokenizer.batch_decode(ids)
        assert tokenizer(texts[-len(ids) :])["input_ids"] == ids, "prompts survive as text"
        observation, *_ = env.step(silence)
    return texts
