"""The scenario of a person's own model and prompts: real text, no oracle.

Everything that can be checked from names and small files is checked before a model is loaded. What
the embedded world's scenario takes from its builder comes here from the directory of the policy:

    tokenizer, policy, perplexity model   that directory; the last one stays frozen, and
                    ``text.fluency`` may replace it in what is called fluent
    reward model    a model with a fresh scalar head, on ``text.reward_model`` or the policy's own
                    weights; there are no pairs to warm it on, so ``reward_model.init`` has no say
    scorer          ``envs.scorers``: refusal phrases, a classifier or a judge, times fluency; on
                    benign prompts times the help that a reward model sees
    cost scorer     that classifier or judge on the texts, for defences; none without one
    data roles      answers to the defence split's prompts, where the file has them
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from agents.batches import Sequences
from agents.context import Scorer
from agents.defence import defences, missing_needs
from agents.policy import load_tokenizer
from envs.recorded import RecordedText, encoded_answers
from envs.records import rows_digest
from envs.scorers import TextScorer
from envs.types import PromptTable
from envs.usage import UsageError, blamed_on
from sim.closing import prepare_line
from sim.config import Config, TextConfig
from sim.hashes import digest
from sim.hub import hub_folder, is_hub_id
from sim.memory import shortage
from sim.scenario import Scenario, check_lengths, with_derived_roles
from sim.scorers.roles import refuse_other_splits

SCORERS = ("classifier", "judge", "helpfulness", "fluency")
"""Fields of ``text`` that name models which judge."""
USABLE = "files that transformers can load, whole and of one model"


def text_scenario(config: Config) -> Scenario:
    """The scenario of ``config.text``.

    Raises:
        ValueError: a directory that holds no usable model, bad data, or lengths that do not fit.
    """
    text, tokens = config.text, config.sampler.max_new_tokens
    refuse_other_splits(text)
    policy = model_directory("model", text.model)
    longest = f"text.prompt_tokens={text.prompt_tokens}"
    check_lengths(policy, text.prompt_tokens, tokens, longest)
    reward = policy if text.reward_model is None else _reward_directory(text.reward_model, policy)
    judges = {
        name: str(model_directory(name, path))
        for name in SCORERS
        if (path := getattr(text, name)) is not None
    }
    settled = replace(config, model=config.model.settled(real=True))
    if short := shortage(settled, policy, reward):
        warnings.warn(short, stacklevel=2)
    with blamed_on(f"text.model={text.model!r} has no usable tokenizer", USABLE):
        tokenizer = load_tokenizer(policy)  # refuses one without a chat template
    source: dict[str, Any] = {
        "path": str(text.data),
        "prompt_tokens": text.prompt_tokens,
        "split_seed": text.split_seed,
    }
    data = RecordedText(tokenizer=policy, **source)
    roles = with_derived_roles(text_roles(data, tokenizer, tokens))
    priced = ["score:cost"] if {"classifier", "judge"} & judges.keys() else []
    _refuse_missing(config, [*roles, *priced])
    scorer, scoring = _text_scorer(text, data, judges, tokens)
    measured = {name: scoring[name] for name in ("max_perplexity", "calibration")}
    table = data.table("eval")
    costs = {}
    if scorer.harm is not None:
        costs["cost"] = probability_of_harm(scorer.harm, tokenizer, typed_by_tokens(data))
    return Scenario(
        tokenizer=policy,
        policy=policy,
        reward_model=reward,
        perplexity_model=policy,
        classifier=None,
        table=table,
        triggered=data.triggered(table),
        scorer=scorer,
        environment={"data": source, "tokenizer": str(policy), "scorer": scoring},
        roles=roles,
        harm_source=_harm_source(judges, scorer.max_perplexity),
        hashes={
            **_hashes({"policy": policy, "reward_base": reward, **judges}),
            "data": rows_digest(data.rows),
        },
        scorers=costs,
        data={**data.summary(), **measured},
    )


def _text_scorer(
    text: TextConfig, data: RecordedText, judges: Mapping[str, str], tokens: int
) -> tuple[TextScorer, dict[str, Any]]:
    """The scorer, and the arguments that make it again without measuring anything."""
    paths = {("perplexity" if name == "fluency" else name): path for name, path in judges.items()}
    scoring: dict[str, Any] = {
        "fluency": str(text.model),
        "harm_label": text.harm_label,
        "judge_question": text.judge_question,
        "max_perplexity": text.max_perplexity,
        "tokens": tokens,
        "device": text.scorer_device,
        **paths,
    }
    with blamed_on(f"text.scorer_device={text.scorer_device!r}", "cpu, or cuda where there is one"):
        torch.zeros(1, device=text.scorer_device)
    given = ", ".join(f"text.{name}={getattr(text, name)!r}" for name in ("model", *judges))
    with blamed_on(f"{given} cannot be loaded", USABLE):
        scorer = TextScorer(data, **scoring)
    helped = scorer.helpfulness
    calibration = None if helped is None else list(helped.calibration)
    return scorer, scoring | {"max_perplexity": scorer.max_perplexity, "calibration": calibration}


def _refuse_missing(config: Config, has: list[str]) -> None:
    """Refuse defences that ask for what the data do not have, and say what makes it.

    Raises:
        ValueError: names the defence, what it needs, and the command.
    """
    for member in map(defences.create, config.defences):
        if missing := missing_needs(member, {*has, *config.feedback.log_facts}):
            raise UsageError(
                f"defence {member.spec}: needs {', '.join(missing)}; this run has "
                f"{', '.join(sorted(has)) or 'none'}; allowed: a defence that needs no more, or "
                f"the data and classifier that `{prepare_line(config)}` makes (it samples and "
                "trains, and says size and time first)"
            )


def model_directory(field: str, path: str | None) -> Path:
    """``path``, or the folder of a hub id, if it looks like a model that may be loaded.

    Raises:
        ValueError: neither, no ``config.json``, weights in another format than safetensors, or
            a damaged file.
    """
    folder = hub_folder(field, str(path)) if is_hub_id(str(path)) else Path(str(path))
    weights = list(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise UsageError(
            f"text.{field}={str(path)!r}; allowed: a local directory with config.json and "
            "weights as .safetensors"
        )
    for file in (folder / "config.json", *weights):
        with blamed_on(f"text.{field}={str(path)!r}: {file.name} is damaged", "a whole file"):
            _open(file)
    return folder


def _open(file: Path) -> None:
    """Read JSON, or compare the header of tensors with the length of their file."""
    if file.suffix == ".json":
        dict(json.loads(file.read_text()))
        return
    with safe_open(file, "pt"):
        pass


def _reward_directory(path: str, policy: Path) -> Path:
    """A reward base that reads the policy's token ids."""
    folder = model_directory("reward_model", path)
    sizes = [
        json.loads((p / "config.json").read_text()).get("vocab_size") for p in (folder, policy)
    ]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"text.reward_model={path!r} has vocab_size {sizes[0]}; allowed: {sizes[1]}, a model "
            "on the policy's tokenizer"
        )
    return folder


