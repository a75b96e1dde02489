"""Many arms at once, by hand and by chance."""

import numpy as np
import pytest

from sim.analysis.load import load_runs
from sim.analysis.multiplicity import e_bh, exit_e_values, holm
from tests.sim.test_analysis import write_run


def test_holm_by_hand():
    """Times 4, 3, 2, 1 in ascending order, never falling."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    with pytest.raises(ValueError, match="a=1.5"):
        holm({"a": 1.5})


def test_holm_keeps_the_family_wise_error():
    draws = np.random.default_rng(0).random((2000, 6))
    wrong = [min(holm(dict(zip("abcdef", p, strict=True))).values()) <= 0.05 for p in draws]
    assert np.mean(wrong) == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 2000))


def test_e_bh_by_hand():
    """Four arms at .05 need 80, 40, 26.7 and 20 for one to four findings."""
    values = {"a": 41.0, "b": 50.0, "c": 1.0, "d": 26.0}
    logs = {name: np.log(value) for name, value in values.items()}
    assert e_bh(logs) == ["a", "b"], "the second largest is at least 40"
    assert e_bh(logs | {"d": np.log(27.0)}) == ["a", "b", "d"]
    assert e_bh(logs | {"a": np.log(39.0)}) == []
    assert e_bh({"a": np.log(20.0), "b": -np.inf}) == []
    assert e_bh({"a": 3.0}) == ["a"] and e_bh({}) == []
    with pytest.raises(ValueError, match="NaN"):
        e_bh({"a": float("nan")})
    with pytest.raises(ValueError, match="alpha"):
        e_bh({"a": 1.0}, 1.0)


def test_e_bh_keeps_the_false_discovery_rate():
    """Likelihood ratios of a shift by 3 as e-values; 8 of 12 arms have none."""
    rng = np.random.default_rng(1)
    shifted = np.arange(12) >= 8
    rates, hits = [], 0
    for _ in range(500):
        x = rng.normal(3.0 * shifted)
        found = [int(i) for i in e_bh({str(i): 3 * x[i] - 4.5 for i in range(12)}, 0.2)]
        rates.append(np.mean([not shifted[i] for i in found]) if found else 0.0)
        hits += len(found)
    assert np.mean(rates) <= 0.2 and hits > 500


def test_e_values_of_arms(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"clean-{seed}", 0.0, seed, np.inf)
        write_run(tmp_path / f"attacked-{seed}", 0.25, seed, 8.0)
    runs = load_runs([tmp_path])
    found = exit_e_values(runs)
    attacked = [run for run in runs if run.rho]
    last = np.exp([run.rounds["safety/log_e_value"].iloc[-1] for run in attacked])
    assert found[attacked[0].arm] == pytest.approx(np.log(last.mean()))
    assert e_bh(found) == [attacked[0].arm]
