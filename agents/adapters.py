"""Adapters inside a model: the one that is trained, and what tensors are called without any.

LoRA layers are put into the model itself (peft's ``inject_adapter_in_model``), so everything that
knows the model's parts goes on knowing them. A policy, its reference and a reward model that share
a base are module trees of their own: each has its own adapters, and all of them are always on but
where a defence switches its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from agents.processes import all_whole, for_main, like, like_all, whole
from envs.usage import UsageError

TRAINED = "trained"
"""The adapter that a learner trains; peft's files do not tell its name."""
HEAD = "score."
"""What the tensors of a reward model's head begin with."""
PEFT_PREFIX = "base_model.model."
"""What peft's files put before the names of tensors."""


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that carry peft's adapters, by name; told by the layer that each wraps."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}


def adapter_params(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """The parameters of one adapter in ``model``."""
    return [
        parameter
        for layer in adapted_layers(model).values()
        for name in layer.adapter_layer_names
        if adapter in getattr(layer, name)
        for parameter in getattr(layer, name)[adapter].parameters()
    ]


def inject(
    model: nn.Module, adapter: str, targets: str | list[str], rank: int, alpha: int, seed: int
) -> None:
    """Put an adapter into ``model`` that changes nothing yet; it alone has gradients.

    It computes beside those that are there. ``seed`` draws its first factors.

    Raises:
        UsageError: ``targets`` fit no layer.
    """
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    there = {name: list(layer.active_adapters) for name, layer in adapted_layers(model).items()}
    kind = TaskType.SEQ_CLS if hasattr(model, HEAD[:-1]) else TaskType.CAUSAL_LM
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type=kind
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second one is meant
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name=adapter)
        except ValueError as error:
            known = {name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m)}
            raise UsageError(
                f"targets {targets!r} of an adapter fit no layer; allowed: all-linear, or some of "
                f"{', '.join(sorted(known))}"
            ) from error
    for name, layer in adapted_layers(model).items():
        if there.get(name):
            layer.set_adapter([*there[name], adapter])
    for p in model.parameters():
        p.requires_grad_(False)
    for p in adapter_params(model, adapter):
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        p.requires_grad_(True)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a matrix that adapters can stand on."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def has_trained_adapter(model: nn.Module) -> bool:
    """Whether ``model`` is trained through an adapter rather than whole."""
    return any(TRAINED in layer.active_adapters for layer in adapted_layers(model).values())


def plain_names(model: nn.Module) -> dict[str, str]:
    """Names of the tensors of ``model`` with those they have without adapters; theirs left out."""
    wrappers = tuple(f"{name}." for name in adapted_layers(model))
    own = [n for n in model.state_dict() if ".base_layer." in n or not n.startswith(wrappers)]
    return {name: name.replace(".base_layer.", ".") for name in own}


def only_trained(model: nn.Module) -> bool:
    """Whether the adapter that is trained is all there is on the base at present."""
    on = [set(m.active_adapters) for m in adapted_layers(model).values() if not m.disable_adapters]
    return bool(on) and set().union(*on) == {TRAINED}


def trained_targets(model: nn.Module) -> list[str]:
    """Last names of the layers that the trained adapter stands on, sorted; none without one."""
    layers = adapted_layers(model).items()
    return sorted({n.rpartition(".")[2] for n, m in layers if TRAINED in m.active_adapters})


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of ``model`` without any adapters, under a plain model's names."""
    state = model.state_dict()
    return {plain: state[name].detach() for name, plain in plain_names(model).items()}


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a plain model that computes as ``model`` does now.

    Adapters that are on are added to the weights they stand on, adapters that are off are left out.
    """
    weights = base_weights(model)
    for name, layer in adapted_layers(model).items():
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            change = whole(layer.get_delta_weight(adapter).detach())
            plain = whole(weights[f"{name}.weight"])
            weights[f"{name}.weight"] = for_main((plain + change).to(plain.dtype))
    return weights


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of ``model``: all of it, or adapters and head without the base."""
    state = model.state_dict()
    if not has_trained_adapter(model):
        return state
    base = plain_names(model)
    return {n: v for n, v in state.items() if n not in base or n.startswith(HEAD)}


def load_own_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put :meth:`own_state` back; the base stays as it is.

    Raises:
        RuntimeError: a tensor is missing, or is none of the model's.
    """
    if not has_trained_adapter(model):
        model.load_state_dict(like_all(model.state_dict(), state))
        return
    _, unexpected = model.load_state_dict(like_all(model.state_dict(), state), strict=False)
    missing = own_state(model).keys() - state.keys()
    if missing or unexpected:
        raise RuntimeError(f"adapters: missing {sorted(missing)}, unexpected {sorted(unexpected)}")


def trained_adapter(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of the trained adapter under peft's names, as its files have them."""
    tensors = {peft: value.detach() for peft, value in _peft_names(model).items()}
    settings = model.peft_config[TRAINED].to_dict()
    base = getattr(model.config, "_name_or_path", "") or None
    facts = {"base_model_name_or_path": base, "inference_mode": True}
    return tensors, {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in {**settings, **facts}.items()
    }


def load_trained_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of :func:`trained_adapter` back.

    Raises:
        RuntimeError: a tensor is missing, or is none of the adapter's.
    """
    live = _peft_names(model)
    if live.keys() != tensors.keys():
        raise RuntimeError(f"adapter: {sorted(live.keys() ^ tensors.keys())} differ")
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(like(value, tensors[name]))


def exported(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """What :func:`load_plain` takes: the trained adapter with its config, or plain weights."""
    if has_trained_adapter(model):
        return trained_adapter(model)
    return all_whole(plain_weights(model)), None


def load_plain(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a plain model's weights, or the tensors of the trained adapter, into ``model``.

    Adapters of defences stay as they are.

    Raises:
        RuntimeError: a tensor is missing, or is none of the model's.
    """
    if has_trained_adapter(model):
        load_trained_adapter(model, weights)
        return
    names, state = plain_names(model), model.state_dict()
    adapters = {n: v for n, v in state.items() if n not in names}
    live = {plain: name for name, plain in names.items()}
    given = {live.get(name, name): value for name, value in weights.items()}
    model.load_state_dict({**adapters, **like_all(state, given)})


def _peft_names(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of the trained adapter by the names of peft's files."""
    marked, base = f".{TRAINED}.", plain_names(model)
    return {
        PEFT_PREFIX + name.replace(marked, "."): value
        for name, value in model.state_dict().items()
        if marked in name and name not in base
    }
