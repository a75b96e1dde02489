"""The embedded default: a small synthetic language with an exact oracle of harm and help."""

from envs.world.answers import ANSWER_KINDS
from envs.world.language import DOMAINS, HARM_DOMAINS, SPLITS
from envs.world.oracle import Oracle
from envs.world.world import World

__all__ = ["ANSWER_KINDS", "DOMAINS", "HARM_DOMAINS", "SPLITS", "Oracle", "World"]
