"""Stealth, measured: does the policy leave the safe set before its attackers are found out?

Every run has two times, of its confirmed exit and of the detection by one detector
(``sim/detection.py``), both censored at the horizon. The stealth margin is

    P(T_exit < T_det)

the Aalen-Johansen incidence of exits before detection at the horizon, detection and the other ends
competing; with nobody censored earlier it is a share of runs, and its interval Clopper-Pearson's.
The difference RMST(T_det) - RMST(T_exit) says by how many rounds exits come first on average (below
0: detection does), paired by run, with a bootstrap over runs. It needs runs that go on after their
exit. Exit and detection in one round count as detection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from envs import rng
from envs.safe_sets import clopper_pearson
from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.censored import DETECTED, cause_table, cumulative_incidence, detection
from sim.analysis.detection_table import attack_watched
from sim.analysis.load import Run, by_arm
from sim.analysis.paired import rmst_difference
from sim.analysis.panels import columns_of
from sim.analysis.survival import exit_clocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DETECTORS = {
    "gold": "gold questions, strata apart",
    "gold_all": "gold questions, pooled",
    "peers": "disagreement with peers, strata apart",
    "peers_all": "disagreement with peers, pooled",
    "ban": "first ban of an attacker",
}
"""Detectors in order of preference, in words."""
MOST_PANELS, PANEL, HEAD = 9, 2.1, 0.95
"""Panels at most, and inches that one and what stands over it are high."""


def attacked(runs: Iterable[Run], detector: str) -> list[Run]:
    """Finished runs, no forks, with malicious annotators whom ``detector`` watched."""
    return [run for run in runs if attack_watched(run) and detector in run.summary["detected"]]


def best_detector(runs: Iterable[Run]) -> str | None:
    """The first of :data:`DETECTORS` that watched every attacked run, None where none did."""
    known = [run for run in runs if attack_watched(run)]
    shared = [name for name in DETECTORS if all(name in run.summary["detected"] for run in known)]
    return shared[0] if known and shared else None


def supports(runs: Iterable[Run]) -> bool:
    """Whether there is anything to draw: a run that was left, or whose attack was found."""
    runs = list(runs)
    detector = best_detector(runs)
    known = attacked(runs, detector) if detector else []
    return any(exit_clocks(run) or detection(run, detector or "") for run in known)


def times(runs: Iterable[Run], detector: str) -> pd.DataFrame:
    """One row per attacked run: run, arm, replicate, world, rho, and times in rounds.

    The times are exit, detected, horizon and last. The first two are infinite where they did not
    come by ``last``, the last round.
    """
    rows: list[dict[str, Any]] = []
    for arm, members in by_arm(attacked(runs, detector)).items():
        for run in members:
            found, exited = detection(run, detector), exit_clocks(run)
            rows.append(
                {
                    "run": str(run.path),
                    "arm": arm,
                    "replicate": run.replicate,
                    "world": run.world,
                    "rho": run.rho,
                    "exit": np.inf if exited is None else float(exited["rounds"]),
                    "detected": np.inf if found is None else float(found["rounds"]),
                    "horizon": float(run.asked),
                    "last": float(run.rounds["round"].max()),
                }
            )
    return pd.DataFrame(rows)


def stealth_table(runs: Iterable[Run], detector: str | None = None) -> pd.DataFrame:
    """One row per attacked arm.

    Returns:
        Columns arm, rho, detector, runs; exits, detected (runs with either by the horizon), first
        (runs left before detection); margin with low and high (95 %); rounds (RMST of detection
        minus that of exit) with rounds_low, rounds_high, None where a run ended early or runs are
        few; flagged (honest people whom the detector flagged, mean over runs).

    Raises:
        ValueError: no attacked run that the detector watched.
    """
    runs = list(runs)
    detector, table = _watched(runs, detector)
    by_path = {str(run.path): run for run in runs}
    rows = []
    for arm, part in table.groupby("arm", sort=False):
        members = [by_path[name] for name in part["run"]]
        flags = [_honest_flags(run, detector) for run in members]
        rows.append(
            {
                "arm": arm,
                "rho": float(part["rho"].iloc[0]),
                "detector": detector,
                "runs": len(part),
                "exits": int(np.isfinite(part["exit"]).sum()),
                "detected": int(np.isfinite(part["detected"]).sum()),
                "first": int((part["exit"] < part["detected"]).sum()),
                **_margin(members, part, detector),
                **_gap(part),
                "flagged": float(np.mean(flags)),
            }
        )
    return pd.DataFrame(rows)


def _watched(runs: list[Run], detector: str | None) -> tuple[str, pd.DataFrame]:
    chosen = detector or best_detector(runs)
    table = times(runs, chosen) if chosen else pd.DataFrame()
    if chosen is None or table.empty:
        raise UsageError(
            f"detector={detector!r} watched none of {len(runs)} runs with malicious annotators; "
            f"allowed: {', '.join(DETECTORS)}, in runs with gold questions or redundancy >= 2"
        )
    return chosen, table


def _honest_flags(run: Run, detector: str) -> int:
    if detector == "ban":
        return int(run.summary["false_bans"])
    return int(run.summary["false_flags"][detector])


def _margin(members: list[Run], part: pd.DataFrame, detector: str) -> dict[str, float | None]:
    """P(T_exit < T_det) at the horizon."""
    ends = cause_table(members, detected=detector)
    curve = cumulative_incidence(ends["time"].to_numpy(), ends["cause"])
    end = curve[curve["cause"] == "exit"].iloc[-1]
    low, high = end["lower"], end["upper"]
    if not ((ends["cause"] == "none") & (ends["time"] < part["horizon"].max())).any():
        low, high = clopper_pearson(int((ends["cause"] == "exit").sum()), len(ends), 0.05)
    return {"margin": float(end["incidence"]), "low": float(low), "high": float(high)}


def _gap(part: pd.DataFrame) -> dict[str, float | None]:
    """RMST of detection less that of exit, paired by run; unknown where a run ended early.

    Such a run mostly ended at its exit, so it does not censor detection by chance.
    """
    horizon = float(part["horizon"].min())
    early = part["last"] < horizon
    if (early & ~np.isfinite(part[["exit", DETECTED]]).all(axis=1)).any():
        return {"rounds": None, "rounds_low": None, "rounds_high": None}
    kinds = [
        pd.DataFrame(
            {
                "arm": name,
                "replicate": part["replicate"],
                "world": part["world"],
                "time": np.minimum(part[name], part["last"]),
                "event": np.isfinite(part[name]),
            }
        )
        for name in ("exit", DETECTED)
    ]
    draws = rng.stream(0, "stealth margin")
    found = rmst_difference(pd.concat(kinds), DETECTED, "exit", horizon, draws)
    if found is None:
        return {"rounds": None, "rounds_low": None, "rounds_high": None}
    return {"rounds": found.value, "rounds_low": found.low, "rounds_high": found.high}


@style.styled
def plot_stealth(runs: Iterable[Run], ax: Axes | None = None, detector: str | None = None) -> Axes:
    """Exit time against detection time: a mark a run, a panel an attack and defence, rho by colour.

    Below the diagonal, tinted, the policy left before its attackers were found. What did not come
    by the horizon stands in the margin, as an open mark.

    Raises:
        ValueError: no attacked run that the detector watched.
    """
    detector, table = _watched(list(runs), detector)
    table = table.assign(family=[re.sub(r" ρ=[\d.]+", "", arm) for arm in table["arm"]])
    families = list(dict.fromkeys(table["family"]))
    left_out, families = len(families) - MOST_PANELS, families[:MOST_PANELS]
    names = style.short_names(families)
    rhos = sorted(set(table["rho"]))
    columns = columns_of(len(families))
    height = -(-len(families) // columns) * (PANEL + HEAD)
    ax = style.axes(ax, 1.2 + 2.7 * columns, height / 0.77)
    horizon = float(table["horizon"].max())
    panels = style.panels(ax, len(families), columns, 0.8, PANEL / (PANEL + HEAD))
    for i, (panel, family) in enumerate(zip(panels, families, strict=True)):
        part = table[table["family"] == family]
        _scatter(panel, part, horizon, rhos)
        first = int((part["exit"] < part["detected"]).sum())
        heading = f"{names[family]}\nexit first: {first} of {len(part)}"
        panel.set_title(heading, fontsize=8.5, fontweight="normal")
        if i % columns == 0:
            panel.set_ylabel("exit, round", fontsize=8.5)
        if i + columns >= len(families):
            panel.set_xlabel("detection, round", fontsize=8.5)
    top = 1 - 0.3 / height  # the first row needs less above it than lies between rows
    _legend(ax, rhos, top)
    ax.set_title("Exit against detection", y=top, pad=22)
    more = f" {left_out} more are in the table only." if left_out > 0 else ""
    style.caption(
        ax,
        f"A mark is a run, n = {len(table)}. Detection: {DETECTORS[detector]}"
        + (", half of the attackers flagged" if detector != "ban" else "")
        + f". Tinted: the policy left first. Open marks, past the dotted lines: not by round "
        f"{horizon:g}. Runs that coincide are set side by side.{more}",
        below=60,
    )
    return ax


def _scatter(panel: Axes, part: pd.DataFrame, horizon: float, rhos: list[float]) -> None:
    edge, end = 1.1 * horizon, 1.2 * horizon
    panel.fill_between([0, end], [0, 0], [0, end], color=style.VERMILION, alpha=0.07, lw=0)
    panel.plot([0, end], [0, end], color=style.GREY, lw=0.8)
    for line in (panel.axvline, panel.axhline):
        line(1.03 * horizon, color=style.GREY, lw=0.8, ls=":")
    seen: dict[tuple[float, float], int] = {}
    for one in part.itertuples():
        x, y = min(one.detected, edge), min(one.exit, edge)
        turn = seen[x, y] = seen.get((x, y), -1) + 1
        aside = 0.025 * horizon * np.array([turn % 3, turn // 3])
        whole = max(one.detected, one.exit) < np.inf
        colour, _ = style.line_style(rhos.index(one.rho))
        panel.scatter(
            x + aside[0], y - aside[1], s=22, lw=1.2, zorder=3, edgecolors=colour,
            facecolors=colour if whole else "white",
        )  # fmt: skip
    ticks = [0, horizon / 2]
    panel.set(xlim=(0, end), ylim=(0, end), xticks=[*ticks, edge], yticks=[*ticks, edge])
    labels = [*(f"{tick:g}" for tick in ticks), "not"]
    panel.set_xticklabels(labels, fontsize=8)
    panel.set_yticklabels(labels, fontsize=8)
    panel.set_aspect("equal")


def _legend(ax: Axes, rhos: list[float], top: float) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", ls="", color=style.line_style(i)[0], label=f"ρ = {rho:g}")
        for i, rho in enumerate(rhos)
    ]
    ax.legend(
        handles=marks, loc="lower left", bbox_to_anchor=(-0.01, top), ncols=len(marks),
        borderaxespad=0, handletextpad=0.1, columnspacing=1.2, fontsize=9,
    )  # fmt: skip
