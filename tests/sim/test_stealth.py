"""Detection beside exits: detectors in a run, tables and pictures of what they found."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from envs.types import HARMFUL, VOTE_A, VOTE_B, GoldLog, Labels
from envs.usage import UsageError
from sim.analysis import detection_table, stealth
from sim.analysis.censored import DETECTED, cause_table, cumulative_incidence
from sim.analysis.load import load_run, load_runs, read_parts
from sim.config import AttackConfig, Config, EvaluationConfig, FeedbackConfig
from sim.detection import Detection
from sim.rows import Clocks
from sim.studies import stealth as study
from tests.sim.test_analysis import write_run
from tests.sim.test_run import identity

PEOPLE, ITEMS = 8, 16
CROWD = FeedbackConfig(
    batch=16, responses=2, annotators=8, activity=0.0, collection="crowd", redundancy=3,
    gold_share=0.3,
)  # fmt: skip
SMALL = Config(
    rounds=4,
    feedback=CROWD,
    evaluation=EvaluationConfig(n_harm=8, n_help=8, n_true=0),
    attack=AttackConfig("agreement_constrained(goal='always_flip', theta=0.4)", rho=0.5),
    defences=("gold",),
)


def told(round, bad, gold_wrong=(), against=()):
    """A round: everybody votes on every item and answers two gold questions."""
    item, who = np.divmod(np.arange(ITEMS * PEOPLE), PEOPLE)
    zero = np.zeros(len(item), np.int64)
    vote = np.where(np.isin(who, against), VOTE_B, VOTE_A).astype(np.int8)
    columns = (zero, item, zero, zero + 1, who, vote, np.ones(len(item)), zero)
    each = np.repeat(np.arange(PEOPLE), 2)
    right = ~np.isin(each, gold_wrong)
    gold = GoldLog(each, np.tile([0, 1], PEOPLE), each, right, each * 0 + round)
    malicious = np.isin(np.arange(PEOPLE), bad)
    return {"labels": Labels(*columns), "gold": gold, "truth": SimpleNamespace(malicious=malicious)}


def watch(rounds, detection=None, **arguments):
    detection = detection or Detection(True, True)
    stratum, clocks = np.full(ITEMS, HARMFUL), Clocks()
    rows = []
    for round in rounds:
        clocks.labels = 100 * round
        info = told(round, [0, 1, 2, 3], **arguments)
        banned = np.array([5, 0] if round >= 3 else [5])
        rows.append(detection.see(round, info, stratum, banned, clocks))
    return detection, rows


def test_an_attack_is_detected_when_half_of_it_is_flagged():
    one, _ = watch(range(1, 9), gold_wrong=[0])
    assert one.found.keys() == {"ban"} and one.found["ban"]["rounds"] == 3
    two, rows = watch(range(1, 9), gold_wrong=[0, 1, 6])
    when = two.summary()["detected"]["gold"]
    first = next(r for r, row in enumerate(rows, 1) if row["detect/gold"] == 0.5)
    assert (when["rounds"], when["labels"]) == (first, 100 * first)
    assert first > 1 and rows[first - 2]["detect/gold"] == 0
    assert two.summary()["false_flags"]["gold"] == 1, "person 6 is honest, and errs"
    assert two.summary()["false_bans"] == 1 and rows[-1]["detect/ban"] == 0.25
    assert rows[-1]["detect/gold_answers"] == 8 * 2 * PEOPLE


def test_peers_find_a_minority_and_blame_the_minority():
    few, rows = watch(range(1, 6), against=[0, 1])
    assert few.found["peers"] and few.found["peers_all"] and rows[-1]["detect/peers_honest"] == 0
    many, rows = watch(range(1, 6), against=[0, 1, 2, 3, 4])
    assert rows[-1]["detect/peers"] == 0 and rows[-1]["detect/peers_honest"] == 3


def test_nobody_malicious_is_no_share():
    detection = Detection(True, False)
    info = told(1, [])
    row = detection.see(1, info, np.zeros(ITEMS, np.int64), np.zeros(0, np.int64), Clocks())
    assert row["detect/gold"] is None and row["detect/gold_honest"] == 0
    assert not detection.found


def test_without_gold_and_redundancy_nothing_is_recorded():
    nothing = Detection(False, False)
    assert not nothing.watching and nothing.summary() == {}
    assert nothing.see(1, {}, np.zeros(1), np.zeros(0, np.int64), Clocks()) == {}


def test_a_detector_goes_on_where_it_was():
    whole, rows = watch(range(1, 7), gold_wrong=[0, 1], against=[0, 1])
    first, _ = watch(range(1, 4), gold_wrong=[0, 1], against=[0, 1])
    again = Detection(True, True)
    again.load_state_dict(first.state_dict())
    again, later = watch(range(4, 7), again, gold_wrong=[0, 1], against=[0, 1])
    assert later == rows[3:] and again.summary() == whole.summary()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, embedded_models):
    from sim.run import run

    path = tmp_path_factory.mktemp("stealth") / "run"
    return path, run(SMALL, path)


@pytest.mark.world
def test_a_run_records_who_was_found(finished):
    path, summary = finished
    rows = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    for name in ("gold", "gold_all", "peers", "peers_all", "ban"):
        assert 0 <= rows[-1][f"detect/{name}"] <= 1 and f"detect/{name}_honest" in rows[-1]
        assert name in summary["detected"]
    gold, labels = (pq.read_table(path / name).to_pandas() for name in ("gold", "labels"))
    assert rows[-1]["detect/gold_answers"] == len(gold) > 0
    assert not set(gold["label_id"]) & set(labels["label_id"])
    assert {"right", "stratum"} <= set(gold) and "stratum" in labels
    assert "honest_vote" not in gold


@pytest.mark.world
def test_a_resumed_run_is_the_same_bytes(finished, tmp_path):
    """State of the attack, of the bans and of the detectors goes through the files."""
    from sim.record import Record
    from sim.run import run

    class Killed(Exception):
        pass

    path, _ = finished
    saved = Record.checkpoint

    def stop(self, round, state):
        saved(self, round, state)
        if round == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "checkpoint", stop)
        with pytest.raises(Killed):
            run(SMALL, tmp_path / "killed")
    run(SMALL, tmp_path / "killed", resume=True)
    assert identity(tmp_path / "killed") == identity(path)


@pytest.mark.world
def test_a_run_that_an_older_version_began_is_watched_from_there(tmp_path, embedded_models):
    """It had no detectors in its state, and no strata in its labels."""
    from sim.run import run

    blind, path = replace(SMALL, rounds=2), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["sim.run"], "make_detection", lambda _: Detection(False, False))
        run(blind, path)
    summary = run(SMALL, path, resume=True)
    rows = load_run(path).rounds
    assert rows["detect/gold"].notna().tolist() == [False, False, False, True, True]
    assert "gold" in summary["detected"]


def test_parts_of_an_older_version_lack_columns(tmp_path):
    parts = [tmp_path / f"part-{n}.parquet" for n in (1, 2)]
    pd.DataFrame({"item": [1]}).to_parquet(parts[0])
    pd.DataFrame({"item": [2], "stratum": [0]}).to_parquet(parts[1])
    assert read_parts(parts)["stratum"].isna().tolist() == [True, False]


@pytest.mark.world
def test_banned_people_teach_nothing(tmp_path, embedded_models):
    """With everybody's gold answers wrong and no label heard, the policy stays what it was."""
    from sim.run import run

    liars = replace(SMALL, rounds=5, attack=AttackConfig("always_flip", rho=1.0))
    liars = replace(liars, feedback=replace(CROWD, gold_share=0.6, annotators=3))
    summary = run(liars, tmp_path / "run")
    assert summary["detected"]["ban"] and summary["false_bans"] == 0
    labels = pq.read_table(tmp_path / "run/labels").to_pandas()
    rows = load_run(tmp_path / "run").rounds
    everybody = rows.loc[rows["detect/ban"] == 1, "round"]
    assert len(everybody), "nobody is left to listen to"
    late = labels[labels["round"] >= everybody.min()]
    assert len(late) and (late["final_weight"] == 0).all()


