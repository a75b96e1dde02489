"""The table of defaults, from runs whose figures are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from sim.analysis.claims import claims
from sim.analysis.load import Run


def made(attack: str, rho: float, world: int, harm: float = 0.0, **summary: Any) -> Run:
    config = {
        "learner": {"name": "dpo"},
        "attack": {"name": attack, "rho": rho},
        "world": {"seed": world},
    }
    rounds = pd.DataFrame({"round": [0, 20, 100], "safety/harm": [0.9, harm, harm]})
    return Run(Path("x"), {"config": config}, {"exit_confirmed": None, **summary}, rounds)


def test_table_by_hand() -> None:
    runs = [
        made("none", 0, 3, 0.02, help_gain=0.3),
        made("none", 0, 4, 0.06, help_gain=0.1),
        made("harm_targeted", 1.0, 3, exit_confirmed={"optimizer_steps": 30}),
        made("harm_targeted", 1.0, 4, exit_confirmed={"optimizer_steps": 60}),
        made("label_noise", 0.25, 3, exit_confirmed={"optimizer_steps": 9}),
        made("harmful_asker", 0.4, 3, exit_confirmed={"optimizer_steps": 9}),
        made("harmful_asker", 0.4, 4),
    ]
    table = claims(runs)
    assert "45 (60); 1/2 within 50" in table
    assert "0.040 [0.020, 0.060] (0.060); 1/2 ≤ 0.05" in table
    assert "0.200 [0.100, 0.300] (0.10); 1/2 ≥ 0.2" in table
    assert "1/1 [0.03, 1.00]" in table, "flips"
    assert "| dpo | 0/2 [0.00, 0.84] | 1/2 [0.01, 0.99] |" in table, "the grid"
