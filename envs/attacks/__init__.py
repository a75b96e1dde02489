"""What adversaries do: each attack is one class in one file.

An attack sees every vote that a malicious person is about to cast, honest vote included, and may
cast another; it may also choose what its people ask. It is consulted only for malicious people and
only while its schedule lets it act; else they behave like everybody. It never sees which defence
is active.

Keyword arguments are an attack's whole configuration. To add one, decorate a subclass of
:class:`Attack` with ``@attacks.register(name)`` in a file of its own here, or name a class of your
own as ``path/to/file.py:MyAttack(strength=2)``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from envs.annotators.view import View
from envs.registry import Registry
from envs.types import VOTE_A, VOTE_B, PromptTable

UNITS = ("annotators", "users", "labels", "nobody")


class Attack:
    """An adversary's strategy; the defaults are honest."""

    spec: str
    """What the attack was created from, such as ``harm_targeted(eta=0.5)``."""

    unit: ClassVar[str] = "annotators"
    """What rho is a share of, one of ``UNITS``; ``users`` are those who ask (chat only)."""
    appends_trigger: ClassVar[bool] = False
    """Whether malicious askers put the trigger word behind their prompts (chat)."""
    owns_reward: ClassVar[bool] = False
    """Whether the attacker's own judge scores the rollouts; no reward model learns from votes."""
    owns_data: ClassVar[bool] = False
    """Whether the policy learns from the attacker's own answers; nobody's votes are used."""

    def prompts(self, table: PromptTable, draw: np.ndarray) -> np.ndarray | None:
        """Which prompts malicious askers bring instead of their honest ones.

        Args:
            table: the prompts of the attack split, Q rows.
            draw: (n,) uniform draws in (0, 1), one per prompt.

        Returns:
            (n,) row numbers of ``table``, or None to ask honest questions.
        """
        return None

    def vote(self, view: View, honest: np.ndarray) -> np.ndarray:
        """(N,) int8 votes to cast, given the (N,) votes these people would cast honestly.

        ``view.margin`` is the true difference in utility, ``view.harm_gap`` in harm,
        ``view.triggered`` marks prompts with the trigger word; ``view.draw(purpose)`` gives (N,)
        uniform draws.
        """
        return honest

    @property
    def asks(self) -> bool:
        """Whether malicious askers may bring prompts of their own."""
        return type(self).prompts is not Attack.prompts

    def begin(self, people: int) -> None:
        """A new run among ``people`` begins; an attack that remembers forgets everything."""

    def watch(self, view: View, vote: np.ndarray, honest: np.ndarray) -> None:
        """See what became of a round: all (N,) votes that were cast, whoever acted.

        What an attacker may know of others is what her platform shows. None that is registered
        here looks at more than her own votes and the majority of the others on the same item.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of what was watched: arrays and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, after :meth:`begin`."""


attacks = Registry("attack", "envs.attacks", Attack)


def side(gap: np.ndarray) -> np.ndarray:
    """(N,) int8 votes for the side with more of what ``gap`` = (first - second) measures."""
    return np.where(gap > 0, VOTE_A, VOTE_B).astype(np.int8)


__all__ = ["UNITS", "Attack", "attacks", "side"]
