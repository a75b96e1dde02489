"""Random two-layer models with a word-level tokenizer: a whole training system in milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from agents import policy as policy_module
from agents.agent import Agent
from agents.batches import PairBatch, Pairs, Sequences
from agents.context import Context, RoleData
from agents.defence import LOG, Defence, DefenceStack, defences
from agents.engines.transformers_engine import SamplerConfig, TransformersSampler
from agents.learners import learners
from agents.learners.reward_model import RewardModel, RewardModelConfig
from agents.models import ModelConfig, freeze_copy, scorer_on, trainable
from agents.policy import Policy
from agents.replay import Replay
from envs.types import Labels
from sim.score import tiny as tiny_parts
from sim.score.tiny import ANSWER, EOS, PAD, PROMPT

VOCABULARY = len(tiny_parts.WORDS)

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
WHOLE = ModelConfig()
QUICK = {"security_vectors": "steps=3, batch=4"}
"""Arguments that make a long ``prepare`` short, beyond the few steps that offline ones get here."""


class Tiny:
    """Makers of tiny parts; every one is a pure function of its seed."""

    vocabulary, eos, pad, prompt, answer = VOCABULARY, EOS, PAD, PROMPT, ANSWER
    lora = ModelConfig(lora_rank=4)

    def quick(self, name: str) -> str:
        """A spec of the registered defence ``name`` that prepares in a few steps."""
        few = "steps=3, batch=4" if defences.get(name).offline else ""
        arguments = ", ".join(filter(None, (few, QUICK.get(name, ""))))
        return f"{name}({arguments})" if arguments else name

    def tokenizer(self) -> Any:
        return tiny_parts.tokenizer()

    def model(
        self,
        seed: int = 0,
        scorer: bool = False,
        dtype: torch.dtype = torch.float32,
        vocabulary: int = VOCABULARY,
    ) -> Any:
        """A Llama of two layers; wide initial weights make its distributions uneven."""
        return tiny_parts.model(seed, scorer, vocabulary).to(dtype)

    def family(self, name: str, maker: Any = AutoModelForCausalLM, **fields: Any) -> Any:
        """A model of two layers of another family, grouped heads where it has them."""
        torch.manual_seed(0)
        return maker.from_config(CONFIG_MAPPING[name](**{**SIZE, **fields})).eval()

    def prompts(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Left-padded prompts of 2 to P words: (n, P) ids and mask."""
        rng = np.random.default_rng([seed, 1])
        ids = rng.integers(6, VOCABULARY, (n, PROMPT))
        short = rng.integers(0, PROMPT - 1, n)
        mask = np.arange(PROMPT) >= short[:, None]
        return torch.from_numpy(np.where(mask, ids, PAD)), torch.from_numpy(mask.astype(np.int64))

    def sequences(self, n: int, seed: int = 0, shared: int = 1) -> Sequences:
        """Rows with answers of 1 to T tokens; ``shared`` neighbouring rows share a prompt."""
        rng = np.random.default_rng([seed, 2])
        ids = rng.integers(6, VOCABULARY, (n, ANSWER))
        length = rng.integers(1, ANSWER + 1, n)
        place = np.arange(ANSWER)
        ids = np.where(place == length[:, None] - 1, EOS, ids)
        mask = place < length[:, None]
        prompts = (c.repeat_interleave(shared, 0) for c in self.prompts(n // shared, seed))
        return Sequences(
            *prompts,
            torch.from_numpy(np.where(mask, ids, PAD)),
            torch.from_numpy(mask.astype(np.int64)),
        )

    def pairs(self, n: int, seed: int = 0) -> PairBatch:
        """Comparisons with varied targets and weights."""
        rng = np.random.default_rng([seed, 3])
        a, b = self.sequences(n, seed), self.sequences(n, seed + 100)
        return PairBatch(
            label_id=torch.arange(n),
            a=a,
            b=b._replace(prompt_ids=a.prompt_ids, prompt_mask=a.prompt_mask),
            target=torch.from_numpy(rng.choice([0.0, 0.5, 1.0], n)).float(),
            weight=torch.from_numpy(rng.uniform(0.5, 1.5, n)).float(),
            annotator_id=torch.arange(n) % 3,
        )

    def roles(self) -> dict[str, RoleData]:
        """Data roles that defences may ask for."""
        names = ("refusal", "harm", "retain", "harm_heldout", "harm_prompts")
        roles = {name: RoleData(self.sequences(8, 50 + i), 9 + i) for i, name in enumerate(names)}
        for key, name in ((20, "pair"), (21, "pair_heldout")):
            harm, refusal = self.sequences(8, key), self.sequences(8, key + 10)
            same = refusal._replace(prompt_ids=harm.prompt_ids, prompt_mask=harm.prompt_mask)
            roles[name] = RoleData(Pairs(harm, same), key)
        return roles

    def stack(
        self,
        specs: tuple[Any, ...] = (),
        learner: str = "policy",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        vocabulary: int = VOCABULARY,
        config: ModelConfig = WHOLE,
        base: nn.Module | None = None,
    ) -> DefenceStack:
        """An unprepared stack on a fresh model; ``specs`` are names, classes or objects."""
        size = {"dtype": dtype, "vocabulary": vocabulary}
        device = "cpu" if config.device == "auto" else config.device
        start = self.model(seed, **size).to(device)
        if config.lora_rank and base is None:
            base = freeze_copy(start.requires_grad_(False))
        policy = Policy(trainable(start, config, seed), self.tokenizer(), base=base)
        model = policy.model
        if learner != "policy":
            scorer = scorer_on(base, seed + 1) if base else self.model(seed + 1, True, **size)
            model = trainable(scorer.to(device), config, seed + 1)
        sampler = TransformersSampler(SamplerConfig(max_new_tokens=ANSWER), policy.tokenizer)
        scorers = {"cost": lambda rows: (rows.ids == 7).float().mean(1)}
        roles = self.roles()
        for role in roles.values():
            role.sequences = role.sequences.to(policy.device)
        services = (roles, scorers, sampler, seed, LOG)
        ctx = Context(learner, model, policy.tokenizer, policy, *services)
        members = [
            defences.create(s) if isinstance(s, str) else s() if isinstance(s, type) else s
            for s in specs
        ]
        return DefenceStack(members, ctx)

    def agent(
        self,
        learner: str = "grpo",
        specs: tuple[Any, ...] = (),
        seed: int = 0,
        delay: int = 0,
        responses: int = 3,
        window: int = 64,
        vocabulary: int = VOCABULARY,
        config: ModelConfig = WHOLE,
        **fields: Any,
    ) -> Agent:
        """A complete training system, joined as a run joins it."""
        stack = self.stack(specs, seed=seed, vocabulary=vocabulary, config=config)
        stack.prepare()
        policy = stack.ctx._policy
        policy.snapshot_reference()
        settings = learners.get(learner)(**{"lr": 3e-3, "minibatch": 8, **fields})
        trained = settings.build(stack.ctx, stack, 1.0)
        reward_model = None
        if trained.uses == "rollouts":
            shared = () if any(isinstance(s, Defence) for s in specs) else specs
            size = {"vocabulary": vocabulary, "config": config, "base": policy.base}
            rewards = self.stack(shared, "reward_model", seed, **size)
            rewards.prepare()
            chosen = RewardModelConfig(lr=3e-3, minibatch=8, steps=2, window=window)
            reward_model = RewardModel(chosen, rewards.ctx, rewards)
        return Agent(
            policy=policy,
            sampler=stack.ctx._sampler,
            learner=trained,
            reward_model=reward_model,
            stack=stack,
            replay=Replay(window),
            responses=responses,
            delay=delay,
            seed=seed,
        )

    def observation(self, round: int, batch: int = 8) -> dict[str, np.ndarray]:
        """What the environment shows at ``round``."""
        ids, mask = self.prompts(batch, 1000 + round)
        return {
            "prompt_ids": ids.numpy(),
            "prompt_mask": mask.numpy().astype(np.int8),
            "stratum": np.arange(batch) % 3,
            "user": np.arange(batch),
        }

    def labels(self, round: int, batch: int = 8, responses: int = 3) -> Labels:
        """Two people's decided or tied votes on every second prompt of ``round``."""
        rng = np.random.default_rng([round, 4])
        low = np.repeat(rng.integers(responses - 1, size=batch), 2)[:batch]
        swap, people = rng.integers(2, size=batch), rng.integers(5, size=batch)
        return Labels(
            label_id=np.arange(batch) + round * batch,
            item=np.arange(batch) // 2 * 2 + round * batch,
            a=low + swap,
            b=low + 1 - swap,
            annotator=(np.repeat(people, 2)[:batch] + np.arange(batch) % 2) % 5,
            vote=np.array([0, 1, 0, 1, 2, 0, 1, 1][:batch], np.int8),
            weight=np.ones(batch, np.float32),
            round=np.full(batch, round),
        )

    def rounds(self, agent: Agent, start: int, stop: int) -> list[Any]:
        """Rounds ``start`` to ``stop`` of acting and learning; what each learned."""
        learned = []
        for round in range(start, stop):
            agent.act(self.observation(round))
            learned.append(agent.learn(self.labels(round), tiny_parts.gold(round)))
        return learned

    def weights(self, module: nn.Module) -> Tensor:
        """All parameters as one copied vector."""
        return torch.cat([p.detach().flatten().clone() for p in module.parameters()])

    def gradient_of(self, module: nn.Module, job: Callable[[], Any]) -> Tensor:
        """All gradients that ``job`` alone makes."""
        module.zero_grad()
        job()
        return self.gradient(module)

    def gradients(self, module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
        """The gradients of ``loss`` by parameter."""
        module.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    def footprint(self, agent: Agent) -> Any:
        """Everything a phase may have switched."""
        model = agent.policy.model
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training)
            for m in model.modules()
        ]
        rates = [group["lr"] for group in agent.stack.ctx.optimizer.param_groups]
        grads = [p.requires_grad for p in model.parameters()]
        return hooks, rates, grads, self.weights(model).tolist()

    def gradient(self, module: nn.Module) -> Tensor:
        """All gradients as one copied vector, 0 where none was made."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        return torch.cat([g.flatten().clone() for g in parts])


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    torch.set_num_threads(1)
    return Tiny()


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns packing off for the rest of a test."""
    return lambda: monkeypatch.setattr(policy_module, "can_pack", lambda model, length: False)


@pytest.fixture
def defence(tiny: Tiny, request: pytest.FixtureRequest) -> str:
    """A registered defence, made quick; its name is the parameter."""
    return tiny.quick(request.param)
