"""What a defence costs: time and memory of one round against the same round without it.

Two training systems that differ in nothing else take turns at the same rounds, each from its own
feedback. Time is the median of the paired ratios. Memory is the greatest number of bytes that
tensors made during one round hold at once, with what the system keeps between rounds (weights,
moments, frozen copies, anchors); each storage counts once.
"""

from __future__ import annotations

import statistics
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.agent import Agent
from sim.battery.loop import Loop
from sim.config import Config
from sim.progress import quiet_loading

WARM, ROUNDS = 2, 5


def cost(config: Config) -> dict[str, float]:
    """Time and memory of ``config``'s round over those of its undefended twin."""
    quiet_loading()
    torch.set_num_threads(config.threads)
    bare, defended = Loop(replace(config, defences=())), Loop(config)
    for loop in (bare, defended):
        for _ in range(WARM):
            loop.round()
    ratios = []
    for _ in range(ROUNDS):
        base = bare.round()
        ratios.append(defended.round() / base)
    memory = held(defended) / held(bare)
    return {"time": statistics.median(ratios), "memory": memory}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside the block make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and count the storages of what it returns."""
        made = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _real(t)}
        for tensor in filter(_real, tree_leaves(made)):
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if place in held or place in self._known:  # a view, or written in place
                continue
            self._known.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, place, size)
        return made

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def held(loop: Loop) -> int:
    """Bytes kept between rounds, and the most that one round adds to them."""
    kept = _kept(loop.agent)
    with LiveBytes() as live:
        loop.round()
    return kept + live.most


def _kept(agent: Agent) -> int:
    """Bytes of weights, reference, moments and whatever the defences hold, each storage once."""
    held: list[Any] = [agent.state_dict(), agent.policy.reference]
    for stack in agent.stacks().values():
        held += [stack.ctx.model, *(vars(member) for member in stack.members)]
    leaves = [leaf for leaf in tree_leaves(held) if leaf is not None]
    modules = [leaf for leaf in leaves if isinstance(leaf, torch.nn.Module)]
    tensors = [*filter(_real, leaves), *(t for m in modules for t in m.parameters())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
