"""The policy's answers from a vLLM engine: synced before they are asked for, and proved to be.

Weights go over when the policy's version or the phase has changed; the phase, because a defence may
serve other weights than it trains. A policy whose defences leave the phases alone is sent once a
round; of one that is trained through an adapter, the adapter, over a base that is sent once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.adapters import (
    base_weights,
    only_trained,
    plain_weights,
    trained_adapter,
    trained_targets,
)
from agents.batches import Sequences
from agents.engines.backend import Backend, Request, VLLMConfig
from agents.engines.probe import Probe
from agents.engines.transformers_engine import Sampled, SamplerConfig
from envs import rng as draws

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean gap after a sync that rounding explains, nat a token."""


class Link:
    """An engine and what it holds: one for the samplers at all temperatures.

    Args:
        start: makes the backend for a policy with an adapter on these layers; called at first use.
        tolerance: gap allowed after a sync, nat a token.
    """

    backend: Backend
    probe: Probe

    def __init__(self, start: Callable[[list[str]], Backend], tolerance: float):
        self.metrics: dict[str, float] = {}
        self.holds: tuple[int, str] | None = None  # version and phase of its weights
        self._started = self._has_base = self._asleep = False
        self._start, self._tolerance = start, tolerance

    def load(self, model: nn.Module, version: int, phase: str) -> None:
        """Send what it does not hold, and prove that it arrived."""
        if not self._started:
            self.backend = self._start(trained_targets(model))
            self.probe = Probe(self.backend, self._tolerance)
            self._started = True
        if self._asleep:
            self.backend.wake()
            self._asleep = False
        if self.holds == (version, phase):
            return
        self._send(model)
        self.holds = version, phase
        if self.probe.sequences is not None:
            self._prove(model)

    def heard(self, model: nn.Module, sequences: Sequences) -> None:
        """After the very first answers: the first texts there are to prove anything on."""
        if self.probe.sequences is None:
            self.probe.choose(*sequences)
            self._prove(model)

    def _send(self, model: nn.Module) -> None:
        """An adapter alone, where the engine has its base; else every weight."""
        if not only_trained(model):
            self.backend.load_weights(plain_weights(model))
            self._has_base = False
            return
        if not self._has_base:
            self.backend.load_weights(base_weights(model))
            self._has_base = True
        self.backend.load_adapter(*trained_adapter(model))

    def _prove(self, model: nn.Module) -> None:
        assert self.holds is not None
        version, phase = self.holds
        what = f"the sync of version {version}" + (f" for {phase}" if phase else "")
        self.metrics.update(self.probe.check(model, what))

    def rest(self) -> None:
        """Leave the card to the trainer until the next :meth:`load`."""
        if self._started and not self._asleep:
            self.backend.sleep()
            self._asleep = True

    def close(self) -> None:
        """Stop the engine; the next use starts another."""
        if self._started:
            self._started = self._has_base = self._asleep = False
            self.holds = None
            self.backend.close()


class VLLMSampler:
    """Samples from a vLLM engine.

    Args:
        config: length and temperature of responses.
        engine: correction and tolerance.
        tokenizer: the policy's.
        start: makes the backend for a policy with an adapter on these layers; called at first use.
        dtype: of the weights.

    Attributes:
        metrics: what syncs and comparisons found since they were last read.
    """

    def __init__(
        self,
        config: SamplerConfig,
        engine: VLLMConfig,
        tokenizer: Any,
        start: Callable[[list[str]], Backend],
        dtype: str = "float32",
    ):
        self.config = config
        self.correction = engine.correction
        self.eos_id = tokenizer.eos_token_id
        self.pad_id = tokenizer.pad_token_id
        self._sleeps = engine.sleep
        self.link = Link(start, engine.tolerance or TOLERANCES[dtype])
        self.metrics = self.link.metrics

    def at(self, config: SamplerConfig) -> VLLMSampler:
        """The same engine at another temperature or length."""
        other = copy.copy(self)
        other.config = config
        return other

    def load(self, model: nn.Module, version: int, phase: str = "") -> None:
        """Send the weights of ``model`` as the present phase has them, unless they are there.

        Raises:
            EngineFailed: the engine does not start, or the probe finds other weights in it.
        """
        self.link.load(model, version, phase)

    def sample(
        self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, k: int, seed: int
    ) -> Sampled:
        """``k`` responses to each of B prompts; a prompt's row and ``seed`` make its own seed."""
        real = prompt_mask.bool()
        request = Request(
            prompts=[ids[mask].tolist() for ids, mask in zip(prompt_ids, real, strict=True)],
            seeds=(draws.uniform(seed, np.arange(len(prompt_ids))) * 2**53).astype(int).tolist(),
            k=k,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            eos_id=self.eos_id,
        )
        answers = self.link.backend.generate(request)
        shape = (len(answers), self.config.max_new_tokens)
        lengths = np.array([len(answer.ids) for answer in answers])
        said = np.arange(shape[1]) < lengths[:, None]  # (B*K, T)
        ids = np.full(shape, self.pad_id, np.int64)
        ids[said] = np.concatenate([answer.ids for answer in answers])
        logprobs = np.zeros(shape, np.float32)
        logprobs[said] = np.concatenate([answer.logprobs for answer in answers])
        prompts = (prompt_ids.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0))
        found = (ids, said.astype(np.int64), logprobs)
        ids, mask, logprobs = (torch.from_numpy(c).to(prompt_ids.device) for c in found)
        sampled = Sampled(Sequences(*prompts, ids, mask), logprobs)
        self.link.heard(model, sampled.sequences)
        return sampled

    def forget(self) -> None:
        """Send the weights again before the next answer, whatever their version."""
        self.link.holds = None

    def told(self) -> dict[str, float]:
        """What syncs and comparisons found since this was last asked."""
        found = dict(self.metrics)
        self.metrics.clear()  # shared with the sampler at another temperature
        return found

    def rest(self) -> None:
        """Leave the card to the trainer until the next :meth:`load`."""
        if self._sleeps:
            self.link.rest()

    def close(self) -> None:
        """Stop the engine."""
        self.link.close()
