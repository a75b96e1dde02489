"""Other shapes of the environment's step, for code that expects them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs


class CostInTuple(gym.Wrapper, RecordConstructorArgs):
    """The 6-tuple of safety-gymnasium: (observation, reward, cost, terminated, truncated, info)."""

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def step(self, action: np.ndarray) -> tuple[Any, ...]:  # type: ignore[override]
        """As the environment's, with ``info["cost"]`` also in third place."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, info["cost"], terminated, truncated, info
