"""What a vLLM engine can do for the sampler, wherever it runs, and how one is asked for.

Two backends: ``vllm_inprocess`` (this process, tensors handed over) and ``vllm_server`` (HTTP,
another card or host, weights through a shared folder). Both get their first weights from the
policy too, so what they say is never that of an older file.

On the CPU a tied head is a packed copy that no reload reaches. Both backends therefore give the
head weights of its own (:data:`UNTIED`).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from envs.usage import Interrupted, UsageError, check_ranges

UNTIED = {"tie_word_embeddings": False}
"""Laid over the config of every model that an engine loads."""
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes for which vLLM 0.32 has an attention kernel on CPUs."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM makes room for."""
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer computes on the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Environment of every engine that is started here."""
T = TypeVar("T")


class EngineFailed(Interrupted):
    """The engine died, hung, or answers with other weights than it was given."""


@dataclass(frozen=True)
class VLLMConfig:
    """The vLLM engines."""

    sequences: int = 256
    """Responses decoded together; the key-value cache has room for that many."""
    tolerance: float = 0.0
    """Gap allowed between sampler and trainer after a sync, mean over the probe's tokens, nat; 0:
    .001 in float32, .05 in bfloat16."""
    correction: Literal["none", "importance", "recompute"] = "none"
    """What rollout learners take for the sampler's log-probabilities (``agents.engines.mismatch``).
    """
    timeout: float = 600.0
    """Seconds without an answer after which the engine counts as hung."""
    url: str = ""
    """A running server's address for ``engine=vllm-server``; one is started here when empty."""
    shared: str = ""
    """Folder that this process and the server both see, for weights; a temporary one when empty."""
    tensor_parallel: int = 1
    """Cards that share one model."""
    sleep: bool = True
    """Leave an in-process engine's memory on the card to the trainer while it learns."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, "vllm.", sequences=">= 1", tolerance=">= 0", timeout="> 0")
        check_ranges(self, "vllm.", tensor_parallel=">= 1")
        if self.url and not re.match(r"https?://[^/]", self.url):
            raise UsageError(f"vllm.url={self.url!r}; allowed: http://HOST:PORT, or https")
        if self.shared and not Path(self.shared).is_dir():
            raise UsageError(f"vllm.shared={self.shared!r} is no folder; allowed: one that exists")


class Room(NamedTuple):
    """What an engine keeps free for adapters."""

    rank: int
    targets: list[str]
    """Last names of the layers they stand on."""


class Completion(NamedTuple):
    """One response: t tokens through EOS, with the log-probabilities they were drawn at."""

    ids: list[int]
    logprobs: list[float]


class Request(NamedTuple):
    """Prompts to answer, one seed each; the k responses to a prompt have seeds of their own."""

    prompts: list[list[int]]
    seeds: list[int]
    k: int
    max_new_tokens: int
    temperature: float
    eos_id: int

    def sampling(self, row: int) -> dict[str, Any]:
        """Sampling parameters of vLLM for prompt ``row``, by the names both doors share."""
        return {
            "n": self.k,
            "seed": self.seeds[row],
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "stop_token_ids": [self.eos_id],
            "ignore_eos": True,  # further EOS tokens of the model: the trainer knows one
            "logprobs": 0,  # of the drawn token only
        }


class Backend(Protocol):
    """A vLLM engine. Every call raises :class:`EngineFailed` when there is no answer."""

    def generate(self, request: Request) -> list[Completion]:
        """Responses, the k of a prompt together."""

    def score(self, texts: list[list[int]]) -> list[np.ndarray]:
        """(t - 1,) float64 log-probabilities of the tokens of each text after its first."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace every weight, drop the adapter, forget what was computed with the old ones."""

    def load_adapter(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Answer through this adapter, given as peft's files hold one, from now on."""

    def sleep(self) -> None:
        """Leave the card to the trainer until :meth:`wake`: weights wait outside, caches go."""

    def wake(self) -> None:
        """Be as before :meth:`sleep`."""

    def close(self) -> None:
        """Give back the memory; may be called twice."""


def engine_arguments(
    dtype: str, length: int, config: VLLMConfig, shape: Any, room: Room | None = None
) -> dict[str, Any]:
    """Engine arguments of vLLM, by the names both doors share.

    Args:
        dtype: ``float32`` or ``bfloat16``, the trainer's.
        length: longest prompt and response together, tokens.
        config: sizes.
        shape: the model's transformers config.
        room: for the policy's adapter, where it has one.

    Raises:
        ValueError: vLLM has no attention for such a model on a CPU.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu and head_size(shape) not in CPU_HEADS:
        raise UsageError(
            f"engine: vllm on a CPU with a model of head_dim={head_size(shape)}; allowed: "
            f"{', '.join(map(str, CPU_HEADS))}, or --engine transformers"
        )
    lora: dict[str, Any] = {}
    if room is not None:
        # Named layers leave the head plain: through an adapted one vLLM 0.32 scores no two texts.
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(room.rank)}
        lora["lora_target_modules"] = room.targets
    return {
        **lora,
        "dtype": dtype,
        "max_model_len": length,
        "max_num_seqs": config.sequences,
        "gpu_memory_utilization": 0.05,  # asked at the start; the line below is what is taken
        "kv_cache_memory_bytes": cache_bytes(shape, length, config.sequences, dtype),
        "tensor_parallel_size": config.tensor_parallel,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "enforce_eager": on_cpu,
        "seed": 0,
    }


def lora_rank(rank: int) -> int:
    """The smallest rank vLLM makes room for that holds ``rank``.

    Raises:
        ValueError: there is none.
    """
    fitting = [room for room in RANKS if room >= rank]
    if not fitting:
        raise UsageError(f"model.lora_rank={rank} with vllm; allowed: at most {RANKS[-1]}")
    return fitting[0]


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Path:
    """Write an adapter as peft does, into ``folder``, which is made."""
    folder.mkdir()
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def cache_bytes(shape: Any, length: int, sequences: int, dtype: str, block: int = 128) -> int:
    """Bytes of keys and values for ``sequences`` texts of ``length`` tokens, in whole blocks."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    tokens = -(-length // block) * block * (sequences + 1)  # one block of vLLM's stays empty
    return (
        2
        * shape.num_hidden_layers
        * heads
        * head_size(shape)
        * tokens
        * (4 if dtype == "float32" else 2)
    )


def head_size(shape: Any) -> int:
    """Width of one attention head."""
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """``call()``, given up after ``seconds``: an engine that hangs in native code can only be left.

    Raises:
        EngineFailed: no answer in time, or an exception, named.
    """
    answers: Queue[tuple[bool, Any]] = Queue()

    def work() -> None:
        torch.get_num_threads()  # a new thread takes over torch's number only when it is asked for
        try:
            answers.put((True, call()))
        except BaseException as error:  # noqa: BLE001  (told to the caller, whatever it is)
            answers.put((False, error))

    threading.Thread(target=work, daemon=True, name=f"vllm {what}").start()
    try:
        fine, value = answers.get(timeout=seconds)
    except Empty:
        raise EngineFailed(f"vllm: no answer to {what} in {seconds:g} s") from None
    if not fine:
        raise EngineFailed(f"vllm: {what} failed: {type(value).__name__}: {value}") from value
    return value
