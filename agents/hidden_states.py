"""What a causal language model computes on its way: hidden states of every layer, MLP outputs.

    h_0 = embedding,    h_l = output of decoder layer l = 1 .. L,    logits = head(norm(h_L))

Hooks on the layers see a packed row (``agents.packing``) or padded rows alike; both come out here
as one matrix of tokens with an index of who is where. No state has passed the final norm, unlike
the last of transformers' own ``hidden_states``, so ``head(norm(h_l))`` reads every depth equally.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.batches import Sequences
from agents.packing import can_pack, pack, packed_inputs
from agents.policy import padded_inputs, tiled_logp
from agents.sharding import as_forward
from envs.usage import UsageError

DOWN_PROJECTIONS = ("down_proj", "c_proj", "fc2", "dense_4h_to_h")
"""Names that model families give to the last matrix of an MLP."""


class States(NamedTuple):
    """Hidden states of one forward pass over N sequences; M counts the rows that were computed."""

    layers: list[Tensor]  # l = 0 .. L of (M, d)
    mlp: list[Tensor]  # layers 1 .. L of (M, d)
    tokens: Tensor  # (A,) rows of all real tokens of all sequences, shared prompts once for each
    answers: Tensor  # (N, T) row of each response token, 0 on padding
    before: Tensor  # (N, T) row that predicts each response token, 0 on padding


class _Enough(Exception):
    """Ends a forward pass whose further layers nobody reads."""


@as_forward
def capture(model: nn.Module, sequences: Sequences, last: int | None = None) -> States:
    """Run ``model`` on ``sequences``, with gradient if it is on, and keep every state.

    Args:
        model: a transformers causal language model.
        sequences: N prompts with responses.
        last: stop after this decoder layer, counted from 1; None runs all of them.
    """
    layers: list[Tensor] = []
    mlp: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        layers.append(_rows(args[0] if args else kwargs["hidden_states"]))

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        layers.append(_rows(output))
        if len(layers) - 1 == last:
            raise _Enough

    def inside(_module: nn.Module, _args: Any, output: Any) -> None:
        mlp.append(_rows(output))

    blocks = decoder_layers(model)
    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    try:
        handles += [block.register_forward_hook(leave) for block in blocks]
        handles += [mlp_of(block).register_forward_hook(inside) for block in blocks]
        places = _forward(model, sequences)
    finally:
        for handle in handles:
            handle.remove()
    return States(layers, mlp, *places)


def _rows(output: Any) -> Tensor:
    """(M, d) of a module's output, which is (B, S, d) or a tuple that begins with it."""
    return (output[0] if isinstance(output, tuple) else output).flatten(0, 1)


def _forward(model: nn.Module, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Run the decoder without the head; ``tokens``, ``answers`` and ``before`` of its rows."""
    prompt, answer = sequences.prompt_ids.shape[1], sequences.ids.shape[1]
    said = sequences.mask.bool()
    if can_pack(model, prompt + answer):
        layout = pack(sequences)
        _run(model, packed_inputs(model, layout))
        inside = torch.zeros(layout.prompt.numel(), dtype=torch.bool, device=said.device)
        inside[layout.in_prompt] = True
        inside = inside.view_as(layout.prompt)[layout.owner]
        answers = F.pad(layout.answer, (0, answer - layout.answer.shape[1]))
        before = torch.zeros_like(answers).masked_scatter(said, layout.before)
        tokens = torch.cat([layout.prompt[layout.owner][inside], answers[said]])
        return tokens, answers, before
    inputs = padded_inputs(sequences)
    _run(model, inputs)
    ids = inputs["input_ids"]
    places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    tokens = places[inputs["attention_mask"].bool()]
    return tokens, places[:, prompt:] * said, places[:, prompt - 1 : -1] * said


def _run(model: nn.Module, inputs: dict[str, Any]) -> None:
    with suppress(_Enough):
        model.get_decoder()(**inputs)


def _named(parent: nn.Module, names: Sequence[str], what: str) -> Any:
    """The first of ``names`` that ``parent`` has.

    Raises:
        UsageError: it has none of them.
    """
    for name in names:
        if hasattr(parent, name):
            return getattr(parent, name)
    raise UsageError(
        f"model: {type(parent).__name__} has no {what}; allowed: one named {', '.join(names)}"
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, first to last."""
    return _named(model.get_decoder(), ("layers", "h"), "list of layers")


def mlp_of(layer: nn.Module) -> nn.Module:
    """The MLP of one decoder layer."""
    return _named(layer, ("mlp", "feed_forward"), "MLP")


def down_projection(layer: nn.Module) -> nn.Module:
    """The matrix that writes an MLP's result, found by name: its place differs between families."""
    return _named(mlp_of(layer), DOWN_PROJECTIONS, "down projection")


def final_norm(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm between the last layer and the head."""
    return _named(model.get_decoder(), ("norm", "ln_f", "final_layer_norm"), "final norm")


def at_depth(model: nn.Module, share: float) -> int:
    """The decoder layer, counted from 1, at ``share`` of the depth; rounded up."""
    return max(1, math.ceil(share * len(decoder_layers(model))))


def check_layers(model: nn.Module, layers: Sequence[int], field: str) -> None:
    """Refuse layers that the model does not have.

    Raises:
        UsageError: a layer outside 1 to L.
    """
    depth = len(decoder_layers(model))
    if not all(1 <= layer <= depth for layer in layers):
        raise UsageError(f"{field}={tuple(layers)}; allowed: 1 to {depth}, the model's layers")


@as_forward
def depth_losses(model: nn.Module, states: States, sequences: Sequences, mask: Tensor) -> Tensor:
    """(L + 1,) cross-entropy of the tokens in ``mask`` (N, T), read from every depth.

    All depths pass the head as one list of rows, a tile at a time, so their logits never stand
    together.
    """
    rows, ids = states.before[mask], sequences.ids[mask]
    norm, depths = final_norm(model), len(states.layers)
    read = torch.cat([norm(layer[rows]) for layer in states.layers])
    logp = tiled_logp(model.get_output_embeddings(), read, ids.repeat(depths), 1.0)
    return -logp.view(depths, -1).sum(1) / max(1, len(ids))


@contextmanager
def only_trainable(model: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep gradients from all parameters of ``model`` but ``chosen`` while the block lasts."""
    kept = {id(p) for p in chosen}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_(True)
