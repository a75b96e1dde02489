"""A10, schedules: when an attack acts. They wrap any attack by the factor g(t) in [0, 1].

With t0 = ``start``, L = ``length``, P = ``period`` and s = t - t0, g is 0 before t0 and then

    constant  1                     (t0 must be 0: an attack that begins later is a sleeper)
    sleeper   1                     good reputation until t0
    burst     1[s < L]              one window
    ramp      min(1, (s + 1) / L)   full strength in the L-th round
    pulsed    1[s mod P < L]        the first L rounds of every P
    on_off    1[s mod P >= L]       L honest rounds, then P - L hostile ones
    drip      L / P                 as much as pulsed, spread evenly

Where g is a fraction, each malicious act is hostile with probability g and honest otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from envs.usage import UsageError, check_ranges

Gate = Callable[[int, int, int], float]

SCHEDULES: dict[str, Gate] = {
    "constant": lambda s, length, period: 1.0,
    "burst": lambda s, length, period: float(s < length),
    "ramp": lambda s, length, period: min(1.0, (s + 1) / length),
    "drip": lambda s, length, period: length / period,
    "pulsed": lambda s, length, period: float(s % period < length),
    "sleeper": lambda s, length, period: 1.0,
    "on_off": lambda s, length, period: float(s % period >= length),
}
"""g by name, as a function of s >= 0, L and P."""
WITH_LENGTH = ("burst", "ramp", "drip", "pulsed", "on_off")
WITH_PERIOD = ("drip", "pulsed", "on_off")
"""Kinds that use L, and those that use P; all but ``constant`` use t0."""


@dataclass(frozen=True)
class Schedule:
    """When an attack acts.

    Raises:
        ValueError: an unknown kind, or a start, length or period that makes no sense for it.
    """

    kind: str = "constant"
    """One of ``SCHEDULES``."""
    start: int = 0
    """t0, the first round of the attack."""
    length: int = 0
    """L, rounds of a burst, of a ramp's rise, or of the first part of a period."""
    period: int = 0
    """P, rounds from one pulse to the next."""

    def __post_init__(self) -> None:
        """Check the fields that the kind uses."""
        check_ranges(self, start="", length="", period="")
        if self.kind not in SCHEDULES:
            raise UsageError(f"schedule={self.kind!r}; allowed: {', '.join(SCHEDULES)}")
        if self.start < 0 or (self.kind == "constant" and self.start):
            allowed = "0 (use 'sleeper')" if self.kind == "constant" else ">= 0"
            raise UsageError(f"start={self.start} with {self.kind!r}; allowed: {allowed}")
        if self.kind in WITH_LENGTH and self.length < 1:
            raise UsageError(f"length={self.length} with {self.kind!r}; allowed: >= 1")
        if self.kind in WITH_PERIOD and self.period < self.length:
            raise UsageError(
                f"period={self.period} with {self.kind!r}; allowed: >= length={self.length}"
            )

    def intensity(self, round: int) -> float:
        """g(t): the share of malicious acts in ``round`` that are hostile."""
        since = round - self.start
        return SCHEDULES[self.kind](since, self.length, self.period) if since >= 0 else 0.0
