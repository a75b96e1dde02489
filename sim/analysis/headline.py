"""The answer of a report in words: who left the safe set, what kept it there, at what price.

Runs are pooled by attack and defences over learners, worlds and whatever else differs. Shares carry
Clopper-Pearson intervals, which treat runs as independent; the cautions say where they are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from envs.registry import brief
from envs.safe_sets import clopper_pearson
from sim.analysis.load import Run, by_arm, mean_of
from sim.analysis.retained import clean_twins, holds, learning_retained
from sim.analysis.tables import PARENTS, branch_table
from sim.identity import leaves

MOST_SENTENCES = 8
"""Most attacks, or defences over a grid, that are told of one by one; the table holds the rest."""
GRID = 3
"""Values of rho from which an attack is told of as a whole."""


class Group(NamedTuple):
    """Finished runs under one attack and one list of defences."""

    name: str  # of the attack; empty: none
    rho: float
    defences: str  # empty: none
    runs: list[Run]
    exits: list[int]  # rounds of the confirmed exits
    retained: float | None
    holds: bool | None  # in every arm; None: unknown in some, and false in none

    @property
    def attack(self) -> str:
        """The attack at its rho, in words."""
        return f"{self.name} at ρ = {self.rho:g}" if self.name else ""

    @property
    def left(self) -> str:
        """How many of the runs left."""
        return f"{len(self.exits)} of {len(self.runs)} runs"

    @property
    def unconfirmed(self) -> int:
        """How many of the runs crossed the limit, or ended above it, with no exit confirmed."""
        return sum(run.exit_round("confirmed") is None and outside(run) for run in self.runs)

    @property
    def interval(self) -> str:
        """Where the share of runs that leave lies, at 95 %."""
        return _interval(len(self.exits), len(self.runs))


def outside(run: Run) -> bool:
    """Whether a finished run ended above the limit, or crossed it by the truth."""
    return run.exit_round("true") is not None or (run.summary.get("harm_end") or 0.0) > run.limit


def groups(runs: Iterable[Run]) -> list[Group]:
    """Finished runs by attack and defences, undefended first; forks are left out."""
    runs = [run for run in runs if run.summary and not run.fork]
    twins = clean_twins(runs)
    parted: dict[tuple[str, float, str], list[list[Run]]] = {}
    for arm in by_arm(runs).values():
        parted.setdefault((*_attack(arm[0]), _defences(arm[0])), []).append(arm)
    found = []
    for (attack, rho, defences), arms in parted.items():
        held = [holds(arm, learning_retained(arm, twins)) for arm in arms]
        known = False if False in held else None if None in held else True
        members = [run for arm in arms for run in arm]
        dated = [run.exit_round("confirmed") for run in members]
        exits = [when for when in dated if when is not None]
        retained = learning_retained(members, twins)
        found.append(Group(attack, rho, defences, members, exits, retained, known))
    return found


def _attack(run: Run) -> tuple[str, float]:
    name = brief(str(dict(leaves(run.config)).get("attack.name")))
    return (name, run.rho) if run.rho else ("", 0.0)


def _defences(run: Run) -> str:
    return " + ".join(map(brief, run.config.get("defences", [])))


def answer_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per attack and defences: exits with their share, harm and help, what was kept."""
    return pd.DataFrame(
        {
            "attack": group.attack or "none",
            "defence": group.defences or "none",
            "runs": len(group.runs),
            "left": len(group.exits),
            "share that left [95 %]": f"{len(group.exits) / len(group.runs):.2f} {group.interval}",
            "outside, unconfirmed": group.unconfirmed,
            "median exit round": float(np.median(group.exits)) if group.exits else None,
            "harm at end": mean_of(group.runs, "harm_end"),
            "help gain": mean_of(group.runs, "help_gain"),
            "learning retained": group.retained,
            "holds": {True: "yes", False: "no", None: None}[group.holds],
        }
        for group in groups(runs)
    )


def answer(runs: Iterable[Run]) -> list[str]:
    """The sentences that a report begins with."""
    runs = list(runs)
    found, branches = groups(runs), _branches(runs)
    if not found and not branches:
        return ["No run has ended yet: nothing can be said of exits."]
    grids: list[Group] = []
    single: list[Group] = []
    for name in dict.fromkeys(group.name for group in found if group.name):
        mine = [group for group in found if group.name == name]
        graded = len({group.rho for group in mine}) >= GRID
        (grids if graded else single).extend(mine)
    clean = [group for group in found if not group.name]
    return [*_over_grids(grids), *_one_by_one([*single, *clean]), *branches]


def _branches(runs: list[Run]) -> list[str]:
    """A sentence for every fork that has ended."""
    said = []
    for row in branch_table(runs).to_dict("records"):
        if pd.notna(end := row["harm at end"]):
            there = "" if pd.isna(row[PARENTS]) else f", {row[PARENTS]:.2f} in its parent"
            branch = f"From round {row['from round']} on with {row['changed']}"
            said.append(f"{branch}: harm {end:.2f} at the end{there}.")
    more = len(said) - MOST_SENTENCES
    return said[:MOST_SENTENCES] + ([f"{more} more branches stand in their table."] * (more > 0))


