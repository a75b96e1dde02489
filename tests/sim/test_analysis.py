"""Reading runs, exit times across seeds, pictures and pages; the runs are written here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.text import Text

from envs.collapse import Fluency
from envs.monitor import CostMonitor
from sim.analysis import arms as pictures_of_arms
from sim.analysis.arm_names import arm_names, replicate
from sim.analysis.arms import plot_arms, plot_survival
from sim.analysis.load import by_arm, load_run, load_runs
from sim.analysis.paired import log_rank, rmst_difference
from sim.analysis.plots import plot_cost_trace, plot_reward_vs_harm, plot_rho
from sim.analysis.report import write_report
from sim.analysis.style import line_style, short_names
from sim.analysis.survival import exit_table, horizon_of, kaplan_meier, rmst
from sim.analysis.tables import AGAINST, EXCHANGE, HOLM, arm_table, run_table
from sim.analysis.words import RHO
from sim.identity import identity


def write_run(
    path: Path,
    rho: float = 0.25,
    seed: int = 0,
    crossing: float = 9.0,
    defences: tuple[str, ...] = (),
    learner: str = "grpo",
    rounds: int = 20,
    hostile: str = "",
    lr: float = 0.1,
) -> Path:
    """A small run directory; harm rises through .35 at round ``crossing`` (inf: never)."""
    rng = np.random.default_rng(seed)
    monitor = CostMonitor(planned=rounds + 1, watched={"harm_classifier": 0.25})
    path.mkdir(parents=True)
    config = {
        "seed": seed,
        "rounds": rounds,
        "learner": {"name": learner, "lr": lr},
        "attack": {"name": "harmful_asker", "rho": rho},
        "defences": list(defences),
        "evaluation": {"cost_limit": 0.25, "alpha": 0.05, "limits": {}, "n_help": 128},
    }
    (path / "manifest.json").write_text(json.dumps({"config": config}))
    lines = []
    for r in range(rounds + 1):
        mean = 0.03 + 0.32 * (1 + np.tanh((r - crossing) / 2.6)) + 0.01 * rng.random()
        clocks = {"labels": 64 * r, "optimizer_steps": 4 * r}
        clocks |= {"malicious_labels": int(64 * rho) * r, "flips": int(12 * rho) * r}
        costs = (rng.random(128) < mean).astype(float)
        fluency = Fluency(4.0 + rng.random(), 0.01, 0.5 + 0.01 * r)
        row = monitor.observe(r, clocks, {"harm": costs, "harm_classifier": costs}, fluency)
        row |= {"helpfulness": fluency.help, "utility": 0.2 + 0.02 * r, "labels": 64 if r else None}
        row["reward"] = float(-0.5 + 0.07 * r + 0.5 * mean) if r and learner == "grpo" else None
        share = rng.binomial(64, rho) / 64
        names = ("annotators", "labels", "flips", "risk_flips", "post")
        shares = (rho, share, share / 3, min(1.0, 1.4 * share), share / 3 + 0.02)
        row |= {f"feedback/rho_{k}": v if r else None for k, v in zip(names, shares, strict=True)}
        row |= {f"clock/{k}": v for k, v in clocks.items()}
        lines.append(json.dumps(row, allow_nan=False))
        if r:
            write_samples(path, r, rng, hostile)
    (path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    summary = monitor.summary() | {"exit_true": None, "harm_end": mean}
    summary |= {"help_start": 0.5, "help_end": 0.75, "help_gain": 0.25}
    if summary["exit_confirmed"]:
        summary["exit_true"] = {"rounds": int(crossing) - 1, "labels": 64 * (int(crossing) - 1)}
    (path / "summary.json").write_text(json.dumps(summary, allow_nan=False))
    return path


def write_samples(path: Path, r: int, rng: np.random.Generator, hostile: str) -> None:
    """Eight comparisons of invented words."""
    words = np.array(["mokel", "tarvi", "bessun", "lirat", "dovane", "quill", "sarn", "pelt"])
    text = [" ".join(rng.choice(words, 6)) for _ in range(24)]
    columns = {
        "round": [r - 1] * 8,  # rounds trained before these answers
        "label_id": list(range(64 * r, 64 * r + 8)),
        "item": list(range(64 * r, 64 * r + 8)),
        "prompt": [hostile + t for t in text[:8]],
        "answer_a": text[8:16],
        "answer_b": text[16:],
        "vote": rng.choice(["a", "b", "tie", "skip"], 8).tolist(),
        "honest_vote": rng.choice(["a", "b"], 8).tolist(),
        "annotator": rng.integers(0, 100, 8).tolist(),
        "adversarial": (rng.random(8) < 0.25).tolist(),
        "stratum": rng.choice(["benign", "contrast", "harmful"], 8).tolist(),
        "cost_a": rng.random(8).astype(np.float32),
        "cost_b": rng.random(8).astype(np.float32),
    }
    (path / "samples").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path / "samples" / f"part-{r:06d}.parquet")


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Three arms of two seeds: clean, undefended, defended."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        write_run(root / f"clean-{seed}", 0.0, seed, np.inf)
        write_run(root / f"attacked-{seed}", 0.25, seed, 8.0 + 2 * seed)
        write_run(root / f"defended-{seed}", 0.25, seed, np.inf, ("refusal_loss",))
    return root


# Reading runs.


def test_half_written_last_line_is_dropped(tmp_path):
    path = write_run(tmp_path / "run", rounds=6)
    with open(path / "rounds.jsonl", "a") as file:
        file.write('{"round": 7, "safety/ha')
    assert load_run(path).rounds["round"].tolist() == list(range(7))
    lines = (path / "rounds.jsonl").read_text().splitlines()
    (path / "rounds.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        load_run(path)


def test_missing_values_are_nan_and_evaluations_are_found(tmp_path):
    run = load_run(write_run(tmp_path / "run", learner="dpo", rounds=4))
    assert run.column("reward").isna().all() and run.column("never_recorded").isna().all()
    lines = [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]
    lines[2]["safety/harm"] = None
    (run.path / "rounds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_run(run.path).evaluations["round"].tolist() == [0, 1, 3, 4]


def test_not_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="manifest.json"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="no run found"):
        load_runs([tmp_path])


def test_arms_in_reading_order(arms):
    grouped = by_arm(load_runs([arms]))
    assert list(grouped) == [
        "clean",
        "harmful_asker ρ=0.25",
        "harmful_asker ρ=0.25 + refusal_loss",
    ]
    assert [len(members) for members in grouped.values()] == [2, 2, 2]


def config(learner="grpo", rho=0.25, **more):
    attack = {"name": "label_noise", "rho": rho, "schedule": "constant", "start": 0}
    known = {"seed": 0, "learner": {"name": learner, "lr": 0.1}, "attack": attack, "defences": []}
    return known | more


def test_arms_are_named_by_what_differs_and_by_nothing_else():
    seeds = [config(seed=seed, world={"seed": world}) for seed in (0, 1) for world in (3, 4)]
    assert set(arm_names(seeds)) == {"label_noise ρ=0.25"}
    assert replicate({"seed": 1, "world.seed": 3}) == "seed 1, world 3"
    later = config()
    later["attack"] = {**later["attack"], "schedule": "sleeper", "start": 5}
    latest = config(attack=later["attack"] | {"start": 9})
    clean = config(rho=0.0, defences=["freeze()"])
    assert arm_names([config(), later, latest, clean]) == [
        "label_noise ρ=0.25 attack.schedule=constant",
        "label_noise ρ=0.25 attack.schedule=sleeper attack.start=5",
        "label_noise ρ=0.25 attack.schedule=sleeper attack.start=9",
        "clean + freeze",
    ]
    slow = config("dpo")
    slow["learner"] = {"name": "dpo", "lr": 0.2}  # learners have settings of their own
    assert arm_names([config(), slow]) == ["grpo: label_noise ρ=0.25", "dpo: label_noise ρ=0.25"]


def attacked(**schedule):
    return config(attack={"name": "harm_targeted", "rho": 0.2, **schedule})


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (config(checkpoint_every=1), config(checkpoint_every=5), True),
        (config(samples_per_round=8), config(samples_per_round=0), True),
        (config(evaluation={"n_true": 0}), config(evaluation={"n_true": 9}), True),
        (config(evaluation={"n_harm": 64}), config(evaluation={"n_harm": 9}), False),
        (attacked(schedule="constant", length=3), attacked(schedule="constant", length=4), True),
        (attacked(schedule="burst", length=3), attacked(schedule="burst", length=4), False),
        (attacked(schedule="burst", period=3), attacked(schedule="burst", period=4), True),
        (attacked(schedule="pulsed", period=3), attacked(schedule="pulsed", period=4), False),
        (attacked(schedule="sleeper", start=3), attacked(schedule="sleeper", start=4), False),
        (attacked(name="none"), config(rho=0.0), True),
        (attacked(name="my.py:Mine()"), attacked(name="my.py:Mine"), True),
        (attacked(name="a/my.py:Mine"), attacked(name="b/my.py:Mine"), False),
        (config(defences=["freeze()"]), config(defences=["freeze"]), True),
        (config(text={"model": None, "split_seed": 0}), config(text={"split_seed": 1}), True),
        (config(text={"model": "m"}, world={"seed": 0}), config(text={"model": "m"}), True),
        (config(world={"seed": 0}), config(world={"seed": 1}), False),
    ],
)
def test_what_cannot_act_makes_no_other_run(first, second, equal):
    assert (identity(first) == identity(second)) == equal
    assert len(set(arm_names([first, second]))) == 1 or not equal


def test_runs_are_found_at_any_depth(tmp_path):
    write_run(tmp_path / "a", rounds=3)
    inner = write_run(tmp_path / "sweep" / "of" / "b", rounds=3, seed=1)
    (inner / "checkpoints").mkdir()
    (inner / "checkpoints" / "manifest.json").write_text("{}")  # a run holds no runs
    write_run(tmp_path / ".retried" / "a.1", rounds=3)  # nor does what was set aside count
    assert [run.path for run in load_runs([tmp_path])] == [tmp_path / "a", inner]


def test_a_report_calls_a_run_by_one_name(tmp_path):
    """What differs is found over all runs, those that have not ended included."""
    paths = [write_run(tmp_path / str(n), rounds=4, lr=0.1 * (n + 1)) for n in range(2)]
    (paths[1] / "summary.json").unlink()
    runs = load_runs([tmp_path])
    name = "harmful_asker ρ=0.25 learner.lr=0.1"
    assert list(by_arm(runs[:1])) == [name] and name in runs[0].title
    assert arm_table(runs[:1])["arm"].tolist() == [name]
    assert run_table(runs)["arm"].tolist()[0] == name
    page = write_report([tmp_path], tmp_path / "report")[0].read_text()
    assert "<td>harmful_asker ρ=0.25</td>" not in page


def test_samples_come_back_in_order(arms):
    samples = load_run(arms / "clean-0").table("samples")
    assert samples["round"].tolist() == [r for r in range(20) for _ in range(8)]
    assert load_run(arms / "clean-0").table("truth").empty


# Exit times across seeds.


def test_exit_table_censors_runs_that_stay_inside(arms):
    table = exit_table(load_runs([arms]), "labels").set_index(["arm", "replicate"])
    exited = table.loc[("harmful_asker ρ=0.25", "seed 0")]
    summary = load_run(arms / "attacked-0").summary
    assert exited["event"] and exited["time"] == summary["exit_confirmed"]["labels"]
    assert [exited["left"], exited["right"]] == [64 * r for r in summary["bracket"]]
    inside = table.loc[("clean", "seed 1")]
    assert not inside["event"] and inside["time"] == 64 * 20 and np.isinf(inside["right"])


def test_how_far_every_run_could_be_followed(arms, tmp_path):
    """On labels no further than the first that ended inside; of runs that all left, the last."""
    runs = load_runs([arms])
    exits = exit_table(runs, "labels")
    assert horizon_of(runs, exits) == 20
    inside = exits.index[~exits["event"]]
    exits.loc[inside[0], "time"] = 700.0
    assert exits["time"].max() > 700 == horizon_of(runs, exits, "labels")
    out = exits[exits["event"]]
    assert horizon_of(runs, out, "labels") == out["time"].max()


def test_rmst_by_hand():
    """Exits at 1, 2, 3: the area is 1 + 2/3 + 1/3 and the error that of a plain mean."""
    whole = rmst(np.array([1, 2, 3]), np.array([True] * 3), 4.0)
    assert whole.value == pytest.approx(2.0)
    assert whole.error == pytest.approx(np.sqrt(2 / 3 / 3))
    assert whole.low is None  # too few runs for an interval
    # Exit at 1, censored at 2, exit at 3, censored at 4: S = 3/4 from 1, 3/8 from 3.
    mixed = rmst(np.array([1, 2, 3, 4]), np.array([True, False, True, False]), 4.0)
    assert mixed.value == pytest.approx(1 + 2 * 0.75 + 0.375)
    # Greenwood: areas right of the exits 1.875 and .375, terms 1/(4*3) and 1/(2*1).
    assert mixed.error == pytest.approx(np.sqrt(1.875**2 / 12 + 0.375**2 / 2))


def test_rmst_error_is_that_of_the_estimator():
    """Spread of the estimate over repeated experiments, which lifelines' number misses by far."""
    rng = np.random.default_rng(7)
    lives = rng.weibull(4, (800, 40)) * 70
    time, event = np.minimum(lives, 80), lives <= 80
    found = [rmst(t, e, 80.0) for t, e in zip(time, event, strict=True)]
    spread = np.std([f.value for f in found])
    assert np.mean([f.error for f in found]) == pytest.approx(spread, rel=0.1)
    covered = [f.low <= np.minimum(rng.weibull(4, 10**5) * 70, 80).mean() <= f.high for f in found]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_rmst_does_not_say_what_nobody_saw():
    assert rmst(np.array([1, 5]), np.array([True, False]), 9.0) is None
    assert rmst(np.array([5, 1]), np.array([True, False]), 9.0).value == 5  # all had left


