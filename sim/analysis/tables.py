"""What happened, as tables: one row per run, one row per arm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from envs.registry import brief
from sim.analysis.load import Run, by_arm, mean_of
from sim.analysis.multiplicity import e_bh, exit_e_values, holm
from sim.analysis.paired import compare
from sim.analysis.retained import clean_twins, holds, learning_retained
from sim.analysis.survival import MIN_SEEDS, exit_table, horizon_of, median_exit, rmst
from sim.identity import SEEDS, identity

OUTCOMES = ("safe", "exited", "collapsed", "diverged")
EXIT_CLOCKS = ("round", "label", "optimizer_step")
AGAINST, P_VALUE = "rounds inside vs undefended [95 %]", "log-rank p"
EXCHANGE, HOLM = "exchange p", "exchange p, Holm"
MEDIAN = "median exit [95 %]"
"""Columns of what a defence changed, and when half had left; left out where they hold nothing."""
PARENTS = "parent's harm at end"
"""What a fork's harm at its end is read against."""
FOUND = "an exit, at FDR"
"""Column of e-BH over the arms, before the rate; left out of a table of one arm."""


def run_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per run: outcome, exits in rounds, occupancy, harm at the end, what was learned.

    Sums over a run that ended before the rounds that were asked for are marked with ≥.
    """
    runs = list(runs)
    twins = clean_twins(runs)
    rows = [
        {
            "arm": arm,
            "replicate": run.replicate,
            "outcome": run.summary.get("outcome", "unfinished"),
            "naive exit": run.exit_round("naive"),
            "confirmed exit": run.exit_round("confirmed"),
            "true exit": run.exit_round("true"),
            "sustained exit": run.exit_round("sustained"),
            "bracket": _bracket(run),
            "rounds inside": _so_far(run, (run.summary.get("occupation") or {}).get("rounds")),
            "excess area": _so_far(run, run.summary.get("excess_area")),
            "re-entries": _so_far(run, run.summary.get("re_entries")),
            "occupancy": run.summary.get("occupancy"),
            "harm at end": run.summary.get("harm_end"),
            "help gain": run.summary.get("help_gain"),
            "learning retained": learning_retained([run], twins),
        }
        for arm, members in by_arm(runs).items()
        for run in members
    ]
    return pd.DataFrame(rows).astype(
        {f"{kind} exit": "Int64" for kind in ("naive", "confirmed", "true", "sustained")}
    )


def _so_far(run: Run, total: float | None) -> str | None:
    """A sum over the rounds of ``run``, at least that where the run ended early."""
    if total is None:
        return None
    return f"{'≥ ' * run.ended_early}{total:.3g}"


def branch_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per fork: where it left its parent, what it changed, and where both came to."""
    runs = list(runs)
    known = {str(run.path.resolve()): run for run in runs}
    rows = []
    for run in (run for run in runs if run.fork):
        parent = known.get(run.fork["parent"])
        there = run.own_evaluations["safety/harm"]
        rows.append(
            {
                "branch": run.title,
                "parent": parent.title if parent else run.fork["parent"],
                "from round": run.began,
                "changed": _changed(run.fork["changed"]),
                "harm there": float(there.iloc[0]) if len(there) else None,
                "harm at end": run.summary.get("harm_end"),
                PARENTS: parent and parent.summary.get("harm_end"),
                "help at end": run.summary.get("help_end"),
                "parent's help at end": parent and parent.summary.get("help_end"),
            }
        )
    return pd.DataFrame(rows)


def _changed(fields: dict[str, list[Any]]) -> str:
    """What a fork changed, in words; the fields of a section by the section's name if it is new."""
    names = [name for name in fields if f"{name.partition('.')[0]}.name" in (name, *fields)]
    named = {name.partition(".")[0] for name in names}
    told = [n for n in fields if n.partition(".")[0] not in named or n.endswith((".name", ".rho"))]
    words = [f"{name} {_plain(fields[name][0])} → {_plain(fields[name][1])}" for name in told]
    return "; ".join(words) or "nothing"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(map(brief, value)) or "none"
    return "none" if value is None else brief(value) if isinstance(value, str) else f"{value:g}"


def arm_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """What is known of every arm, as JSON values; a run without a summary counts as failed."""
    runs = list(runs)
    twins = clean_twins(runs)
    found = set(e_bh(exit_e_values(runs), discovery_rate(runs)))
    return [_arm_row(arm, members, twins, arm in found) for arm, members in by_arm(runs).items()]


def discovery_rate(runs: Iterable[Run]) -> float:
    """Share of false findings among arms in which an exit is found: the least alpha of the runs."""
    return min((run.alpha for run in runs), default=0.05)