def _over_grids(found: list[Group]) -> list[str]:
    """A sentence for every attack and defence, over all its rho."""
    said = []
    for name in dict.fromkeys(group.name for group in found):
        mine: dict[str, list[Group]] = {}
        for group in found:
            if group.name == name:
                mine.setdefault(group.defences, []).append(group)
        order = sorted(mine, key=lambda defences: (bool(defences), *_rank(mine[defences])))
        for defences in order[:MOST_SENTENCES]:
            under = f"Under {name}, {f'with {defences}' if defences else 'without a defence'}:"
            said.append(f"{under} {_by_rho(mine[defences])}{_kept(mine[defences])}.")
        if len(order) > MOST_SENTENCES:
            said.append(f"{len(order) - MOST_SENTENCES} more defences stand in the table.")
    return said


def _rank(mine: list[Group]) -> tuple[bool, float, float]:
    """Defences that hold at every rho come first, then those with the fewest exits."""
    left = sum(len(group.exits) for group in mine) / sum(len(group.runs) for group in mine)
    kept = [group.retained for group in mine if group.retained is not None]
    return not all(group.holds for group in mine), left, -sum(kept) / max(1, len(kept))


def _by_rho(mine: list[Group]) -> str:
    mine = sorted(mine, key=lambda group: group.rho)
    leaving = [group for group in mine if group.exits]
    stayed = [group for group in mine if not group.exits]
    n = sum(len(group.runs) for group in stayed)
    at = ", ".join(f"{group.rho:g}" for group in stayed)
    if not leaving:
        words = f"none of {n} runs left the safe set, at ρ = {at} (share in {_interval(0, n)})"
        return words + _unconfirmed(mine)
    first, *more = leaving
    parts = [f"{first.left} left at ρ = {first.rho:g}"]
    parts += [f"{len(g.exits)} of {len(g.runs)} at {g.rho:g}" for g in more]
    return ", ".join([*parts, f"none of {n} at {at}"] if stayed else parts) + _unconfirmed(mine)


def _unconfirmed(mine: list[Group]) -> str:
    """Runs that count as having stayed and did not, in words; empty where there are none."""
    count = sum(group.unconfirmed for group in mine)
    return f" ({count} more crossed b or ended above it, unconfirmed)" if count else ""


def _kept(mine: list[Group]) -> str:
    """The learning kept under a defence, where it is known at every rho."""
    shares = [group.retained for group in mine if group.retained is not None]
    if not mine[0].defences or len(shares) < len(mine):
        return ""
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"; it kept {low if low == high else f'{low} to {high}'} % of what clean runs learn"


def _interval(left: int, n: int) -> str:
    low, high = clopper_pearson(left, n, 0.05)
    return f"[{low:.2f}, {high:.2f}]"


def _one_by_one(found: list[Group]) -> list[str]:
    said = []
    attacks = list(dict.fromkeys(group.attack for group in found))
    for attack in sorted(attacks, key=bool, reverse=True)[:MOST_SENTENCES]:
        mine = [group for group in found if group.attack == attack]
        bare = next((group for group in mine if not group.defences), None)
        if bare:
            said.append(_undefended(bare))
        if attack and (defended := [group for group in mine if group.defences]):
            said += _defended(attack, defended)
    if len(attacks) > MOST_SENTENCES:
        said.append(f"{len(attacks) - MOST_SENTENCES} more attacks stand in the table.")
    return said


def _undefended(group: Group) -> str:
    under = f"Under {group.attack}, without a defence," if group.attack else "Without an attack"
    words = f"{under} {group.left} left the safe set (share in {group.interval} at 95 %)"
    words += _unconfirmed([group])
    if not group.exits:
        return f"{words}."
    first, last = min(group.exits), max(group.exits)
    when = f"round {first}" if first == last else f"rounds {first} to {last}"
    middle = "" if first == last else f", median {np.median(group.exits):g}"
    return f"{words}; the exits were confirmed in {when}{middle}."


def _defended(attack: str, mine: list[Group]) -> list[str]:
    held = [group for group in mine if group.holds]
    held.sort(key=lambda group: -(group.retained or 0))
    many = len(mine)
    if held:
        best = held[0]
        words = f"{best.defences} keeps the policy inside under {attack}: {best.left} left "
        words += f"(share in {best.interval} at 95 %){_unconfirmed([best])}, "
        words += f"and it kept {_percent(best)} of what honest feedback teaches."
        others = ", ".join(f"{group.defences} ({_percent(group)})" for group in held[1:6])
        more = f" and {len(held) - 6} more" if len(held) > 6 else ""
        also = f" Also holding, with the learning kept: {others}{more}." if others else ""
        lost = many - len(held)
        rest = f" The other {lost} of {many} defences do not hold." if lost else ""
        return [words, (also + rest).strip()] if also or rest else [words]
    safe = [group for group in mine if group.holds is None]
    if safe:
        names = ", ".join(f"{group.defences} ({group.left} left)" for group in safe[:6])
        return [
            f"Under {attack} these stayed inside: {names}. What they cost in learning is not "
            "known: no clean run of the same seeds is here, or it learned too little."
        ]
    least = min(mine, key=lambda group: (len(group.exits) / len(group.runs), group.defences))
    kept = "" if least.retained is None else f" and {_percent(least)} of the learning kept"
    words = f"Under {attack} no defence of {many} holds" if many > 1 else f"{mine[0].defences} does"
    words += "" if many > 1 else f" not hold under {attack}"
    return [f"{words}; fewest left under {least.defences}: {least.left} {least.interval}{kept}."]


def _percent(group: Group) -> str:
    return "an unknown share" if group.retained is None else f"{100 * group.retained:.0f} %"
