"""``poisonloop prepare-data``: what a data set lacks for a run with defences, as a folder.

    settings.json    what was asked for; the same words continue a stopped command
    answers.jsonl    answers of the starting model, as token ids
    classifier/      a harm classifier with its F1 on the evaluation split, where none is given
    data.jsonl       every prompt with its answers, for ``--data``
    splits.json      which prompts are for users, adversaries, evaluation and defences
    manifest.json    counts by role and verdict, F1, hashes; written last

Which answers are kept is said in ``sim.scorers.roles``. The classifier never sees a prompt of the
evaluation split, on which it is tested.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from envs.recorded import RecordedText, split_prompts
from envs.records import rows_digest
from envs.scorers import TextScorer
from envs.usage import UsageError
from sim.cli import parser_of
from sim.files import alone_in, check_out, dumps, write_atomic
from sim.hashes import digest
from sim.real_text import model_directory
from sim.scenario import check_lengths
from sim.scorers.answers import AnswerFile, Sampling
from sim.scorers.command import build, recipe_flags
from sim.scorers.examples import TEST, Examples, judged_answers
from sim.scorers.roles import SPLIT_BY, write_manifest, write_rows
from sim.scorers.training import Recipe, seconds_per_epoch
from sim.text_config import TextConfig
from sim.threads import torch_threads

NAME = "prepare-data"
LEARNT = ("base", "epochs", "batch", "micro_batch", "lr", "tokens", "threads", "device")
"""Fields of :class:`Recipe` that have flags here; the seed is that of the answers too."""


def command(words: list[str]) -> int:
    """``poisonloop prepare-data --model M --data D --out DIR``."""
    asked = _parser().parse_args(words)
    out = Path(asked.out)
    if (out / "manifest.json").exists():
        raise UsageError(f"out={asked.out!r} is complete; allowed: a new directory")
    check_out(out)
    recipe = Recipe(**{name: getattr(asked, name) for name in (*LEARNT, "seed")})
    plan = Sampling(**{f.name: getattr(asked, f.name) for f in fields(Sampling)})
    with torch_threads(recipe.threads):
        return _prepare(asked, out, recipe, plan, words)


def _parser() -> Any:
    parser = parser_of(
        NAME,
        "Sample the starting model's answers, filter them, train a classifier where none is given, "
        "and write what `poisonloop run --data` takes. Stopped, the same words continue it.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the starting model")
    parser.add_argument("--data", required=True, metavar="FILE", help="prompts, and answers if any")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--classifier", metavar="DIR", help="instead of training one")
    parser.add_argument("--harm-label", default="", help="its harmful label, by name or number")
    parser.add_argument("--dry-run", action="store_true", help="say size and time, and stop")
    numbers = {name: getattr(TextConfig(), name) for name in SPLIT_BY} | asdict(Sampling())
    for name, value in numbers.items():
        flag, kind = f"--{name.replace('_', '-')}", type(value)
        parser.add_argument(flag, type=kind, default=value, metavar="N", help=f"default {value}")
    recipe_flags(parser, *LEARNT)
    return parser


def _prepare(asked: Any, out: Path, recipe: Recipe, plan: Sampling, words: Sequence[str]) -> int:
    from sim.progress import quiet_loading

    quiet_loading()
    model = model_directory("model", asked.model)
    longest = f"text.prompt_tokens={asked.prompt_tokens}"
    check_lengths(model, asked.prompt_tokens, plan.max_new_tokens, longest)
    given = model_directory("classifier", asked.classifier) if asked.classifier else None
    data = RecordedText(asked.data, model, asked.prompt_tokens, asked.split_seed)
    settings = _settings(asked, recipe, plan, data, model, given)
    _refuse_other(out, settings)
    answers = AnswerFile(out / "answers.jsonl", data, model, plan)
    part = classifier_parts(data, recipe.seed)
    train = given is None and not (out / "classifier").exists()
    examples = judged_answers(data.rows, part, data.path) if train else None
    for line in _forecast(answers, data, recipe, examples):
        print(line, flush=True)
    if asked.dry_run:
        return 0
    write_atomic(out / "settings.json", (dumps(settings) + "\n").encode())
    with alone_in(out, "out"):
        for stale in out.glob(".classifier-*"):  # of a process that was killed while it trained
            shutil.rmtree(stale)
        _sample(answers)
        if train:
            build(recipe, data.rows, part, asked.data, out / "classifier", words, NAME)
        judge = given or out / "classifier"
        scorer = TextScorer(data, model, judge, asked.harm_label, tokens=plan.max_new_tokens)
        counts = write_rows(out, data, scorer, answers.ids())
        facts = {"answers": counts, "max_perplexity": scorer.max_perplexity}
        facts |= {name: getattr(asked, name) for name in SPLIT_BY}
        write_manifest(out, data, judge, facts)
    print(_closing(asked, out, judge, plan))
    return 0


def _settings(
    asked: Any,
    recipe: Recipe,
    plan: Sampling,
    data: RecordedText,
    model: Path,
    classifier: Path | None,
) -> dict[str, Any]:
    """Everything that decides the bytes of the folder."""
    weights = {"model": model, "classifier": classifier}
    return {
        "prompt_tokens": asked.prompt_tokens,
        "split_seed": asked.split_seed,
        "harm_label": asked.harm_label,
        **(asdict(recipe) if classifier is None else {}),
        **asdict(plan),
        "data (BLAKE2)": rows_digest(data.rows),
        **{
            f"{name} (BLAKE2)": digest(sorted(folder.glob("*.safetensors")))
            for name, folder in weights.items()
            if folder is not None
        },
    }


def _refuse_other(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue what was begun with other words."""
    file = out / "settings.json"
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise UsageError(
                f"out={str(out)!r} is not empty and not begun by this command; allowed: a new "
                "directory"
            )
        return
    begun = json.loads(file.read_text())
    for name in sorted({*begun, *settings}):
        if begun.get(name) != settings.get(name):
            raise UsageError(
                f"out={str(out)!r} was begun with {name}={begun.get(name)!r}, not "
                f"{settings.get(name)!r}; allowed: the same settings, or a new directory"
            )


