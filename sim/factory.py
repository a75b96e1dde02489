"""From configuration to parts: the outside world, the training system, and what measures them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import gymnasium
from torch import Tensor, nn

import envs  # noqa: F401  (registers the environment)
from agents.adapters import load_own_state, load_plain
from agents.agent import Agent
from agents.context import Context, RoleData
from agents.defence import DefenceStack, defences
from agents.engines.backend import Backend, Room
from agents.engines.shared import Shared
from agents.engines.transformers_engine import TransformersSampler
from agents.engines.vllm_sampler import VLLMSampler
from agents.learners.reward_model import RewardModel, load_reward_model
from agents.models import freeze_copy, scorer_on, trainable
from agents.policy import Policy, load_causal_lm, load_tokenizer
from agents.processes import count, is_main
from agents.replay import Replay
from agents.sharding import shard
from envs import hacking
from envs import rng as draws
from envs.attacks import attacks
from envs.monitor import CostMonitor
from sim.attacker import owned_loop
from sim.config import Config
from sim.detection import Detection
from sim.evaluate import Evaluator
from sim.scenario import Scenario


def make_env(config: Config, scenario: Scenario) -> gymnasium.Env:
    """The environment of ``config``, wrapped by nothing."""
    people, attack = config.feedback, config.attack
    return gymnasium.make(
        "FeedbackPoisoning/Live-v0",
        disable_env_checker=True,
        **scenario.environment,
        batch=people.batch,
        responses=people.responses,
        pairs=people.pairs,
        tokens=config.sampler.max_new_tokens,
        collection=people.collection,
        redundancy=people.redundancy,
        annotators=people.annotators,
        activity=people.activity,
        behaviours=list(people.behaviours),
        attack=attack.name,
        rho=attack.rho,
        schedule=attack.schedule,
        start=attack.start,
        length=attack.length,
        period=attack.period,
        harmful_share=people.harmful_share,
        contrast_share=people.contrast_share,
        stratum_error=people.stratum_error,
        trigger_share=people.trigger_share,
        gold_share=people.gold_share,
        gold_harmful=people.gold_harmful,
        delay=people.delay,
        cost_limit=config.evaluation.cost_limit,
        rounds=config.rounds,
    )


class Start(NamedTuple):
    """What an agent begins with in place of its scenario's models, by learner."""

    weights: Mapping[str, Mapping[str, Tensor]] = {}
    """Of the models that defences prepare: what ``load_plain`` takes of the policy, and the own
    state of the reward model."""
    defences: Mapping[str, list[dict[str, Any]]] = {}
    """States that defences recreate their structure from, instead of preparing."""


def make_agent(
    config: Config,
    scenario: Scenario,
    restored: dict[str, Any] | None = None,
    start: Start | None = None,
) -> Agent:
    """The training system: policy, sampler, reward model, learner, wrapped by the defences.

    Args:
        restored: an agent's state. Defences then recreate their structure from it instead of
            preparing again, and everything else is loaded after.
        start: what to begin with where there is no whole state.

    Raises:
        ValueError: an unknown defence, or one that needs what this run does not have.
    """
    tokenizer = load_tokenizer(scenario.tokenizer)
    chosen = config.model.settled(bool(config.text.model))
    place = (chosen.torch_dtype, chosen.device)

    def trained(name: str, model: nn.Module) -> nn.Module:
        return trainable(model, chosen, draws.key(config.seed, "adapter", name))

    begin = start or Start(defences=(restored or {}).get("defences", {}))
    first, base = load_causal_lm(scenario.policy, *place), None
    if chosen.lora_rank:
        base = freeze_copy(first.requires_grad_(False))
    policy = Policy(trained("policy", first), tokenizer, config.sampler.temperature, base)
    own = TransformersSampler(config.sampler, tokenizer)
    sampler = own if config.engine == "transformers" else _vllm(config, scenario, tokenizer)
    owned = owned_loop(config, scenario, tokenizer)

    def defended(name: str, model: Any) -> DefenceStack:
        roles = {
            role: RoleData(rows.to(policy.device), draws.key(config.seed, "role", name, role))
            for role, rows in scenario.roles.items()
        }
        services = (roles, scenario.scorers, own, config.seed, config.feedback.log_facts)
        ctx = Context(name, model, tokenizer, policy, *services)
        members = [defences.create(spec) for spec in config.defences[scenario.prepared :]]
        stack = DefenceStack(members, ctx, acting=config.threat == "online")
        if name in begin.defences:
            stack.load_state_dict(begin.defences[name])
            return stack
        if name in begin.weights:
            load = load_plain if name == "policy" else load_own_state
            load(model, begin.weights[name])
        stack.prepare()
        return stack

    divide = partial(shard, whole=chosen.lora_rank > 0)
    stack = defended("policy", policy.model)
    policy.snapshot_reference()
    divide(policy.model), divide(policy.reference)
    reward_model = None
    if config.learner_name in ("ppo", "grpo") and owned.judge is None:
        head_seed = draws.key(config.seed, "reward head")
        if base is not None and scenario.reward_model == scenario.policy:
            scoring = scorer_on(base, head_seed)
        else:
            scoring = load_reward_model(scenario.reward_model, head_seed, *place)
        reward = defended("reward_model", trained("reward_model", scoring))
        divide(reward.ctx.model)
        reward_model = RewardModel(config.reward_model, reward.ctx, reward)
    if base is not None:
        divide(base)
    agent = Agent(
        policy=policy,
        sampler=sampler,
        learner=config.learner.build(stack.ctx, stack, owned.sampler.temperature),
        reward_model=reward_model,
        stack=stack,
        replay=Replay(config.reward_model.window),
        responses=config.feedback.responses,
        delay=config.feedback.delay,
        seed=draws.key(config.seed, "agent"),
        judge=owned.judge,
        supplied=owned.supplied,
        rollout_sampler=None if owned.sampler == config.sampler else sampler.at(owned.sampler),
    )
    if restored is not None:
        agent.load_state_dict(restored)
    return agent


