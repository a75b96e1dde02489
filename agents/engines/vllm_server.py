"""vLLM behind HTTP: on other cards, or on another host that sees the same folder.

Prompts and answers are token ids. Weights go through that folder: they are written as safetensors
and the server is told to read them. A server of our own listens on loopback with a key made for it
and ends with this process; one that runs already is named by ``vllm.url``, its key by the variable
``POISONLOOP_VLLM_KEY``, and it must have been started as ``docs/engines.md`` says.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from agents.engines.backend import (
    SETTINGS,
    UNTIED,
    Completion,
    EngineFailed,
    Request,
    Room,
    VLLMConfig,
    engine_arguments,
    save_adapter,
)

KEY = "POISONLOOP_VLLM_KEY"
"""Environment variable with the key of a server that runs already."""
SMALL = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
"""What a server needs of a model beside its weights."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy: prompts and the key are the server's alone."""
CONNECTIONS = 32
"""Requests under way at once; the server batches them."""
NAME = "policy"
"""What the model is called over HTTP."""
LAUNCHED = ("TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "OMP_NUM_THREADS")
"""How variables begin that a launcher sets for each of its processes."""
OURS = {
    **SETTINGS,
    "VLLM_SERVER_DEV_MODE": "1",  # the door through which weights are replaced
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}
"""Environment of a server of our own."""


class Engine:
    """A vLLM server as a backend; it starts with the first weights.

    Args:
        model: directory with ``config.json`` and tokenizer; its weights are not read.
        length: longest prompt and response together, tokens.
        dtype: ``float32`` or ``bfloat16``.
        config: sizes, patience, address.
        room: for the policy's adapter, where it has one.
    """

    def __init__(
        self, model: Path, length: int, dtype: str, config: VLLMConfig, room: Room | None = None
    ):
        self.patience = config.timeout
        self.process: subprocess.Popen[bytes] | None = None
        self._name = NAME
        self.url, self._key = config.url.rstrip("/"), os.environ.get(KEY, "")
        self._folder = Path(tempfile.mkdtemp(prefix="poisonloop-", dir=config.shared or None))
        self._weights = self._folder / "model"
        self._weights.mkdir()
        for file in (file for pattern in SMALL for file in model.glob(pattern)):
            shutil.copy(file, self._weights)
        shape = AutoConfig.from_pretrained(model)
        shape.update(UNTIED)
        shape.save_pretrained(self._weights)
        self._words = []  # behind a server of our own
        if not self.url:
            self._words = flags(engine_arguments(dtype, length, config, shape, room))

    def _start(self) -> None:
        self._key = secrets.token_hex(16)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = ["--model", str(self._weights), "--served-model-name", NAME]
        words += ["--host", "127.0.0.1", "--port", str(port), *self._words]
        with (self._folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**_own_environment(), **OURS, "VLLM_API_KEY": self._key},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if self.process is not None and self.process.poll() is not None:
                raise EngineFailed(
                    f"vllm: the server ended with status {self.process.returncode}; "
                    f"its last words: {self._last_words()}"
                )
            try:
                with DIRECT.open(f"{self.url}/health", timeout=5):
                    return
            except (OSError, HTTPException):
                time.sleep(0.2)
        raise EngineFailed(f"vllm: no server answers at {self.url} in {self.patience:g} s")

    def _last_words(self) -> str:
        log = self._folder / "server.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        telling = [line for line in lines if "Error" in line] or lines
        return telling[-1].strip() if telling else "none"

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer to ``body``, as JSON values."""
        asked = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        try:
            with DIRECT.open(asked, timeout=self.patience) as answer:
                said = answer.read()
        except urllib.error.HTTPError as error:
            words = error.read(2000).decode(errors="replace")
            raise EngineFailed(f"vllm: {path} refused with {error.code}: {words}") from None
        except (OSError, HTTPException) as error:
            died = self.process is not None and self.process.poll() is not None
            what = f"the server died: {self._last_words()}" if died else f"no answer: {error}"
            raise EngineFailed(f"vllm: {path}: {what}") from None
        try:
            return json.loads(said)
        except ValueError:  # some doors say nothing, or that they are done
            return None

    def _post_all(self, bodies: list[dict[str, Any]]) -> list[Any]:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            answers = list(pool.map(lambda body: self._post("/v1/completions", body), bodies))
        if not all(isinstance(answer, dict) and "choices" in answer for answer in answers):
            raise EngineFailed(f"vllm: {self.url} answers, but not as a vLLM server does")
        return answers

    def generate(self, request: Request) -> list[Completion]:
        """Responses, the k of a prompt together."""
        bodies = [
            {
                "model": self._name,
                "prompt": prompt,
                "return_token_ids": True,
                **request.sampling(row),
            }
            for row, prompt in enumerate(request.prompts)
        ]
        return [
            Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"])
            for answer in self._post_all(bodies)
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]

    def score(self, texts: list[list[int]]) -> list[np.ndarray]:
        """(t - 1,) log-probabilities of the tokens of each text after its first."""
        plan = {"model": self._name, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answers = self._post_all([{**plan, "prompt": text} for text in texts])
        rests = [answer["choices"][0]["prompt_logprobs"][1:] for answer in answers]
        return [
            np.array([of[str(token)]["logprob"] for of, token in zip(rest, text[1:], strict=True)])
            for text, rest in zip(texts, rests, strict=True)
        ]

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace every weight, and forget what was computed with the old ones."""
        whole = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        save_file(whole, self._folder / "new", {"format": "pt"})
        (self._folder / "new").replace(self._weights / "model.safetensors")
        if not self.url:
            self._start()
            return
        told = {"weights_path": str(self._weights)}
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": told})
        self._post("/reset_prefix_cache", {})
        self._forget_adapter()

    def load_adapter(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Answer through this adapter from now on; the one before is dropped."""
        self._forget_adapter()
        name = f"adapter-{secrets.token_hex(8)}"  # new to a server that served another run, too
        folder = save_adapter(self._folder / name, tensors, settings)
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self._name = name

    def _forget_adapter(self) -> None:
        if self._name != NAME:
            self._post("/v1/unload_lora_adapter", {"lora_name": self._name})
            shutil.rmtree(self._folder / self._name)
            self._name = NAME

    def sleep(self) -> None:
        """Nothing: a server has cards of its own."""

    def wake(self) -> None:
        """Nothing: it never sleeps."""

    def close(self) -> None:
        """Stop a server of our own and remove the folder."""
        if self.process is not None:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(self.process.pid, sign)
                    self.process.wait(10)
                    break
                except ProcessLookupError:
                    break
                except subprocess.TimeoutExpired:
                    continue
            self.process = None
        shutil.rmtree(self._folder, ignore_errors=True)


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as ``vllm serve`` spells them."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, list):
            words += [flag, *value]
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def _own_environment() -> dict[str, str]:
    """This process's, but for what says that it is one of several: the server is not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return dict(os.environ)
    return {n: v for n, v in os.environ.items() if not n.startswith(LAUNCHED)}


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _end_with_parent() -> None:
    """Linux: a server never outlives a run that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