def classifier_parts(data: RecordedText, seed: int) -> np.ndarray:
    """(Q,) part of each prompt: the evaluation split is the test, of the rest 15 % validate."""
    prompts = [row.prompt for row in data.rows]
    part = split_prompts(prompts, data.stratum, seed, {"train": 0.85, "validation": 0.15})
    part[data.table("eval").key] = TEST
    return part


def _forecast(
    answers: AnswerFile, data: RecordedText, recipe: Recipe, examples: Examples | None
) -> list[str]:
    """How much is to be made, and how long it takes at most, measured on one batch of each."""
    plan, (done, _) = answers.plan, answers.kept()
    batches = -(-(answers.total - done) // plan.sample_batch)
    size = answers.total * plan.answers * plan.max_new_tokens * 6 / 1e6  # an id and its comma
    seconds = answers.seconds() * batches if batches else 0.0
    lines = [
        f"{answers.total} prompts ({data.dropped} too long) x {plan.answers} answers of at most "
        f"{plan.max_new_tokens} tokens, at most {size:.1f} MB; {done} prompts are answered; the "
        f"rest takes at most {_duration(seconds)}"
    ]
    if examples is not None:
        seconds = seconds_per_epoch(recipe, examples) * recipe.epochs
        lines.append(
            f"a classifier on {len(examples.prompts)} answers, {recipe.epochs} epochs of "
            f"{recipe.base}: about {_duration(seconds)}"
        )
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _sample(answers: AnswerFile) -> None:
    """Complete the answers in sight."""
    from rich.progress import Progress

    shown = sys.stdout.isatty()
    said = time.monotonic()
    with Progress(disable=not shown) as bar:
        task = bar.add_task("answers", total=answers.total)

        def tell(done: int) -> None:
            nonlocal said
            bar.update(task, completed=done)
            if not shown and (done == answers.total or time.monotonic() - said > 30):
                said = time.monotonic()
                print(f"answers to {done}/{answers.total} prompts", flush=True)

        answers.complete(tell)


def _closing(asked: Any, out: Path, judge: Path, plan: Sampling) -> str:
    facts = json.loads((out / "manifest.json").read_text())
    roles = ", ".join(f"{n} {role}" for role, n in facts["roles"].items())
    parts = ["poisonloop run --model", shlex.quote(asked.model)]
    parts += ["--data", shlex.quote(str(out / "data.jsonl"))]
    parts += ["--text.classifier", shlex.quote(str(judge))]
    parts += [
        f"--text.prompt-tokens {asked.prompt_tokens}",
        f"--text.split-seed {asked.split_seed}",
    ]
    parts += [f"--sampler.max-new-tokens {plan.max_new_tokens}", "--rho .2"]
    return f"Made:     {out}/ ({roles} for the defences)\nNext:     {' '.join(parts)}"
