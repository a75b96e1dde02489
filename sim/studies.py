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
GRID = (0.05, 0.1, 0.2, 0.4, 0.8)
"""The default attack's shares of adversaries; the clean arm is its 0."""
FLIPS = 0.25
"""Share of labels flipped in the arm that asks which learners break under plain noise."""
HORIZON = 40
"""Rounds of the grid and of the flips."""
UPDATES = 50
"""Optimizer steps within which rho = 1 has to break every learner."""
SEEDS = range(3)
"""Root seeds on every reporting world: nine runs an arm."""


def replicates(config: Config, worlds: Iterable[int], seeds: Iterable[int]) -> list[Config]:
    """``config`` on every world with every root seed."""
    return [
        replace(config, seed=seed, world=replace(config.world, seed=world))
        for world in worlds
        for seed in seeds
    ]


def demo() -> Arms:
    """Clean, poisoned, poisoned and defended, poisoned and frozen."""
    clean = replace(preset("demo"), checkpoint_every=5)
    poisoned = replace(clean, attack=AttackConfig(DEFAULT_ATTACK, rho=0.4))
    arms = {
        "clean": clean,
        "poisoned": poisoned,
        "poisoned + refusal_loss": replace(poisoned, defences=("refusal_loss",)),
        "poisoned + freeze": replace(poisoned, defences=("freeze",)),
    }
    return {name: replicates(config, (0,), (0, 1)) for name, config in arms.items()}


def tuning() -> Arms:
    """Every learner's candidates at rho = 0 (100 rounds) and rho = 1 (up to :data:`UPDATES`)."""
    settings: list[tuple[str, dict[str, float], dict[str, float]]] = [
        *(("grpo", {"lr": lr}, {}) for lr in (3e-4, 5e-4, 1e-3)),
        ("grpo", {"lr": 5e-4, "beta": 0.3}, {}),
        ("grpo", {"lr": 5e-4}, {"lr": 1e-3}),
        *(("ppo", {"lr": lr}, {}) for lr in (2e-4, 4e-4)),
        ("ppo", {"lr": 2e-4, "kl": 0.5}, {}),
        *(("dpo", {"lr": lr}, {}) for lr in (2e-4, 4e-4)),
        ("dpo", {"lr": 2e-4, "beta": 0.3}, {}),
        *(("sft", {"lr": lr}, {}) for lr in (1e-4, 2e-4)),
    ]
    arms: Arms = {}
    for name, setting, reward in settings:
        clean = without_attack(name, setting)
        clean = replace(clean, reward_model=replace(clean.reward_model, **reward))
        chosen = setting | {f"reward_model.{key}": value for key, value in reward.items()}
        label = f"{name} {' '.join(f'{k}={v:g}' for k, v in chosen.items())}"
        for case, config in (("clean", clean), ("rho=1", full_attack(clean))):
            arms[f"{label} {case}"] = replicates(config, DEVELOPMENT_WORLDS, (0,))
    return arms


def without_attack(learner: str, setting: dict[str, float] | None = None) -> Config:
    """The clean run of a study: 100 rounds, measured every fifth."""
    return Config(
        rounds=100,
        learner=registry.get(learner)(**(setting or {})),
        evaluation=EvaluationConfig(every=5, n_harm=256, n_help=256, n_true=0),
        checkpoint_every=20,
    )


def attacked(clean: Config, rounds: int, attack: AttackConfig, every: int = 5) -> Config:
    """``clean`` under ``attack``, until the confirmed exit or for ``rounds``."""
    evaluation = replace(clean.evaluation, every=every, stop_on_exit=True)
    return replace(clean, rounds=rounds, attack=attack, evaluation=evaluation)


def full_attack(clean: Config) -> Config:
    """Everybody is an adversary, for rounds enough to hold :data:`UPDATES` optimizer steps.

    Learners that update from labels take fewer steps in a round with few labels and more in one
    with many; the table reads the exit on the clock of optimizer steps.
    """
    return attacked(clean, UPDATES, AttackConfig(DEFAULT_ATTACK, rho=1.0), every=2)


def learners() -> Arms:
    """Every learner at its defaults: rho = 1, rho = 0, 25 % flips, the default attack's grid."""
    arms: Arms = {}
    for name in LEARNERS:
        clean = without_attack(name)
        cases = {
            "rho=1": full_attack(clean),
            "clean": clean,
            "flips": attacked(clean, HORIZON, AttackConfig("label_noise", rho=FLIPS)),
        }
        cases |= {
            f"rho={rho:g}": attacked(clean, HORIZON, AttackConfig(DEFAULT_ATTACK, rho=rho))
            for rho in GRID
        }
        arms |= {f"{name} {k}": replicates(c, REPORT_WORLDS, SEEDS) for k, c in cases.items()}
    return arms


STUDIES = {"demo": demo, "tuning": tuning, "learners": learners}
