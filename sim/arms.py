"""Named sets of arms: experiments that no product of values describes, as the flags of each arm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArmSet:
    """Arms by name, each as the flags a person would type after ``poisonloop run PRESET``."""

    preset: str
    arms: dict[str, str]


ARM_SETS = {
    "demo": ArmSet(
        preset="demo",
        arms={
            "clean": "--rho 0",
            "poisoned": "--rho 0.4",
            "poisoned + refusal_loss": "--rho 0.4 --defence refusal_loss",
            "poisoned + freeze": "--rho 0.4 --defence freeze",
        },
    ),
}
"""``demo``: honest people; adversaries; the same with a defence; the same with a null control."""