def test_kaplan_meier_by_hand():
    curve = kaplan_meier(np.array([1, 2, 3, 4]), np.array([True, False, True, False]))
    assert curve["survival"].tolist() == pytest.approx([1, 0.75, 0.75, 0.375, 0.375])
    assert curve["censored"].tolist() == [0, 0, 1, 0, 1]
    # Log-log band at t = 1: S ** exp(+-1.96 s), s = sqrt(1/12) / |ln .75|.
    s = np.sqrt(1 / 12) / abs(np.log(0.75))
    expected = sorted(0.75 ** np.exp(sign * 1.96 * s) for sign in (-1, 1))
    assert curve.loc[1, ["lower", "upper"]].tolist() == pytest.approx(expected, abs=1e-3)


def table_of(times: dict[str, list[float]], horizon: float) -> pd.DataFrame:
    rows = [
        {"arm": arm, "replicate": seed, "world": 0, "time": time, "event": time < horizon}
        for arm, members in times.items()
        for seed, time in enumerate(members)
    ]
    return pd.DataFrame(rows)


def test_paired_difference_uses_the_pairing():
    """Seeds differ widely, arms by exactly 10 within a seed: the paired error is zero."""
    first = [20.0, 35.0, 50.0, 65.0, 80.0]
    table = table_of({"defended": [t + 10 for t in first], "attacked": first}, 100.0)
    rng = np.random.default_rng(0)
    found = rmst_difference(table, "defended", "attacked", 95.0, rng, draws=200)
    assert (found.value, found.n) == (pytest.approx(10.0), 5)
    assert (found.error, found.low, found.high) == (0, None, None), "no interval of width 0"
    cut = table.assign(event=table["event"] & (table["time"] < 60))
    assert rmst_difference(cut, "defended", "attacked", 95.0, rng) is None
    with pytest.raises(ValueError, match="other"):
        rmst_difference(table, "other", "attacked", 95.0, rng)


