"""The bench's figures as a table for people."""

from __future__ import annotations

from typing import Any


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    from sim.bench.rounds import STAGES

    console, machine, figures = Console(), result["machine"], result["grpo_round"]
    ours, trl, work = figures["ours"], figures.get("trl"), figures["work"]
    table = Table(title="one GRPO round: seconds, median (quartiles)")
    table.add_column("stage")
    for name in ("ours", *(["TRL"] if trl else []), "matmul", "MiB"):
        table.add_column(name, justify="right")
    for stage in (*STAGES, "round", "evaluate"):
        peak = ours["memory_mib"]["peak"].get(stage)
        table.add_row(
            f"[bold]{stage}[/]" if stage == "round" else stage,
            _cell(ours["seconds"], stage),
            *([_cell(trl["seconds"], stage)] if trl else []),
            f"{ours['matmul_share'][stage]:.0%}" if stage in ours["matmul_share"] else "",
            f"{peak:.0f}" if peak else "",
        )
    console.print(table)
    console.print(
        f"{work['responses']} responses, {work['response_tokens']:.0f} tokens, "
        f"{work['optimizer_steps']} + {work['reward_model_steps']} optimizer steps; "
        f"{ours['response_tokens_per_second']['round']:.0f} response tokens/s; "
        f"matmul: useful operations on real tokens as a share of {machine['matmul_gflops']:.0f} "
        f"GFLOP/s at {machine['threads']} threads, which copy {machine['copy_gbytes']:.0f} GB/s"
    )
    if not trl:
        return
    low, high = figures["ratio_quartiles"]
    console.print(
        f"TRL {trl['version']}, {trl['per_device_batch']} answers per forward, takes "
        f"[bold]{figures['ratio_to_trl']:.2f}[/] times as long ({low:.2f} to {high:.2f})"
    )
    dpo = result["dpo_round"]
    work = dpo["work"]
    if not work["pairs"]:
        console.print("no DPO round: people decided too few pairs to fill a minibatch")
    else:
        low, high = dpo["ratio_quartiles"]
        console.print(
            f"one DPO round of {work['pairs']} pairs, {work['optimizer_steps']} optimizer steps: "
            f"ours {_cell(dpo['ours'], 'seconds')}, TRL {_cell(dpo['trl'], 'seconds')}, "
            f"[bold]{dpo['ratio_to_trl']:.2f}[/] times as long ({low:.2f} to {high:.2f})"
        )
    differs = [name for name, equal in result["same_work"].items() if not equal]
    console.print(
        f"[red]work differs: {', '.join(differs)}[/]" if differs else "same work and losses"
    )


def _cell(seconds: dict[str, Any], stage: str) -> str:
    if stage not in seconds:
        return ""
    s = seconds[stage]
    return f"{s['median']:.3f} ({s['low']:.3f}-{s['high']:.3f})"


def show_memory(result: dict[str, Any]) -> None:
    """Print memory by part."""
    from rich.console import Console
    from rich.table import Table

    console, sides = Console(), result["mib"]
    table = Table(title=f"{result['shape']} policy, {result['vocabulary']} words: MiB of one round")
    table.add_column("part")
    for name in sides:
        table.add_column(name, justify="right")
    for part in next(iter(sides.values()))["parts"]:
        table.add_row(part, *(f"{side['parts'][part]:.0f}" for side in sides.values()))
    for stage in next(iter(sides.values()))["resident"]:
        row = (side["resident"][stage] for side in sides.values())
        table.add_row(
            f"resident, {stage}" + (" (peak)" if stage != "loaded" else ""),
            *(f"{v:.0f}" if v else "" for v in row),
        )
    console.print(table)
