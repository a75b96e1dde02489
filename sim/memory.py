"""How much memory a run needs, from the models' config.json alone.

Nothing is loaded: a model is laid out on torch's meta device and its tensors are counted.

    whole      weights 4, gradients 4, moments 8 bytes a parameter, reference 4; reward model 16
    adapters   weights once for policy, reference and perplexity, and for a reward model on the
               same files; 16 bytes for every trained number of the adapters
    judges     the evaluation's perplexity model, which with adapters is their base, and on the
               CPU the scorer's fluency model, 4

Activations are those that the backward pass of one micro-batch keeps, prompts read once, answers at
full length; d is the width, f that of the feed-forward, M the packed tokens, and attention has its
blocks padded (``agents.packing``):

    layer    M (7 d + 4 f) + 2 d (U P + N T) + 2 d (U P + N (P + T))     5 d under adapters
    again    M d for every layer, and all of one layer at a time         gradient checkpointing

Of n processes that divide weights (``agents.sharding``) each has 1/n of all but adapters, of each
model by itself (policy, reference, reward model, perplexity model), and 1/n of the rows. Embeddings
and head are whole while a model computes, the policy while it is sampled.

A sum of tensors is what must fit at least; allocators and kernels take some more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agents.adapters import is_linear
from agents.engines.backend import cache_bytes, head_size
from agents.models import ModelConfig
from agents.policy import TILE
from agents.processes import count
from sim.config import Config

GIB = 2**30
TRAINED = 4 + 4 + 8
"""Bytes of a trained number: itself, its gradient, AdamW's moments."""
SIZES: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
             "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
           "tie_word_embeddings": True},
    "3B": {"hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192,
           "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256,
           "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
           "tie_word_embeddings": False},
}  # fmt: skip
"""Llama shapes of usual sizes."""


class Counted(NamedTuple):
    """A model's numbers."""

    parameters: int  # of the language model
    body: int  # without an output layer of its own
    adapter: int  # trained numbers of adapters at the targets
    cast: int  # widths of the inputs of all targets, which bfloat16 keeps in float32 again
    layers: int
    width: int
    queries: int  # heads * head size
    keys: int  # key-value heads * head size
    feed_forward: int
    vocabulary: int


class Work(NamedTuple):
    """What goes through a model at once."""

    prompts: int
    answers: int
    prompt_tokens: int
    answer_tokens: int


