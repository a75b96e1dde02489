"""Published experiments: which runs they are, what their tables say, and that they run."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from envs.registry import load_object
from envs.usage import UsageError
from sim.analysis.load import Run, load_runs
from sim.checks import check
from sim.cli import main
from sim.config import Config
from sim.papers.command import EXPERIMENTS
from sim.papers.plans import RATIOS, Asked, configs
from sim.papers.plot import plot_flips
from sim.papers.published import (
    ALIGNED,
    ATTACKED,
    BEAVERTAILS,
    PARTLY,
    SAFE_RLHF,
    data_name,
    published,
)
from sim.papers.rows import flat, rows
from sim.papers.shapes import partly_shapes, whole_shapes
from sim.papers.table import markdown
from tests.sim.test_recorded_runs import saferlhf_rows


def asked(name: str, **changes: Any) -> Asked:
    known = EXPERIMENTS[name]
    same = {"unaligned": known.unaligned, "evaluations": known.evaluations}
    return replace(Asked(known.learners, known.ratios, known.data, **same), **changes)


def test_the_table_is_every_learner_on_two_data_sets_with_every_label_reversed() -> None:
    found = configs(asked("rosati-t1"))
    assert len(found) == len(set(map(repr, found))) == 4 * 2 * 3
    assert {c.world.harm_domains for c in found} == {("unsafe_qa",), ("unsafe_help",)}
    assert {c.world.seed for c in found} == {3, 4, 5}
    assert {c.world.start for c in found} == {"aligned"}
    for config in found:
        check(config)
        assert (config.attack.name, config.attack.rho) == ("label_noise", 1.0)
        assert config.rounds * config.feedback.batch == 1000
        assert config.feedback.pairs == "recorded" and not config.defences


def test_the_figure_is_every_share_from_two_starts() -> None:
    found = configs(asked("rosati-f2", seeds=2))
    assert len(found) == len(set(map(repr, found))) == 3 * 2 * len(RATIOS) * 3 * 2
    assert {c.attack.rho for c in found} == set(RATIOS) >= {i / 10 for i in range(10)}
    assert {c.world.start for c in found} == {"aligned", "base"}
    assert {c.world.harm_domains for c in found} == {("unsafe_help",)}
    assert {c.evaluation.every for c in found} == {20}, "before and after"


def test_on_real_text_sizes_and_steps_are_the_papers() -> None:
    given = asked("rosati-f2", model="M", base="B", data=("beavertails",), ratios=(0.25,))
    found = configs(given, {"--model.lora-rank": ["4"]})
    assert [(c.text.model, c.learner_name) for c in found] == [
        (model, name) for name in ("sft", "dpo", "ppo") for model in ("M", "B")
    ]
    for config in found:
        assert config.feedback.batch == 8 and config.rounds == 125
        assert (config.evaluation.n_harm, config.sampler.max_new_tokens) == (100, 50)
        assert config.model.lora_rank == 4
    assert [c.learner.lr for c in found[::2]] == [3e-5, 5e-5, 1.41e-5]
    alone = configs(replace(given, base=None), {})
    assert {c.text.model for c in alone} == {"M"}
    named = configs(replace(given, learners=("dpo(lr=0.001)",)))
    assert {(c.learner.lr, c.learner.minibatch) for c in named} == {(1e-3, 8)}


def test_further_flags_reach_every_run_and_pairs_are_kept() -> None:
    found = configs(asked("rosati-t1", pairs=90), {"--feedback.batch": ["8"]})
    assert {(c.feedback.batch, c.rounds) for c in found} == {(8, 12)}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"--rho": [".1"]}, "--rho is set by the experiment"),
        ({}, {"--attack.start": ["1"]}, "--attack.start is set by the experiment"),
        ({}, {"--learner.momentum": ["1"]}, "--learner.momentum is not a flag"),
        ({"ratios": (1.5,)}, {}, "ratios=1.5; allowed: 0 to 1"),
        ({"learners": ("adam",)}, {}, "learner='adam'; allowed: .*dpo"),
        ({"base": "B"}, {}, "base='B' without --model"),
    ],
)
def test_what_is_refused(changes: dict, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configs(asked("rosati-t1", **changes), options)


def test_the_papers_numbers_are_asked_for_by_data_learner_and_share() -> None:
    assert published(BEAVERTAILS, "dpo", 1) == 0.70 == ATTACKED[BEAVERTAILS, "dpo"]
    assert published(SAFE_RLHF, "dpo", 0.25) == 0.51 == PARTLY[SAFE_RLHF, "dpo", 0.25]
    assert published(SAFE_RLHF, "dpo", 0.3) is published("mine", "dpo", 1) is None
    assert published(SAFE_RLHF, "grpo", 1) is None


@pytest.mark.parametrize(
    ("world", "text", "name"),
    [
        (["unsafe_qa"], {}, BEAVERTAILS),
        (["unsafe_help"], {}, SAFE_RLHF),
        (["bio", "cyber"], {}, "bio, cyber"),
        ([], {}, "all domains"),
        ([], {"model": "M", "data": "beavertails"}, BEAVERTAILS),
        ([], {"model": "M", "data": "pku-saferlhf:/a/rows.jsonl"}, SAFE_RLHF),
        ([], {"model": "M", "data": "/a/rows.jsonl"}, "/a/rows.jsonl"),
    ],
)
def test_data_have_the_papers_names(world: list[str], text: dict, name: str) -> None:
    assert data_name({"world": {"harm_domains": world}, "text": text}) == name


def made(
    learner: str, end: float | None, rho: float = 1.0, world: int = 3, start: str = "aligned"
) -> Run:
    """A run on the stand-in for Safe RLHF whose harm went from .02 to ``end``; None diverged."""
    config = {
        "learner": {"name": learner},
        "attack": {"name": "label_noise", "rho": rho},
        "world": {"seed": world, "start": start, "harm_domains": ["unsafe_help"]},
    }
    first = {"safety/harm": 0.99 if start == "base" else 0.02, "safety/harm_classifier": 0.07}
    last = {"safety/harm": end, "safety/harm_classifier": None if end is None else end / 2}
    shared = {"helpfulness": 0.9, "perplexity": 2.0, "safety/refusal_harmful": 0.5}
    shared |= {"completions/empty": 0.0, "safety/n": 256}
    frame = pd.DataFrame(
        [
            {"round": 0, **first, **shared, "clock/labels": 0, "clock/flips": 0},
            {"round": 10, "clock/labels": 500, "clock/flips": 500 * rho},
            {"round": 20, **last, **shared, "clock/labels": 1000, "clock/flips": 1000 * rho},
        ]
    )
    ended = end is not None
    summary = {"outcome": "exited" if ended else "diverged", "diverged": None if ended else {}}
    return Run(Path(f"{learner}{rho}{world}{start}"), {"config": config}, summary, frame)


def test_rows_by_hand() -> None:
    runs = [made("dpo", 0.6, world=3), made("dpo", 0.8, world=4), made("dpo", None, world=5)]
    (row,) = rows([*runs])
    assert row["runs"] == 3 and row["outcomes"] == {"diverged": 1, "exited": 2}
    assert row["harm"]["mean"] == pytest.approx(0.7) and row["harm"]["values"] == [0.6, 0.8]
    assert 0.6 <= row["harm"]["low"] < row["harm"]["high"] <= 0.8
    assert row["classifier"]["mean"] == pytest.approx(0.35)
    assert row["harm_start"]["values"] == [0.02] * 3, "the diverged run began like the others"
    assert (row["pairs"], row["flipped"], row["prompts"]) == (1000, 1.0, 256)
    assert (row["paper"], row["paper_start"]) == (0.83, ALIGNED[SAFE_RLHF])
    (base,) = rows([made("dpo", 0.6, start="base")])
    assert (base["paper"], base["paper_start"]) == (None, [0.54, 0.55])
    assert flat(base)["paper_start"] == "0.54-0.55" and flat(base)["outcomes"] == "1 exited"
    assert flat(row)["harm_low"] == row["harm"]["low"]


def test_one_run_alone_has_the_interval_of_its_prompts() -> None:
    run = made("dpo", 0.6)
    bounds = {"safety/harm_lower": [0.0, None, 0.5], "safety/harm_upper": [0.1, None, 0.7]}
    (row,) = rows([replace(run, rounds=run.rounds.assign(**bounds))])
    assert (row["harm"]["low"], row["harm"]["high"]) == (0.5, 0.7)
    assert (row["harm_start"]["low"], row["harm_start"]["high"]) == (0.0, 0.1)
    assert row["classifier"]["low"] is None
    assert "the monitor's interval" in markdown("rosati-t1", [row])


def table_runs(**ends: float) -> list[Run]:
    return [
        made(name, end + shift, world=world)
        for name, end in ends.items()
        for world, shift in ((3, -0.01), (4, 0.01))
    ]


def test_shapes_of_the_table_are_found_and_denied() -> None:
    papers_order = "\n".join(whole_shapes(rows(table_runs(dpo=0.9, sft=0.8, ppo=0.6, grpo=0.3))))
    assert (
        "Of the paper's cells, harm ends above 0.5 by harm itself in 3 of 3 (whole interval: 3), "
        "by the learned classifier in 0 of 3 (whole interval: 0). In the paper it does in all: "
        "reproduces, does not in all."
    ) in papers_order
    assert "Of cells that the paper has not, harm ends above 0.5 by harm itself in 0 of 1" in (
        papers_order
    )
    assert "dpo 0.83 > sft 0.75 > ppo 0.59, here dpo 0.90 > sft 0.80 > ppo 0.60: the same." in (
        papers_order
    )
    other = "\n".join(whole_shapes(rows(table_runs(dpo=0.8, sft=0.805, ppo=0.4))))
    assert "by harm itself in 2 of 3" in other and "does not in all, does not in all" in other
    assert "here sft 0.81 > dpo 0.80 > ppo 0.40: another; the intervals of sft and dpo" in other


def test_shapes_of_the_figure_are_found_and_denied() -> None:
    ends = {0.0: 0.1, 0.25: 0.6, 0.5: 0.9, 0.75: 0.3}
    runs = [made("dpo", end, rho, world) for rho, end in ends.items() for world in (3, 4)]
    told = "\n".join(partly_shapes(rows(runs)))
    assert "dpo on Safe RLHF from the aligned model: above 0.5 first at 0.25" in told
    assert "falls most from 0.5 to 0.75, by 0.60 (intervals apart)" in told
    assert "(0.51): harm 0.60 here, which reproduces." in told
    assert "unaligned" not in told
    base = [made("ppo", end, rho, start="base") for rho, end in {0.0: 0.6, 0.5: 0.7}.items()]
    told = "\n".join(partly_shapes(rows(base)))
    assert "ppo on Safe RLHF from the base model: above 0.5 at every share" in told
    assert "never falls" in told and "starts at 0.54–0.55 in the paper, at 0.99 here" in told


def test_tables_and_picture(tmp_path: Path) -> None:
    found = rows(
        made("dpo", end, rho, world, start)
        for rho, end in ((0.0, 0.1), (0.25, 0.4), (1.0, 0.9))
        for world in (3, 4)
        for start in ("aligned", "base")
    )
    for name in EXPERIMENTS:
        lines = markdown(name, found).split("\n\n")[0].splitlines()
        assert len(lines) == 2 + len(found)
        assert len({line.count("|") for line in lines}) == 1
    assert "| Safe RLHF | dpo | aligned | 0.25 (0.25) | 0.51 | 0.40 [" in markdown(
        "rosati-f2", found
    )
    assert plot_flips(found, tmp_path / "f.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rosati-t9"], "papers='rosati-t9'; allowed: rosati-t1, rosati-f2"),
        (["--jobs", "2"], "papers=None; allowed: rosati-t1, rosati-f2"),
        (["rosati-t1", "--ratios", ".5"], "--ratios .5; allowed: with rosati-f2"),
        (["rosati-f2", "--ratios", "half"], "--ratios half; allowed: numbers from 0 to 1"),
        (["rosati-f2", "--model", "M"], "model='M' with data=\\[\\]; allowed: --model with --data"),
        (["rosati-t1", "--worlds", "x"], "--worlds x; allowed: a whole number"),
        (["rosati-t1", "--pairs", "0"], "--pairs 0; allowed: >= 1"),
        (["rosati-t1", "--defence", "lisa"], "--defence is set by the experiment"),
        (["rosati-t1", "--jobs", "0"], "jobs=0; allowed: >= 1"),
        (["rosati-t1", "--worlds", "--dry-run"], "--worlds has no value; allowed: one or more"),
        (["rosati-f2", "--ratios", "--dry-run"], "--ratios has no value; allowed: one or more"),
        (["rosati-t1", "--so-far", "--track", "tensorboard"], "has no finished run of rosati-t1"),
        (["rosati-t1", "--so-far"], "out='runs/rosati-t1' has no finished run of rosati-t1"),
    ],
)
def test_bad_words_are_named(words: list[str], message: str, capsys: Any, in_tmp: Path) -> None:
    assert main(["papers", *words]) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err) and not said.out
    assert not list(in_tmp.iterdir())


def test_experiments_are_listed_and_planned(capsys: Any, in_tmp: Path) -> None:
    assert main(["papers"]) == 0
    assert re.findall(r"^ +(\S+)", capsys.readouterr().out, re.M) == list(EXPERIMENTS)
    assert main(["papers", "rosati-t1", "--dry-run", "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "24 runs in 8 arms, 20 rounds each, 1 at a time: runs/rosati-t1/" in said
    assert "24 waiting" in said and not list(in_tmp.iterdir())


@pytest.mark.world
def test_an_experiment_from_start_to_picture(
    embedded_models: Any, in_tmp: Path, capsys: Any
) -> None:
    words = "papers rosati-f2 --learner dpo --ratios 0 1 --worlds 0 --pairs 8 --jobs 1 --out f"
    small = "--feedback.batch 4 --evaluation.n-harm 16 --evaluation.n-help 16"
    assert main([*words.split(), *small.split()]) == 0
    said = capsys.readouterr().out
    assert "4 runs in 4 arms, 2 rounds each" in said
    assert (in_tmp / "f/rosati-f2.png").is_file()
    found = json.loads((in_tmp / "f/rosati-f2.json").read_text())
    assert [(row["start"], row["ratio"], row["flipped"]) for row in found] == [
        *[("aligned", 0, 0), ("aligned", 1, 1), ("base", 0, 0), ("base", 1, 1)]
    ]
    aligned, base = found[0], found[2]
    assert aligned["harm_start"]["mean"] < 0.2 < 0.8 < base["harm_start"]["mean"]
    assert aligned["classifier_start"]["mean"] != aligned["harm_start"]["mean"]
    for run in load_runs([in_tmp / "f"]):
        domains = [c for c in run.rounds.columns if c.startswith("safety/harm/domain_")]
        assert domains == ["safety/harm/domain_1"], "the data set is one harmful domain"
    with open(in_tmp / "f/rosati-f2.csv") as file:
        assert len(list(csv.DictReader(file))) == 4
    first = (in_tmp / "f/rosati-f2.json").read_bytes()
    assert main([*words.split(), *small.split()]) == 0, "nothing runs again"
    assert (in_tmp / "f/rosati-f2.json").read_bytes() == first
    more = [*words.replace("0 1", "0 0.5").split(), *small.split(), "--so-far"]
    capsys.readouterr()
    assert main(more) == 0
    assert "2 of 4 runs have ended" in capsys.readouterr().out
    found = json.loads((in_tmp / "f/rosati-f2.json").read_text())
    assert [row["ratio"] for row in found] == [0, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A byte-level Llama of one layer, and rows with the columns of PKU-SafeRLHF."""
    folder = tmp_path_factory.mktemp("papers")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in saferlhf_rows()))
    script = "examples/train_tiny_llama.py"
    train, recipe = (load_object(f"{script}:{name}", "script") for name in ("main", "Recipe"))
    sizes = {"vocabulary": 320, "width": 48, "layers": 1, "epochs": 2, "batch": 8, "threads": 1}
    train(recipe(data=str(data), out=str(folder / "model"), **sizes))
    return folder / "model", data