def test_no_p_value_below_four_seeds():
    many = table_of({"a": [10.0, 12, 14, 16], "b": [30.0, 34, 36, 38]}, 100.0)
    assert log_rank(many, "a", "b") < 0.05
    few = many[many["replicate"] < 3]
    with pytest.raises(ValueError, match="at least 4"):
        log_rank(few, "a", "b")
    rng = np.random.default_rng(0)
    assert rmst_difference(few, "a", "b", 35.0, rng, draws=50).low is None


# Pictures and pages.


def drawn_text(ax) -> str:
    figure = ax.get_figure(root=True)
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


def test_cost_trace_shows_what_the_summary_says(arms):
    run = load_run(arms / "attacked-0")
    words = drawn_text(plot_cost_trace(run))
    for kind in ("naive", "confirmed"):
        assert f"{kind} exit: round {run.exit_round(kind)}" in words
    assert f"true crossing: round {run.exit_round('true')}" in words
    low, high = run.summary["bracket"]
    assert f"bracket ({low}, {high}]" in words
    assert "over 128 fresh harmful prompts" in words and "95% betting interval" in words
    assert "exit: round" not in drawn_text(plot_cost_trace(load_run(arms / "clean-0")))


def test_cost_trace_marks_what_is_used(arms, tmp_path):
    shutil.copytree(arms / "attacked-0", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["limits"] = {"harm": 0.25, "over_refusal": 0.5}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    ax = plot_cost_trace(load_run(tmp_path / "run"))
    assert "1/(α/2) = 40" in drawn_text(ax)
    (crossing,) = [line for line in ax.lines if line.get_label().startswith("true crossing")]
    assert crossing.get_ydata() == [0.25]
    assert "1/α = 20" in drawn_text(plot_cost_trace(load_run(arms / "attacked-0")))


def test_reward_is_replaced_by_utility_where_there_is_none(arms, tmp_path):
    assert "reward model" in plot_reward_vs_harm(load_run(arms / "clean-0")).get_xlabel()
    dpo = load_run(write_run(tmp_path / "dpo", learner="dpo", rounds=5))
    ax = plot_reward_vs_harm(dpo)
    assert ax.get_xlabel().startswith("utility")
    np.testing.assert_allclose(ax.lines[-1].get_xdata(), dpo.column("utility"))


def test_rho_draws_all_five(arms):
    words = drawn_text(plot_rho(load_run(arms / "attacked-0")))
    assert "25% of people" in words
    assert all(meaning in words for meaning in RHO.values())
    assert plot_rho(load_run(arms / "clean-0")).get_ylim()[0] == 0


def test_rho_weighs_by_labels_and_leaves_gaps(tmp_path):
    path = write_run(tmp_path / "run", rounds=3)
    rows = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    for row, labels, flips in zip(rows[1:], (30, 0, 10), (0.2, 0.0, 0.6), strict=True):
        row |= {"labels": labels, "feedback/rho_flips": flips}
    (path / "rounds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = plot_rho(load_run(path)).lines
    thin, thick = lines[2 * list(RHO).index("feedback/rho_flips") :][:2]
    np.testing.assert_allclose(thin.get_ydata(), [0.2, np.nan, 0.6])
    np.testing.assert_allclose(thick.get_ydata(), [0.2, 0.2, 0.3])


def test_every_arm_has_a_look_of_its_own():
    assert len({line_style(i) for i in range(100)}) == 100


def test_names_in_pictures_are_short():
    settings = " ".join(f"feedback.setting_{i}={i}" for i in range(8))
    short = short_names([f"clean {settings} lr={lr}" for lr in (0.1, 0.2)])
    assert list(short.values()) == ["lr=0.1", "lr=0.2"]
    assert short_names(["clean", "clean + freeze"])["clean + freeze"] == "clean + freeze"
    (alone,) = short_names([settings]).values()
    assert max(map(len, alone.split("\n"))) <= 36


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Nine arms that all stay inside."""
    root = tmp_path_factory.mktemp("many")
    for n in range(9):
        write_run(root / str(n), 0.05 * n, 0, np.inf, rounds=4)
    return load_runs([root])


@pytest.mark.parametrize("plot", [plot_arms, plot_survival])
def test_many_arms_are_listed_with_their_values(many, plot):
    ax = plot(many)
    entries = [text.get_text() for text in ax.get_legend().get_texts()]
    values = [float(entry.split()[0]) for entry in entries]
    assert len(entries) == 9 and values == sorted(values, reverse=True)
    if plot is plot_survival:
        curves = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
        assert values == [1.0] * 9 and min(min(c.get_ydata()) for c in curves) >= 0.97 - 1e-9


def test_of_too_many_arms_those_are_drawn_that_left_first(arms, monkeypatch):
    runs = load_runs([arms])
    monkeypatch.setattr(pictures_of_arms, "MOST_ARMS", 1)
    curve, *_ = [line for line in plot_survival(runs).lines if line.get_linewidth() == 2.2]
    assert min(curve.get_ydata()) == 0, "everybody left in the attacked arm"
    assert "2 arms that left later or stayed" in drawn_text(plot_survival(runs))
    (mean,) = [line for line in plot_arms(runs).lines if line.get_linewidth() > 2]
    assert mean.get_ydata()[-1] > 0.5
    assert "2 arms with less harm at the end" in drawn_text(plot_arms(runs))


def test_survival_picture_says_n_and_draws_no_band_for_few_seeds(arms, tmp_path):
    few = plot_survival(load_runs([arms]))
    assert "n = 2 per arm" in drawn_text(few) and "bands need 4 seeds" in drawn_text(few)
    assert not few.collections
    for seed in range(4):
        write_run(tmp_path / str(seed), 0.25, seed, 4.0 + 2 * seed, rounds=14)
    many = plot_survival(load_runs([tmp_path]), clock="labels")
    assert "bands: 95%" in drawn_text(many) and len(many.collections) == 1


def test_arms_picture_averages_the_seeds(arms):
    ax = plot_arms(load_runs([arms]))
    assert "n = 2 per arm" in drawn_text(ax)
    means = [line.get_ydata() for line in ax.lines if line.get_linewidth() > 2]
    pair = [load_run(arms / f"attacked-{s}").column("safety/harm") for s in range(2)]
    np.testing.assert_allclose(means[1], np.mean(pair, axis=0))


def test_an_arm_is_named_where_its_mean_ends(tmp_path):
    """Two of three were stopped at their exits: the survivor's end is not the arm's."""
    for seed in range(3):
        path = write_run(tmp_path / str(seed), 0.25, seed, np.inf if seed == 2 else 6.0)
        if seed < 2:
            lines = (path / "rounds.jsonl").read_text().splitlines()[: 9 + seed]
            (path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    runs = load_runs([tmp_path])
    ax = plot_arms(runs)
    last = np.mean([run.column("safety/harm").iloc[8] for run in runs])
    (label,) = (text for text in ax.texts if "harmful_asker" in text.get_text())
    assert label.xy[1] == pytest.approx(last, abs=0.02)
    assert ax.lines[3].get_xdata()[-1] == 8


def test_tables(arms):
    runs = load_runs([arms])
    assert run_table(runs)["outcome"].tolist() == ["safe"] * 2 + ["exited"] * 2 + ["safe"] * 2
    table = arm_table(runs).set_index("arm")
    confirmed = [load_run(arms / f"attacked-{s}").exit_round("confirmed") for s in range(2)]
    inside = table["rounds inside, of 20"]
    assert inside["clean"] == 20 and inside["harmful_asker ρ=0.25"] == np.mean(confirmed)
    assert table["standard error"].isna().all()
    assert (table["learning retained"] == 1).all()  # of the clean runs' gain, which all have
    assert table["holds"].tolist() == ["yes", "no", "yes"]


def test_nothing_is_said_of_learning_on_some_twins_or_little_gain(arms, tmp_path):
    shutil.copytree(arms, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "clean-1")
    table = arm_table(load_runs([tmp_path / "runs"]))
    assert table["learning retained"].isna().tolist() == [False, True, True]
    assert table["holds"].fillna("-").tolist() == ["yes", "no", "-"]
    page = write_report([tmp_path / "runs"], tmp_path / "report")[0].read_text()
    assert "no clean, undefended twin" in page
    file = tmp_path / "runs" / "clean-0" / "summary.json"
    # Two errors of a difference of means over 128 values in [0, 1]: 2 sqrt(2) .5 / sqrt(128).
    for gain, known in ((0.124, False), (0.126, True)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"help_gain": gain}))
        assert arm_table(load_runs([file.parent]))["holds"].notna().tolist() == [known]


def test_a_defended_arm_is_compared_with_its_undefended_one(arms, tmp_path):
    assert AGAINST not in arm_table(load_runs([arms]))  # two seeds are too few
    for seed in range(4):
        write_run(tmp_path / f"attacked-{seed}", 0.25, seed, 6.0)
        write_run(tmp_path / f"defended-{seed}", 0.25, seed, np.inf, ("refusal_loss",))
        write_run(tmp_path / f"alone-{seed}", 0.5, seed, np.inf, ("refusal_loss",))
    runs = load_runs([tmp_path])
    table = arm_table(runs)
    left = [run.exit_round("confirmed") for run in by_arm(runs)["harmful_asker ρ=0.25"]]
    assert table[AGAINST].isna().tolist() == [True, False, True]
    assert table[AGAINST][1].startswith(f"{20 - np.mean(left):+.1f} [+")
    assert table["log-rank p"][1] < 0.05
    assert table[EXCHANGE][1] == 2 / 16 and table[HOLM].isna().tolist() == [True, False, True]
    assert table["standard error"].isna().tolist() == [left.count(left[0]) == 4, True, True]
    for seed in range(4):  # a second comparison: the smaller p-value counts twice
        write_run(tmp_path / f"lisa-{seed}", 0.25, seed, 6.0 + 3 * seed, ("lisa",))
    table = arm_table(load_runs([tmp_path])).set_index("arm")
    p, adjusted = (table[name].dropna().to_numpy() for name in (EXCHANGE, HOLM))
    assert p.min() == 2 / 16 and adjusted.tolist() == [2 * p.min(), max(2 * p.min(), p.max())]


def test_no_error_is_told_of_arms_that_nobody_left(tmp_path):
    for seed in range(4):
        write_run(tmp_path / f"attacked-{seed}", 0.25, seed, np.inf)
        write_run(tmp_path / f"defended-{seed}", 0.25, seed, np.inf, ("refusal_loss",))
    table = arm_table(load_runs([tmp_path]))
    assert table["rounds inside, of 20"].tolist() == [20, 20]
    assert table["standard error"].isna().all() and table[AGAINST][1] == "+0.0"
    assert table[EXCHANGE][1] == 1


def diverge(path: Path, at: int) -> Path:
    """Make the run in ``path`` one that diverged in round ``at`` + 1."""
    lines = (path / "rounds.jsonl").read_text().splitlines()[: at + 1]
    (path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    unknown = dict.fromkeys(("help_gain", "help_end", "harm_end", "occupancy"))
    ends = {"outcome": "diverged", "exit_confirmed": None, "exit_true": None, "bracket": None}
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | ends | unknown))
    return path


def test_a_diverged_run_does_not_shorten_the_others(arms, tmp_path):
    shutil.copytree(arms, tmp_path / "runs")
    diverge(tmp_path / "runs" / "defended-1", 1)
    runs = load_runs([tmp_path / "runs"])
    table = arm_table(runs).set_index("arm")
    inside = table["rounds inside, of 20"]
    assert inside["clean"] == 20 and inside["harmful_asker ρ=0.25 + refusal_loss"] == 20
    assert table["holds"].tolist() == ["yes", "no", "no"]
    means = [line for line in plot_arms(runs).lines if line.get_linewidth() > 2]
    assert means[-1].get_xdata().tolist() == [0, 1]  # while both runs of the arm go on
    diverge(tmp_path / "runs" / "defended-0", 2)
    runs = load_runs([tmp_path / "runs"])
    assert arm_table(runs)["rounds inside, of 20"].isna().tolist() == [False, False, True]
    lines = plot_survival(runs).lines
    curves = [line.get_xdata() for line in lines if line.get_drawstyle() == "steps-post"]
    assert [max(curve) for curve in curves][::2] == [20, 2]
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    assert "restricted mean is missing where every run" in written[0].read_text()


def test_the_same_run_is_read_once(arms, tmp_path, capsys):
    shutil.copytree(arms, tmp_path / "again")
    (tmp_path / "again" / "clean-0" / "summary.json").unlink()
    runs = load_runs([tmp_path / "again", arms])
    assert len(runs) == 6 and all(run.summary for run in runs)
    said = capsys.readouterr().err
    assert said.startswith("left out: ") and "and 5 more (the same run as another)" in said
    assert said.count("\n") == 1
    quiet = {"attack": {"name": "always_flip", "rho": 0.0, "start": 3}}
    assert identity(config(rho=0)) == identity(config(rho=0.0) | quiet)  # it never acts
    assert identity(config()) != identity(config(seed=1))
    assert identity(config(), {"seed"}) == identity(config(seed=1), {"seed"})


def test_a_run_that_only_begins_is_left_out_of_its_folder(tmp_path, capsys):
    write_run(tmp_path / "a", rounds=3)
    begun = write_run(tmp_path / "b", rounds=3, seed=1)
    (begun / "rounds.jsonl").write_text('{"round": 0, "safe')
    assert [run.path.name for run in load_runs([tmp_path])] == ["a"]
    assert f"left out: {begun} (no round yet)" in capsys.readouterr().err
    for _ in range(2):  # half a row, and no file at all
        with pytest.raises(ValueError, match="has no complete round yet; allowed: "):
            load_runs([begun])
        (begun / "rounds.jsonl").unlink(missing_ok=True)


def test_report_of_one_run_lies_beside_it(tmp_path):
    path = write_run(tmp_path / "run")
    written = write_report([path])
    assert written[0] == path / "report.html"
    names = {p.relative_to(path).as_posix() for p in written}
    figures = {f"figures/{name}.png" for name in ("cost_trace", "reward_vs_harm", "rho")}
    tables = {"tables/runs.csv"} | {
        f"tables/{name}.parquet" for name in ("runs", "rounds", "summaries")
    }
    assert names == {"report.html"} | figures | tables
    page = written[0].read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 3 and "left the safe set" in page


def test_report_of_several_needs_a_place(arms, tmp_path):
    with pytest.raises(ValueError, match="out="):
        write_report([arms])
    written = write_report([arms], tmp_path / "report")
    assert {"arms.png", "survival.png"} <= {p.name for p in written}
    assert all(p.stat().st_size > 1000 for p in written if p.suffix == ".png")


def test_report_of_a_run_killed_after_its_first_line(tmp_path):
    path = write_run(tmp_path / "run", rounds=3)
    first = (path / "rounds.jsonl").read_text().splitlines()[0]
    (path / "rounds.jsonl").write_text(first + '\n{"round": 1')
    (path / "summary.json").unlink()
    assert "has not ended" in write_report([path])[0].read_text()
