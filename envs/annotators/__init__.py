"""Honest annotators, composed of small behaviours.

Every behaviour may act at four places, in this order, each for all votes at once:

    activity      how often a person acts
    logit         s = sum of the behaviours' terms; P(first preferred) = sigmoid(s)
    probability   what lapses and mistakes make of P
    answer        ties and abstentions, after a side was drawn

A behaviour is one class in one file, decorated with ``@annotators.register(name)``; its keyword
arguments are its whole configuration.
"""

from __future__ import annotations

import numpy as np

from envs.annotators.view import View
from envs.registry import Registry

DEFAULT = ("boltzmann(beta=4.0)", "lapse(rate=0.02)")
"""Careful people: they err on close pairs and slip now and then."""
NOISY = ("boltzmann(beta=0.9)", "lapse(rate=0.05)")
"""People as they are measured: right on .78 of the pairs that differ, when an aligned policy of the
embedded world answers, so that two of them agree on .66 (AlpacaFarm, Dubois et al. 2023). As a
policy moves, differences shrink and so does agreement: that looks like an attack."""


class Behaviour:
    """One trait of annotators; the defaults do nothing."""

    def activity(self, weight: np.ndarray) -> np.ndarray:
        """(people,) unnormalised rates of acting, from those so far."""
        return weight

    def logit(self, view: View) -> np.ndarray | float:
        """(N,) term added to the log-odds of preferring the first response."""
        return 0.0

    def probability(self, view: View, p: np.ndarray) -> np.ndarray:
        """(N,) probability of preferring the first response, from that so far."""
        return p

    def answer(self, view: View, vote: np.ndarray) -> np.ndarray:
        """(N,) int8 votes, from the sides that were drawn."""
        return vote


annotators = Registry("annotator", "envs.annotators", Behaviour)


__all__ = ["DEFAULT", "NOISY", "Behaviour", "View", "annotators"]
