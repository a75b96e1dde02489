"""A DPO round on labelled pairs: ours, and the same steps by ``trl.DPOTrainer``.

Both learn from the same pairs in minibatches of the same size, with the reference's log-probs
computed in each step, AdamW, float32 and the same threads. TRL's trainer is constructed once, gets
the pairs as token ids, runs one uninterrupted ``train()`` and uses the fastest of several batch
sizes per forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from agents.batches import PairBatch, winners
from agents.learners.dpo import DPO, DPOConfig
from agents.policy import load_causal_lm, load_tokenizer
from sim.bench.trl_clock import fastest, global_rng_restored, plain_arguments, train_in_rounds
from sim.config import Config
from sim.factory import make_agent
from sim.scenario import Scenario

Rows = list[dict[str, list[int]]]


class OurDpoRounds:
    """Our learner on the same pairs, one round at a call."""

    def __init__(self, config: Config, scenario: Scenario, pairs: PairBatch):
        self.agent = make_agent(replace(config, learner=DPOConfig()), scenario)
        self.pairs = pairs
        self.round = 0

    def __call__(self) -> dict[str, float]:
        """Run one round; its seconds."""
        began = time.perf_counter()
        self.agent.learner.learn(self.pairs, self.round)
        self.round += 1
        return {"round": time.perf_counter() - began}

    def loss(self, weights: dict[str, Tensor], pairs: PairBatch) -> float:
        """The loss on ``pairs`` with other weights than the policy has now."""
        model, learner = self.agent.policy.model, self.agent.learner
        assert isinstance(learner, DPO)
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(weights, strict=False)
        found = learner.run(learner.referenced(pairs))
        model.load_state_dict(kept)
        return found.losses["loss"]


class TrlDpoRounds:
    """Rounds of a warm ``DPOTrainer``; ``per_device`` pairs in one forward and backward."""

    def __init__(
        self, scenario: Scenario, config: DPOConfig, pairs: PairBatch, per_device: int, rounds: int
    ):
        from datasets import Dataset, disable_progress_bars
        from trl import DPOConfig as TheirConfig
        from trl import DPOTrainer

        disable_progress_bars()
        self.rows = token_rows(pairs)
        tokenizer = load_tokenizer(scenario.tokenizer)
        text = {name.removesuffix("_ids"): tokenizer.decode(i) for name, i in self.rows[0].items()}
        self.steps = config.epochs * len(self.rows) // config.minibatch
        self.seconds: list[dict[str, float]] = []
        self._folder = TemporaryDirectory()
        with global_rng_restored():
            self.trainer = DPOTrainer(
                model=load_causal_lm(scenario.policy),
                ref_model=load_causal_lm(scenario.policy),
                args=TheirConfig(
                    **plain_arguments(config, per_device, self._folder.name),
                    max_steps=rounds * self.steps,
                    beta=config.beta,
                ),
                train_dataset=Dataset.from_list([text]),  # it insists on text; ids come below
                processing_class=tokenizer,
            )
        self.trainer.train_dataset = Dataset.from_list(self.rows)

    def run(self, after_round: Callable[[int], None] = lambda round: None) -> None:
        """All rounds; ``after_round`` is called between them, off the clock."""

        def finished(round: int, whole: float) -> None:
            self.seconds.append({"round": whole})
            after_round(round)

        train_in_rounds(self.trainer, self.steps, finished)

    def loss(self, n: int) -> float:
        """TRL's loss on the first ``n`` pairs at its present weights."""
        inputs = self.trainer.data_collator(self.rows[:n])
        with torch.no_grad():
            return float(self.trainer.compute_loss(self.trainer.model, inputs))


def token_rows(pairs: PairBatch) -> Rows:
    """Decided pairs as the token ids that TRL's collator takes."""
    chosen = winners(pairs).sequences
    rejected = winners(replace(pairs, target=1 - pairs.target)).sequences
    columns = {
        "prompt_ids": chosen[:2],
        "chosen_ids": chosen[2:],
        "rejected_ids": rejected[2:],
    }
    return [
        {name: ids[i][mask[i] == 1].tolist() for name, (ids, mask) in columns.items()}
        for i in range(len(pairs.target))
    ]


def best_batch(
    scenario: Scenario, config: DPOConfig, pairs: PairBatch, rounds: int = 3
) -> tuple[int, dict[int, float]]:
    """TRL's fastest number of pairs per forward, and seconds per round of each that was tried."""
    sizes = [config.minibatch // d for d in (1, 2, 4) if config.minibatch % d == 0]
    return fastest(sizes, lambda size: TrlDpoRounds(scenario, config, pairs, size, rounds))
