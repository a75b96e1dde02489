"""One vLLM engine for the several processes of a run: the main process asks, all are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import processes
from agents.engines.backend import Backend, Completion, Request


class Shared:
    """A backend in every process, with the engine behind that of the main process.

    Args:
        engine: the engine in the main process, None in the others.
    """

    def __init__(self, engine: Backend | None):
        self.engine = engine

    def generate(self, request: Request) -> list[Completion]:
        """Responses, the k of a prompt together."""
        said = self.engine.generate(request) if self.engine else []
        ids = _told([answer.ids for answer in said], torch.int64)
        logprobs = _told([answer.logprobs for answer in said], torch.float64)
        pairs = zip(ids, logprobs, strict=True)
        return [Completion(one.tolist(), other.tolist()) for one, other in pairs]

    def score(self, texts: list[list[int]]) -> list[np.ndarray]:
        """(t - 1,) float64 log-probabilities of the tokens of each text after its first."""
        found = self.engine.score(texts) if self.engine else []
        return [scores.numpy() for scores in _told(found, torch.float64)]

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace every weight; divided ones are put together, one after the other."""
        whole = processes.all_whole(weights)
        if self.engine:
            self.engine.load_weights(whole)

    def load_adapter(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Answer through this adapter from now on; every process has it whole."""
        if self.engine:
            self.engine.load_adapter(tensors, settings)

    def sleep(self) -> None:
        """Leave the card to the trainer."""
        if self.engine:
            self.engine.sleep()

    def wake(self) -> None:
        """Be as before."""
        if self.engine:
            self.engine.wake()

    def close(self) -> None:
        """Give back the memory; may be called twice."""
        if self.engine:
            self.engine.close()


def _told(rows: list[Any], dtype: torch.dtype) -> list[Tensor]:
    """The main process's rows of numbers, in every process."""
    lengths = processes.from_main(torch.tensor([len(row) for row in rows], dtype=torch.int64))
    joined = [torch.as_tensor(row, dtype=dtype) for row in rows]
    flat = processes.from_main(torch.cat(joined) if joined else torch.zeros(0, dtype=dtype))
    return list(flat.split(lengths.tolist()))
