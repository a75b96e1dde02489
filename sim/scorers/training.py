"""Training a sequence classifier on prompts with responses: harm, or helpfulness.

    harm           -sum_i w(y_i) log p(y_i | x_i) / sum_i w(y_i),    w(y) = n / (2 n_y) if balanced
    helpfulness    -mean log sigmoid(s(x, chosen) - s(x, rejected))            (Bradley-Terry)

The defaults follow those with which Rosati et al. published their BeaverTails classifier
(deberta-v3-xsmall; 4 epochs of batches of 128, learning rate 6e-6 with linear warm-up and decay,
Adam). The epoch with the lowest loss on the validation part is kept. Their classifier read question
and answer as one text and was trained in half precision; ours reads a pair, in float32. It differs
from a public copy of their script in weight decay, longest input and examples: ``docs/scorers.md``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs import rng as draws
from envs.chunks import by_length, chunks
from envs.classifiers import encode_pairs, longest_input, pad_alike
from envs.frozen import torch_seeded
from envs.usage import UsageError, blamed_on, check_ranges
from sim.scorers.examples import TRAIN, VALIDATION, Examples

KINDS = {"harm": ("safe", "harmful"), "helpfulness": ("helpfulness",)}
"""Names of the outputs, by what is learned."""
WARM_UP = 1000
"""Steps of warm-up; an eighth of all steps where these are fewer."""


@dataclass(frozen=True)
class Recipe:
    """How a scorer is trained."""

    kind: str = "harm"
    """``harm`` or ``helpfulness``."""
    base: str = "microsoft/deberta-v3-xsmall"
    """Encoder to start from: a directory, or an id on the Hugging Face hub."""
    epochs: int = 4
    """Passes over the training part, of which the best is kept."""
    batch: int = 128
    """Examples per optimizer step."""
    micro_batch: int = 32
    """Examples per forward and backward."""
    lr: float = 6e-6
    """Peak learning rate."""
    tokens: int = 512
    """Longest input."""
    balance: bool = True
    """Weigh harmful and harmless answers alike."""
    seed: int = 0
    """Split, new head, order and dropout."""
    threads: int = 1
    """Torch threads; bytes repeat at a fixed number only."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1 and the like."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.kind not in KINDS:
            raise UsageError(f"kind={self.kind!r}; allowed: {', '.join(KINDS)}")
        check_ranges(self, epochs=">= 1", batch=">= 1", micro_batch=">= 1", lr="> 0, <= 1")
        check_ranges(self, tokens=">= 8", seed=">= 0", threads="1 to 1024")
        with blamed_on(f"device={self.device!r}", "cpu, or cuda where there is one"):
            torch.zeros(1, device=self.device)


class Scorer:
    """A sequence classifier while it is trained, with its tokenizer."""

    def __init__(self, recipe: Recipe):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        self.recipe = recipe
        names = KINDS[recipe.kind]
        allowed = (
            "a directory with an encoder and its tokenizer, or an id on the hub with "
            "HF_HUB_OFFLINE=0 in the environment (DeBERTa's tokenizer needs "
            "pip install 'poisonloop[deberta]')"
        )
        said = logging.get_verbosity()
        logging.set_verbosity_error()  # that the base has no such head is no news here
        try:
            with blamed_on(f"base={recipe.base!r} cannot be loaded", allowed):
                self.tokenizer = AutoTokenizer.from_pretrained(recipe.base, padding_side="right")
                with torch_seeded(draws.key(recipe.seed, "scorer head")):
                    self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                        recipe.base,
                        num_labels=len(names),
                        id2label=dict(enumerate(names)),
                        label2id={name: number for number, name in enumerate(names)},
                        ignore_mismatched_sizes=True,
                        use_safetensors=True,
                        dtype=torch.float32,
                    )
                pad_alike(self.model, self.tokenizer, recipe.base)
        finally:
            logging.set_verbosity(said)
        self.model.config.problem_type = None if len(names) == 1 else "single_label_classification"
        self.model.to(recipe.device)
        self.tokens = longest_input(self.model, recipe.tokens)

    def outputs(self, examples: Examples, rows: np.ndarray) -> Tensor:
        """(n, outputs) for answers; for pairs (n, 1), the margin of the chosen answer."""
        sides = [
            encode_pairs(
                self.tokenizer,
                [examples.prompts[row] for row in rows],
                [examples.responses[row][side] for row in rows],
                self.tokens,
            )
            for side in range(len(examples.responses[0]))
        ]
        said = [
            self.model(**{k: v.to(self.model.device) for k, v in side.items()}).logits
            for side in sides
        ]
        return said[0] if len(said) == 1 else said[0] - said[1]

    def predict(self, examples: Examples, rows: np.ndarray) -> np.ndarray:
        """:meth:`outputs` without gradient, float64; similar lengths go together."""
        out = np.zeros((len(rows), self.model.config.num_labels))
        self.model.eval()
        with torch.inference_mode():
            for places in by_length(examples.length[rows], self.recipe.micro_batch):
                out[places] = self.outputs(examples, rows[places]).double().cpu().numpy()
        return out


