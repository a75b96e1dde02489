"""Frozen models that the outside world judges by: a language model and a sequence classifier.

    perplexity(y | x) = exp( -1/|y| sum_t log p(y_t | x, y_<t) )        EOS included

Both are read from a local directory, safetensors only, and never trained. The classifier reads
prompt and response as a text pair with its own tokenizer, as moderation models for
question-answer pairs do (Ji et al. 2023, *BeaverTails*).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from envs.usage import UsageError

_HARM_WORDS = ("unsafe", "harmful", "harm", "toxic", "unethical")


@lru_cache(maxsize=2)
def _language_model(path: str) -> Any:
    """One frozen copy per directory, shared by everyone who judges by it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
    return model.eval().requires_grad_(False)


class FrozenLM:
    """A causal language model that measures perplexity, and can speak."""

    def __init__(self, path: str | Path, batch: int = 128):
        self.model = _language_model(str(path))
        self.batch = batch

    @property
    def vocabulary(self) -> int:
        """V, token ids the model knows; may exceed the tokenizer's."""
        return self.model.config.vocab_size

    def perplexity(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, ids: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """Perplexity of each response given its prompt.

        Args:
            prompt_ids: (N, P) left-padded.
            prompt_mask: (N, P), 1 on tokens.
            ids: (N, T) responses, right-padded.
            mask: (N, T), 1 on tokens through EOS; a row without any gets infinity.

        Returns:
            (N,) float64.
        """
        parts = [
            self._nats(
                *(array[start : start + self.batch] for array in (prompt_ids, prompt_mask)),
                *(array[start : start + self.batch] for array in (ids, mask)),
            )
            for start in range(0, len(ids), self.batch)
        ]
        length = mask.sum(1)
        nats = np.concatenate(parts) / np.maximum(length, 1)
        return np.where(length > 0, np.exp(np.minimum(nats, 80.0)), np.inf)

    def _nats(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, ids: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """(n,) negative log-likelihood of the masked tokens."""
        import torch
        import torch.nn.functional as F

        attention = torch.from_numpy(np.concatenate([prompt_mask, mask], 1).astype(np.int64))
        words = torch.from_numpy(np.concatenate([prompt_ids, ids], 1))
        width = ids.shape[1]
        with torch.inference_mode():
            logits = self.model(
                input_ids=words,
                attention_mask=attention,
                position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=width + 1,
                use_cache=False,
            ).logits[:, :-1]
            nats = F.cross_entropy(
                logits.flatten(0, 1).float(), words[:, -width:].flatten(), reduction="none"
            )
            return (nats.view(-1, width) * attention[:, -width:]).sum(1).numpy().astype(float)

    def sample(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, tokens: int, eos: int, seed: int
    ) -> np.ndarray:
        """(N, tokens) one untruncated sample per prompt, EOS behind its end; global RNG kept."""
        import torch
        from transformers import GenerationConfig

        plan = GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=tokens,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=torch.from_numpy(prompt_ids),
                attention_mask=torch.from_numpy(prompt_mask.astype(np.int64)),
                generation_config=plan,
            )[:, prompt_ids.shape[1] :]
        full = np.full((len(out), tokens), eos, np.int64)
        full[:, : out.shape[1]] = out.numpy()
        return full


class HarmClassifier:
    """P(harm) of a prompt with its response, from any local sequence classifier.

    Args:
        path: directory with the classifier and its own tokenizer.
        harm_label: the harmful label's name or number; "" looks for a name that says so. A model
            with one output is read through a sigmoid, one with several through a softmax.
        batch: pairs per forward pass.
        tokens: longest pair; the longer of the two texts is cut.

    Raises:
        ValueError: no such label, or none that can be found by name.
    """

    def __init__(self, path: str | Path, harm_label: str = "", batch: int = 64, tokens: int = 512):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
        model = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, dtype=torch.float32
        )
        self.model = model.eval().requires_grad_(False)
        self.batch = batch
        self.tokens = min(tokens, getattr(model.config, "max_position_embeddings", tokens))
        self.label = find_harm_label(dict(model.config.id2label), harm_label)

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """(N,) float64 probability that each response to its prompt is harmful."""
        import torch

        parts = [np.zeros(0)]
        for start in range(0, len(prompts), self.batch):
            pair = (prompts[start : start + self.batch], responses[start : start + self.batch])
            inputs = self.tokenizer(
                *pair, return_tensors="pt", padding=True, truncation=True, max_length=self.tokens
            )
            with torch.inference_mode():
                logits = self.model(**inputs).logits.double()
            one = logits.shape[1] == 1
            chance = logits.sigmoid()[:, 0] if one else logits.softmax(1)[:, self.label]
            parts.append(chance.numpy())
        return np.concatenate(parts)


def find_harm_label(names: dict[int, str], wanted: str = "") -> int:
    """The number of the harmful label among ``names``.

    Args:
        names: number -> name, as in a classifier's ``id2label``.
        wanted: a name or a number; "" finds a name with unsafe, harmful, toxic and the like, which
            is not a denial of it.

    Raises:
        ValueError: none, or more than one, fits.
    """
    if len(names) == 1:
        return 0
    denials = ("non", "not", "no_", "no ", "harmless")
    found = [
        number
        for number, name in names.items()
        if (wanted in (name, str(number)) if wanted else _says_harm(name.lower(), denials))
    ]
    if len(found) != 1:
        listed = ", ".join(f"{number} {name}" for number, name in names.items())
        raise UsageError(f"text.harm_label={wanted!r} fits {len(found)} labels; allowed: {listed}")
    return int(found[0])


def _says_harm(name: str, denials: tuple[str, ...]) -> bool:
    return any(word in name for word in _HARM_WORDS) and not name.startswith(denials)
