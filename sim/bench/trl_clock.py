"""Runs a TRL trainer in rounds of optimizer steps and lets something else happen in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from agents.learners.update import OptimizerConfig


def train_in_rounds(trainer: Any, steps: int, finished: Callable[[int, float], None]) -> None:
    """One uninterrupted ``train()``, told off in rounds of ``steps`` optimizer steps.

    Args:
        trainer: a trainer of TRL's, warm from construction.
        steps: of a round.
        finished: called with the round's number, from 1, and its seconds; off the clock.
    """
    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):
        """Stops at the last optimizer step of a round."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            done, rest = divmod(state.global_step, steps)
            if not rest:
                finished(done, time.perf_counter() - self.began)
                self.began = time.perf_counter()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    with global_rng_restored():
        trainer.train()


def plain_arguments(learner: OptimizerConfig, per_device: int, folder: str) -> dict[str, Any]:
    """What both of TRL's configs are told: our optimizer, and nothing beside training."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": learner.minibatch // per_device,
        "learning_rate": learner.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": learner.betas[0],
        "adam_beta2": learner.betas[1],
        "weight_decay": learner.weight_decay,
        "max_grad_norm": learner.max_grad_norm,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def fastest(sizes: list[int], build: Callable[[int], Any]) -> tuple[int, dict[int, float]]:
    """The fastest of ``sizes`` per forward, and seconds per round of each, the first left out."""
    seconds = {}
    for size in sizes:
        tried = build(size)
        tried.run()
        seconds[size] = min(row["round"] for row in tried.seconds[1:])
    return min(seconds, key=lambda size: seconds[size]), seconds


@contextmanager
def global_rng_restored() -> Iterator[None]:
    """TRL seeds and draws from the global generators."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)
    np.random.set_state(numpy_state)