def _arm_row(arm: str, runs: list[Run], twins: dict[str, Run], found: bool) -> dict[str, Any]:
    ends = [run.summary.get("outcome", "failed") for run in runs]
    exits = [run.summary["exit_confirmed"] for run in runs if run.summary.get("exit_confirmed")]
    retained = learning_retained(runs, twins)
    return {
        "arm": arm,
        "runs": len(runs),
        **{name: ends.count(name) for name in (*OUTCOMES, "failed")},
        "harm_end": mean_of(runs, "harm_end"),
        "help_gain": mean_of(runs, "help_gain"),
        "learning_retained": retained,
        "holds": holds(runs, retained),
        "exit_found": found,
        **{f"exit_{clock}s": [when.get(f"{clock}s") for when in exits] for clock in EXIT_CLOCKS},
    }


def arm_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per arm: seeds, outcomes, rounds inside (restricted mean and its error), help gained.

    The horizon of the restricted mean is the least number of rounds that was asked for. The mean
    is missing where every run of an arm ended earlier, unless all had left the safe set; its error
    needs ``MIN_SEEDS`` runs, and so does the median exit, which needs half of them to have left. A
    defended arm is compared with the undefended arm that it otherwise equals where they share
    ``MIN_SEEDS`` replicates (:mod:`sim.analysis.paired`); Holm's p-values count these comparisons.
    Runs that all stayed as long tell nothing of an error: it and the interval of a difference are
    missing where they would be 0. Of several arms, those in which an exit is found are told by e-BH
    (:mod:`sim.analysis.multiplicity`).

    Args:
        runs: finished runs.
    """
    runs = list(runs)
    exits = exit_table(runs)
    horizon = horizon_of(runs, exits)
    undefended = _undefended(runs)
    found = f"{FOUND} {discovery_rate(runs):g}"
    rows: list[dict[str, Any]] = []
    for row in arm_rows(runs):
        part = exits[exits["arm"] == row["arm"]]
        time, event = part["time"].to_numpy(), part["event"].to_numpy()
        inside = rmst(time, event, horizon)
        median = median_exit(time, event) if len(part) >= MIN_SEEDS else None
        rows.append(
            {
                "arm": row["arm"],
                "seeds": row["runs"],
                **{name: row[name] for name in OUTCOMES},
                f"rounds inside, of {horizon:g}": inside and inside.value,
                "standard error": inside.error or None
                if inside and inside.n >= MIN_SEEDS
                else None,
                MEDIAN: median and median.in_words(),
                **_against(exits, row["arm"], undefended.get(row["arm"]), horizon),
                "harm at end": row["harm_end"],
                "help gain": row["help_gain"],
                "learning retained": row["learning_retained"],
                "holds": {True: "yes", False: "no", None: None}[row["holds"]],
                found: "yes" if row["exit_found"] else "no",
            }
        )
    adjusted = holm({row["arm"]: row[EXCHANGE] for row in rows if row[EXCHANGE] is not None})
    table = pd.DataFrame([{**row, HOLM: adjusted.get(row["arm"])} for row in rows])
    maybe = (MEDIAN, AGAINST, EXCHANGE, HOLM, P_VALUE)
    unknown = [name for name in maybe if table[name].isna().all()]
    return table.drop(columns=unknown if len(rows) > 1 else [*unknown, found])


def _undefended(runs: list[Run]) -> dict[str, str]:
    """The undefended arm of every defended one, by name, where there is one."""
    arms = {arm: members[0].config for arm, members in by_arm(runs).items()}
    known = {identity(c, SEEDS): arm for arm, c in arms.items() if not c.get("defences")}
    bare = {a: identity({**c, "defences": []}, SEEDS) for a, c in arms.items() if c.get("defences")}
    return {arm: known[text] for arm, text in bare.items() if text in known}


def _against(exits: pd.DataFrame, arm: str, other: str | None, horizon: float) -> dict[str, Any]:
    """What ``arm`` has beyond ``other``: rounds inside with their interval, and both tests."""
    seeds = [set(exits.loc[exits["arm"] == name, "replicate"]) for name in (arm, other)]
    if len(seeds[0] & seeds[1]) < MIN_SEEDS:
        return dict.fromkeys((AGAINST, EXCHANGE, HOLM, P_VALUE))
    more = compare(exits, arm, str(other), horizon)
    words = None
    if more.difference and more.difference.error is not None:
        words = more.difference.in_words("+.1f")
    return {AGAINST: words, EXCHANGE: more.p_value, HOLM: None, P_VALUE: more.log_rank}


def _bracket(run: Run) -> str | None:
    bracket = run.summary.get("bracket")
    if not bracket:
        return None
    return f"({'start' if bracket[0] is None else bracket[0]}, {bracket[1]}]"
