"""Weights divided between the processes of a run (FSDP2: ``torch.distributed.fsdp.fully_shard``).

Policy, reference, reward model and perplexity model are each divided by themselves, decoder layer
by decoder layer; embeddings, last norm and head go with the whole model. Weights are put together
when what they belong to computes, and taken apart again afterwards.

    trained whole             weights, gradients and AdamW's moments are divided
    trained through adapters  the frozen base is divided; every process has the adapters whole

A gradient is the mean over processes of what each computed, so that a loss which all compute alike
(a defence's own batch) counts once, with no word about processes in its code. Within
:func:`parts_add_up` it is the sum: there each process has other rows of one batch. DeepSpeed's ZeRO
hides ``.grad``, which the ``backward`` hook of defences edits, and cannot be used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor, nn

from agents import processes

P = ParamSpec("P")
T = TypeVar("T")
THROUGH = "compute_here"
"""The method of a divided model that computes with its weights at hand."""

_units: WeakSet[Any] = WeakSet()
"""Whatever is divided in this process."""
_computing: WeakSet[Any] = WeakSet()
"""Models that are within :func:`as_forward`."""
_adding = False


def shard(module: nn.Module, whole: bool = False) -> nn.Module:
    """Divide the weights of ``module`` between the processes, if there are several.

    Args:
        module: a transformers model, or a head beside one.
        whole: leave every process what is trained, and combine its gradients.
    """
    if processes.count() == 1:
        return module
    for p in module.parameters():  # where defences trained it, kernels may have rounded apart
        dist.broadcast(p.data, src=0)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    kept = {p for p in module.parameters() if p.requires_grad} if whole else set()
    for p in kept:
        p.register_hook(_combined)
    if len(kept) == len(list(module.parameters())):
        return module
    mesh = init_device_mesh(next(module.parameters()).device.type, (processes.count(),))
    for part in [*_layers(module), module]:
        unit = fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        unit.set_gradient_divide_factor(float(processes.count()))
        _units.add(unit)
    # Ours are views, and nobody adds to them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    setattr(module, THROUGH, partial(_at_hand, module))
    register_fsdp_forward_method(module, THROUGH)
    return module


def _at_hand(module: Any, compute: Callable[..., T], *args: Any, **named: Any) -> T:
    """``compute`` with the weights of ``module`` kept, whatever parts of it are called."""
    _computing.add(module)
    module.set_reshard_after_forward(False, recurse=False)
    try:
        return compute(module, *args, **named)
    finally:
        module.set_reshard_after_forward(True, recurse=False)
        _computing.discard(module)


def _layers(module: nn.Module) -> list[nn.Module]:
    from agents.hidden_states import decoder_layers

    return list(decoder_layers(module)) if hasattr(module, "get_decoder") else []


def _combined(gradient: Tensor) -> Tensor:
    gradient = processes.total(gradient)
    return gradient if _adding else gradient / processes.count()


def as_forward(
    compute: Callable[Concatenate[nn.Module, P], T],
) -> Callable[Concatenate[nn.Module, P], T]:
    """Let ``compute(model, ...)`` call parts of a divided model as if it were its ``forward``."""

    @wraps(compute)
    def run(model: nn.Module, *args: P.args, **named: P.kwargs) -> T:
        through = getattr(model, THROUGH, None)
        if through is None or model in _computing:
            return compute(model, *args, **named)
        return through(compute, *args, **named)

    return run


def has_hooks(model: nn.Module) -> bool:
    """Whether ``model`` has forward hooks of anybody's beside the two that divide it."""
    return len(model._forward_hooks) + len(model._forward_pre_hooks) > 2 * hasattr(model, THROUGH)


@contextmanager
def parts_add_up() -> Iterator[None]:
    """A block whose backward passes are of this process's part of a batch."""
    global _adding
    count = float(processes.count())
    try:
        _adding = True
        for unit in _units:
            unit.set_gradient_divide_factor(1.0)
        yield
    finally:
        _adding = False
        for unit in _units:
            unit.set_gradient_divide_factor(count)


@contextmanager
def put_together(model: nn.Module) -> Iterator[None]:
    """A block with every weight of ``model`` at hand: sampling asks for them at each token."""
    units: list[Any] = [module for module in model.modules() if module in _units]
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
