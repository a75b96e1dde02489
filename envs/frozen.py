"""Frozen language models that the outside world judges by.

    perplexity(y | x) = exp( -1/|y| sum_t log p(y_t | x, y_<t) )        EOS included

Read from a local directory, safetensors only, and never trained. The initial policy measures its
own tokens; any other model (:class:`TextFluency`) reads the texts with a tokenizer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from envs.chunks import by_length
from envs.turns import without_special
from envs.usage import UsageError

TILE = 2**24
"""Logits formed at once: 64 MiB in float32, and their log-softmax beside them."""


@lru_cache(maxsize=4)
def _language_model(path: str, device: str) -> Any:
    """One frozen copy per directory and device, shared by everyone who judges by it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


class FrozenLM:
    """A causal language model that measures perplexity, and can speak."""

    def __init__(self, path: str | Path, batch: int = 128, device: str = "cpu"):
        self.model = _language_model(str(path), device)
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

        there = self.model.device
        whole = np.concatenate([prompt_mask, mask], 1).astype(np.int64)
        attention = torch.from_numpy(whole).to(there)
        words = torch.from_numpy(np.concatenate([prompt_ids, ids], 1)).to(there)
        width = ids.shape[1]
        with torch.inference_mode():
            inputs = {
                "input_ids": words,
                "attention_mask": attention,
                "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
                "use_cache": False,
            }
            if self._head_is_last:
                states = self.model.base_model(**inputs).last_hidden_state[:, -width - 1 : -1]
                head = self.model.get_output_embeddings()
            else:
                states = self.model(**inputs, logits_to_keep=width + 1).logits[:, :-1]
                head = torch.nn.Identity()
            rows = max(1, TILE // self.vocabulary)
            nats = _tiled_nats(head, states.flatten(0, 1), words[:, -width:].flatten(), rows)
            said = (nats.view(-1, width) * attention[:, -width:]).sum(1)
            return said.cpu().numpy().astype(float)

    @cached_property
    def _head_is_last(self) -> bool:
        """Whether the output embeddings alone turn the states into logits; some models cap them."""
        import torch

        with torch.inference_mode():
            words = torch.arange(8, device=self.model.device)[None]  # one may be padding, all 0
            states = self.model.base_model(input_ids=words, use_cache=False)[0]
            head = self.model.get_output_embeddings()
            if head is None or states.shape[-1] != head.weight.shape[-1]:
                return False
            return torch.equal(head(states), self.model(input_ids=words, use_cache=False).logits)

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
        there = self.model.device
        with torch_seeded(seed, str(there)), torch.inference_mode():
            out = self.model.generate(
                input_ids=torch.from_numpy(prompt_ids).to(there),
                attention_mask=torch.from_numpy(prompt_mask.astype(np.int64)).to(there),
                generation_config=plan,
            )[:, prompt_ids.shape[1] :]
        full = np.full((len(out), tokens), eos, np.int64)
        full[:, : out.shape[1]] = out.cpu().numpy()
        return full


def _tiled_nats(head: Any, states: Any, ids: Any, rows: int) -> Any:
    """(R,) negative log-likelihood of ``ids`` under ``head(states)``, ``rows`` of them at once."""
    import torch
    import torch.nn.functional as F

    parts = zip(states.split(rows), ids.split(rows), strict=True)
    return torch.cat([F.cross_entropy(head(s).float(), i, reduction="none") for s, i in parts])


@contextmanager
def torch_seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """A block for code that draws from torch's global generators, which are left as they were.

    Args:
        seed: where they start.
        device: where that code computes; others are not touched.
    """
    import torch

    there = torch.device(device)
    with torch.random.fork_rng(devices=[there] if there.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class TextFluency:
    """Perplexity of texts under a language model that has another tokenizer than the policy.

    A prompt is rendered by the model's chat template, or stands before its response on a line of
    its own. Tokens are this model's, so its figures compare with each other and not with those of
    another model.

    Args:
        path: directory with the language model and its tokenizer.
        batch: texts per forward pass; similar lengths go together.
        tokens: longest prompt with response. A prompt keeps its last half of them, a response is
            cut at its end.
        device: where the model computes.
    """

    def __init__(self, path: str | Path, batch: int = 64, tokens: int = 512, device: str = "cpu"):
        from transformers import AutoTokenizer

        self.lm = FrozenLM(path, batch, device)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        with_padding(self.tokenizer, path)
        known = getattr(self.lm.model.config, "max_position_embeddings", None) or tokens
        self.tokens = min(tokens, known)

    def __call__(self, prompts: list[str], responses: list[str], ended: np.ndarray) -> np.ndarray:
        """Perplexity of each response given its prompt.

        Args:
            prompts: N texts, as they were typed.
            responses: N texts.
            ended: (N,) whether a response came to its end; its EOS then counts.

        Returns:
            (N,) float64, infinity for a response without tokens.
        """
        heads = self._encode(rendered_prompts(self.tokenizer, prompts), self.tokens // 2, "left")
        tails = self._encode(responses, self.tokens - self.tokens // 2, "right")
        eos = self.tokenizer.eos_token_id
        if eos is not None:
            tails = [ids + [eos] * int(end) for ids, end in zip(tails, ended, strict=True)]
        length = [len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)]
        out = np.full(len(prompts), np.inf)
        for rows in by_length(length, self.lm.batch):
            if any(tails[row] for row in rows):
                prompt = self._pad([heads[row] for row in rows], "left")
                out[rows] = self.lm.perplexity(
                    *prompt, *self._pad([tails[row] for row in rows], "right")
                )
        return out

    def _encode(self, texts: list[str], most: int, side: str) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [ids[-most:] if side == "left" else ids[: most - 1] for ids in encoded]

    def _pad(self, rows: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="np")
        return padded["input_ids"].astype(np.int64), padded["attention_mask"].astype(np.int64)


def rendered_prompts(tokenizer: Any, prompts: list[str]) -> list[str]:
    """Prompts as a model reads them before its answer; on a line of their own without template."""
    if not prompts or not tokenizer.chat_template:
        return [f"{prompt}\n" for prompt in prompts]
    prompts = without_special(tokenizer, prompts)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)


def with_padding(tokenizer: Any, path: str | Path) -> None:
    """Give ``tokenizer`` a padding token where it has none.

    Raises:
        ValueError: it has no EOS token to serve as one.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(
                f"model={str(path)!r} has a tokenizer without PAD and EOS; allowed: one of them, "
                "for texts of unequal length"
            )
        tokenizer.pad_token = tokenizer.eos_token
