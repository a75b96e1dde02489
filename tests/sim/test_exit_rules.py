"""``poisonloop exit-rules`` against an independent simulation of the same rules."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from envs.exit_rules import RULES
from sim.cli import main
from sim.exit_study import RISE, STEPS, TRUE_EXIT, bracket_rows, simulate

RUNS, THEIRS = 400, 1500
EARLY = {
    "mean": (0.77, 0.67, 0.40), "mean_twice": (0.15, 0.12, 0.01), "cp_each": (0.04, 0.04, 0.03),
    "cp_planned": (0, 0.001, 0.002), "e_first": (0, 0, 0), "e_mixture": (0, 0, 0),
    "e_sr": (0, 0, 0),
}  # fmt: skip
DELAY = {
    "mean": (3.6, 1.4, 0.5), "mean_twice": (9.5, 5.2, 4.0), "cp_each": (15, 7.5, 3.9),
    "cp_planned": (32, 15, 7.6), "e_first": (57, 49, 47), "e_mixture": (29, 17, 10),
    "e_sr": (24, 15, 8),
}  # fmt: skip
FALSE = {
    "mean": (0.80, 1), "mean_twice": (0.06, 1), "cp_each": (0.005, 0.74), "cp_planned": (0, 0.025),
    "e_first": (0, 0.008), "e_mixture": (0, 0.008), "e_sr": (0, 0.012),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int, str], dict[str, Any]]:
    return {(row["cell"], row["n"], row["rule"]): row for row in simulate(RUNS, seed=1)}


def agree(ours: float, theirs: float, error: float, rounding: float) -> bool:
    """Within three errors of the difference of the two simulations, and the rounding."""
    return abs(ours - theirs) <= 3 * error * np.sqrt(1 + RUNS / THEIRS) + rounding


def share_error(share: float) -> float:
    share = np.clip(share, 1 / RUNS, 1 - 1 / RUNS)
    return float(np.sqrt(share * (1 - share) / RUNS))


def exact(rule: str, n: int) -> tuple[float, float, float]:
    """Early share, delay and its spread, from the binomial chance of a call at each checkpoint."""
    k = np.arange(n + 1)
    calls = {
        "mean": k / n > 0.2,
        "cp_each": binom.sf(k - 1, n, 0.2) < 0.05,
        "cp_planned": binom.sf(k - 1, n, 0.2) < 0.05 / 40,
    }[rule]
    chance = (binom.pmf(k[None], n, RISE[:, None]) * calls).sum(1)
    first = chance * np.concatenate([[1], np.cumprod(1 - chance)[:-1]])
    late = STEPS >= 85
    weights, delay = first[late] / first[late].sum(), STEPS[late] - 85
    mean = float(weights @ delay)
    return float(first[~late].sum()), mean, float(np.sqrt(weights @ (delay - mean) ** 2))


@pytest.mark.parametrize("n", [16, 64, 256])
@pytest.mark.parametrize("rule", ["mean", "cp_each", "cp_planned"])
def test_rules_that_count_have_their_exact_delay(rows, rule, n):
    row, (early, delay, spread) = rows["rise", n, rule], exact(rule, n)
    assert abs(row["early"] - early) <= 4 * share_error(early)
    assert abs(row["delay"] - delay) <= 4 * spread / np.sqrt(row["dated"])
    # The other simulation, too, so that the curve is the one it was made on.
    assert abs(EARLY[rule][(16, 64, 256).index(n)] - early) <= 0.005 + 2 * share_error(early)


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_as_early_late_and_wrong_as_known(rows, rule):
    assert TRUE_EXIT == 85 and len(STEPS) == 40
    for n, early, delay in zip((16, 64, 256), EARLY[rule], DELAY[rule], strict=True):
        row = rows["rise", n, rule]
        assert agree(row["early"], early, share_error(early), 0.005)
        error = row["delay_se"]
        if rule == "mean":  # few and skewed: the sample's own error is too small
            error = exact(rule, n)[2] / np.sqrt(row["dated"])
        assert agree(row["delay"], delay, error, 0.5 if delay >= 8 else 0.05)
        assert row["unconfirmed"] == 0
        assert row["dated"] == round(RUNS * (1 - row["early"]))
    for cost, false in zip(("flat 0.12", "flat 0.195"), FALSE[rule], strict=True):
        assert agree(rows[cost, 64, rule]["false_exit"], false, share_error(false), 0.005)


def test_brackets_are_as_wide_as_known():
    """Clopper-Pearson: (45, 101], (57, 97] and (65, 93] for 64, 128 and 256 draws."""
    found = bracket_rows(RUNS, seed=1)
    exact = {row["n"]: row for row in found if row["bracket"] == "clopper_pearson"}
    for n, low, high in ((64, 45, 101), (128, 57, 97), (256, 65, 93)):
        assert agree(exact[n]["left"], low, exact[n]["left_se"], 0.5)
        assert agree(exact[n]["right"], high, exact[n]["right_se"], 0.5)
    for row in found:
        assert row["coverage"] >= 0.98
        assert row["width"] >= exact[row["n"]]["width"]


def test_command_prints_and_writes_the_same_tables_again(tmp_path: Path, capsys: Any) -> None:
    for name in ("first", "second"):
        assert main(["exit-rules", "--runs", "20", "--out", str(tmp_path / name)]) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "first/exit-rules.md").read_text()
    assert table in printed and all(rule.says in table for rule in RULES.values())
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    known = json.loads((tmp_path / "first/exit-rules.json").read_text())
    read = list(csv.DictReader((tmp_path / "first/exit-rules.csv").open()))
    assert [row["rule"] for row in read] == [row["rule"] for row in known["rows"]]
    assert len(read) == 5 * len(RULES) and len(known["brackets"]) == 6


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--runs", "1"], "runs"), (["--seed", "-1"], "seed"), (["--run", "5"], "--run")],
)
def test_bad_flags_are_named(words: list[str], named: str, capsys: Any) -> None:
    assert main(["exit-rules", *words]) == 2
    assert named in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    for out, reason in (("file", "is a file"), ("file/inside", "Not a directory")):
        assert main(["exit-rules", "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert "--out" in said and reason in said and "; allowed: " in said and "Errno" not in said


def test_the_example_of_the_documentation_runs():
    text = (Path(__file__).parents[2] / "docs/exits.md").read_text()
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?date.*?)```", text, re.S).group(1), names)
    means = np.linspace(0.1, 0.6, 40)
    assert (names["found"] >= np.flatnonzero(means > 0.25)[0]).all()