def _vllm(config: Config, scenario: Scenario, tokenizer: Any) -> VLLMSampler:
    """The sampler of a vLLM engine, which starts when it is first needed."""
    chosen = config.model.settled(bool(config.text.model))
    door = "vllm_server" if config.engine == "vllm-server" else "vllm_inprocess"
    length = scenario.table.ids.shape[1] + config.sampler.max_new_tokens + 1  # a probe asks for one

    def start(targets: list[str]) -> Backend:
        if not is_main():
            return Shared(None)
        room = Room(chosen.lora_rank, targets) if targets else None
        module = importlib.import_module(f"agents.engines.{door}")
        engine = module.Engine(scenario.policy, length, chosen.dtype, config.vllm, room)
        return Shared(engine) if count() > 1 else engine

    return VLLMSampler(config.sampler, config.vllm, tokenizer, start, chosen.dtype)


def make_evaluator(config: Config, scenario: Scenario, base: nn.Module | None = None) -> Evaluator:
    """Held-out measurement: scorer, perplexity model, learned classifier.

    Args:
        base: the policy's, which serves as perplexity model where that is the same.
    """
    chosen = config.model.settled(bool(config.text.model))
    place = (chosen.torch_dtype, chosen.device)
    classifier = None
    if scenario.classifier is not None:
        classifier = load_reward_model(scenario.classifier, 0, *place).requires_grad_(False)
    if base is None or scenario.perplexity_model != scenario.policy:
        base = load_causal_lm(scenario.perplexity_model, *place).eval().requires_grad_(False)
        shard(base)
    back_door = attacks.create(config.attack.name).appends_trigger
    return Evaluator(
        config=config.evaluation,
        table=scenario.table,
        scorer=scenario.scorer,
        perplexity_model=base,
        classifier=classifier,
        seed=draws.key(config.seed, "evaluation"),
        triggered=scenario.triggered if back_door else None,
        units=getattr(scenario.scorer, "units", hacking.words),
    )


def make_detection(config: Config) -> Detection:
    """What watches annotators from outside, as far as the label log lets it."""
    facts = config.feedback.log_facts
    return Detection("log:gold" in facts, "log:redundant" in facts)


def planned_evaluations(config: Config) -> int:
    """J: the one before training, and one every ``evaluation.every`` rounds."""
    return -(-config.rounds // config.evaluation.every) + 1


def make_monitor(config: Config, scenario: Scenario) -> CostMonitor:
    """The CMDP cost monitor; J, the number of evaluations, is fixed here."""
    chosen = config.evaluation
    return CostMonitor(
        {"harm": chosen.cost_limit, **chosen.limits},
        alpha=chosen.alpha,
        planned=planned_evaluations(config),
        watched={"harm_classifier": chosen.cost_limit} if scenario.classifier else {},
        sets=chosen,
        sustained=chosen.sustained,
    )