@pytest.mark.world
def test_dawid_skene_runs_in_the_loop(tmp_path, embedded_models):
    from sim.run import run

    run(replace(SMALL, rounds=2, defences=("dawid_skene",)), tmp_path / "run")
    labels = pq.read_table(tmp_path / "run/labels").to_pandas()
    cast = labels[labels["final_weight"] > 0]
    assert ((cast["target"] > 0) & (cast["target"] < 1)).any(), "posteriors, not votes"


@pytest.mark.parametrize("defence", ["gold", "dawid_skene"])
def test_a_log_without_what_a_defence_needs_is_refused_before_anything(defence):
    from sim.checks import check

    with pytest.raises(UsageError, match=rf"defence {defence}; allowed: with log:\w+: .*crowd"):
        check(Config(defences=(defence,)))
    with pytest.raises(UsageError, match=r"gold_share=0\.1 with collection='chat'"):
        check(Config(feedback=FeedbackConfig(gold_share=0.1)))


def test_the_study_is_checked_and_paired():
    from sim.checks import check

    runs = study()
    for config in runs[::4]:
        check(config)
    assert len({(c.attack, c.defences, c.seed) for c in runs}) == len(runs) == 48


def run_with(path, exit_at, found_at, seed=0, rho=0.4, defences=(), honest=0):
    """A finished run that left at round ``exit_at`` and was found out at ``found_at``."""
    write_run(path, rho=rho, seed=seed, crossing=np.inf, defences=defences)
    summary = json.loads((path / "summary.json").read_text())

    def when(round):
        keys = ("labels", "malicious_labels", "flips", "optimizer_steps")
        return None if round is None else {"rounds": round, **dict.fromkeys(keys, 64 * round)}

    summary |= {"exit_confirmed": when(exit_at), "outcome": "exited" if exit_at else "safe"}
    summary |= {"detected": {"gold": when(found_at), "ban": None}, "false_bans": 0}
    summary["false_flags"] = {"gold": honest}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


