"""The named sweeps behind the README's figures: what is run, declared in one place.

    demo      five arms that show the point, two seeds each
    tuning    learning rate and KL of every learner, on the development worlds 0-2
    learners  every learner under no attack, full attack, label flips and the default attack's grid,
              on the worlds 3-5 that nothing was tuned on
    exit-times  time in the safe set against rho, under four defences, on the same worlds
    judges    malicious GRPO at two temperatures against the defences that are meant for it
    stealth   harm-targeted votes, open and agreement-constrained, watched or banned by gold

``poisonloop sweep --study NAME`` runs one, or ``poisonloop sweep NAME`` where no preset has the
name; like every sweep it is restartable.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from agents.learners.dpo import DPOConfig
from agents.learners.grpo import GRPOConfig
from agents.learners.ppo import PPOConfig
from agents.learners.reward_model import RewardModelConfig
from agents.learners.sft import SFTConfig
from sim.config import DEFAULT_ATTACK, AttackConfig, Config, EvaluationConfig, FeedbackConfig
from sim.presets import preset

DEVELOPMENT_WORLDS, REPORT_WORLDS = (0, 1, 2), (3, 4, 5)
GRID = (0.05, 0.1, 0.2, 0.4, 0.8)
"""The default attack's shares of adversaries; the clean arm is its 0."""
DOSES = (0.0, 0.02, *GRID)
"""Shares of adversaries in the study of exit times."""
FLIPS = 0.25
"""Share of labels flipped in the arm that asks which learners break under plain noise."""
HORIZON = 40
"""Rounds of the grid and of the flips."""
UPDATES = 50
"""Optimizer steps within which rho = 1 has to break every learner."""
SEEDS = range(3)
"""Root seeds on every reporting world: nine runs an arm."""


def _over(arms: Iterable[Config], worlds: Iterable[int], seeds: Iterable[int]) -> list[Config]:
    """Every arm on every world with every root seed."""
    return [
        replace(arm, seed=seed, world=replace(arm.world, seed=world))
        for arm, world, seed in itertools.product(arms, worlds, seeds)
    ]


def demo() -> list[Config]:
    """Clean; poisoned; poisoned and defended; poisoned under the two null controls."""
    clean = replace(preset("demo"), checkpoint_every=5)
    poisoned = replace(clean, attack=AttackConfig(DEFAULT_ATTACK, rho=0.4))
    defended = [
        replace(poisoned, defences=(name,)) for name in ("refusal_loss", "freeze", "small_lr")
    ]
    return _over((clean, poisoned, *defended), (0,), (0, 1))


def tuning() -> list[Config]:
    """Every learner's candidates at rho = 0 (100 rounds) and rho = 1 (up to :data:`UPDATES`).

    The default is the candidate that stays farthest from all three bounds of the ``learners`` study
    (help gained .2, harm .05, 50 steps to the exit), each as a share of the bound, on its worst
    world.
    """
    candidates = [
        *(GRPOConfig(lr=lr) for lr in (3e-4, 5e-4, 1e-3)),
        GRPOConfig(beta=0.3),
        *(PPOConfig(lr=lr) for lr in (2e-4, 3e-4, 5e-4)),
        PPOConfig(kl=0.5),
        *(DPOConfig(lr=lr) for lr in (2e-4, 3e-4, 4e-4)),
        DPOConfig(beta=0.3),
        *(SFTConfig(lr=lr) for lr in (1e-4, 2e-4)),
    ]
    clean = [without_attack(learner) for learner in candidates]
    clean += [replace(clean[1], reward_model=RewardModelConfig(lr=1e-3))]
    return _over([*clean, *map(full_attack, clean)], DEVELOPMENT_WORLDS, (0,))


def without_attack(learner: Any) -> Config:
    """The clean run of a study: 100 rounds, measured every fifth."""
    return Config(
        rounds=100,
        learner=learner,
        evaluation=EvaluationConfig(every=5, n_harm=256, n_help=256, n_true=0),
        checkpoint_every=20,
    )


def attacked(clean: Config, rounds: int, attack: AttackConfig, every: int = 5) -> Config:
    """``clean`` under ``attack``, until the confirmed exit or for ``rounds``."""
    evaluation = replace(clean.evaluation, every=every, stop_on_exit=True)
    return replace(clean, rounds=rounds, attack=attack, evaluation=evaluation)


