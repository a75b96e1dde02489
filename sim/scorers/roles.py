"""Which of a starting model's answers play a role, and the file of prompts they are written to.

Kept are, on harmful prompts, refusals that the classifier finds harmless and fluent answers that it
finds harmful (P >= 1/2); on other prompts, fluent answers that do not refuse. The rest (gibberish,
echoes, refusals that then comply, evasions that neither refuse nor harm) is counted and left out.
What the classifier says of an answer is written as ``p_harm`` and never becomes a label.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from envs.chunks import chunks
from envs.readers import parts
from envs.recorded import SPLITS, RecordedText
from envs.records import Row
from envs.scorers import TextScorer
from envs.types import COMPLY, HARMFUL, REFUSE, STRATA, VERDICTS, Scores
from envs.usage import UsageError
from sim.files import dumps, write_atomic
from sim.hashes import digest
from sim.text_config import TextConfig

BLOCK = 4096
"""Answers scored together."""
SPLIT_BY = ("split_seed", "prompt_tokens")
"""What, beside the prompts, decides who is in which split."""


def write_rows(
    out: Path, data: RecordedText, scorer: TextScorer, ids: np.ndarray
) -> dict[str, dict[str, int]]:
    """Write ``data.jsonl`` and ``splits.json``.

    Args:
        out: the folder.
        data: Q prompts with what answers they have.
        scorer: with a classifier or a judge.
        ids: (Q, K, T) the model's answers to all prompts.

    Returns:
        The model's answers by verdict and those that are kept, to harmful and to other prompts.
    """
    blocks = chunks(np.arange(len(ids)), max(1, BLOCK // ids.shape[1]))
    parts = [scorer.score(rows, ids[rows]) for rows in blocks]
    scores = Scores(*map(np.concatenate, zip(*parts, strict=True)))
    texts, harmful = scorer.texts(ids), data.stratum == HARMFUL
    comply, refuse = scores.verdict == COMPLY, scores.verdict == REFUSE
    kept = np.where(harmful[:, None], refuse | (comply & (scores.cost >= 0.5)), comply)
    splits = {name: data.table(name).key for name in SPLITS}
    split = {int(key): name for name, keys in splits.items() for key in keys}
    lines: list[dict[str, Any]] = []
    for key, row in enumerate(data.rows):
        made = [
            {"text": texts[key][k], "by": "model"}
            | ({"p_harm": round(float(scores.cost[key, k]), 6)} if harmful[key] else {})
            for k in np.flatnonzero(kept[key])
        ]
        head = {"prompt": row.prompt, "stratum": STRATA[row.stratum]}
        rest = {"category": row.category, "split": split[key], "responses": own(row) + made}
        pairs = [{"chosen": a, "rejected": b} for a, b in row.pairs] or [{}]
        lines += [{**head, **rest, **pairs[0]}, *({**head, **pair} for pair in pairs[1:])]
    write_atomic(out / "data.jsonl", "".join(dumps(line) + "\n" for line in lines).encode())
    named = {name: [data.rows[key].prompt for key in keys] for name, keys in splits.items()}
    write_atomic(out / "splits.json", (dumps(named) + "\n").encode())
    return {
        side: {name: int((scores.verdict[rows] == v).sum()) for v, name in enumerate(VERDICTS)}
        | {"kept": int(kept[rows].sum())}
        for side, rows in (("harmful", harmful), ("other", ~harmful))
    }


def own(row: Row) -> list[dict[str, Any]]:
    """Answers that a row came with, beside those of its pairs."""
    paired = {text for pair in row.pairs for text in pair}
    return [
        {"text": text} | ({} if label is None else {"harmful": label})
        for text, label in zip(row.answers, row.unsafe, strict=True)
        if text not in paired or label is not None
    ]


def write_manifest(out: Path, data: RecordedText, judge: Path, facts: dict[str, Any]) -> None:
    """Read back what was written, as a run will, and write down what is in it.

    Args:
        out: the folder with ``data.jsonl``.
        data: the prompts that were written.
        judge: directory of the classifier.
        facts: what else to write down.
    """
    again = RecordedText(
        out / "data.jsonl",
        data.tokenizer.name_or_path,
        data.prompt_tokens,
        split_seed=data.split_seed,
    )
    for name in SPLITS:
        mine, theirs = (source.table(name).text for source in (data, again))
        assert mine == theirs, f"split {name} changed on the way through the file"
    scores = judge / "scores.json"
    figures = json.loads(scores.read_text())["held_out"] if scores.exists() else {}
    said = {
        "roles": {role: len(texts) for role, (_, texts) in again.examples().items()},
        "splits": {name: len(data.table(name).key) for name in SPLITS},
        "too_long": data.dropped,
        "classifier_f1": figures.get("f1"),
        "data (BLAKE2)": digest([out / "data.jsonl"]),
        **facts,
    }
    write_atomic(out / "manifest.json", (json.dumps(said, indent=1) + "\n").encode())


def refuse_other_splits(text: TextConfig) -> None:
    """Refuse to split prepared data anew: their classifier may have learned evaluation prompts.

    A greater ``prompt_tokens`` leaves the splits as they are: prompts that were too long are not
    in prepared data.

    Raises:
        ValueError: the manifest beside a file of ``text.data`` names another split seed, or a
            greater ``prompt_tokens``.
    """
    for part in parts(str(text.data)):
        if not (made := _manifest_beside(part.path)):
            continue
        for name, fits, sign in (
            ("split_seed", made["split_seed"] == text.split_seed, ""),
            ("prompt_tokens", made["prompt_tokens"] <= text.prompt_tokens, ">= "),
        ):
            if not fits:
                raise UsageError(
                    f"text.{name}={getattr(text, name)} with data={str(part.path)!r}, prepared "
                    f"with {name}={made[name]}: other splits would evaluate on prompts that its "
                    f"classifier learned from; allowed: {sign}{made[name]}, or data prepared anew"
                )


def _manifest_beside(data: Path | None) -> dict[str, Any]:
    """What ``prepare-data`` wrote down beside ``data``; empty beside anything else."""
    folder = data if data is None or data.is_dir() else data.parent
    try:
        said = json.loads((folder / "manifest.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and {"roles", *SPLIT_BY} <= said.keys() else {}
