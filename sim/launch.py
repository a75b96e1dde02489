"""One run in several processes: ``accelerate launch --use_fsdp --fsdp_version 2 -m sim.cli run``.

Accelerate starts the processes and hands on its settings as environment variables. Those that a run
cannot honour are refused here by name, before anything heavy is imported.
"""

from __future__ import annotations

import os
import sys
import time
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
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "parallelism_config",
        "weights are divided by FSDP2 alone",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "it is --model.gradient-checkpointing",
    ),
}
"""Switches of accelerate's, what they are called, and why not."""
FIXED = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no", "precision is --model.dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no", "models are not compiled"),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", "true", "weights are taken apart"),
}
"""Settings of accelerate's with the one value that is honoured."""
PATIENCE = 10.0
"""Seconds that a process waits for the main one's error before it ends with its own."""


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
    for variable, (name, honoured, why) in FIXED.items():
        value = os.environ.get(variable, honoured)
        if value.lower() != honoured:
            raise UsageError(f"accelerate: {name}={value}; allowed: {honoured} ({why})")


def join() -> None:
    """Meet the other processes; all but the main one are silent from here on."""
    if launched() == 1:
        return
    # Transformers would read weights in the first process alone and leave the others' unset.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    import torch

    card = int(os.environ["LOCAL_RANK"])
    if card < torch.cuda.device_count():
        torch.cuda.set_device(card)
    # The others may wait long for the main one; when a process dies, accelerate ends them all.
    torch.distributed.init_process_group(timeout=timedelta(days=1))
    if not is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave() -> None:
    """Part from the others at a good end. After a bad one, the launcher ends them all."""
    if launched() > 1:
        import torch

        torch.distributed.destroy_process_group()


def leave_it_to_main() -> None:
    """In all but the main process: wait a while for the end that the main one's own error brings.

    The launcher ends all processes with the first that fails, and it should be the one that prints.
    """
    if not is_main():
        time.sleep(PATIENCE)


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
