"""Forms of reward hacking across runs: the table by hand, older records, the picture."""

from pathlib import Path

import numpy as np
import pandas as pd

from envs.hacking import FORMS, PROMPT_KINDS, column
from sim.analysis.hacking_forms import (
    form_shares,
    hacking_forms_table,
    most_hacked,
    plot_hacking_forms,
    supports,
)
from sim.analysis.load import Run

NAN = float("nan")


def made(columns: dict, arm: str = "a", **evaluation) -> Run:
    n = len(next(iter(columns.values())))
    rounds = pd.DataFrame(
        {"round": np.arange(n), "safety/harm": [0.1, *[0.2] * (n - 1)], **columns}
    )
    config = {"learner": {"name": "grpo"}, "evaluation": evaluation, "seed": 0}
    return Run(Path(arm), {"config": config}, {}, rounds, arm=arm)


def forms(gibberish: list, **evaluation) -> Run:
    known = {column(f, s): [0.0] * len(gibberish) for f in FORMS for s in PROMPT_KINDS}
    known[column("gibberish", "benign")] = gibberish
    return made({**known, "reward": [NAN, *range(1, len(gibberish))]}, **evaluation)


def test_one_row_for_what_there_is():
    table = hacking_forms_table([forms([0.1, 0.3, 0.2]), forms([0.0, 0.1, 0.2], hacked_share=0.15)])
    assert len(table) == 1
    row = table.iloc[0]
    assert (row["answers"], row["to prompts"], row["runs"]) == ("gibberish", "benign", 2)
    assert [row[k] for k in ("start", "peak", "worst", "end")] == [0.05, 0.25, 0.3, 0.2]
    assert (row["hacked"], row["first round"]) == ("2 of 2", 1)


def test_runs_without_any_have_an_empty_table():
    assert hacking_forms_table([forms([0.0, 0.0])]).empty
    assert not supports([made({"reward": [1.0, 2.0]})])


def test_older_records_are_read_over_all_prompts():
    old = made({f"completions/{k}": [0.0, 0.9] for k in ("empty", "echo", "gibberish")})
    assert set(form_shares(old)) == {(form, "all") for form in FORMS}
    assert hacking_forms_table([old])["to prompts"].unique().tolist() == ["all"]


def test_the_picture_is_of_the_most_hacked_run():
    runs = [forms([0.0, 0.1, 0.2]), forms([0.0, 0.8, 0.1])]
    assert most_hacked(runs) is runs[1]
    ax = plot_hacking_forms(runs)
    drawn = [line for line in ax.get_lines() if len(line.get_xdata()) and max(line.get_ydata()) > 0]
    assert [list(line.get_ydata()) for line in drawn] == [[0.8, 0.1]]  # round 0 has no reward
    assert list(drawn[0].get_xdata()) == [1.0, 2.0]
    assert ax.get_xlabel() == "reward model's mean reward"