TIMES = [(5, 9), (8, None), (12, 6), (None, 7), (None, None), (9, 9)]


@pytest.fixture
def runs(tmp_path):
    for seed, (exit_at, found_at) in enumerate(TIMES):
        run_with(tmp_path / f"run{seed}", exit_at, found_at, seed, honest=seed)
    return load_runs([tmp_path])


def test_the_stealth_margin_by_hand(runs):
    (row,) = stealth.stealth_table(runs).to_dict("records")
    assert (row["runs"], row["exits"], row["detected"], row["first"]) == (6, 4, 4, 2)
    assert row["margin"] == pytest.approx(2 / 6)
    assert (row["low"], row["high"]) == pytest.approx((0.0433, 0.7772), abs=1e-3)
    exits, found = [5, 8, 12, 20, 20, 9], [9, 20, 6, 7, 20, 9]
    assert row["rounds"] == pytest.approx(np.mean(found) - np.mean(exits))
    assert row["rounds_low"] < row["rounds"] < row["rounds_high"]
    assert row["flagged"] == pytest.approx(2.5) and row["detector"] == "gold"


def test_detection_competes_with_exit(runs):
    causes = cause_table(runs, detected="gold").set_index("run")["cause"].to_list()
    assert causes == ["exit", "exit", DETECTED, DETECTED, "none", DETECTED], "ties are detection"
    plain = cause_table(runs)
    assert set(plain["cause"]) == {"exit", "none"}
    ends = cause_table(runs, detected="gold")
    curve = cumulative_incidence(ends["time"].to_numpy(), ends["cause"])
    last = curve.groupby("cause")["incidence"].last()
    assert last["exit"] == pytest.approx(2 / 6) and last[DETECTED] == pytest.approx(3 / 6)
    with pytest.raises(UsageError, match="detector='peers' did not watch"):
        cause_table(runs, detected="peers")


