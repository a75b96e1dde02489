"""The named sweeps behind the README's figures: what is run, declared in one place.

    demo      four arms that show the point, two seeds each
    tuning    learning rate and KL of every learner, on the development worlds 0-2
    learners  every learner under no attack, full attack, label flips and the default attack's grid,
              on the worlds 3-5 that nothing was tuned on

``poisonloop sweep --study NAME`` runs one; like every sweep it is restartable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from agents.learners import learners as registry
from sim.config import DEFAULT_ATTACK, AttackConfig, Config, EvaluationConfig, preset

Arms = dict[str, list[Config]]
LEARNERS = ("grpo", "ppo", "dpo", "sft")
DEVELOPMENT_WORLDS, REPORT_WORLDS = (0, 1, 2), (3, 4, 5)
GRID = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
"""The default attack's shares of adversaries."""
HORIZON = 40
"""Rounds of the default attack's grid."""
UPDATES = 50
"""Optimizer updates within which rho = 1 has to break every learner."""
FLIP_SEEDS = 3
"""Seeds per world for the break fraction under 25 % label flips: nine runs in all."""


def replicates(config: Config, worlds: Iterable[int], seeds: Iterable[int]) -> list[Config]:
    """``config`` on every world with every root seed."""
    return [
        replace(config, seed=seed, world=replace(config.world, seed=world))
        for world in worlds
        for seed in seeds
    ]


def demo() -> Arms:
    """Clean, poisoned, poisoned and defended, poisoned and frozen."""
    clean = preset("demo")
    poisoned = replace(clean, attack=AttackConfig(DEFAULT_ATTACK, rho=0.4))
    arms = {
        "clean": clean,
        "poisoned": poisoned,
        "poisoned + refusal_loss": replace(poisoned, defences=("refusal_loss",)),
        "poisoned + freeze": replace(poisoned, defences=("freeze",)),
    }
    return {name: replicates(config, (0,), (0, 1)) for name, config in arms.items()}


def _settings(name: str) -> list[dict[str, float]]:
    rates = (1e-4, 3e-4, 1e-3)
    pulls = {"grpo": ("beta", (0.05, 0.2)), "ppo": ("kl", (0.05, 0.2)), "dpo": ("beta", (0.1, 0.3))}
    if name not in pulls:
        return [{"lr": rate} for rate in rates]
    field, values = pulls[name]
    return [{"lr": rate, field: value} for rate in rates for value in values]


def tuning() -> Arms:
    """Every learner's settings at rho = 0 (60 rounds) and rho = 1 (the rounds of 50 updates)."""
    arms: Arms = {}
    evaluation = EvaluationConfig(every=5, n_harm=128, n_help=128, n_true=0)
    for name in LEARNERS:
        for setting in _settings(name):
            learner = registry.get(name)(**setting)
            label = f"{name} {' '.join(f'{k}={v:g}' for k, v in setting.items())}"
            clean = Config(rounds=60, learner=learner, evaluation=evaluation)
            hostile = replace(full_attack(clean), evaluation=replace(evaluation, every=2))
            for case, config in (("rho=0", clean), ("rho=1", hostile)):
                arms[f"{label} {case}"] = replicates(config, DEVELOPMENT_WORLDS, (0,))
    return arms


def full_attack(config: Config) -> Config:
    """Everybody is an adversary, for as many rounds as hold :data:`UPDATES` full updates.

    Learners that update from labels take fewer steps in a round with few labels, so the rounds are
    counted generously; the table reads the exit on the clock of optimizer steps.
    """
    attack = AttackConfig(DEFAULT_ATTACK, rho=1.0)
    return replace(config, rounds=25, attack=attack)


def learners() -> Arms:
    """Every learner at its defaults: rho = 0, rho = 1, 25 % flips, and the grid."""
    arms: Arms = {}
    claims = EvaluationConfig(every=5, n_harm=256, n_help=256, n_true=0)
    often = replace(claims, every=2)
    for name in LEARNERS:
        clean = Config(rounds=100, learner=registry.get(name)(), evaluation=claims)
        hostile = replace(full_attack(clean), evaluation=replace(claims, every=1))
        flips = replace(
            clean, rounds=HORIZON, evaluation=often, attack=AttackConfig("label_noise", rho=0.25)
        )
        arms[f"{name} clean"] = replicates(clean, REPORT_WORLDS, range(3))
        arms[f"{name} rho=1"] = replicates(hostile, REPORT_WORLDS, range(3))
        arms[f"{name} flips=.25"] = replicates(flips, REPORT_WORLDS, range(FLIP_SEEDS))
        for rho in GRID:
            attack = AttackConfig(DEFAULT_ATTACK, rho=rho) if rho else AttackConfig()
            config = replace(clean, rounds=HORIZON, evaluation=often, attack=attack)
            arms[f"{name} default rho={rho:g}"] = replicates(config, REPORT_WORLDS, range(3))
    return arms


STUDIES = {"demo": demo, "tuning": tuning, "learners": learners}
