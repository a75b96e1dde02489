"""``poisonloop memory``: what fits where, computed from a config.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.usage import UsageError, blamed_on
from sim import flags
from sim.config import Config, registered_learner
from sim.hub import is_hub_id
from sim.listing import UNBROKEN

USAGE = """\
usage: poisonloop memory [PRESET] [--model M] [flags of `poisonloop run`]

  poisonloop memory
  poisonloop memory --model Qwen/Qwen2.5-0.5B-Instruct --learner grpo
  poisonloop memory --model models/mine --model.lora-rank 16 --learner.micro-batch 8
  poisonloop memory --processes 4

GiB by part for M, a directory or a hub id of which config.json is read, or for usual sizes of
models: trained whole, and through adapters on a base in float32 and in bfloat16. Flags of the run
change batches, lengths and rank; --learner chooses one (default: dpo and grpo). With --processes N
it is what each of N needs that share one run: docs/sharding.md.
"""
RANK = 16
"""Of the adapters, where no flag says it."""


def command(words: list[str]) -> int:
    """Print the table."""
    preset, options = flags.read(words)
    if "--help" in options:
        print(USAGE, end="")
        return 0
    name, processes = flags.take(options, "--model"), flags.positive(options, "--processes", 1)
    asked = "--learner" in options
    config = flags.build(preset, options)
    show(rows(config, models(name), () if asked else ("dpo", "grpo"), processes))
    return 0


def models(name: str | None) -> dict[str, Any]:
    """Transformers configs by what the table calls them."""
    from transformers import AutoConfig, LlamaConfig

    from sim.memory import SIZES

    if name is None:
        return {size: LlamaConfig(**fields) for size, fields in SIZES.items()}
    allowed = "a directory with config.json, or a hub id that is in the cache or can be reached"
    if not (Path(name) / "config.json").is_file() and not is_hub_id(name):
        raise UsageError(f"text.model={name!r}; allowed: {allowed}")
    with blamed_on(f"text.model={name!r} has no config that can be read", allowed):
        return {name: AutoConfig.from_pretrained(name)}


def rows(
    config: Config, known: dict[str, Any], learners: Iterable[str], processes: int = 1
) -> list[tuple[str, str, str, dict[str, int]]]:
    """Model, method, learner and bytes by part.

    Args:
        config: batches, lengths, rank; its own learner counts where ``learners`` is empty.
        known: transformers configs by name.
        learners: registered names.
        processes: that share one run.
    """
    from sim.memory import estimate

    settled = config.model.settled(real=True)
    rank = config.model.lora_rank or RANK
    methods = {
        "whole": replace(settled, lora_rank=0, dtype="float32"),
        f"adapters, rank {rank}": replace(settled, lora_rank=rank, dtype="float32"),
        f"adapters, rank {rank}, bfloat16": replace(settled, lora_rank=rank, dtype="bfloat16"),
    }
    chosen = [replace(config, learner=registered_learner(name)()) for name in learners] or [config]

    def bytes_of(one: Config, model: Any, shape: Any) -> dict[str, int]:
        return estimate(replace(one, model=model), shape, shape, processes=processes)

    return [
        (name, method, one.learner_name, bytes_of(one, model, shape))
        for name, shape in known.items()
        for one in chosen
        for method, model in methods.items()
    ]


def show(lines: list[tuple[str, str, str, dict[str, int]]]) -> None:
    """Print one row a method, and what this machine has."""
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sim.memory import GIB, available, peak

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    there = {device: available(device) for device in devices}
    parts = list(lines[0][3])
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("model", "trained", "learner"):
        table.add_column(heading, no_wrap=heading != "trained")
    for heading in (*parts, "peak", *(f"fits {device}" for device in devices)):
        table.add_column(heading, justify="right")
    for name, method, learner, found in lines:
        whole = peak(found)
        sizes = [f"{found[part] / GIB:.2f}" for part in parts]
        fits = ["yes" if whole <= there[device] else "no" for device in devices]
        table.add_row(Text(name), method, learner, *sizes, f"{whole / GIB:.2f}", *fits)
    console = Console()
    console.width = console.width if console.is_terminal else UNBROKEN
    console.print(table)
    held = ", ".join(f"{device} {size / GIB:.1f}" for device, size in there.items())
    console.print(Text(f"GiB. This machine: {held}. The peak counts the larger of the last two."))
