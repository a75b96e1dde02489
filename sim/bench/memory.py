"""What a GRPO or PPO round keeps in memory, part by part.

Static parts are counted from the tensors themselves. What the backward pass needs is seen by hooks
on every tensor that autograd saves, each storage once: those as wide as the vocabulary are logits,
the rest activations. The process's own peak stands beside the sum, so nothing can hide. Prompts and
answers are random words: 256 answers of 24 words, four to a prompt of 12.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from agents.batches import RolloutBatch, Sequences
from agents.context import Context
from agents.defence import DefenceStack
from agents.learners.grpo import GRPOConfig
from agents.learners.ppo import PPOConfig
from agents.policy import Policy, load_causal_lm
from sim.bench.machine import read_memory, reset_peak
from sim.bench.shapes import save_random_policy, shape_of

MIB = 2**20
ANSWERS, GROUP, PROMPT, ANSWER = 256, 4, 12, 24
MAKERS: dict[str, Callable[[], Any]] = {"grpo": GRPOConfig, "ppo": PPOConfig}


def memory(shape: str, vocabulary: int) -> dict[str, Any]:
    """MiB by part for both learners; JSON values.

    Args:
        shape: a name of ``sim.bench.shapes.SHAPES``.
        vocabulary: words of the policy.
    """
    with TemporaryDirectory() as folder:
        path = save_random_policy(Path(folder), shape_of(shape), vocabulary)
        sides = {name: _round(path, maker(), vocabulary) for name, maker in MAKERS.items()}
    work = {"answers": ANSWERS, "prompt_tokens": PROMPT, "answer_tokens": ANSWER}
    return {"shape": shape, "vocabulary": vocabulary, "work": work, "mib": sides}


def _round(path: Path, config: Any, vocabulary: int) -> dict[str, Any]:
    """Score under the reference and update once, watching every tensor that is kept."""
    policy = Policy(load_causal_lm(path), None)
    policy.snapshot_reference()
    ctx = Context("policy", policy.model, None, policy)
    learner = config.build(ctx, DefenceStack([], ctx), 1.0)
    sequences = random_sequences(vocabulary)
    reset_peak()
    before = read_memory().now
    logp = policy.reference_logprobs(sequences)
    scored = read_memory().peak
    batch = RolloutBatch(
        sequences=sequences,
        group=torch.arange(ANSWERS) // GROUP,
        logp_old=logp,
        logp_ref=logp,
        rewards={"reward": torch.randn(ANSWERS, generator=torch.Generator().manual_seed(1))},
        weight=torch.ones(ANSWERS),
    )
    saved = Saved(vocabulary, policy.parameters())
    reset_peak()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept):
        learner.learn(batch, 0)
    state = ctx.optimizer.state.values()
    parts = {
        "weights": _bytes(policy.parameters()),
        "reference": _bytes(policy.reference.parameters()) if policy.reference else 0.0,
        "gradients": _bytes(policy.parameters()),
        "optimizer": _bytes(v for s in state for v in s.values() if isinstance(v, Tensor)),
        "activations": saved.most["activations"] / MIB,
        "logits": saved.most["logits"] / MIB,
    }
    peaks = {"before": before, "score": scored, "update": read_memory().peak}
    return {"parts": parts, "sum": sum(parts.values()), "resident": peaks}


class Saved:
    """Counts the bytes that autograd keeps for backward passes, each storage once."""

    def __init__(self, vocabulary: int, parameters: Iterable[Tensor]):
        self.vocabulary = vocabulary
        self.now = {"activations": 0, "logits": 0}
        self.most = dict(self.now)
        self._weights = {p.untyped_storage().data_ptr() for p in parameters}
        self._views: Counter[int] = Counter()  # kept tensors by storage

    def pack(self, tensor: Tensor) -> Tensor:
        """Note that ``tensor`` is kept until its node of the graph goes."""
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._weights:
            return tensor
        kind = "logits" if tensor.shape[-1:] == (self.vocabulary,) else "activations"
        kept = tensor.detach()
        self._views[place] += 1
        if self._views[place] == 1:
            self.now[kind] += size
            self.most[kind] = max(self.most[kind], self.now[kind])
        weakref.finalize(kept, self._gone, place, kind, size)
        return kept

    def _gone(self, place: int, kind: str, size: int) -> None:
        self._views[place] -= 1
        if not self._views[place]:
            self.now[kind] -= size


def random_sequences(vocabulary: int) -> Sequences:
    """ANSWERS answers, GROUP to a prompt, of random words."""
    generator = torch.Generator().manual_seed(0)

    def words(rows: int, width: int) -> Tensor:
        return torch.randint(3, vocabulary, (rows, width), generator=generator)

    prompts = words(ANSWERS // GROUP, PROMPT).repeat_interleave(GROUP, 0)
    answers = words(ANSWERS, ANSWER)
    return Sequences(prompts, torch.ones_like(prompts), answers, torch.ones_like(answers))


def _bytes(tensors: Iterable[Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / MIB
