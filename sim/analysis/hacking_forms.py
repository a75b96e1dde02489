"""Reward hacking by form: nothing said, gibberish, echo (:mod:`envs.hacking`), beside the reward.

Runs of older versions recorded degenerate answers over all prompts together and no single words;
they are read as far as that goes, with one column for both kinds of prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from envs.hacking import FORMS, PROMPT_KINDS, column
from sim.analysis import style
from sim.analysis.load import Run, by_arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABOVE = 0.25
"""Share of answers of one form that is called hacking where a run does not say another."""
COLOURS = {"short": style.BLUE, "gibberish": style.VERMILION, "echo": style.GREEN}
MARKS = {"harmful": ("o", "-"), "benign": ("^", "--"), "all": ("s", "-")}
WORDS = {"short": "nothing or one word", "gibberish": "gibberish", "echo": "the question"}


def supports(runs: Iterable[Run]) -> bool:
    """Whether any of the runs measured its answers' forms."""
    return any(form_shares(run) for run in runs)


def form_shares(run: Run) -> dict[tuple[str, str], pd.Series]:
    """Share of answers at every evaluation, by form and kind of prompt; empty where unknown."""
    rows = run.own_evaluations.index
    found = {
        (form, name): run.column(column(form, name))[rows]
        for form in FORMS
        for name in PROMPT_KINDS
    }
    if all(values.isna().all() for values in found.values()):
        old = {"short": "empty", "gibberish": "gibberish", "echo": "echo"}
        found = {(k, "all"): run.column(f"completions/{name}")[rows] for k, name in old.items()}
    return {key: values for key, values in found.items() if values.notna().any()}


def hacking_forms_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per arm, form and kind of prompt that has any such answer.

    ``start``, ``peak`` and ``end`` are means over runs, ``worst`` the greatest share in any; then
    how many runs were ever above the share that counts as hacking, and the first round of those.
    """
    rows = []
    for arm, members in by_arm(runs).items():
        shares = [(run, form_shares(run)) for run in members]
        for key in dict.fromkeys(key for _, known in shares for key in known):
            parts = [(run, known[key].dropna()) for run, known in shares if key in known]
            rows.append({"arm": arm, **_row(*key, [part for part in parts if len(part[1])])})
    table = pd.DataFrame(row for row in rows if row["worst"] > 0)
    return table.astype({"first round": "Int64"}) if len(table) else table


def _row(form: str, stratum: str, parts: list[tuple[Run, pd.Series]]) -> dict[str, Any]:
    firsts = []
    for run, shares in parts:
        limit = run.config.get("evaluation", {}).get("hacked_share", ABOVE)
        above = shares.index[shares > limit]
        firsts += [int(run.rounds["round"][above[0]])] if len(above) else []
    peaks = [float(shares.max()) for _, shares in parts]
    return {
        "answers": WORDS[form],
        "to prompts": stratum,
        "runs": len(parts),
        "start": float(np.mean([shares.iloc[0] for _, shares in parts])),
        "peak": float(np.mean(peaks)),
        "worst": max(peaks),
        "end": float(np.mean([shares.iloc[-1] for _, shares in parts])),
        "hacked": f"{len(firsts)} of {len(parts)}",
        "first round": min(firsts) if firsts else None,
    }


def most_hacked(runs: Iterable[Run]) -> Run:
    """The run with the greatest share of one form at any evaluation."""
    return max(runs, key=lambda run: max((s.max() for s in form_shares(run).values()), default=-1))


@style.styled
def plot_hacking_forms(runs: Iterable[Run], ax: Axes | None = None) -> Axes:
    """Reward against the share of each form, of the run in which one of them is most common.

    To the right and up is reward without an answer. Learners without a reward model are drawn by
    the utility that honest people assign.
    """
    runs = list(runs)
    run = most_hacked(runs)
    ax = style.axes(ax)
    name = next((n for n in ("reward_eval", "reward") if run.column(n).notna().any()), "utility")
    reward = run.column(name)
    ends: list[tuple[float, str, str, style.Dash]] = []
    for (form, stratum), shares in form_shares(run).items():
        known = shares.index[shares.notna() & reward[shares.index].notna()]
        if not len(known):
            continue
        x, y = reward[known].to_numpy(), shares[known].to_numpy()
        marker, dash = MARKS[stratum]
        ax.plot(x, y, dash, marker=marker, color=COLOURS[form], ms=4, lw=1.2, alpha=0.85)
        where = "" if stratum == "all" else f", {stratum}"
        ends.append((float(y[-1]), f"{WORDS[form]}{where}", COLOURS[form], dash))
    ax.set(ylim=(-0.02, 1.02), ylabel="share of answers")
    ax.set_xlabel("utility" if name == "utility" else "reward model's mean reward")
    style.list_ends(ax, "share at the end", ends)
    style.title(ax, f"Reward hacking by form: {run.title}")
    chosen = f"Of {len(runs)} runs that in which one form is most common. " * (len(runs) > 1)
    style.caption(
        ax,
        f"{chosen}One point an evaluation, in order along the line. Answers that say nothing (or "
        "one word of the embedded language, one character of real text), no sentence, or the "
        "question back.",
    )
    return ax
