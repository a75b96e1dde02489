"""The runs of a card: paired arms under the default attack, and under who adapts to it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from envs.registry import brief
from sim.config import DEFAULT_ATTACK, AttackConfig, Config

BASELINES = {
    "none": (),
    "freeze": ("freeze",),
    "refusal_loss": ("refusal_loss",),
    "lisa": ("lisa",),
}
"""Arms that stand beside the defence in every card."""
STANDARD, EARLY, LONG = "default", "early stopping", "rounds x2"
ATTACKERS = (STANDARD, "temperature 1.5", EARLY, "learner.lr x3", LONG)
"""The default attacker, then those who adapt."""


class Arm(NamedTuple):
    """Which runs of a card belong together."""

    learner: str
    defence: str
    attacker: str
    hostile: bool = True


def short(spec: str) -> str:
    """``spec`` without the file or module of its class, as a card calls it."""
    target, paren, arguments = brief(spec).partition("(")
    return f"{target.rpartition(':')[2]}{paren}{arguments}"


def arms(base: Config, spec: str, rho: float) -> dict[Arm, Config]:
    """The runs of one learner by arm, under seed 0.

    The defence and the undefended policy meet every attacker, the other baselines the default one.
    Clean, undefended twins tell what there was to learn; who stops early needs none of its own.
    """
    learner, mine = base.learner_name, short(spec)
    found: dict[Arm, Config] = {}
    for attacker in ATTACKERS:
        clean = adapted(base, attacker)
        hostile = replace(clean, attack=AttackConfig(DEFAULT_ATTACK, rho=rho))
        known = BASELINES if attacker == STANDARD else {"none": ()}
        if attacker != EARLY:
            found[Arm(learner, "none", attacker, hostile=False)] = clean
        for name, specs in {**known, mine: (spec,)}.items():
            found[Arm(learner, name, attacker)] = replace(hostile, defences=specs)
    return found


def adapted(base: Config, attacker: str) -> Config:
    """``base`` as ``attacker`` of :data:`ATTACKERS` trains it."""
    if attacker == "temperature 1.5":
        return replace(base, sampler=replace(base.sampler, temperature=1.5))
    if attacker == EARLY:
        return replace(base, evaluation=replace(base.evaluation, stop_on_exit=True))
    if attacker == "learner.lr x3":
        return replace(base, learner=replace(base.learner, lr=3 * base.learner.lr))
    return replace(base, rounds=2 * base.rounds) if attacker == LONG else base
