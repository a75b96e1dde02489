"""Which weights are trained, in which precision, and where: whole models, or adapters on one base.

    full fine-tuning   every weight is trained, in float32
    LoRA               W + (alpha / rank) B A on a frozen W; A and B are trained, in float32

(Hu et al. 2022). With adapters there is one base, in float32 or bfloat16, whoever uses it: policy,
reference and reward model are module trees of their own over the same tensors, so nothing is ever
switched between them, copied, or merged into the base. AdamW keeps its moments in the precision of
what it trains, float32 in both cases; a whole model in bfloat16 is refused, since most steps of a
learner are smaller than the spacing of its numbers.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from agents.adapters import HEAD, TRAINED, inject
from envs.usage import UsageError, check_ranges

Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class ModelConfig:
    """Precision, device and trained weights of policy and reward model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of frozen weights and activations; what is trained is float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Auto: the CPU for the embedded world, the GPU for real text where there is one."""
    gradient_checkpointing: Switch = "auto"
    """Form activations again in the backward pass: less memory, a third more time. Auto: on for
    real text."""
    lora_rank: int = 0
    """Rank of the adapters that are trained; 0 trains all weights."""
    lora_alpha: int = 32
    """Adapters are scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers with adapters: ``all-linear`` is all but the head, or names such as q_proj v_proj."""

    def __post_init__(self) -> None:
        """Check the ranges, and that what is trained is in float32."""
        check_ranges(self, "model.", lora_rank="0 to 4096", lora_alpha="1 to 65536")
        if not self.lora_targets:
            raise UsageError("model.lora_targets=(); allowed: all-linear, or names of layers")
        if self.dtype == "bfloat16" and not self.lora_rank:
            raise UsageError(
                "model.dtype='bfloat16' with model.lora_rank=0; allowed: float32, or a rank >= 1 "
                "(whole models are trained in float32, adapters in float32 on a bfloat16 base)"
            )

    def settled(self, real: bool) -> ModelConfig:
        """No ``auto`` left, on this machine.

        Args:
            real: whether the policy is a person's own model.

        Raises:
            UsageError: a GPU is asked for and there is none.
        """
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise UsageError("model.device='cuda'; allowed: cpu (torch finds no GPU here)")
        device = ("cuda" if real and cuda else "cpu") if self.device == "auto" else self.device
        here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if device == "cuda" and here > max(1, cards):
            raise UsageError(f"{here} processes on a machine of {cards} GPUs; allowed: one a GPU")
        again = self.gradient_checkpointing
        again = ("on" if real else "off") if again == "auto" else again
        return replace(self, device=device, gradient_checkpointing=again)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's own."""
        return getattr(torch, self.dtype)


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` stands."""
    return next(model.parameters()).device


def freeze_copy(model: nn.Module) -> nn.Module:
    """``model`` as it is now, frozen, in evaluation mode: a module tree of its own.

    Only what is trained is copied. Weights that are frozen already are shared, so a policy with
    adapters and its copy stand on one base; nobody may train those weights later.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def checkpointed(model: nn.Module) -> nn.Module:
    """``model``, whose decoder layers keep their input only and run again in the backward pass.

    Transformers' own switch acts in training mode alone, where dropout would make the trainer
    another model than the sampler. Without gradients, and with a cache, nothing changes.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_again, layer.forward)
    return model


def _again(forward: Any, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled() or named.get("past_key_values") is not None:
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def trainable(model: nn.Module, config: ModelConfig, seed: int) -> nn.Module:
    """``model``, ready to be trained as ``config`` says: whole, or through an adapter and its head.

    Args:
        model: a causal language model, or a reward model.
        config: settled.
        seed: draws the adapter.

    Raises:
        UsageError: no layer of the model is a target of adapters.
    """
    if config.gradient_checkpointing == "on":
        checkpointed(model)
    if not config.lora_rank:
        return model
    targets: Any = list(config.lora_targets)
    targets = "all-linear" if targets == ["all-linear"] else targets
    try:
        inject(model, TRAINED, targets, config.lora_rank, config.lora_alpha, seed)
    except UsageError as error:
        raise UsageError(f"model.lora_targets: {error}") from None
    for name, p in model.named_parameters():
        if name.startswith(HEAD):
            p.data = p.data.float()
            p.requires_grad_(True)
    return model


def scorer_on(base: nn.Module, seed: int) -> nn.Module:
    """A sequence classifier with one output that shares the tensors of the language model ``base``.

    ``seed`` draws its head.
    """
    from transformers import AutoModelForSequenceClassification

    config: Any = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    setattr(model, model.base_model_prefix, freeze_copy(base.get_decoder()))
    for module in model.modules():  # one config, so that a switch of attention reaches all layers
        if hasattr(module, "config"):
            module.config = model.config
    head = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, device=device_of(base))
    drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    head.weight.data = (config.initializer_range * drawn).to(head.weight)
    model.score = head
    return model.eval()
