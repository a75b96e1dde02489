"""The loop, once: prompts -> sample -> label -> reward model -> learner -> monitor -> record.

Everything else (command line, sweeps, notebooks) calls :func:`run`. A run directory can be left at
any moment, by kill -9 too, and continued by the same function with ``resume=True``, byte for byte.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from agents.agent import Agent
from agents.learners.update import Diverged
from agents.processes import is_main, main_first, wait
from envs.attacks.early_stopping import StopRule
from envs.usage import UsageError
from sim.checks import check, settled
from sim.config import Config
from sim.evaluate import Evaluation, Evaluator
from sim.evaluation_config import stopped_by
from sim.factory import (
    make_agent,
    make_detection,
    make_env,
    make_evaluator,
    make_monitor,
    planned_evaluations,
)
from sim.listener import Listener, Silent
from sim.manifest import manifest
from sim.onlooker import Onlooker
from sim.record import Record
from sim.resume import check_origin, extend
from sim.rows import Clocks, Scored, evaluation_row, label_tables, round_row
from sim.scenario import make_scenario
from sim.summary import summarise


def run(
    config: Config, out: Path | str, resume: bool = False, listener: Listener | None = None
) -> dict[str, Any]:
    """Run the experiment of ``config`` in directory ``out``; returns its summary.

    Args:
        config: what to run.
        out: a new directory, or with ``resume`` an unfinished or extended one.
        resume: continue from the last intact checkpoint.
        listener: told of every round; progress bars are listeners.

    Raises:
        ValueError: bad configuration, a policy that cannot be sampled, or a directory that exists
            (or does not, or holds what was started with other models or code, with ``resume``).
    """
    with ExitStack() as held:
        return _run(config, Path(out), resume, listener or Silent(), held)


def _run(
    config: Config, out: Path, resume: bool, listener: Listener, held: ExitStack
) -> dict[str, Any]:
    check(config)
    config = settled(config)
    torch.set_num_threads(config.threads)
    with main_first():  # may build models
        scenario = make_scenario(config)
    kept = Record if is_main() else Onlooker
    begun = kept(out) if resume else None
    restored = None
    if begun is not None:
        check_origin(out, config, scenario)
        held.enter_context(begun.alone())
        with main_first():
            restored = begun.restore()
            if is_main():
                extend(out, config)
    start, state = restored or (0, {})
    env = make_env(config, scenario)  # the outside world
    agent = make_agent(config, scenario, state.get("agent"))  # the training system
    held.callback(agent.close)
    evaluate = make_evaluator(config, scenario, agent.policy.base)
    monitor = make_monitor(config, scenario)
    clocks, scored = Clocks(), Scored(config.feedback.delay)
    parts: dict[str, Any] = {"agent": agent, "monitor": monitor, "clocks": clocks, "scored": scored}
    parts["env"] = env.unwrapped
    detection = make_detection(config)
    if detection.watching:
        parts["detection"] = detection
    attacker = StopRule(config.attack.stop_at)
    if config.attack.stop_at:
        parts["early_stop"] = attacker
    observation, _ = env.reset(seed=config.seed)
    first = before_training(evaluate, agent) if restored is None else None
    record = begun or kept.create(out, manifest(config, scenario))
    if begun is None:
        held.enter_context(record.alone())

    def measured(round: int, evaluation: Evaluation) -> dict[str, Any]:
        """Judge an evaluation of the policy after ``round`` updates, and keep its weights."""
        with agent.stack.phase("export"):
            record.save_policy(round, *agent.stack.ctx.exported())
        return evaluation_row(monitor, evaluation, round, clocks)

    def save(round: int) -> None:
        record.checkpoint(round, {name: part.state_dict() for name, part in parts.items()})

    def ended(round: int) -> bool:
        exits = {"confirmed": monitor.confirmed, "sustained": monitor.exit_sustained}
        stopped = stopped_by(config.evaluation, **exits) is not None
        return stopped or attacker.reached or round >= config.rounds

    if first is not None:
        record.write(0, {"round": 0, **clocks.columns(), **measured(0, first)})
        save(0)
    else:
        state = {"detection": detection.state_dict(), **state}  # an older version's run had none
        others = [name for name in parts if name != "agent"]
        observation = {name: parts[name].load_state_dict(state[name]) for name in others}["env"]
        if monitor.planned < planned_evaluations(config):  # the run is extended
            monitor.extend(planned_evaluations(config))

    listener.start(config, start, config.rounds)
    diverged, round = None, start
    while not ended(round):
        round, began = round + 1, time.perf_counter()
        try:
            responses = agent.act(observation)  # what users are shown
            observation, utility, _, _, info = env.step(responses.ids)  # people label it
            learned = agent.learn(info["labels"], info.get("gold"))  # reward model, then policy
            last = attacker.see(info["cost"]) or round == config.rounds
            due = round % config.evaluation.every == 0 or last
            evaluation = evaluate(agent, round) if due else None
        except Diverged as failure:
            diverged = {"round": round, "reason": str(failure)}
            break
        scored.add(round - 1, info["truth"])
        tokens = int(responses.mask.sum())
        clocks.count(info["labels"], info["truth"], agent.stack.ctx.step, tokens)
        row = round_row(round, utility, info, learned, clocks)
        row |= detection.see(round, info, agent.served[0].stratum, learned.banned, clocks)
        if evaluation is not None:
            row |= measured(round, evaluation)
        tables = label_tables(config, agent, info, learned, scored)
        record.write(round, row, tables, {"seconds": time.perf_counter() - began})
        if round % config.checkpoint_every == 0 or ended(round):
            save(round)
        listener.round(row)

    wait()  # until all is written that the summary is made of
    summary = summarise(config, scenario, agent, evaluate, monitor, record, diverged)
    summary |= detection.summary()
    record.finish(summary)
    listener.finish(summary)
    return summary


def before_training(evaluate: Evaluator, agent: Agent) -> Evaluation:
    """Measure the policy that the run starts from.

    Raises:
        ValueError: it cannot be sampled, so there is nothing to train.
    """
    try:
        return evaluate(agent, 0)
    except Diverged as failure:
        raise UsageError(f"policy: {failure}; allowed: a model with finite logits") from None