def counted(config: Any, model: ModelConfig) -> Counted:
    """The numbers of a transformers config, laid out on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        laid: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = laid.get_output_embeddings()
    parameters = sum(p.numel() for p in laid.parameters())
    tied = head.weight is laid.get_input_embeddings().weight
    every = model.lora_targets == ("all-linear",)
    shapes = [
        module.weight.shape
        for name, module in laid.named_modules()
        if is_linear(module) and module is not head
        if every or name.rpartition(".")[2] in model.lora_targets
    ]
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Counted(
        parameters=parameters,
        body=parameters - (0 if tied else head.weight.numel()),
        adapter=model.lora_rank * sum(map(sum, shapes)),
        cast=sum(shape[1] for shape in shapes),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        queries=heads * head_size(text),
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_size(text),
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
    )


def activations(shape: Counted, work: Work, model: ModelConfig) -> int:
    """Bytes that the backward pass of ``work`` keeps, logits left out."""
    prompts, answers, p, t = work
    tokens = prompts * p + answers * t
    again = model.gradient_checkpointing == "on"
    number = model.torch_dtype.itemsize
    inner = tokens * ((5 if model.lora_rank else 7) * shape.width + 4 * shape.feed_forward)
    inner += 2 * shape.queries * (2 * prompts * p + answers * (p + 2 * t))
    layer = number * inner
    if model.lora_rank:
        layer += 4 * tokens * shape.adapter // max(1, shape.layers * 2 * shape.width)
        layer += 4 * tokens * shape.cast // shape.layers if number < 4 else 0
    if not again:
        return shape.layers * layer
    return shape.layers * tokens * shape.width * number + layer


def logits(shape: Counted, tokens: int) -> int:
    """Bytes of a tile of logits with their log-softmax and gradient."""
    return 3 * 4 * min(TILE, tokens * shape.vocabulary)


def estimate(
    config: Config,
    policy: Any,
    reward: Any,
    same: bool = True,
    prompt_tokens: int | None = None,
    processes: int = 1,
) -> dict[str, int]:
    """Bytes by part, of one process.

    Args:
        config: a run.
        policy: the policy's transformers config.
        reward: that of the reward model's base.
        same: whether both are the same files, so that adapters share one base.
        prompt_tokens: longest prompt; that of ``config.text`` when absent.
        processes: between which weights and rows are divided.
    """
    model = config.model
    whole, number = not model.lora_rank, model.torch_dtype.itemsize
    on_cpu = model.device != "cuda"  # where the scorer's fluency model always stands
    shape, base = counted(policy, model), counted(reward, model)
    trained = shape.parameters if whole else shape.adapter
    scoring = (base.body if whole else base.adapter) + base.width
    apart = processes > 1  # divided weights are nobody else's
    own_base = 0 if whole or (same and not apart) else base.body * number
    again = 0 if whole or not apart else shape.parameters * number  # the base in another tree
    rolls = config.learner_name in ("ppo", "grpo")
    p, t = prompt_tokens or config.text.prompt_tokens, config.sampler.max_new_tokens
    people, micro = config.feedback, min(config.learner.micro_batch, config.learner.minibatch)
    answers = people.batch * people.responses if rolls else people.batch
    micro = -(-min(micro, answers) // processes)
    step = Work(min(micro, people.batch), micro * (1 + (config.learner_name == "dpo")), p, t)
    kept = activations(shape, step, model) + logits(shape, step.answers * t)
    if rolls:
        labels = min(config.reward_model.micro_batch, config.reward_model.minibatch)
        labels = -(-labels // processes)
        kept = max(kept, activations(base, Work(labels, 2 * labels, p, t), model))
    sampled = max(people.batch * people.responses, config.evaluation.n_harm)
    rows = -(-min(config.sampler.batch, sampled) // processes)
    cache = rows * (p + t) * 2 * shape.keys * shape.layers * number
    engine = 0
    if config.engine == "vllm":  # its own weights with a head of their own, and its cache
        room = cache_bytes(policy, p + t + 1, config.vllm.sequences, model.dtype)
        engine = (shape.body + shape.width * shape.vocabulary) * number + room
        cache = rows = 0
    ours = processes if whole else 1  # adapters are whole in every process
    if apart:
        head = 1 if shape.body == shape.parameters else 2
        kept += head * shape.vocabulary * shape.width * number * (2 if whole else 1)
        cache += shape.parameters * number * (config.engine == "transformers")
    scored = own_base // processes + TRAINED * scoring // ours
    return {
        "weights": shape.parameters * number // processes + (0 if whole else 4 * trained),
        "gradients": 4 * trained // ours,
        "optimizer": 8 * trained // ours,
        "reference": ((shape.parameters if whole else trained) * 4 + again) // processes,
        "reward model": scored if rolls else 0,
        "judges": shape.parameters * ((number if whole else 0) + (4 if on_cpu else 0))
        + again // processes,
        "vllm": engine,
        "activations": kept,
        "sampling": cache + rows * shape.vocabulary * (number + 4 + 4 + 8),
    }


def peak(parts: dict[str, int]) -> int:
    """All parts at once but the last two: who samples does not learn."""
    learning, sampling = parts["activations"], parts["sampling"]
    return sum(parts.values()) - min(learning, sampling)


def available(device: str) -> int:
    """Bytes of ``device``: a GPU's memory, or the machine's."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shortage(config: Config, policy: Path, reward: Path) -> str | None:
    """What to say before a run whose parts are larger than its device, None where they fit.

    Args:
        config: a run whose ``model`` is settled.
        policy: the policy's folder.
        reward: the folder of the reward model's base.
    """
    from transformers import AutoConfig

    configs = [AutoConfig.from_pretrained(folder) for folder in (policy, reward)]
    needed = peak(estimate(config, *configs, same=policy == reward, processes=count()))
    there = available(config.model.device)
    if needed <= there:
        return None
    return (
        f"model: about {needed / GIB:.1f} GiB are needed and {config.model.device} has "
        f"{there / GIB:.1f}; `poisonloop memory --model {policy}` shows what takes them, and "
        "model.lora_rank, model.dtype, learner.micro_batch and sampler.batch change it"
    )
