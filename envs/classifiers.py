"""Sequence classifiers that judge a prompt with its response: harm, and helpfulness.

    P(harm | x, y)   a sigmoid of one output, a softmax over several, or, where the model says
                     ``multi_label_classification``, the largest of its sigmoids
    help(x, y)       sigmoid((s(x, y) - center) / scale), s the one output of a reward model

Read from a local directory, safetensors only, and never trained. Both texts go in as moderation and
reward models expect them: through the chat template where the tokenizer has one, and otherwise as a
text pair (Ji et al. 2023, *BeaverTails*). Every part of the weights must be in the directory: a
head that is missing would be drawn at random and judge just as confidently.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.chunks import by_length
from envs.frozen import with_padding
from envs.turns import without_special
from envs.usage import UsageError

_HARM_WORDS = ("unsafe", "harmful", "harm", "toxic", "unethical")
_DENIAL = re.compile(r"non|not|no[_ ]|harmless|(safe|benign|ethical)(?![a-z])")


@lru_cache(maxsize=4)
def _classifier(path: str, device: str) -> tuple[Any, Any]:
    """One frozen copy per directory and device, with its tokenizer, shared by all who judge."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", truncation_side="right")
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        path, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(loaded["missing_keys"]):
        raise UsageError(
            f"classifier={path!r} has no weights for {missing[0]}; allowed: a model that was saved "
            "as a sequence classifier, head included"
        )
    pad_alike(model, tokenizer, path)
    return model.to(device).eval().requires_grad_(False), tokenizer


