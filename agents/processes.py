"""The processes of one run, and what they tell each other.

A run usually is one process, and all of this does nothing. Of several, each goes through the whole
loop: same configuration, same draws, same numbers, so that all come to the same collective
operation at the same time. What takes long is divided between them by rows and put together again:
sampling, log-probabilities and rewards, forward and backward of a learner's step. What stays small
(labelling, a defence's own batches, the monitor) all of them do alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False
_counts = True


def count() -> int:
    """How many processes share what is computed now."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def index() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return index() == 0


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """A block that each process goes through by itself, the others after the main one.

    What the main process left on disk is there for them.
    """
    global _alone
    if not is_main():
        wait()
    _alone = True
    try:
        yield
    finally:
        _alone = False
    if is_main():
        wait()


@contextmanager
def counting(counts: bool) -> Iterator[None]:
    """A block in which this process adds to no total unless its rows count (:func:`share`)."""
    global _counts
    _counts = counts
    try:
        yield
    finally:
        _counts = True


def total(value: Tensor) -> Tensor:
    """The sum over all processes, without gradient."""
    return _reduced(value if _counts else torch.zeros_like(value), dist.ReduceOp.SUM)


def largest(value: int) -> int:
    """The largest of all processes' numbers."""
    return int(_reduced(torch.tensor(value), dist.ReduceOp.MAX)) if count() > 1 else value


def _reduced(value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if count() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value, how)
    return value


def from_main(row: Tensor) -> Tensor:
    """The main process's ``row`` (n,); the others give any of its dtype."""
    if count() == 1:
        return row
    length = torch.tensor(len(row))
    dist.broadcast(length, src=0)
    row = row if is_main() else row.new_empty(int(length))
    dist.broadcast(row, src=0)
    return row


def share(rows: Tensor, owner: Tensor | None = None) -> tuple[Tensor, bool]:
    """This process's part of ``rows`` (n,), and whether it counts.

    Where a process has none it gets the first row, which does not count: every process must make
    the same passes through a model whose weights are divided.

    Args:
        rows: divided as they stand, neighbours together, unless there is an
        owner: (n,) from 0 on, which prompt a row is about. Rows of one prompt then stay together: a
            pass reads it once for all of them.
    """
    if count() == 1:
        return rows, True
    if owner is None:
        part = rows.tensor_split(count())[index()]
    else:
        size = torch.bincount(owner)
        middle = 2 * size.cumsum(0) - size  # of each prompt's rows, were they sorted; in halves
        part = rows[(middle * count() // (2 * len(rows)))[owner] == index()]
    return (part, True) if len(part) else (rows[:1], False)


def by_rows(compute: Callable[[Tensor], Tensor], n: int, batch: int) -> Tensor:
    """(n, ...) of ``compute``, which takes row numbers, ``batch`` of them at a time; no gradient.

    The rows of a batch are divided between the processes; all get the whole.
    """
    return torch.cat([_together(compute, rows) for rows in torch.arange(n).split(batch)])


def _together(compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    if count() == 1:
        return compute(rows)
    mine, counts = share(rows)
    found = compute(mine)
    whole = found.new_zeros(len(rows), *found.shape[1:])
    if counts:
        whole[mine - rows[0]] = found
    return total(whole)


def whole(value: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes; others as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def for_main(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU of the main process, of several; the others keep nothing of it."""
    if count() == 1:
        return tensor
    return tensor.cpu() if is_main() else tensor.new_empty(0, device="cpu")


def all_whole(state: Any) -> Any:
    """Nested ``state`` with every tensor :func:`whole`; parts end on the CPU, in the main process.

    Elsewhere what was divided comes out empty: the main process alone writes it.
    """
    if count() == 1:
        return state
    if isinstance(state, Tensor):
        if not hasattr(state, "full_tensor"):
            return state
        return for_main(whole(state.detach()))
    if isinstance(state, Mapping):
        return {name: all_whole(value) for name, value in state.items()}
    return [all_whole(v) for v in state] if isinstance(state, list | tuple) else state


def like(live: Tensor, value: Tensor) -> Tensor:
    """``value``, divided as ``live`` is; as it is where it is so already."""
    if not hasattr(live, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    placed = value.to(live.device)
    return distribute_tensor(placed, live.device_mesh, live.placements, src_data_rank=None)


def like_all(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, each divided as the one of that name in ``live``."""
    return {name: like(live[name], v) if name in live else v for name, v in values.items()}
