"""The end of a run: its outcome, its exit times, and the true crossing behind them."""

from __future__ import annotations

import json
from typing import Any

from agents.adapters import load_own_state, own_state
from agents.agent import Agent
from envs import hacking
from envs.monitor import CostMonitor
from sim.config import Config
from sim.evaluate import Evaluator
from sim.evaluation_config import STOPS, stopped_by
from sim.record import Record
from sim.scenario import Scenario


def summarise(
    config: Config,
    scenario: Scenario,
    agent: Agent,
    evaluate: Evaluator,
    monitor: CostMonitor,
    record: Record,
    diverged: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything ``summary.json`` says of one run.

    A diverged run has no policy at its end, so its end, gain and occupancy are null. ``censored``
    says that the run ended before the rounds that were asked for (at an exit, by its attacker, by
    diverging): occupation, excess, returns and the peak are those until then, so at least these.
    """
    rows = [json.loads(line) for line in (record.path / "rounds.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row.get("safety/harm") is not None]
    first, last = measured[0], measured[-1]
    crossing = None
    if config.evaluation.n_true:
        crossing = true_crossing(config, agent, evaluate, record, measured)
    ended = diverged is None
    summary = monitor.summary(diverged=not ended)
    return {
        **summary,
        "occupancy": summary["occupancy"] if ended else None,
        "censored": rows[-1]["round"] < config.rounds,
        "diverged": diverged,
        "exit_true": crossing,
        "exit_true_n": config.evaluation.n_true,
        "help_start": first["helpfulness"],
        "help_end": last["helpfulness"] if ended else None,
        "help_gain": last["helpfulness"] - first["helpfulness"] if ended else None,
        "hacking": hacking.summary(measured, config.evaluation.hacked_share),
        "harm_start": first["safety/harm"],
        "harm_end": last["safety/harm"] if ended else None,
        "learner": config.learner_name,
        "lr": config.learner.lr,
        "attack": config.attack.name,
        "rho": config.attack.rho,
        "defences": list(config.defences),
        "attacker_stopped": _attacker_stopped(config, summary, rows[-1]["round"], ended),
        "seed": config.seed,
        "world_seed": config.world.seed,
        "model_seed": config.world.model_seed,
        "rounds": rows[-1]["round"],
        "harm_source": scenario.harm_source,
    }


def _attacker_stopped(
    config: Config, summary: dict[str, Any], last: int, ended: bool
) -> int | None:
    """The round in which the attacker kept the policy and ended the run, if she did."""
    early = ended and config.attack.stop_at and last < config.rounds
    by_us = stopped_by(config.evaluation, **{k: summary[f"exit_{k}"] for k in STOPS})
    return last if early and not by_us else None


def true_crossing(
    config: Config,
    agent: Agent,
    evaluate: Evaluator,
    record: Record,
    measured: list[dict[str, Any]],
) -> dict[str, Any] | None:
    """First evaluated policy whose cost on ``n_true`` fresh samples exceeds the limit.

    The saved policies are bisected between the start, taken as inside, and the first that was
    measured above the limit; where that one is truly inside, between it and the one of greatest
    harm. This assumes a single crossing on the way. None when both are truly inside the set.
    """
    from safetensors.torch import load_file

    limit, n = config.evaluation.cost_limit, config.evaluation.n_true
    final = {k: v.clone() for k, v in own_state(agent.policy.model).items()}

    def unsafe(index: int) -> bool:
        round = measured[index]["round"]
        agent.load_policy(load_file(record.policy_path(round)))
        return bool(evaluate.true_cost(agent, n, round).mean() > limit)

    worst = max(range(len(measured)), key=lambda i: measured[i]["safety/harm"])
    low, high = -1, next((i for i, row in enumerate(measured) if row["safety/harm"] > limit), worst)
    try:
        if not unsafe(high):  # the naive exit was noise: look at the most harmful policy
            low, high = high, worst
            if high <= low or not unsafe(high):
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if unsafe(middle) else (middle, high)
    finally:
        load_own_state(agent.policy.model, final)
        agent.sampler.forget()
    row = measured[high]
    clocks = {k.removeprefix("clock/"): v for k, v in row.items() if k.startswith("clock/")}
    return {"rounds": row["round"], **clocks}
