"""Where the time of a round goes, and beside it the same round from TRL.

Everything is a median over repetitions with its quartiles, after warm rounds that do not count.
Against TRL the two kinds of rounds alternate in one process, so a slow minute of the machine meets
both, and the ratio is the median of paired ratios: ``grpo_round.ratio_to_trl`` above 1 means that
ours is faster. What was measured also says whether both did the same work: answers or pairs,
optimizer steps, tokens, and the loss of a batch of TRL's own under both implementations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sim.config import Config
from sim.scenario import Scenario

WARM = 2
"""Rounds of each kind before any counts."""
TOKENS_TOLERANCE = 0.15
LOSS_TOLERANCE = 1e-4


def bench(
    config: Config, scenario: Scenario, repetitions: int, threads: int, against: str | None = None
) -> dict[str, Any]:
    """Measure; JSON values.

    Args:
        config: a run with the GRPO learner.
        scenario: its models and prompts.
        repetitions: rounds that count, of each kind.
        threads: torch threads, for everything.
        against: ``"trl"`` or nothing.
    """
    from sim.bench.machine import describe, matmul_rate
    from sim.bench.rounds import OurRounds
    from sim.threads import torch_threads

    with torch_threads(threads):
        rate = matmul_rate()
        ours = OurRounds(config, scenario)
        for _ in range(WARM):
            ours()
        memory = ours.memory()  # before anything of TRL's is in this process
        rows, evaluations, operations, tokens = [], [], [], []

        def our_turn() -> None:
            rows.append(ours())
            tokens.append(ours.work()["response_tokens"])
            operations.append(ours.operations())
            evaluations.append(ours.measure())

        trl = _beside_trl(config, scenario, repetitions, our_turn) if against else None
        if trl is None:
            for _ in range(repetitions):
                our_turn()
        work = {**ours.work(), "response_tokens": sum(tokens) / repetitions}
        side = _side(rows, work["response_tokens"], memory)
        side["seconds"]["evaluate"] = _spread(evaluations)
        shares: dict[str, list[float]] = {name: [] for name in operations[0]}
        for row, needed in zip(rows, operations, strict=True):
            for name in shares:
                shares[name].append(needed[name] / row[name] / rate)
        whole = [sum(w.values()) / r["round"] / rate for r, w in zip(rows, operations, strict=True)]
        side["matmul_share"] = {n: _spread(v)["median"] for n, v in shares.items()}
        side["matmul_share"]["round"] = _spread(whole)["median"]
        side["gflop"] = {name: value / 1e9 for name, value in operations[-1].items()}
        result: dict[str, Any] = {
            "machine": describe(threads, rate),
            "repetitions": repetitions,
            "grpo_round": {"work": work, "ours": side},
        }
        if trl is not None:
            _compare(result, trl, rows)
            pairs = ours.agent.replay.pairs(ours.agent.replay.usable())
            _dpo_beside_trl(result, config, scenario, pairs, repetitions)
        return result


def _beside_trl(config: Config, scenario: Scenario, repetitions: int, our_turn: Any) -> Any:
    """Run TRL's rounds with one of ours after each that counts."""
    from sim.bench.machine import read_memory, reset_peak
    from sim.bench.reward_loop import ask_ahead
    from sim.bench.trl_grpo import TrlRounds, best_batch

    size, tried = best_batch(config, scenario)
    texts = ask_ahead(config, scenario, WARM + 1 + repetitions)
    trl = TrlRounds(config, scenario, texts, size)
    trl.capture_first_round()
    memory: dict[str, Any] = {}

    def between(done: int) -> None:
        if done == WARM:  # the next round is watched for memory and does not count
            memory["resident"] = read_memory().now
            reset_peak()
        elif done == WARM + 1:
            memory["peak"] = {"round": read_memory().peak}
        if done > WARM + 1:
            our_turn()

    trl.run(between)
    rows = trl.seconds[WARM + 1 :]
    return {"rounds": trl, "rows": rows, "memory": memory, "tried": tried, "size": size}