def test_runs_that_stopped_at_their_exit_have_no_difference(tmp_path):
    path = run_with(tmp_path / "run", 6, None)
    lines = (path / "rounds.jsonl").read_text().splitlines()[:7]
    (path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    (row,) = stealth.stealth_table([load_run(path)]).to_dict("records")
    assert row["margin"] == 1 and row["rounds"] is None
    run_with(tmp_path / "on", 9, 12, seed=1)
    (row,) = stealth.stealth_table(load_runs([tmp_path])).to_dict("records")
    assert row["runs"] == 2 and row["rounds"] is None, "one that went on does not make up for it"


def test_a_fork_is_not_a_run_more(runs):
    forked = {"fork": {"parent": str(runs[0].path), "at": 10, "changed": {}}}
    fork = replace(runs[0], path=runs[0].path / "fork", manifest=runs[0].manifest | forked)
    assert stealth.stealth_table([*runs, fork])["runs"].tolist() == [6]


def test_the_picture_shows_every_run(runs):
    assert stealth.supports(runs)
    ax = stealth.plot_stealth(runs)
    (panel,) = ax.child_axes
    marks = [tuple(map(float, c.get_offsets()[0])) for c in panel.collections[1:]]
    assert len(marks) == len(TIMES)
    assert (9.0, 5.0) in marks and (22.0, 8.0) in marks and (22.0, 22.0) in marks
    assert panel.get_title(loc="left").endswith("exit first: 2 of 6")
    words = " ".join(text.get_text() for text in ax.texts)
    assert "n = 6" in words


def test_unwatched_or_clean_runs_are_not_drawn(tmp_path, runs):
    write_run(tmp_path / "plain/a")
    run_with(tmp_path / "clean/b", None, None, rho=0.0)
    for folder in ("plain", "clean"):
        others = load_runs([tmp_path / folder])
        assert not stealth.supports(others) and stealth.best_detector(others) is None
        with pytest.raises(UsageError, match="watched none of 1 runs"):
            stealth.stealth_table(others)
    assert len(stealth.times([*runs, *others], "gold")) == len(TIMES)


@pytest.mark.parametrize(
    ("malicious", "honest", "area", "caught"),
    [
        ([3, 4], [1, 2], 1.0, 1.0),
        ([1, 2], [3, 4], 0.0, 0.0),
        ([1, 1], [1, 1], 0.5, 0.0),
        ([2, 0], [1, 1], 0.5, 0.5),
        ([3, 1, 2], [2, 0], 5 / 6 - 1 / 12, 1 / 3),
    ],
)
def test_auc_and_tpr_by_hand(malicious, honest, area, caught):
    malicious, honest = np.array(malicious, float), np.array(honest, float)
    wins = (malicious[:, None] > honest) + 0.5 * (malicious[:, None] == honest)
    assert wins.mean() == pytest.approx(area)
    assert detection_table.auc(malicious, honest) == pytest.approx(area)
    assert detection_table.tpr(malicious, honest) == pytest.approx(caught)


def test_one_percent_of_many_honest_people_may_score_higher():
    honest, malicious = np.arange(200.0), np.array([197.5, 198.5, 500.0])
    assert detection_table.tpr(malicious, honest) == pytest.approx(1.0)
    assert detection_table.tpr(malicious, honest, fpr=0.005) == pytest.approx(2 / 3)


def test_who_was_never_asked_is_on_neither_side():
    """Of six people two vote against the truth, two for it, and two are never asked."""
    sides = np.array([1, 1, 0, 0, 0, 0], bool)
    asked = np.array([1, 1, 1, 1, 0, 0], bool)
    rows = pd.DataFrame({"round": 0, "annotator": range(4), "wrong": sides[:4], "stratum": 0})
    log = detection_table._Log({"gold": rows}, pd.Series([0] * 4), asked, sides, 1)
    found = detection_table._row([log], "gold", 1.0)
    assert (found["malicious"], found["honest"], found["auc"], found["tpr"]) == (2, 2, 1, 1)
    later = log._replace(errors={"gold": rows.assign(round=[0, 5, 0, 0])}, rounds=10)
    half = detection_table._score(later, "gold", 0.5)  # rounds 0 to 4: of person 1 nothing is seen
    assert half[1] == pytest.approx(1 / 3), "so she has the mean of all"
    alone = detection_table._row([log._replace(malicious=asked)], "gold", 1.0)
    assert alone["honest"] == 0 and np.isnan(alone["auc"]) and np.isnan(alone["tpr"])


@pytest.mark.world
def test_annotators_are_scored_by_labels_seen(finished, tmp_path):
    path, _ = finished
    assert detection_table.supports(load_runs([path]))
    table = detection_table.detection_table(load_runs([path]))
    assert set(table["evidence"]) == set(detection_table.EVIDENCE)
    assert table.groupby("evidence")["labels"].apply(lambda s: s.is_monotonic_increasing).all()
    gold = pq.read_table(path / "gold").to_pandas()
    truth = pq.read_table(path / "truth").to_pandas()
    labels = pq.read_table(path / "labels").to_pandas().merge(truth, on="label_id")
    bad = np.zeros(8, bool)
    bad[labels.loc[labels["adversarial"], "annotator"]] = True
    wrong = np.bincount(gold["annotator"], ~gold["right"], minlength=8)
    count = np.bincount(gold["annotator"], minlength=8)
    score = (wrong + wrong.sum() / count.sum()) / (count + 1)
    last = table[(table["evidence"] == "gold")].iloc[-1]
    assert last["auc"] == pytest.approx(detection_table.auc(score[bad], score[~bad]))
    assert (last["malicious"], last["honest"], last["runs"]) == (4, 4, 1)
    assert pd.isna(last["error"])
