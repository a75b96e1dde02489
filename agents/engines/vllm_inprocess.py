"""vLLM in this process: weights are handed over as tensors, answers come back as lists.

``VLLM_ENABLE_V1_MULTIPROCESSING=0`` keeps its engine core here, so that one process owns the card,
and no tensor is copied through a pipe.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from agents.engines.backend import (
    SETTINGS,
    UNTIED,
    Completion,
    Request,
    Room,
    VLLMConfig,
    engine_arguments,
    save_adapter,
    within,
)

HERE = {**SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


class Engine:
    """A vLLM engine in this process.

    Args:
        model: directory with ``config.json``; its weights are not read.
        length: longest prompt and response together, tokens.
        dtype: ``float32`` or ``bfloat16``.
        config: sizes and patience.
        room: for the policy's adapter, where it has one.

    Raises:
        EngineFailed: vLLM cannot run this model here.
    """

    def __init__(
        self, model: Path, length: int, dtype: str, config: VLLMConfig, room: Room | None = None
    ):
        self.patience = config.timeout
        self._adapters = tempfile.TemporaryDirectory(prefix="poisonloop-")
        self._adapter: Any = None
        self._number = 0  # a number names one adapter for ever: caches are kept by it
        shape = AutoConfig.from_pretrained(model)
        os.environ.update({name: os.environ.get(name, HERE[name]) for name in HERE})
        arguments = engine_arguments(dtype, length, config, shape, room)
        arguments["enable_sleep_mode"] = config.sleep and torch.cuda.is_available()
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        try:
            # vLLM seeds the global generators, and warns of its own ways.
            with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
                self.llm: Any = within(self.patience, "start", lambda: _start(model, arguments))
        finally:
            torch.set_num_threads = set_threads  # vLLM puts a warning in its place
            torch.set_num_threads(threads)

    def generate(self, request: Request) -> list[Completion]:
        """Responses, the k of a prompt together."""
        from vllm import SamplingParams

        plans = [
            SamplingParams(**request.sampling(row), detokenize=False, flat_logprobs=True)
            for row in range(len(request.prompts))
        ]
        outputs = self._ask("generate", request.prompts, plans)
        return [
            Completion(list(one.token_ids), one.logprobs.logprobs)
            for output in outputs
            for one in sorted(output.outputs, key=lambda one: one.index)
        ]

    def score(self, texts: list[list[int]]) -> list[np.ndarray]:
        """(t - 1,) log-probabilities of the tokens of each text after its first."""
        from vllm import SamplingParams

        plan = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._ask("score", texts, [plan] * len(texts))
        rests = [output.prompt_logprobs[1:] for output in outputs]
        return [
            np.array([of[token].logprob for of, token in zip(rest, text[1:], strict=True)])
            for text, rest in zip(texts, rests, strict=True)
        ]

    def _ask(self, what: str, prompts: list[list[int]], plans: list[Any]) -> list[Any]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return within(
            self.patience,
            what,
            lambda: self.llm.generate(asked, plans, use_tqdm=False, lora_request=self._adapter),
        )

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace every weight, and forget what was computed with the old ones."""

        def load() -> None:
            told = {"weights_iterator": iter(weights.items())}
            self.llm.collective_rpc("reload_weights", kwargs=told)
            self.llm.reset_prefix_cache()

        within(self.patience, "load_weights", load)
        self._adapter = None

    def load_adapter(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Answer through this adapter from now on; the one before is dropped."""
        from vllm.lora.request import LoRARequest

        old, number = self._adapter, self._number + 1
        folder = save_adapter(Path(self._adapters.name) / str(number), tensors, settings)
        new = LoRARequest(f"adapter-{number}", number, str(folder))

        def load() -> None:
            if old is not None:
                self.llm.llm_engine.remove_lora(old.lora_int_id)
            self.llm.llm_engine.add_lora(new)

        within(self.patience, "load_adapter", load)
        shutil.rmtree(folder)
        self._adapter, self._number = new, number

    def sleep(self) -> None:
        """Weights wait in the machine's memory, caches go; on a CPU there is nothing to leave."""
        within(self.patience, "sleep", lambda: self.llm.sleep(level=1))

    def wake(self) -> None:
        """Weights come back."""
        within(self.patience, "wake", self.llm.wake_up)

    def close(self) -> None:
        """Give back the memory."""
        self._adapters.cleanup()
        self.llm = None
        gc.collect()


def _start(model: Path, arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        model=str(model),
        skip_tokenizer_init=True,
        disable_log_stats=True,
        load_format="dummy",
        hf_overrides=UNTIED,
        **arguments,
    )