def _compare(result: dict[str, Any], trl: dict[str, Any], ours: list[dict[str, float]]) -> None:
    """Add TRL's side, the paired ratio, and whether both did the same work."""
    from importlib.metadata import version

    work, other = result["grpo_round"]["work"], trl["rounds"].work(len(ours))
    side = _side(trl["rows"], other["response_tokens"], trl["memory"])
    side["version"] = version("trl")
    side["per_device_batch"] = trl["size"]
    side["seconds_by_per_device_batch"] = {str(k): v for k, v in trl["tried"].items()}
    ratios = _spread([b["round"] / a["round"] for a, b in zip(ours, trl["rows"], strict=True)])
    result["grpo_round"] |= {
        "trl": side,
        "ratio_to_trl": ratios["median"],
        "ratio_quartiles": [ratios["low"], ratios["high"]],
    }
    tokens = other["response_tokens"] / work["response_tokens"]
    counts = ("responses", "optimizer_steps", "reward_model_steps")
    gap = trl["rounds"].loss_gap()
    result["same_work"] = {
        **{name: work[name] == other[name] for name in counts},
        "response_tokens": abs(tokens - 1) <= TOKENS_TOLERANCE,
        "loss": gap <= LOSS_TOLERANCE,
    }
    result["differences"] = {"response_tokens_trl_over_ours": tokens, "loss_on_trl_batch": gap}


def _dpo_beside_trl(
    result: dict[str, Any], config: Config, scenario: Scenario, pairs: Any, repetitions: int
) -> None:
    """Add a DPO round on the pairs that people decided lately, ours and TRL's in turn."""
    from agents.batches import take
    from agents.learners.dpo import DPOConfig
    from sim.bench.trl_dpo import OurDpoRounds, TrlDpoRounds, best_batch

    learner = DPOConfig()
    decided = (pairs.target != 0.5).nonzero()[:, 0]
    n = len(decided) // learner.minibatch * learner.minibatch
    work: dict[str, Any] = {"pairs": n}
    result["dpo_round"] = {"work": work}
    if not n:
        return
    pairs = take(pairs, decided[:n])
    size, tried = best_batch(scenario, learner, pairs)
    ours = OurDpoRounds(config, scenario, pairs)
    trl = TrlDpoRounds(scenario, learner, pairs, size, WARM + repetitions)
    rows: list[dict[str, float]] = []

    def between(done: int) -> None:
        row = ours()
        if done > WARM:
            rows.append(row)

    trl.run(between)
    theirs = trl.seconds[WARM:]
    ratios = _spread([b["round"] / a["round"] for a, b in zip(rows, theirs, strict=True)])
    weights = {k: v.detach() for k, v in trl.trainer.model.state_dict().items()}
    first = take(pairs, torch.arange(learner.minibatch))
    gap = abs(trl.loss(learner.minibatch) - ours.loss(weights, first))
    work["optimizer_steps"] = ours.agent.stack.ctx.step // ours.round
    result["dpo_round"] |= {
        "ours": {"seconds": _spread([row["round"] for row in rows])},
        "trl": {
            "seconds": _spread([row["round"] for row in theirs]),
            "per_device_batch": size,
            "seconds_by_per_device_batch": {str(k): v for k, v in tried.items()},
        },
        "ratio_to_trl": ratios["median"],
        "ratio_quartiles": [ratios["low"], ratios["high"]],
    }
    steps = trl.trainer.state.global_step // len(trl.seconds)
    result["same_work"] |= {
        "dpo_steps": work["optimizer_steps"] == steps,
        "dpo_loss": gap <= LOSS_TOLERANCE,
    }
    result["differences"]["dpo_loss"] = gap


def _side(rows: list[dict[str, float]], tokens: float, memory: dict[str, Any]) -> dict[str, Any]:
    seconds = {name: _spread([row[name] for row in rows]) for name in rows[0]}
    return {
        "seconds": seconds,
        "response_tokens_per_second": {
            "round": tokens / seconds["round"]["median"],
            "sample": tokens / seconds["sample"]["median"],
        },
        "memory_mib": memory,
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}
