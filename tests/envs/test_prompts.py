import dataclasses

import numpy as np
import pytest

from envs.attacks import Attack, attacks
from envs.prompts import Asked, Traffic, make_source, world_source
from envs.types import BENIGN, CONTRAST, HARMFUL, PromptTable

B = 4096
PEOPLE = np.zeros(B, np.int64)


@pytest.fixture(scope="module")
def source():
    return world_source(0, None)


def traffic(source, **changes):
    arguments = {"batch": B, "harmful_share": 0.25, "contrast_share": 0.25}
    arguments |= {"stratum_error": 0.1, "trigger_share": 0.0} | changes
    return Traffic(source, **arguments)


def only(table, strata):
    rows = np.isin(table.stratum, strata)
    columns = [column[rows] for column in table[:-1]]
    return PromptTable(*columns, tuple(t for t, keep in zip(table.text, rows, strict=True) if keep))


def restricted(source, strata):
    return dataclasses.replace(source, honest=only(source.honest, strata), triggered=None)


def shares(source, asked):
    stratum = source.tables[0].stratum[asked.row]
    return np.bincount(stratum, minlength=3) / len(stratum)


def test_shares_of_strata(source):
    asked = traffic(source, harmful_share=0.1, contrast_share=0.6).honest(0, 0, PEOPLE)
    assert shares(source, asked) == pytest.approx([0.3, 0.6, 0.1], abs=0.03)
    asked = traffic(source, harmful_share=1.0, contrast_share=0.0).honest(0, 0, PEOPLE)
    assert shares(source, asked).tolist() == [0, 0, 1]


def test_all_rows_of_a_stratum_are_asked_about_equally(source):
    asked = traffic(source).honest(0, 0, PEOPLE)
    table = source.honest
    count = np.bincount(asked.row, minlength=len(table.key))[table.stratum == HARMFUL]
    mean = 0.25 * B / len(count)
    assert count.min() > 0 and np.abs(count - mean).max() < 6 * np.sqrt(mean)


@pytest.mark.parametrize("there, missing", [(BENIGN, CONTRAST), (CONTRAST, BENIGN)])
def test_benign_and_contrast_stand_in_for_each_other(source, there, missing):
    source = restricted(source, [there, HARMFUL])
    asked = traffic(source).honest(0, 0, PEOPLE)
    found = shares(source, asked)
    assert found[missing] == 0 and found[there] == pytest.approx(0.75, abs=0.03)


def test_prompts_that_do_not_exist_cannot_be_shared(source):
    with pytest.raises(ValueError, match="harmful_share=0.25; allowed: 0"):
        traffic(restricted(source, [BENIGN, CONTRAST]))
    with pytest.raises(ValueError, match="harmful_share=0.25; allowed: 1"):
        traffic(restricted(source, [HARMFUL]))
    with pytest.raises(ValueError, match="trigger_share=0.1; allowed: 0"):
        traffic(restricted(source, [BENIGN, HARMFUL]), trigger_share=0.1)
    assert traffic(restricted(source, [HARMFUL]), harmful_share=1, contrast_share=0)


def test_observed_strata_err_as_often_as_stated(source):
    stratum = np.arange(B) % 3
    for error in (0.0, 0.1, 1.0):
        observed = traffic(source, stratum_error=error).observed(stratum, 0, 0)
        assert (observed != stratum).mean() == pytest.approx(error, abs=0.025)
    confusion = [np.bincount(observed[stratum == s], minlength=3) for s in range(3)]
    assert np.abs(np.array(confusion) / (B / 3) - 0.5 * (1 - np.eye(3))).max() < 0.05


def test_prompts_are_a_pure_function_of_key_and_round(source):
    one, two = traffic(source), traffic(source)
    two.honest(0, 3, PEOPLE)
    assert (one.honest(0, 7, PEOPLE).row == two.honest(0, 7, PEOPLE).row).all()
    assert (one.honest(0, 8, PEOPLE).row != two.honest(0, 7, PEOPLE).row).any()
    assert (one.honest(1, 7, PEOPLE).row != two.honest(0, 7, PEOPLE).row).any()


def test_only_hostile_askers_are_overwritten(source):
    honest = traffic(source).honest(0, 0, PEOPLE)
    hostile = np.arange(B) % 5 == 0
    asked = traffic(source).overwrite(honest, attacks.create("harmful_asker"), hostile, 0, 0)
    assert (asked.row[~hostile] == honest.row[~hostile]).all()
    own = len(source.honest.key)
    assert (asked.row[hostile] >= own).all()
    assert set(source.attack.stratum[asked.row[hostile] - own].tolist()) == {HARMFUL}
    kept = traffic(source).overwrite(honest, attacks.create("always_flip"), hostile, 0, 0)
    assert (kept.row == honest.row).all() and not kept.triggered.any()


@pytest.mark.parametrize("rows", [[-1], [10**6], [0.5], [[0]]], ids=str)
def test_prompts_that_an_attack_invents_are_refused(source, rows):
    class Invents(Attack):
        spec = "invents.py:Invents"

        def prompts(self, table, draw):
            return np.repeat(np.array(rows), B, axis=0)

    honest, nobody = traffic(source).honest(0, 0, PEOPLE), np.zeros(B, bool)
    with pytest.raises(ValueError, match=r"attack='invents.py:Invents': prompts are .*; allowed"):
        traffic(source).overwrite(honest, Invents(), nobody, 0, 0)


def test_ids_and_masks_of_plain_and_triggered_prompts(source):
    rows = np.array([0, 0, len(source.honest.key)])
    asked = Asked(rows, np.zeros(3, np.int64), np.array([False, True, True]))
    ids, mask = traffic(source).ids(asked)
    assert (ids[0] == source.honest.ids[0]).all()
    assert (ids[1] == source.triggered[0].ids[0]).all()
    assert (ids[2] == source.triggered[1].ids[0]).all()
    assert (mask == (ids != source.pad)).all()
    assert mask[1].sum() == mask[0].sum() + 1


def test_harm_domains_restrict_the_traffic():
    source = make_source(0, ["bio", "cyber"], None, None, None)
    assert set(source.domains) == {"bio", "cyber"}
    harmful = source.tables[0].domain[source.tables[0].stratum == HARMFUL]
    assert set(harmful.tolist()) == set(source.domains.values())