def pad_alike(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Make ``tokenizer`` pad, and ``model`` know by what: decoders look for the last real token.

    Raises:
        ValueError: the tokenizer has neither a padding nor an EOS token.
    """
    with_padding(tokenizer, path)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def encode_pairs(
    tokenizer: Any, prompts: list[str], responses: list[str], tokens: int
) -> dict[str, Any]:
    """Padded inputs of a sequence classifier for N prompts with responses.

    Args:
        tokenizer: the classifier's own; its chat template, where it has one, renders the two turns.
        prompts: N texts; special tokens of the classifier in them are not read.
        responses: N texts, likewise.
        tokens: longest input; of a pair the longer text is cut, of a chat its end.

    Returns:
        ``input_ids`` and ``attention_mask`` (N, W), and what else the tokenizer makes.
    """
    common = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": tokens}
    prompts, responses = (without_special(tokenizer, texts) for texts in (prompts, responses))
    if not tokenizer.chat_template:
        return tokenizer(prompts, responses, **common)
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    rendered = tokenizer.apply_chat_template(chats, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False, **common)


def longest_input(model: Any, tokens: int) -> int:
    """At most ``tokens``, and no more than the positions that ``model`` has."""
    known = getattr(model.config, "max_position_embeddings", None) or tokens
    # RoBERTa's position numbers begin behind its padding token.
    offset = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    return min(tokens, known - offset)


class PairClassifier:
    """Outputs of a frozen sequence classifier for prompts with responses.

    Args:
        path: directory with the classifier and its own tokenizer.
        batch: pairs per forward pass; similar lengths go together.
        tokens: longest input.
        device: where it computes.
    """

    def __init__(self, path: str | Path, batch: int = 64, tokens: int = 512, device: str = "cpu"):
        self.model, self.tokenizer = _classifier(str(path), device)
        self.batch = batch
        self.tokens = longest_input(self.model, tokens)

    def logits(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """(N, labels) float64 outputs."""
        import torch

        out = np.zeros((len(prompts), self.model.config.num_labels))
        length = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        for rows in by_length(length, self.batch):
            asked, said = ([column[row] for row in rows] for column in (prompts, responses))
            inputs = encode_pairs(self.tokenizer, asked, said, self.tokens)
            with torch.inference_mode():
                inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
                out[rows] = self.model(**inputs).logits.double().cpu().numpy()
        return out


class HarmClassifier(PairClassifier):
    """P(harm) of a prompt with its response, from any local sequence classifier.

    Args:
        path: directory with the classifier and its own tokenizer.
        harm_label: the harmful label's name or number; "" looks for a name that says so, and takes
            all labels of a multi-label model.
        batch: pairs per forward pass.
        tokens: longest input.
        device: where it computes.

    Raises:
        ValueError: no such label, none that can be found by name, or weights without a head.
    """

    def __init__(
        self,
        path: str | Path,
        harm_label: str = "",
        batch: int = 64,
        tokens: int = 512,
        device: str = "cpu",
    ):
        super().__init__(path, batch, tokens, device)
        self.multi = self.model.config.problem_type == "multi_label_classification"
        names = dict(self.model.config.id2label)
        every = self.multi and not harm_label
        self.labels = sorted(names) if every else [find_harm_label(names, harm_label)]

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """(N,) float64 probability that each response to its prompt is harmful."""
        logits = self.logits(prompts, responses)
        if self.multi or logits.shape[1] == 1:
            return sigmoid(logits[:, self.labels]).max(1)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds[:, self.labels[0]] / odds.sum(1)


class Calibration(NamedTuple):
    """What turns the outputs of a reward model into help in (0, 1)."""

    center: float  # output that counts as one half
    scale: float  # outputs per unit of log-odds, above 0


class Helpfulness(PairClassifier):
    """Help given by responses, from a sequence classifier with one output.

    Its outputs have no zero and no unit, so they are read against the initial policy's own answers:
    one half is as good as their mean, and one standard deviation is a unit of log-odds.

    Args:
        path: directory with the reward model and its own tokenizer.
        calibration: from :meth:`calibrate`; center 0 and scale 1 until then.
        batch: pairs per forward pass.
        tokens: longest input.
        device: where it computes.

    Raises:
        ValueError: it has more than one output, or weights without a head.
    """

    def __init__(
        self,
        path: str | Path,
        calibration: Calibration | None = None,
        batch: int = 64,
        tokens: int = 512,
        device: str = "cpu",
    ):
        super().__init__(path, batch, tokens, device)
        self.path, self.calibration = str(path), calibration or Calibration(0.0, 1.0)
        if (outputs := self.model.config.num_labels) != 1:
            raise UsageError(
                f"text.helpfulness={self.path!r} has {outputs} outputs; allowed: a sequence "
                "classifier with one, such as a reward model"
            )

    def calibrate(self, prompts: list[str], responses: list[str]) -> None:
        """Read outputs against these answers from now on.

        Raises:
            ValueError: the model does not tell them apart.
        """
        outputs = self.logits(prompts, responses)[:, 0]
        center, scale = float(outputs.mean()), float(outputs.std())
        if not scale > 1e-6:
            raise UsageError(
                f"text.helpfulness={self.path!r} gives {len(outputs)} answers of the initial "
                f"policy the same score {center:.3g}; allowed: a model that tells answers apart"
            )
        self.calibration = Calibration(center, scale)

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """(N,) float64 help in (0, 1)."""
        center, scale = self.calibration
        return sigmoid((self.logits(prompts, responses)[:, 0] - center) / scale)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), whatever the size of x."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def find_harm_label(names: dict[int, str], wanted: str = "") -> int:
    """The number of the harmful label among ``names``.

    Args:
        names: number -> name, as in a classifier's ``id2label``.
        wanted: a name or a number; "" finds a name with unsafe, harmful, toxic and the like, which
            is not a denial of it, and takes a single label whose name does not deny harm.

    Raises:
        ValueError: none, or more than one, fits.
    """
    fits = _says_harm if len(names) > 1 else _allows_harm
    found = [
        number
        for number, name in names.items()
        if (wanted in (name, str(number)) if wanted else fits(name.lower()))
    ]
    if len(found) != 1:
        listed = ", ".join(f"{number} {name}" for number, name in names.items())
        raise UsageError(f"text.harm_label={wanted!r} fits {len(found)} labels; allowed: {listed}")
    return int(found[0])


def _says_harm(name: str) -> bool:
    return any(word in name for word in _HARM_WORDS) and _allows_harm(name)


def _allows_harm(name: str) -> bool:
    return not _DENIAL.match(name)
