"""No attack: the null object that every comparison has as its other arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from envs.attacks import Attack, attacks


@attacks.register("none")
@dataclass(frozen=True)
class NoAttack(Attack):
    """Everybody is honest, whatever rho says."""

    unit: ClassVar[str] = "nobody"
