"""Which recorded comparisons a report holds."""

from sim.analysis import samples
from sim.analysis.load import load_runs
from tests.sim.test_analysis import write_run


def test_many_samples_are_thinned_evenly(tmp_path, monkeypatch):
    for seed in range(6):
        write_run(tmp_path / str(seed), seed=seed)
    loaded = load_runs([tmp_path])
    whole = samples.collect(loaded, True)
    assert samples.told(whole) == "960 recorded comparisons from 120 rounds."
    monkeypatch.setattr(samples, "MOST", 6 * 8 * 5)
    some = samples.collect(loaded, True)
    assert set(some.rows["round"]) == {1, 5, 9, 13, 17} and len(some.rows) == 6 * 8 * 5
    assert "90 of 120 recorded rounds are left out" in samples.told(some)
    monkeypatch.setattr(samples, "MOST", 6 * 3)
    assert len(samples.collect(loaded, True).rows) == 6 * 3
    monkeypatch.setattr(samples, "MOST_TEXT", 6)
    assert len(samples.collect(loaded, True).rows) == 6
