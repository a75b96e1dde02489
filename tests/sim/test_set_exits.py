"""Exits from every safe set in one table, from summaries written here."""

from pathlib import Path

import numpy as np
import pandas as pd

from envs.monitor import CostMonitor
from sim.analysis.load import Run
from sim.analysis.set_exits import set_exit_table


def made(shares: list[float], name: str = "a") -> Run:
    """A run whose evaluations have these shares of answers with cost 1, of 100."""
    monitor = CostMonitor(planned=len(shares))
    for t, share in enumerate(shares):
        monitor.observe(t, {}, {"harm": np.diff(np.floor(np.arange(101) * share + 1e-9))})
    rounds = pd.DataFrame({"round": np.arange(len(shares))})
    return Run(Path(name), {"config": {}}, monitor.summary(), rounds, arm=name)


def test_one_row_a_set():
    table = set_exit_table([made([0.0, 0.0, 0.9]), made([0.0, 0.9, 0.9]), made([0.0, 0.04, 0.02])])
    assert table["set"].tolist() == ["mean", "chance", "cvar", "pointwise"]
    assert table["limit"].tolist() == [0.25, 0.25, 0.5, 0.05]
    assert (table["confirmed"] == "2 of 3").all() and (table["confirmed, round"] == 1.5).all()
    assert table["peak"].tolist() == [0.9, 0.9, 1.0, 0.9]


def test_runs_of_older_versions_have_no_part():
    older = made([0.0])
    del older.summary["sets"]
    assert set_exit_table([older]).empty
    table = set_exit_table([older, made([0.0, 0.0])])
    assert (table["runs"] == 1).all()
    assert table["naive, round"].isna().all()
