"""What this machine can do, and what a round asks of it: the yardsticks of the bench.

Rate of the machine: the fastest of several large single-precision matrix products, and of several
large copies, at the given number of threads. Work of a round: floating-point operations of the
models' matrix products on *real tokens only*, so padding counts as waste and never as speed:

    forward  2 (body * positions + head * predictions),   forward + backward  three times that

with ``body`` and ``head`` the weights of the linear maps inside and on top of the transformer, and
every distinct prompt of a round, or of a label, counted once, however often it is read.
Left out: embeddings (look-ups), attention's own products (a few percent at these lengths), norms,
softmax, sampling, optimizer. The share of the machine's rate is therefore understated, never
flattered.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

SIDE, COPIED = 2048, 2**28
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Weights(NamedTuple):
    """Weights of linear maps that every position passes, and that every prediction passes."""

    body: int
    head: int

    def forward(self, positions: float, predictions: float = 0.0) -> float:
        """Floating-point operations of one forward pass."""
        return 2.0 * (self.body * positions + self.head * predictions)


def weights_of(model: nn.Module) -> Weights:
    """Count ``model``'s linear maps; its head is ``lm_head`` or ``score``."""
    linear = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = sum(linear.pop(name, 0) for name in ("lm_head", "score"))
    return Weights(sum(linear.values()), head)


def matmul_rate(repetitions: int = 7) -> float:
    """Measured float32 operations per second of a large matrix product, the best of several."""
    a, b = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    seconds = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2.0 * SIDE**3 / min(seconds[1:])


def copy_rate(repetitions: int = 5) -> float:
    """Measured bytes per second read and written by a large copy, the best of several."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return 2.0 * COPIED / min(seconds[1:])


def describe(threads: int, rate: float) -> dict[str, object]:
    """The machine, for the record."""
    import transformers

    return {
        "processor": _processor(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matmul_gflops": rate / 1e9,
        "copy_gbytes": copy_rate() / 1e9,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Memory(NamedTuple):
    """Resident memory of this process in MiB; None where the system does not tell."""

    now: float | None
    peak: float | None  # since the last reset


def read_memory() -> Memory:
    """Present and peak resident memory."""
    if not _STATUS.is_file():
        return Memory(None, None)
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return Memory(*(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")))


def reset_peak() -> None:
    """Let the peak start again from the present; without effect outside Linux."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")