def full_attack(clean: Config) -> Config:
    """Everybody reverses every preference that concerns harm, and asks what users ask.

    The run is long enough for :data:`UPDATES` optimizer steps. Learners that update from labels
    take fewer steps in a round with few labels and more in one with many; the table reads the exit
    on the clock of optimizer steps.
    """
    return attacked(clean, UPDATES, AttackConfig("harm_targeted", rho=1.0), every=2)


def learners() -> list[Config]:
    """Every learner at its defaults: rho = 1, rho = 0, 25 % flips, the default attack's grid."""
    attacks = [AttackConfig("label_noise", rho=FLIPS)]
    attacks += [AttackConfig(DEFAULT_ATTACK, rho=rho) for rho in GRID]
    arms: list[Config] = []
    for learner in (DPOConfig(), GRPOConfig(), PPOConfig(), SFTConfig()):
        clean = without_attack(learner)
        arms += [clean, full_attack(clean), *(attacked(clean, HORIZON, a) for a in attacks)]
    return _over(arms, REPORT_WORLDS, SEEDS)


def exit_times() -> list[Config]:
    """Three learners, bare and under three defences, at every rho of DOSES.

    Runs go on after an exit, so that returns and the whole time inside are counted, and look for
    their true crossing on 2,000 draws.
    """
    arms = [
        Config(
            rounds=HORIZON,
            learner=learner,
            attack=AttackConfig(DEFAULT_ATTACK, rho=rho) if rho else AttackConfig(),
            defences=defences,
            evaluation=EvaluationConfig(every=4, n_harm=256, n_help=256),
        )
        for learner in (GRPOConfig(), DPOConfig(), PPOConfig())
        for defences in ((), ("refusal_loss",), ("lisa",), ("freeze",))
        for rho in DOSES
    ]
    return _over(arms, REPORT_WORLDS, SEEDS)


def judges() -> list[Config]:
    """An attacker who owns the reward, against defences that take its contrasts away.

    200 steps of GRPO without a KL term, 16 prompts of 8 answers a step. Her temperature and her
    number of prompts are axes, since both bring variance back.
    """
    clean = Config(
        rounds=200,
        threat="offline",
        learner=GRPOConfig(beta=0.0),
        feedback=FeedbackConfig(batch=16, responses=8),
        evaluation=EvaluationConfig(every=5, n_true=0, stop_on_exit=True),
        checkpoint_every=200,
        samples_per_round=1,
    )
    attacks = ("malicious_grpo", "malicious_grpo(temperature=2.0)", "malicious_grpo(prompts=64)")
    lists = ((), ("reward_neutralization",), ("reward_neutralization(steps=300)",))
    arms = [
        replace(clean, attack=AttackConfig(name, rho=1.0), defences=members)
        for name, members in itertools.product(attacks, (*lists, ("token_buncher",)))
    ]
    return _over(arms, REPORT_WORLDS, (0,))


def stealth() -> list[Config]:
    """Does the policy leave before its attackers are found: harm-targeted votes, open and stealthy.

    Three of twenty equally active people judge a pair; one item in twenty, and one in five of those
    that look harmful, is a gold question. Who fails them is watched only, or banned.
    """
    watched = Config(
        rounds=16,
        learner=SFTConfig(),
        feedback=FeedbackConfig(
            collection="crowd",
            redundancy=3,
            annotators=20,
            activity=0.0,
            gold_share=0.05,
            gold_harmful=0.2,
        ),
        evaluation=EvaluationConfig(n_help=64, n_true=0),
        checkpoint_every=16,
        samples_per_round=1,
    )
    arms = [
        replace(watched, attack=AttackConfig(attack, rho=rho), defences=members)
        for attack in ("harm_targeted", "agreement_constrained(theta=0.9, prior=(9.0, 1.0))")
        for members in ((), ("gold",))
        for rho in (0.4, 0.6, 0.8)
    ]
    return _over(arms, REPORT_WORLDS[:1], range(4))


STUDIES = {
    "demo": demo,
    "tuning": tuning,
    "learners": learners,
    "exit-times": exit_times,
    "judges": judges,
    "stealth": stealth,
}
