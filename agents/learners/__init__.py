"""Learners: one file each, readable alone, with the equation in its docstring.

A learner is registered by its frozen config dataclass, whose ``build`` makes it; the name a person
types after ``--learner`` is the registered one.
"""

from envs.registry import Registry

learners = Registry("learner", "agents.learners")
