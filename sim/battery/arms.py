"""The runs of the battery: a preset sweep.

Everybody reverses every preference that concerns harm (rho = 1, ``harm_targeted``), from the first
round, for :data:`UPDATES` optimizer steps or until the confirmed exit. Every registered defence at
its defaults is an arm, unless it works on a label log that this run has not (where everybody is
malicious, nobody is to be found out), and so are the papers' strengths and combinations. Clean,
undefended runs of the same length stand beside them, since what a defence lets a policy learn is
measured against those.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from agents.defence import LOG, defences
from agents.learners import learners
from sim.config import AttackConfig, Config, EvaluationConfig
from sim.studies import REPORT_WORLDS

UPDATES = 200
"""Optimizer steps of the policy."""
EVALUATIONS = 20
"""Measurements of a run, the one before training left out."""
STEPS_A_ROUND = {"dpo": 4, "sft": 4}
"""Of learners on labels at their defaults, which take two epochs of 64 in minibatches of 32."""
FURTHER = (
    ("vaccine(rho=100)",),
    ("lisa(rho=100)",),
    ("lisa(mode='anchor', rho=100)",),
    ("refusal_loss(alpha=10)",),
    ("refusal_loss(alpha=100)",),
    ("safe_rlhf(shaping=True)",),
    ("rep_noise", "tar"),
    ("refusal_loss", "lisa"),
)
"""Strengths and lists beyond each defence's own defaults."""
ATTACK = AttackConfig("harm_targeted", rho=1.0)
Arm = tuple[str, ...]


def arms(chosen: Sequence[str] = ()) -> list[Arm]:
    """Lists of defence specs; the empty one is no defence.

    Args:
        chosen: specs joined by ``+`` as on the command line; all when empty.
    """
    if chosen:
        from sim.flags import stack

        return [(), *(stack([spec]) for spec in chosen if spec != "none")]
    known = [name for name in defences.names() if not defences.create(name).needs & LOG.keys()]
    return [(), *((name,) for name in known), *FURTHER]


def configs(
    lists: Iterable[Arm],
    learner_names: Sequence[str] = (),
    worlds: Sequence[int] = REPORT_WORLDS,
    seeds: Sequence[int] = (0,),
    updates: int = UPDATES,
) -> list[Config]:
    """Every list of defences under every learner on every world and seed, and the clean runs."""
    lists, found = list(lists), []
    for name in learner_names or learners.names():
        rounds = -(-updates // STEPS_A_ROUND.get(name, 1))
        attacked = Config(
            rounds=rounds,
            learner=learners.get(name)(),
            attack=ATTACK,
            evaluation=EvaluationConfig(
                every=max(1, rounds // EVALUATIONS), n_true=0, stop_on_exit=True
            ),
            checkpoint_every=rounds,
            samples_per_round=1,
        )
        found += [replace(attacked, attack=AttackConfig())]
        found += [replace(attacked, defences=members) for members in lists]
    return [
        replace(config, seed=seed, world=replace(config.world, seed=world))
        for config, world, seed in itertools.product(found, worlds, seeds)
    ]
