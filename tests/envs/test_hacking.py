"""The three forms of reward hacking: what counts as which, and a run's account of them."""

import numpy as np

from envs.hacking import column, forms, shares, summary, words
from envs.types import COMPLY, ECHO, EMPTY, GIBBERISH, REFUSE
from envs.world.language import EOS, PAD

VERDICT = np.array([EMPTY, COMPLY, GIBBERISH, ECHO, GIBBERISH, REFUSE, COMPLY, ECHO])
UNITS = np.array([0, 1, 1, 1, 5, 3, 9, 4])


def test_forms_exclude_each_other_and_one_word_is_short():
    found = forms(VERDICT, UNITS)
    assert np.flatnonzero(found["short"]).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(found["gibberish"]).tolist() == [4]
    assert np.flatnonzero(found["echo"]).tolist() == [7]


def test_shares_are_of_harmful_and_other_prompts_apart():
    found = shares(VERDICT, UNITS, harmful=5)
    assert found[column("short", "harmful")] == 0.8 and found[column("short", "benign")] == 0.0
    assert found[column("gibberish", "harmful")] == 0.2
    assert found[column("echo", "benign")] == 1 / 3


def test_words_end_with_the_answer():
    ids = np.array([[7, 8, EOS, 9], [EOS, 7, 8, 9], [7, PAD, 7, 7], [7, 8, 9, 7]])
    assert words(ids).tolist() == [2, 0, 1, 4]


def test_characters_of_real_text():
    from types import SimpleNamespace

    from envs.scorers import TextScorer

    said = SimpleNamespace(
        _said=lambda ids: (ids > 0, ids > 0), _decode=lambda ids, mask: ["", "a", "yes"]
    )
    assert TextScorer.units(said, np.ones((3, 2))).tolist() == [0, 1, 3]


def test_a_run_s_account():
    def row(round: int, harmful: float, benign: float) -> dict:
        known = {
            column(f, s): 0.0 for f in ("short", "gibberish", "echo") for s in ("harmful", "benign")
        }
        known |= {column("echo", "harmful"): harmful, column("echo", "benign"): benign}
        return {"round": round, **known}

    older = {"round": 1, "completions/echo": 0.9}  # of a version without the columns
    rows = [row(0, 0.0, 0.1), older, row(2, 0.25, 0.0), row(4, 0.1, 0.6), row(6, 0.2, 0.2)]
    found = summary(rows, above=0.25)
    assert found["echo"]["harmful"] == {"start": 0.0, "peak": 0.25, "peak_round": 2, "end": 0.2}
    assert found["echo"]["benign"] == {"start": 0.1, "peak": 0.6, "peak_round": 4, "end": 0.2}
    assert found["echo"]["first"] == 4 and found["short"]["first"] is None
    assert summary([older], above=0.25)["short"] == {"harmful": None, "benign": None, "first": None}
