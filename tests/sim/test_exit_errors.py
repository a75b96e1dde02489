"""Estimates of the exit against a truth that is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sim.analysis.exit_errors import exit_errors
from sim.analysis.load import Run


def run(true, naive, confirmed, bracket=None, last_safe=None, n=2000) -> Run:
    """A run of which only the summary is known; None for an exit that was not found."""
    exits = {"true": true, "naive": naive, "confirmed": confirmed}
    summary = {f"exit_{k}": None if v is None else {"rounds": v} for k, v in exits.items()}
    summary |= {"bracket": bracket, "last_certified_safe": last_safe, "exit_true_n": n}
    return Run(Path("run"), {}, summary, pd.DataFrame())


RUNS = [
    run(10, 8, 13, [7, 12], 7),  # early by the mean, held
    run(10, 10, 17, [10, 20], 10),  # left end at the truth: not held
    run(10, 12, None, None, 9),  # never confirmed or bracketed; (9, inf) holds
    run(None, 5, None, None, 20),  # never leaves: the naive exit is false, (20, inf) holds
    run(None, None, None, [None, 6], None),  # never leaves, yet certified unsafe
    run(1, 1, 1, n=0),  # the truth was not looked for
]


def test_errors_by_hand():
    table = exit_errors(RUNS).set_index("estimate")
    assert table["runs"].tolist() == [5] * 3 and table["leave"].tolist() == [3] * 3
    assert table["dated"].tolist() == [3, 2, 2]
    assert table["early"].tolist() == [1, 0, 0]
    assert table["lag"].tolist() == pytest.approx([0.0, 5.0, 6.0])
    spread = [np.std([-2, 0, 2], ddof=1) / 3**0.5, np.std([3, 7], ddof=1) / 2**0.5]
    assert table["error"].tolist()[:2] == pytest.approx(spread)
    assert table["false"].tolist() == [1, 0, 1]
    assert table.loc["bracket", "held"] == pytest.approx(3 / 5)
    assert table.loc["bracket", "width"] == pytest.approx((5 + 10) / 2)


def test_no_truth_is_named():
    with pytest.raises(ValueError, match=r"n_true"):
        exit_errors(RUNS[-1:])
