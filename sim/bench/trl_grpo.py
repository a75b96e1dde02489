"""The same round built from ``trl.GRPOTrainer``, as fairly as we can.

The trainer is constructed once and runs one uninterrupted ``train()``, so nothing restarts between
rounds: its own sampling with a key-value cache, its reference model, its loss, its fused AdamW.
The reward function does what a person would write there: ask people about the answers (the same
environment, with the same prompts), train the reward model in a plain loop on the votes, score each
answer once. Batch size is the fastest of several; both sides take the same optimizer steps on the
same number of answers, in float32, with the same threads. Metrics, checkpoints and trackers are
off.

Its stage ``score`` is the reward model's pass; the reference's is inside its ``update``.

Rounds alternate: after each of TRL's a callback lets one of ours run, outside TRL's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from agents.batches import RolloutBatch, Sequences
from agents.context import Context
from agents.defence import DefenceStack
from agents.learners import grpo
from agents.policy import Policy, load_causal_lm, load_tokenizer, response_logprobs
from sim.bench.reward_loop import PlainRewardLoop, ask_ahead
from sim.bench.rounds import Stopwatch
from sim.bench.trl_clock import fastest, global_rng_restored, plain_arguments, train_in_rounds
from sim.config import Config
from sim.scenario import Scenario


class TrlRounds:
    """Rounds of a warm ``GRPOTrainer``; ``per_device`` answers in one forward and backward."""

    def __init__(self, config: Config, scenario: Scenario, texts: list[str], per_device: int):
        self.config, self.scenario = config, scenario
        self.watch = Stopwatch()
        self.loop = PlainRewardLoop(config, scenario, self.watch)
        answers = config.feedback.batch * config.feedback.responses
        learner = config.learner
        self.micro_steps = learner.epochs * answers // per_device
        self.optimizer_steps = learner.epochs * answers // learner.minibatch
        self.seconds: list[dict[str, float]] = []
        self.captured: dict[str, Any] = {}
        self._folder = TemporaryDirectory()
        with global_rng_restored():
            self.trainer = self._build(texts, per_device)
        self.watch.wrap(self.trainer, "_generate_single_turn", "sample")

    def _build(self, texts: list[str], per_device: int) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        config, learner = self.config, self.config.learner
        assert isinstance(learner, grpo.GRPOConfig), "TRL has no PPO"
        answers = config.feedback.batch * config.feedback.responses
        rounds = len(texts) // config.feedback.batch
        args = GRPOConfig(
            **plain_arguments(learner, per_device, self._folder.name),
            generation_batch_size=answers,
            num_iterations=learner.epochs,
            num_generations=config.feedback.responses,
            max_completion_length=config.sampler.max_new_tokens,
            temperature=config.sampler.temperature,
            max_steps=rounds * self.optimizer_steps,
            loss_type=learner.loss_type,
            beta=learner.beta,
            epsilon=learner.clip,
            use_bias_correction_kl=learner.kl_correction,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            model=load_causal_lm(self.scenario.policy),
            reward_funcs=self.loop.rewards,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=load_tokenizer(self.scenario.tokenizer),
        )
        return trainer

    def run(self, after_round: Callable[[int], None] = lambda round: None) -> None:
        """All rounds; ``after_round`` is called between them, off the clock."""

        def finished(round: int, whole: float) -> None:
            parts = self.watch.take()
            parts["update"] = whole - sum(parts.values())
            self.seconds.append({**parts, "round": whole})
            after_round(round)

        train_in_rounds(self.trainer, self.optimizer_steps, finished)

    def capture_first_round(self) -> None:
        """Keep the last batch of the first round, with the weights and loss it met."""
        compute = self.trainer._compute_loss
        calls = 0

        def captured(model: Any, inputs: dict[str, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            loss = compute(model, inputs)
            if calls == self.micro_steps:
                weights = {name: v.detach().clone() for name, v in model.state_dict().items()}
                self.captured = {"inputs": inputs, "loss": float(loss.detach()), "weights": weights}
                self.trainer._compute_loss = compute
            return loss

        self.trainer._compute_loss = captured

    def work(self, rounds: int) -> dict[str, float]:
        """How much one round did; tokens are the mean of the last ``rounds``."""
        people = self.config.feedback
        return {
            "responses": people.batch * people.responses,
            "response_tokens": sum(self.loop.tokens[-rounds:]) / rounds,
            "optimizer_steps": self.trainer.state.global_step // self.loop.rounds,
            "reward_model_steps": self.loop.steps // self.loop.rounds,
        }

    def loss_gap(self) -> float:
        """|our loss - TRL's| on a batch of its own, at the weights it had there."""
        inputs = self.captured["inputs"]
        tokenizer = load_tokenizer(self.scenario.tokenizer)
        model = load_causal_lm(self.scenario.policy)
        model.load_state_dict(self.captured["weights"], strict=False)
        ctx = Context("policy", model, tokenizer, Policy(model, tokenizer))
        stack = DefenceStack([], ctx)
        assert isinstance(self.config.learner, grpo.GRPOConfig)
        learner = self.config.learner.build(ctx, stack, self.config.sampler.temperature)
        columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        sequences = Sequences(*(inputs[name].long() for name in columns))
        old = inputs.get("old_per_token_logps")
        if old is None:  # TRL leaves it out where one step uses each answer once
            old = response_logprobs(model, sequences, self.config.sampler.temperature)
        advantage = inputs["advantages"][:, None].expand_as(old)
        batch = RolloutBatch(
            sequences=sequences,
            group=torch.arange(len(old)),
            logp_old=old,
            logp_ref=inputs["ref_per_token_logps"] if learner.config.beta else old,
            rewards={},
            weight=torch.ones(len(old)),
            extra={"advantage": advantage},
        )
        ours = learner.run(batch).losses["loss"] / self.trainer.args.gradient_accumulation_steps
        return abs(ours - self.captured["loss"])


def best_batch(config: Config, scenario: Scenario, rounds: int = 3) -> tuple[int, dict[int, float]]:
    """TRL's fastest number of answers per forward, and seconds per round of each that was tried."""
    minibatch, group = config.learner.minibatch, config.feedback.responses
    sizes = [minibatch // d for d in (1, 2, 4, 8) if minibatch % d == 0 and minibatch // d >= group]
    texts = ask_ahead(config, scenario, rounds)
    return fastest(sizes, lambda size: TrlRounds(config, scenario, texts, size))
