"""One run in several processes: ``accelerate launch --use_fsdp --fsdp_version 2 -m sim.cli run``.

Accelerate starts the processes and hands on its settings as environment variables. Those that a run
cannot honour are refused here by name, before anything heavy is imported.
"""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta

from envs.usage import UsageError

COMMANDS = ("run", "resume")
"""What several processes can share; everything else starts processes of its own."""
LAUNCH = "accelerate launch --use_fsdp --fsdp_version 2"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "ZeRO hides the gradients that defences edit",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "its models are none of transformers'"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "weights stay on their device"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "it is --model.gradient-checkpointing",
    ),
}
"""Switches of accelerate's, what they are called, and why not."""


def launched() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the one of them that writes and prints."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


def check(command: str) -> None:
    """Refuse what several processes cannot do, or not this way.

    Raises:
        ValueError: names the setting and what is allowed.
    """
    for variable, (name, why) in REFUSED.items():
        if _on(variable):
            raise UsageError(f"accelerate: {name} ({why}); allowed: {LAUNCH}")
    if launched() == 1:
        return
    if command not in COMMANDS:
        raise UsageError(
            f"poisonloop {command} in {launched()} processes; allowed: {', '.join(COMMANDS)}"
        )
    version = os.environ.get("FSDP_VERSION", "1") if _on("ACCELERATE_USE_FSDP") else None
    if version != "2":
        found = "without FSDP" if version is None else f"with FSDP {version}"
        raise UsageError(f"{launched()} processes {found}; allowed: {LAUNCH}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UsageError(
            f"accelerate: mixed_precision={precision}; allowed: no (it is --model.dtype bfloat16)"
        )


def join() -> None:
    """Meet the other processes; all but the main one are silent from here on."""
    if launched() == 1:
        return
    # Transformers would read weights in the first process alone and leave the others' unset.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others may wait long for the main one; when a process dies, accelerate ends them all.
    torch.distributed.init_process_group(timeout=timedelta(days=1))
    atexit.register(torch.distributed.destroy_process_group)
    if not is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
