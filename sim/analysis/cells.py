"""Time inside by learner, defence, attack and rho: the cells of pictures over a design.

A cell holds the runs of one arm. Clean runs have no attack; they are the cell rho = 0 of every
attack on the same learner and defence, whatever number of rounds they were asked for. Forks have no
part, since their first rounds are their parent's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from envs.registry import brief
from sim.analysis.arm_names import base_name
from sim.analysis.load import Run, mean_of, named
from sim.analysis.paired import nested_rmst, nested_weights, with_interval
from sim.analysis.retained import clean_twins, learning_retained
from sim.analysis.survival import Estimate, exit_table, horizon_of
from sim.analysis.words import RHO
from sim.identity import leaves

CLEAN, BARE = "clean", "no defence"
"""What an attack and a defence are called where there is none."""
ASKED = "asked"
"""The share of malicious people that was asked for, beside the five that a run logs."""
MEASURES = ("inside", "occupancy")


def cells(
    runs: Iterable[Run], measure: str = "inside", clock: str = "rounds", seed: int = 0
) -> pd.DataFrame:
    """One row per cell, in the order of the runs; clean cells have the attack ``clean``.

    Args:
        runs: runs; those that have not ended and forks are left out.
        measure: ``inside``, the restricted mean time to the confirmed exit; or ``occupancy``, the
            share of time inside, unknown where a run ended before its last round: what it would
            have done after its exit was not seen.
        clock: of ``inside``, as in :func:`sim.analysis.survival.exit_table`.
        seed: of the bootstrap.

    Returns:
        Columns learner, defence, bare (what the cell without the defence is called), attack, rho,
        n, worlds, left (runs that exited), horizon (on the clock); value (share of the horizon, NaN
        where it is unknown), low, high (95 %, bootstrap over worlds, then runs; NaN below
        ``MIN_SEEDS`` runs, and of runs that are all alike); retained and gain (learning retained,
        mean help gained); and the shares ``asked`` and those of ``RHO``, the latter up to the exit,
        means over runs.
    """
    known = [run for run in runs if run.summary and not run.fork]
    twins = clean_twins(known)
    rows = []
    for learner in dict.fromkeys(run.learner for run in known):
        members = [run for run in known if run.learner == learner]
        exits = exit_table(members, clock).set_index("run")
        horizon = horizon_of(members, exits, clock)
        for labels, group in _groups(members).items():
            part = exits.loc[[str(run.path) for run in group]]
            rng = np.random.default_rng(seed)
            if measure == "occupancy":
                found = _occupancy(group, part, rng)
            else:
                found = nested_rmst(part.assign(time=part["time"] / horizon), 1.0, rng)
            rows.append(
                {
                    "learner": learner,
                    **dict(zip(("defence", "bare", "attack", "rho"), labels, strict=True)),
                    "n": len(group),
                    "worlds": part["world"].nunique(),
                    "left": int(part["event"].sum()),
                    "horizon": horizon,
                    **{name: getattr(found, name, None) for name in ("value", "low", "high")},
                    "retained": learning_retained(group, twins),
                    "gain": mean_of(group, "help_gain"),
                    ASKED: labels[3],
                    **dict(zip(RHO, _shares(group), strict=True)),
                }
            )
    table = pd.DataFrame(rows)
    return (
        table.astype(dict.fromkeys(("value", "low", "high", "retained", "gain"), float))
        if rows
        else table
    )


def _groups(runs: list[Run]) -> dict[tuple[str, str, str, float], list[Run]]:
    """Runs of one learner by defence, its bare name, attack and rho.

    Settings are named where they differ between the runs of one attack: those of another attack
    may be longer or measured more often without making another defence of it.
    """
    attacks: dict[str, list[Run]] = {}
    for run in runs:
        name = brief(str(run.config["attack"].get("name"))) if run.rho else CLEAN
        attacks.setdefault(name, []).append(run)
    groups: dict[tuple[str, str, str, float], list[Run]] = {}
    for attack, members in attacks.items():
        for run in named(members):
            words = run.arm.removeprefix(base_name(dict(leaves(run.config)))).split()
            schedule = [word for word in words if word.startswith("attack.")]
            rest = [word for word in words if not word.startswith("attack.")]
            defence = " + ".join(map(brief, run.config.get("defences", []))) or BARE
            under = " ".join([attack, *schedule])
            key = " ".join([defence, *rest]), " ".join([BARE, *rest]), under, run.rho
            groups.setdefault(key, []).append(run)
    return groups


def cell_table(runs: Iterable[Run]) -> pd.DataFrame:
    """The cells as a table to read and to compute with; empty where nobody was attacked."""
    table = cells(runs)
    if table.empty or not (table["rho"] > 0).any():
        return pd.DataFrame()
    words = {"rho": "ρ", "n": "runs", "left": "exits", "horizon": "rounds", "value": "time inside"}
    words |= {"retained": "learning retained", "gain": "help gain"}
    words |= {name: f"share {of}" for name, of in RHO.items()}
    shown = table.drop(columns=["bare", ASKED]).rename(columns=words)
    return shown.dropna(axis="columns", how="all")


def lines(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Cells of one learner by (defence, attack), ascending in rho, the clean cell first."""
    found = {}
    for (defence, attack), part in table.groupby(["defence", "attack"], sort=False):
        clean = table[(table["defence"] == defence) & (table["attack"] == CLEAN)]
        if attack != CLEAN:
            found[defence, attack] = pd.concat([clean, part.sort_values("rho")])
    return found


def _occupancy(runs: list[Run], part: pd.DataFrame, rng: np.random.Generator) -> Estimate | None:
    if any(run.ended_early or run.summary.get("occupancy") is None for run in runs):
        return None
    values = np.array([run.summary["occupancy"] for run in runs], float)
    weights = nested_weights(part["world"].to_numpy(), rng, 2000)
    return with_interval(values.mean(), weights @ values / weights.sum(1), values.size)


def _shares(runs: list[Run]) -> np.ndarray:
    """(5,) logged shares of ``RHO``: means over the labels up to the exit, then over runs."""
    found = np.full((len(runs), len(RHO)), np.nan)
    for k, run in enumerate(runs):
        exited = run.exit_round("confirmed")
        seen = (run.rounds["round"] <= (run.asked if exited is None else exited)).to_numpy()
        logged = run.rounds.reindex(columns=["labels", *RHO]).to_numpy(float)[seen]
        weights = np.where(np.isnan(logged), 0, np.nan_to_num(logged[:, :1]))[:, 1:]
        total = weights.sum(0)
        summed = (np.nan_to_num(logged[:, 1:]) * weights).sum(0)
        found[k] = np.where(total > 0, summed / np.maximum(total, 1), np.nan)
    known = ~np.isnan(found)
    sums = np.where(known, found, 0).sum(0)
    return np.where(known.any(0), sums / np.maximum(known.sum(0), 1), np.nan)
