"""One training round of this package, timed stage by stage.

    sample  the policy answers        label  people vote       reward_model  steps on the votes
    score   rewards and reference     update the policy's steps         evaluate  monitor's numbers

A *round* is everything but ``evaluate``, which other stacks have no counterpart of. Stages are
timed from outside, around the very calls that ``sim.run`` makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agents.batches import Sequences, distinct_prompts
from sim.bench.machine import read_memory, reset_peak, weights_of
from sim.config import Config
from sim.factory import make_agent, make_env, make_evaluator
from sim.scenario import Scenario

STAGES = ("sample", "label", "reward_model", "score", "update")


class Stopwatch:
    """Seconds by stage, and peak memory on request; an inner stage is not in its outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float | None] = {}
        self.watch_memory = False
        self._inner = [0.0]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block as ``name``."""
        if self.watch_memory:
            reset_peak()
        self._inner.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            inner = self._inner.pop()
            self._inner[-1] += whole
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - inner
            if self.watch_memory:
                self.peaks[name] = read_memory().peak

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time every call of ``owner.method`` as ``name``."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far, and start again."""
        taken, self.seconds = self.seconds, {}
        return taken


class OurRounds:
    """The loop of ``sim.run`` without records, one round at a call."""

    def __init__(self, config: Config, scenario: Scenario):
        self.config = config
        self.env = make_env(config, scenario)
        self.agent = make_agent(config, scenario)
        self.evaluate = make_evaluator(config, scenario)
        self.observation, _ = self.env.reset(seed=config.seed)
        self.watch = Stopwatch()
        assert self.agent.reward_model is not None, "the bench measures a learner with rollouts"
        # What ``learn`` does beside the two learners is scoring and joining labels.
        self.watch.wrap(self.agent.reward_model, "learn", "reward_model")
        self.watch.wrap(self.agent.learner, "learn", "update")
        self.round = 0

    def __call__(self) -> dict[str, float]:
        """Run one round; seconds by stage, and ``round``."""
        began = time.perf_counter()
        with self.watch.stage("sample"):
            responses = self.agent.act(self.observation)
        with self.watch.stage("label"):
            self.observation, _, _, _, info = self.env.step(responses.ids)
        with self.watch.stage("score"):
            self.agent.learn(info["labels"])
        whole = time.perf_counter() - began
        self.round += 1
        return {**self.watch.take(), "round": whole}

    def measure(self) -> float:
        """Run one evaluation; its seconds."""
        with self.watch.stage("evaluate"):
            self.evaluate(self.agent, self.round)
        return self.watch.take()["evaluate"]

    def memory(self) -> dict[str, Any]:
        """One further round and evaluation with peak memory by stage, in MiB."""
        resident = read_memory().now
        self.watch.watch_memory = True
        self()
        self.measure()
        self.watch.watch_memory = False
        return {"resident": resident, "peak": dict(self.watch.peaks)}

    def sequences(self) -> Sequences:
        """The last round's prompts and answers, B * K rows."""
        return self.agent.served[-1].sampled.sequences

    def work(self) -> dict[str, int]:
        """How much one round did."""
        sequences = self.sequences()
        assert self.agent.reward_model is not None
        return {
            "responses": len(sequences),
            "response_tokens": int(sequences.mask.sum()),
            "optimizer_steps": self.agent.stack.ctx.step // self.round,
            "reward_model_steps": self.agent.reward_model.ctx.step // self.round,
        }

    def operations(self) -> dict[str, float]:
        """Useful floating-point operations of the last round by stage (``sim.bench.machine``)."""
        agent, config, sequences = self.agent, self.config, self.sequences()
        assert agent.reward_model is not None
        policy = weights_of(agent.policy.model)
        reward = weights_of(agent.reward_model.ctx.model)
        answers = float(sequences.mask.sum())
        distinct, _ = distinct_prompts(sequences.prompt_ids, sequences.prompt_mask)
        positions = float(sequences.prompt_mask[distinct].sum()) + answers
        per_label = _label_tokens(agent.replay.columns) if len(agent.replay) else 0.0
        labels = self.work()["reward_model_steps"] * config.reward_model.minibatch
        forward = policy.forward(positions, answers)
        return {
            "sample": forward,
            "reward_model": 3 * reward.forward(labels * per_label, 2 * labels),
            "score": forward + reward.forward(positions, len(sequences)),
            "update": 3 * config.learner.epochs * forward,
        }


def _label_tokens(columns: dict[str, Any]) -> float:
    """Mean tokens of one label's two answers and their prompt."""
    tokens = columns["prompt_mask"].sum(1) + columns["a_mask"].sum(1) + columns["b_mask"].sum(1)
    return float(tokens.mean())
