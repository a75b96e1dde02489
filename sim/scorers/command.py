"""``poisonloop train-classifier``: a harm classifier or a helpfulness reward model, as a folder.

The folder holds what any loader of sequence classifiers reads, tokenizer included, ``scores.json``
(figures on held-out prompts, recipe, versions) and ``README.md``, a model card made of them. The
same words on the same machine write the same bytes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from envs.classifiers import sigmoid
from envs.readers import read_rows
from envs.records import Row, rows_digest
from envs.usage import UsageError
from sim.cli import parser_of
from sim.files import check_out, dumps, new_folder
from sim.manifest import versions
from sim.scorers.examples import (
    PARTS,
    TEST,
    TRAIN,
    Examples,
    judged_answers,
    parts_of,
    preferences,
)
from sim.scorers.metrics import harm_report, pair_report, plain_rates
from sim.scorers.training import Recipe, Scorer, train
from sim.threads import torch_threads

Tell = Callable[[int, int, dict[str, float] | None], None]


def command(words: list[str]) -> int:
    """``poisonloop train-classifier --data FILE --out DIR``."""
    asked = _parser().parse_args(words)
    out = Path(asked.out)
    if out.exists():
        raise UsageError(f"out={asked.out!r} exists; allowed: a new directory")
    check_out(out)
    recipe = Recipe(**{f.name: getattr(asked, f.name) for f in fields(Recipe)})
    rows = read_rows(asked.data)
    report = build(recipe, rows, parts_of(rows, recipe.seed), asked.data, out, words)
    for line in closing(report, out):
        print(line)
    return 0


def _parser() -> Any:
    usual = Recipe()
    parser = parser_of(
        "train-classifier",
        "Train a scorer on a prompt with its response, and report it on held-out prompts. "
        "Answers carry `harmful`, or are harmful where their prompt is and they do not refuse.",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="JSONL or Parquet")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument(
        "--kind",
        default=usual.kind,
        help="harm: answers, for --text.classifier; helpfulness: pairs chosen/rejected, for "
        "--text.helpfulness (default %(default)s)",
    )
    recipe_flags(parser, *(f.name for f in fields(Recipe) if f.name not in ("kind", "balance")))
    parser.add_argument(
        "--no-balance", dest="balance", action="store_false", help="do not weigh classes alike"
    )
    return parser


def recipe_flags(parser: Any, *names: str) -> None:
    """Flags for fields of :class:`Recipe`, with its defaults."""
    usual = Recipe()
    for name in names:
        value = getattr(usual, name)
        flag, kind = f"--{name.replace('_', '-')}", type(value)
        parser.add_argument(flag, type=kind, default=value, metavar="X", help=f"default {value}")


def build(
    recipe: Recipe,
    rows: Sequence[Row],
    part: np.ndarray,
    data: str,
    out: Path,
    words: Sequence[str],
    name: str = "train-classifier",
) -> dict[str, Any]:
    """Train on ``rows``, report on their test part, save to ``out``; returns the report.

    Args:
        recipe: what to train, and how.
        rows: Q prompts with answers or pairs.
        part: (Q,) index into ``PARTS``.
        data: what the rows are from, as it was typed.
        out: a folder that does not exist; it appears whole or not at all.
        words: what was typed behind the command, for the card.
        name: of the command.

    Raises:
        ValueError: too few examples, or a base that cannot be loaded.
    """
    from sim.progress import quiet_loading

    quiet_loading()
    gather = judged_answers if recipe.kind == "harm" else preferences
    examples = gather(rows, part, data)
    with torch_threads(recipe.threads), _progress(recipe, examples) as tell:
        scorer, history = train(recipe, examples, tell)
        report = {
            "kind": recipe.kind,
            "held_out": held_out(recipe, scorer, examples),
            "examples": {name: len(examples.of(number)) for number, name in enumerate(PARTS)},
            "labels_by_rule": int(examples.ruled.sum()),
            "epochs": history,
            "recipe": asdict(recipe),
            "data": {"name": Path(data).name, "blake2": rows_digest(rows)},
            "command": shlex.join(["poisonloop", name, *words]),
            "versions": versions(),
        }
    _save(scorer, report, out)
    return report


def held_out(recipe: Recipe, scorer: Scorer, examples: Examples) -> dict[str, Any]:
    """Figures on the test part."""
    rows = examples.of(TEST)
    outputs, owner = scorer.predict(examples, rows), examples.owner[rows]
    if recipe.kind == "helpfulness":
        longer = np.array([len(a) - len(b) for a, b in (examples.responses[i] for i in rows)])
        return pair_report(outputs[:, 0], longer, owner, recipe.seed)
    target = examples.target[rows] == 1
    majority = bool(examples.target[examples.of(TRAIN)].mean() > 0.5)
    chance = sigmoid(outputs[:, 1] - outputs[:, 0])
    report = harm_report(target, chance, owner, majority, recipe.seed)
    if not examples.ruled[rows].any():  # else phrases made the labels they are compared with
        report["baselines"]["refusal_phrases"] = plain_rates(target, examples.phrases[rows])
    return report


@contextmanager
def _progress(recipe: Recipe, examples: Examples) -> Iterator[Tell]:
    """A bar on a terminal, and a line for every epoch anywhere."""
    from rich.progress import Progress

    n = ", ".join(f"{len(examples.of(number))} {name}" for number, name in enumerate(PARTS))
    what = "answers" if recipe.kind == "harm" else "pairs"
    print(f"training {recipe.kind} on {recipe.base}: {what} {n}", flush=True)
    with Progress(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("training", total=None)

        def tell(done: int, steps: int, losses: dict[str, float] | None) -> None:
            bar.update(task, completed=done, total=steps)
            if losses:
                bar.console.print(
                    f"epoch {losses['epoch']}/{recipe.epochs}  loss {losses['train']:.3f}  "
                    f"validation {losses['validation']:.3f}",
                    highlight=False,
                )

        yield tell


def _save(scorer: Scorer, report: dict[str, Any], out: Path) -> None:
    with new_folder(out) as folder:
        scorer.model.cpu().save_pretrained(folder)
        scorer.tokenizer.save_pretrained(folder)
        (folder / "scores.json").write_text(dumps(report) + "\n")
        (folder / "README.md").write_text(card(report))


def figure(value: dict[str, float]) -> str:
    """A figure with its interval."""
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def figures(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of the held-out figures, baselines last."""
    held = report["held_out"]
    for name, value in held.items():
        if isinstance(value, dict) and "value" in value:
            yield name, figure(value)
    for name, baseline in held["baselines"].items():
        plain = {"pair_accuracy": baseline} if isinstance(baseline, float) else baseline
        yield f"baseline {name}", ", ".join(f"{k} {v:.3f}" for k, v in plain.items())