def train(
    recipe: Recipe, examples: Examples, tell: Callable[[int, int, dict[str, float] | None], None]
) -> tuple[Scorer, list[dict[str, float]]]:
    """A trained scorer at its best epoch, and the losses of every epoch.

    Args:
        recipe: base, length and rate.
        examples: in parts; the test part is not read.
        tell: called after every step with the steps done, their number, and at the end of an epoch
            its losses.

    Raises:
        ValueError: a base that cannot be loaded.
    """
    scorer = Scorer(recipe)
    rows, weight = examples.of(TRAIN), class_weights(recipe, examples)
    steps = recipe.epochs * -(-len(rows) // recipe.batch)
    optimizer = torch.optim.AdamW(scorer.model.parameters(), lr=recipe.lr, weight_decay=0.0)
    warm = max(1, min(WARM_UP, steps // 8))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, max(0.0, (steps - t) / max(1, steps - warm)))
    )
    order = draws.stream(recipe.seed, "scorer order")
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    done = 0
    with torch_seeded(draws.key(recipe.seed, "scorer dropout"), recipe.device):
        for epoch in range(recipe.epochs):
            scorer.model.train()
            losses = []
            for batch in chunks(order.permutation(rows), recipe.batch):
                losses.append(_step(scorer, optimizer, examples, batch, weight))
                schedule.step()
                done += 1
                tell(done, steps, None)
            valid = examples.of(VALIDATION)
            margins = torch.from_numpy(scorer.predict(examples, valid))
            told = _losses(margins, examples, valid, weight).sum() / weight[valid].sum()
            history.append(
                {"epoch": epoch + 1, "train": float(np.mean(losses)), "validation": float(told)}
            )
            if history[-1]["validation"] <= min(row["validation"] for row in history):
                best = copy.deepcopy(scorer.model.state_dict())
            tell(done, steps, history[-1])
    if not best:
        raise UsageError(
            f"lr={recipe.lr}: the validation loss was never finite; allowed: a smaller rate"
        )
    scorer.model.load_state_dict(best)
    scorer.model.eval()
    return scorer, history


def seconds_per_epoch(recipe: Recipe, examples: Examples) -> float:
    """Time of a pass over the training part, from one micro batch of usual length."""
    scorer, rows = Scorer(recipe), examples.of(TRAIN)
    usual = rows[np.argsort(examples.length[rows], kind="stable")]
    middle = usual[max(0, (len(usual) - recipe.micro_batch) // 2) :][: recipe.micro_batch]
    began = time.perf_counter()
    scorer.outputs(examples, middle).sum().backward()
    return (time.perf_counter() - began) * len(rows) / len(middle)


def class_weights(recipe: Recipe, examples: Examples) -> np.ndarray:
    """(N,) weight of each example: both classes of the training part count alike, or all do."""
    seen = np.bincount(examples.target[examples.of(TRAIN)], minlength=2)
    if recipe.kind != "harm" or not recipe.balance:
        return np.ones(len(examples.target))
    return (seen.sum() / (2 * seen))[examples.target]


def _step(
    scorer: Scorer,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    batch: np.ndarray,
    weight: np.ndarray,
) -> float:
    """One optimizer step on ``batch``, in micro batches of similar lengths; returns its loss."""
    optimizer.zero_grad()
    whole, total = weight[batch].sum(), 0.0
    for places in by_length(examples.length[batch], scorer.recipe.micro_batch):
        rows = batch[places]
        loss = _losses(scorer.outputs(examples, rows), examples, rows, weight).sum() / whole
        loss.backward()
        total += float(loss.detach())
    nn.utils.clip_grad_norm_(scorer.model.parameters(), 1.0)
    optimizer.step()
    return total


def _losses(outputs: Tensor, examples: Examples, rows: np.ndarray, weight: np.ndarray) -> Tensor:
    """(n,) weighted losses of ``rows``."""
    scale = torch.from_numpy(weight[rows]).to(outputs)
    if outputs.shape[1] == 1:
        return -F.logsigmoid(outputs[:, 0]) * scale
    target = torch.from_numpy(examples.target[rows]).to(outputs.device)
    return F.cross_entropy(outputs, target, reduction="none") * scale