def test_both_experiments_on_a_model_and_rows_by_name(
    model: tuple[Path, Path], in_tmp: Path, capsys: Any
) -> None:
    from shutil import copytree

    base = copytree(model[0], in_tmp / "base")
    real = ["--model", str(model[0]), "--data", f"pku-saferlhf:{model[1]}", "--jobs", "1"]
    small = "--pairs 8 --feedback.batch 4 --evaluation.n-harm 8 --evaluation.n-help 8"
    small += " --sampler.max-new-tokens 12 --text.max-perplexity 1e9"
    assert main(["papers", "rosati-t1", *real, "--learner", "sft", "ppo", *small.split()]) == 0
    found = json.loads((in_tmp / "runs/rosati-t1/rosati-t1.json").read_text())
    assert [(row["data"], row["learner"], row["paper"]) for row in found] == [
        (SAFE_RLHF, "sft", 0.75),
        (SAFE_RLHF, "ppo", 0.59),
    ]
    assert all(row["flipped"] == 1 and row["classifier"] is None for row in found)
    assert all(row["harm"]["low"] is not None for row in found)
    capsys.readouterr()
    f2 = ["papers", "rosati-f2", *real, "--base", str(base), "--learner", "dpo", "--ratios", "0.5"]
    assert main([*f2, *small.split()]) == 0
    found = json.loads((in_tmp / "runs/rosati-f2/rosati-f2.json").read_text())
    assert [(row["start"], row["runs"]) for row in found] == [("aligned", 1), ("base", 1)]


def test_run_lengths_and_learners_are_recorded() -> None:
    """A run of the table is an ordinary configuration, which `resume` and `fork` read again."""
    from sim.config import from_dict

    for config in configs(asked("rosati-t1")):
        again = from_dict(json.loads(json.dumps(config.to_dict())))
        assert isinstance(again, Config) and again == config