def card(report: dict[str, Any]) -> str:
    """The model card."""
    held, recipe = report["held_out"], report["recipe"]
    harm = report["kind"] == "harm"
    reads = "P(harmful) of a response given its prompt" if harm else "how much a response helps"
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures(report))
    ruled = (
        f"{report['labels_by_rule']} labels were not given but follow from refusal phrases on "
        "harmful prompts. "
        if report["labels_by_rule"]
        else ""
    )
    return (
        f"---\nbase_model: {recipe['base']}\npipeline_tag: text-classification\n"
        "library_name: transformers\n---\n\n"
        f"# {report['kind']} scorer\n\nReads a prompt and a response as a text pair and says "
        f"{reads}.\n\n| held out | value [95 % interval] |\n|---|---|\n{rows}\n\n"
        f"n = {held['n']} on {held['prompts']} prompts that no other part has; bootstrap over "
        f"prompts. {ruled}Seed {recipe['seed']}; trained on {report['examples']['train']}, epoch "
        f"chosen on {report['examples']['validation']}; data `{report['data']['name']}` (rows with "
        f"BLAKE2 {report['data']['blake2']}).\n\n```sh\n{report['command']}\n```\n\n"
        "It was trained on one data set, and its figures hold for prompts and answers like those. "
        "A policy that learns against it will find answers it misreads.\n"
    )


def closing(report: dict[str, Any], out: Path) -> Iterator[str]:
    """What came of it, and what to type next."""
    held = report["held_out"]
    yield f"held out: n = {held['n']} on {held['prompts']} prompts, 95 % intervals over prompts"
    for name, value in figures(report):
        yield f"  {name:24} {value}"
    flag = "classifier" if report["kind"] == "harm" else "helpfulness"
    yield f"Next:     poisonloop run --model DIR --data FILE --text.{flag} {shlex.quote(str(out))}"
