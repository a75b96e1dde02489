"""What was decided for a person, and what of the attack that was asked for does nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sim import flags
from sim.closing import owned, prepare_line
from sim.config import DEFAULT_ATTACK, Config


def announce(config: Config, typed: Collection[str]) -> None:
    """Say it before a run.

    Args:
        config: of the run.
        typed: the flags that were.
    """
    text, attack = config.text, config.attack
    if text.model and not (text.classifier or text.judge):
        print("harm: judged by refusal phrases alone; --text.classifier DIR or --text.judge DIR")
        print(f"      reads the answers (`{prepare_line(config)}` trains a classifier;")
        print("      with --dry-run it says size and time)")
    default = attack.name in (DEFAULT_ATTACK, flags.CROWD_ATTACK)
    if attack.rho and default and not names_attack(typed):
        print(f"attack: {attack.name} at rho {attack.rho:g} (the default; choose with --attack)")
    announce_idle([config])


def names_attack(typed: Collection[str]) -> bool:
    """Whether the flags ``typed`` choose an attack."""
    return not {"--attack", "--attack.name"}.isdisjoint(typed)


def announce_idle(configs: Sequence[Config]) -> None:
    """Say which attack acts in none of the runs ``configs``; the clean arm of others needs none."""
    attacks = [config.attack for config in configs]
    acting = {attack.name for attack in attacks if attack.rho} - {"none"}
    for name in dict.fromkeys(attack.name for attack in attacks):
        if name != "none" and name not in acting:
            wanted = "1" if owned(["--attack", name]) else "above 0"
            print(f"attack: {name} changes nothing at rho 0; give --rho {wanted}")
    rhos = dict.fromkeys(f"{attack.rho:g}" for attack in attacks if attack.rho)
    if rhos and not acting:
        what = ", ".join(rhos)
        print(f"attack: none, so everybody is honest whatever rho is; {what} is not kept")