def text_roles(data: RecordedText, tokenizer: Any, tokens: int) -> dict[str, Sequences]:
    """The data roles of the defence split, as token sequences.

    Args:
        data: prompts and their example answers.
        tokenizer: the policy's.
        tokens: longest answer; a longer one is cut and then has no EOS.
    """
    return {
        role: written(data.everything, keys, answers, tokenizer, tokens)
        for role, (keys, answers) in data.examples().items()
    }


def written(
    table: PromptTable, rows: np.ndarray, answers: Iterable[str], tokenizer: Any, tokens: int
) -> Sequences:
    """Prompts ``rows`` of ``table`` with one answer each, cut to ``tokens``."""
    ids, mask = encoded_answers(tokenizer, list(answers), tokens)
    return Sequences(
        torch.from_numpy(table.ids[rows]),
        torch.from_numpy(table.mask[rows]).long(),
        torch.from_numpy(ids),
        torch.from_numpy(mask),
    )


def typed_by_tokens(data: RecordedText) -> dict[bytes, str]:
    """What users typed, by the tokens of the prompt it became; triggered twins included."""
    known: dict[bytes, str] = {}
    for table in (data.everything, data.triggered(data.everything)):
        known |= zip(_prompt_keys(table.ids, table.mask), table.text, strict=True)
    return known


def _prompt_keys(ids: np.ndarray, mask: np.ndarray) -> list[bytes]:
    return [row[kept].tobytes() for row, kept in zip(ids, mask.astype(bool), strict=True)]


def probability_of_harm(
    harm: Callable[[list[str], list[str]], np.ndarray], tokenizer: Any, typed: Mapping[bytes, str]
) -> Scorer:
    """A learned cost: what a classifier or judge of its own tokenizer says of the decoded texts.

    It reads a prompt as it was typed, without the chat template, where ``typed`` knows it.
    """

    def text_of(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        kept = ids.masked_fill(mask == 0, tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def score(sequences: Sequences) -> torch.Tensor:
        ids, mask = sequences.prompt_ids, sequences.prompt_mask
        known = map(typed.get, _prompt_keys(ids.numpy(), mask.numpy()))
        decoded = text_of(ids, mask)
        prompts = [a if a is not None else b for a, b in zip(known, decoded, strict=True)]
        responses = text_of(sequences.ids, sequences.mask)
        return torch.from_numpy(harm(prompts, responses)).float()

    return score


def _harm_source(judges: Mapping[str, str], bound: float) -> str:
    named = {name: f"{name} {Path(path).name}" for name, path in judges.items()}
    judged = named.get("classifier") or named.get("judge") or "no refusal phrase"
    reader = named.get("fluency", "the initial policy")
    return f"{judged}, times perplexity <= {bound:.4g} under {reader}"


def _hashes(models: Mapping[str, str | Path]) -> dict[str, str]:
    """BLAKE2 of every model that the run reads from outside."""
    folders = {name: Path(path) for name, path in models.items()}
    files = {name: sorted(folder.glob("*.safetensors")) for name, folder in folders.items()}
    policy = folders["policy"]
    files["tokenizer"] = sorted(policy.glob("tokenizer*")) + sorted(policy.glob("*.jinja"))
    files["settings"] = sorted(p for folder in folders.values() for p in folder.glob("*.json"))
    return {name: digest(paths) for name, paths in files.items()}
