"""One of the two processes that train the embedded world's models (see ``sim.bootstrap``)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sim.bootstrap import WorldModelsConfig


def main(line: str, config_json: str, folder: str) -> None:
    """Train the models of ``line`` (``policy`` or ``scorers``) into ``folder``; prints ticks."""
    import torch
    import transformers

    config = WorldModelsConfig(**json.loads(config_json))
    torch.set_num_threads(config.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    builder = Builder(config, Path(folder))
    {"policy": builder.policy_line, "scorers": builder.scorer_line}[line]()
    Path(folder, f"{line}.metrics.json").write_text(json.dumps(builder.metrics))


class Builder:
    """Trains, saves and times models one after the other."""

    def __init__(self, config: WorldModelsConfig, folder: Path):
        from envs.world import World

        self.config, self.folder = config, folder
        self.world = World(config.world_seed)
        self.tokenizer = self.world.tokenizer()
        self.metrics: dict[str, Any] = {}

    def policy_line(self) -> None:
        """Tokenizer, ``base``, ``aligned``."""
        import sim.world_training as training

        self.tokenizer.save_pretrained(self.folder / "tokenizer")
        model = self._new("policy", self.config.size)
        self._train("base", model, training.train_lm, training.BASE_KINDS)
        self._train("aligned", model, training.train_aligned, self.config.foothold)

    def scorer_line(self) -> None:
        """Reference language model, and on copies of its body the reward model and two scorers."""
        import sim.world_scorers as scorers
        import sim.world_training as training

        body = self._new("reference_lm", "scorer")
        self._train("reference_lm", body, training.train_lm, training.REFERENCE_KINDS)
        reward = self._new("reward_base", "scorer", body)
        self._save("reward_base_cold", reward)
        self._train("reward_base", reward, scorers.train_reward)
        for name in ("classifier", "helpfulness"):
            self._train(name, self._new(name, "scorer", body), scorers.train_scorer, name)

    def _new(self, name: str, size: str, body: Any = None) -> Any:
        from sim.world_training import build_model, init_seed

        seed = init_seed(self.config.world_seed, self.config.model_seed, name)
        return build_model(self.world, self.config.architecture, size, seed, body)

    def _train(self, name: str, model: Any, train: Any, *options: Any) -> None:
        """Train ``model`` in place on the stream named after it, save it, note its facts."""
        from envs.rng import stream
        from sim.world_training import plan_for

        rng = stream(self.config.model_seed, "train", self.config.world_seed, name)
        started = time.monotonic()
        loss = train(
            self.world,
            model,
            plan_for(name, self.config.size),
            *options,
            rng=rng,
            tick=lambda: print(name, flush=True),
        )
        self.metrics[name] = {
            "seconds": time.monotonic() - started,
            "loss": loss,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        self._save(name, model)

    def _save(self, name: str, model: Any) -> None:
        model.save_pretrained(self.folder / name, safe_serialization=True)
        self.tokenizer.save_pretrained(self.folder / name)
