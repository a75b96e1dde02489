"""The loop of a run without records and evaluations, for measuring what happens inside."""

from __future__ import annotations

import time

from sim.config import Config
from sim.factory import make_agent, make_env
from sim.scenario import make_scenario


class Loop:
    """One training system with its people; ``round`` goes on where the last one ended."""

    def __init__(self, config: Config):
        self.config, scenario = config, make_scenario(config)
        self.env, self.agent = make_env(config, scenario), make_agent(config, scenario)
        self.observation, _ = self.env.reset(seed=config.seed)

    def round(self) -> float:
        """One round; its seconds."""
        began = time.perf_counter()
        responses = self.agent.act(self.observation)
        self.observation, _, _, _, info = self.env.step(responses.ids)
        self.agent.learn(info["labels"])
        return time.perf_counter() - began
