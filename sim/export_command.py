"""``poisonloop export``: a run's comparisons as a folder that ``datasets.load_dataset`` opens."""

from __future__ import annotations

from pathlib import Path

from envs.usage import UsageError
from sim.analysis.load import Run, load_run
from sim.cli import parser_of
from sim.export import DATA, FORMATS, TRUTH, Counts, collect, columns, write
from sim.files import check_out, new_folder

CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: {data}
tags:
- poisonloop
- trl
- preference
pretty_name: Comparisons of a simulated feedback run
---

# Comparisons of a simulated feedback run

People compared answers of a language model while it learned from them, in a run of
`poisonloop run` ({described}).{warning}

Written by `poisonloop export RUN {words}`; TRL's `{trainer}` takes it as it is:

```python
dataset = datasets.load_dataset("path/to/this/folder", split="train")
```

| column | |
|---|---|
{columns}

| labels of the run | |
|---|---|
{counts}

Votes stand as they were cast, before any defence dropped or weighted them.

Answers were cut at {limit} tokens. Which of them were is not recorded, and a trainer writes an end
(EOS) behind those too.
"""
ABOUT = {
    "prompt": "what the user asked",
    "chosen": "the answer that was voted for",
    "rejected": "the other answer",
    "completion": "one of the two answers",
    "label": "whether it was voted for",
    "round": "when the vote was cast, counted from 0",
    "annotator_id": "who voted",
    "label_id": "the vote, of which an unpaired set has two rows",
    "honest_vote": "what the same person would honestly have said: chosen, rejected, tie or skip",
    "adversarial": "whether an adversary cast the vote",
    "flipped": "whether the vote is not the honest one",
}
INSIDE = "the prompt and "


def export(words: list[str]) -> int:
    """Write the comparisons of the run that ``words`` name, and say how many and what is left."""
    parser = parser_of("export", "A run's comparisons as a data set for TRL's trainers.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--conversational", action="store_true", help="messages instead of text")
    parser.add_argument("--with-truth", action="store_true", help=", ".join(TRUTH))
    parser.add_argument("--out", type=Path, help="default: a folder in the run")
    asked = parser.parse_args(words)
    style = ["--conversational"] * asked.conversational + ["--with-truth"] * asked.with_truth
    name = "".join([asked.format, *(flag[1:] for flag in style)])
    out = asked.out or asked.run / "export" / name
    if out.exists():
        raise UsageError(f"out={str(out)!r} exists; allowed: a new directory")
    run = load_run(asked.run)
    check_out(out)
    found, counts = collect(run)
    written = columns(found, asked.format, asked.conversational, asked.with_truth)
    text = card(run, counts, list(written), asked.format, style)
    with new_folder(out) as folder:
        write(folder, written, text)
    print(f"Data set: {out}/ ({asked.format}, for {FORMATS[asked.format]})")
    for what, number in told(counts):
        print(f"{number:>9} {what}")
    if counts.unrecorded:
        print(more_words(run))
    return 0


def card(run: Run, counts: Counts, names: list[str], format: str, style: list[str]) -> str:
    """``README.md`` of the folder; the attack is named only where truth is."""
    about = dict(ABOUT)
    if format == "reward":
        about |= {name: INSIDE + ABOUT[name] for name in ("chosen", "rejected")}
    described = f"learner {run.learner}, {counts.labels} labels"
    warning = " Some of the people may be adversaries, and some of the text may be harmful."
    if "--with-truth" in style:
        described += f", attack {run.config.get('attack', {}).get('name', '?')}, rho {run.rho:g}"
    return CARD.format(
        data=DATA,
        described=described,
        limit=run.config["sampler"]["max_new_tokens"],
        warning=warning,
        words=" ".join([f"--format {format}", *style]),
        trainer=FORMATS[format],
        columns="\n".join(f"| `{name}` | {about[name]} |" for name in names),
        counts="\n".join(f"| {what} | {number} |" for what, number in told(counts)),
    )


def told(counts: Counts) -> list[tuple[str, int]]:
    """Every count with its words."""
    return [
        ("comparisons exported", counts.comparisons),
        ("ties dropped", counts.ties),
        ("skips dropped", counts.skips),
        ("decided comparisons left out, their words were not kept", counts.unrecorded),
    ]


def more_words(run: Run) -> str:
    """How a run keeps all words; its labels a round count skips too."""
    people, kept = run.config["feedback"], run.config["samples_per_round"]
    return (
        f"A run keeps the words of its first {kept} labels of a round (samples_per_round); "
        f"--samples-per-round {people['batch'] * people['redundancy']} keeps all."
    )
