"""The configuration of a run: a frozen tree of the components' own configs.

Every field has a default that makes a sensible first run on the embedded world. Validation happens
here and in the components' constructors, before anything is trained; messages name field, value and
what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from agents.engines.backend import VLLMConfig
from agents.engines.transformers_engine import SamplerConfig
from agents.learners import learners
from agents.learners.dpo import DPOConfig
from agents.learners.grpo import GRPOConfig
from agents.learners.ppo import PPOConfig
from agents.learners.reward_model import RewardModelConfig
from agents.learners.sft import SFTConfig
from agents.models import ModelConfig
from envs.usage import UsageError, check_ranges
from envs.world.language import HARM_DOMAINS
from sim.evaluation_config import AT_ONCE, EvaluationConfig
from sim.text_config import TextConfig

DEFAULT_ATTACK = "harmful_asker"
"""What ``--rho`` above 0 means without ``--attack``: adversaries who bring harmful prompts."""


@dataclass(frozen=True)
class WorldConfig:
    """The embedded world and the models built for it."""

    seed: int = 0
    """World seed: language, recipes, splits. Defaults were tuned on 0-2, figures are from 3-5."""
    model_seed: int = 0
    """Initialisation and training order of the built models."""
    foothold: float = 0.01
    """Oracle compliance with harmful prompts left in the aligned model."""
    size: Literal["small", "medium"] = "small"
    """Width and depth of the policy."""
    architecture: Literal["llama", "qwen2", "mistral"] = "llama"
    """Model family of the built policy."""
    start: Literal["aligned", "base"] = "aligned"
    """Which model the run starts from."""
    harm_domains: tuple[str, ...] = ()
    """Harmful domains that prompts are about, as a data set covers some; all when empty."""

    def __post_init__(self) -> None:
        """Check the ranges, and that the domains exist."""
        check_ranges(
            self,
            "world.",
            seed="0 to 2147483647",
            model_seed="0 to 2147483647",
            foothold="0 to 0.5",
        )
        for name in self.harm_domains:
            if name not in HARM_DOMAINS or self.harm_domains.count(name) > 1:
                raise UsageError(
                    f"world.harm_domains={name!r}; allowed: {', '.join(HARM_DOMAINS)}, each once"
                )

    @property
    def told(self) -> dict[str, Any]:
        """The environment's arguments that say which world it is (JSON values)."""
        domains = {"harm_domains": list(self.harm_domains)} if self.harm_domains else {}
        return {"world": self.seed, **domains}


@dataclass(frozen=True)
class FeedbackConfig:
    """Who asks, who votes, and how votes are collected."""

    batch: int = 64
    """Prompts per round, B."""
    responses: int = 4
    """Responses per prompt, K."""
    pairs: Literal["sampled", "recorded"] = "sampled"
    """People compare what the policy answered, or the recorded answers of the data."""
    collection: Literal["chat", "crowd"] = "chat"
    """Askers label their own items, or items are assigned to annotators."""
    redundancy: int = 1
    """Distinct annotators per pair in crowd collection."""
    annotators: int = 100
    """People in the pool."""
    activity: float = 1.0
    """Zipf exponent of how often people act; 0 is equal."""
    behaviours: tuple[str, ...] = ("boltzmann(beta=4.0)", "lapse(rate=0.02)")
    """Honest annotators' behaviours, applied in order."""
    harmful_share: float = 0.25
    """Share of honest prompts that are harmful."""
    contrast_share: float = 0.25
    """Share of honest prompts that are benign but look harmful."""
    stratum_error: float = 0.1
    """How often the observed stratum is wrong."""
    trigger_share: float = 0.0
    """Share of honest prompts that happen to carry the trigger word."""
    gold_share: float = 0.0
    """Share of items of every observed stratum that are gold questions (crowd)."""
    gold_harmful: float = 0.0
    """The same of items observed as harmful, where that is larger."""
    delay: int = 0
    """Rounds between an answer and its labels."""

    def __post_init__(self) -> None:
        """Check the ranges, and that a round fits into memory."""
        check_ranges(self, "feedback.", batch=">= 1", responses=">= 2", redundancy=">= 1")
        check_ranges(self, "feedback.", annotators=f"1 to {AT_ONCE}", activity=">= 0", delay=">= 0")
        check_ranges(self, "feedback.", harmful_share="0 to 1", contrast_share="0 to 1")
        check_ranges(self, "feedback.", stratum_error="0 to 1", trigger_share="0 to 1")
        check_ranges(self, "feedback.", gold_share="0 to 1", gold_harmful="0 to 1")
        if self.batch * self.responses > AT_ONCE:
            raise UsageError(
                f"feedback.batch={self.batch} with feedback.responses={self.responses}; "
                f"allowed: at most {AT_ONCE} answers a round, which is held in memory"
            )

    @property
    def log_facts(self) -> set[str]:
        """What the label log holds beyond votes, as defences' ``needs`` name it."""
        held = {
            "log:gold": self.gold_share + self.gold_harmful,
            "log:redundant": self.redundancy - 1,
        }
        return {name for name, there in held.items() if there}


@dataclass(frozen=True)
class AttackConfig:
    """What adversaries do, and when."""

    name: str = "none"
    """Attack spec: a registered name, name(key=value), or file.py:Class(key=value)."""
    rho: float = 0.0
    """Share of adversaries: of annotators, of users for askers, of labels for label_noise."""
    schedule: Literal["constant", "burst", "ramp", "drip", "pulsed", "sleeper", "on_off"] = (
        "constant"
    )
    """How the attack is switched over rounds."""
    start: int = 0
    """Rounds before the attack: with 2 the third round is the first that is hostile."""
    length: int = 10
    """Rounds of a burst, of a ramp's rise, or of a pulse."""
    period: int = 20
    """Rounds from one pulse to the next."""
    stop_at: float = 0.0
    """Moving average of the harm served at which the attacker ends the run; 0 never."""

    def __post_init__(self) -> None:
        """Check the ranges; the schedule checks what it uses."""
        check_ranges(self, "attack.", rho="0 to 1", start=">= 0", length=">= 0", period=">= 0")
        check_ranges(self, "attack.", stop_at="0 to 1")


@dataclass(frozen=True)
class Config:
    """One run."""

    rounds: int = 50
    """Rounds of feedback."""
    seed: int = 0
    """Root seed of people, prompts, votes and training; 64 bits with sign, as tables hold it."""
    threads: int = 1
    """Torch threads; bytes repeat at a fixed number only."""
    engine: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    """Who samples: the trainer's own model, vLLM in this process, or a vLLM server."""
    threat: Literal["online", "offline"] = "online"
    """Offline: defences only prepare the model, then face the attacker's own loop."""
    defences: tuple[str, ...] = ()
    """Defence specs, in order."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """The embedded world."""
    text: TextConfig = field(default_factory=TextConfig)
    """Real text; set ``text.model`` and ``text.data`` to leave the embedded world."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Precision, device and trained weights."""
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    """People and collection."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """Adversaries."""
    learner: GRPOConfig | PPOConfig | DPOConfig | SFTConfig = field(default_factory=GRPOConfig)
    """How the policy learns."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """The online reward model (PPO and GRPO)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How responses are drawn."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """The vLLM engines."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Monitor and evaluation."""
    checkpoint_every: int = 1
    """Rounds between checkpoints; a killed run loses at most these."""
    keep_every: int = 0
    """Rounds between checkpoints that are kept to fork from; 0 keeps the last two alone."""
    samples_per_round: int = 8
    """Comparisons recorded in full every round."""

    def __post_init__(self) -> None:
        """Check what no section knows alone; sections and components check the rest."""
        check_ranges(self, rounds=">= 1", seed=f"0 to {2**63 - 1}", threads="1 to 1024")
        check_ranges(self, checkpoint_every=">= 1", samples_per_round=">= 0", keep_every=">= 0")
        if self.keep_every % self.checkpoint_every:
            raise UsageError(
                f"keep_every={self.keep_every} with checkpoint_every={self.checkpoint_every}; "
                "allowed: 0, or a multiple of it"
            )
        if self.text.model and "harm_classifier" in self.evaluation.limits:
            raise UsageError(
                "evaluation.limits='harm_classifier' with text.model; allowed: over_refusal, "
                "harm_triggered (only the embedded world has that classifier)"
            )

    @property
    def learner_name(self) -> str:
        """The registered name of the learner."""
        return learners.name_of(type(self.learner))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :func:`from_dict` is its inverse."""
        return {
            **dataclasses.asdict(self),
            "learner": {"name": self.learner_name, **vars(self.learner)},
        }


def from_dict(values: dict[str, Any]) -> Config:
    """The config that :meth:`Config.to_dict` wrote.

    Raises:
        ValueError: an unknown field or learner.
    """
    values = dict(values)
    learner = dict(values.pop("learner", {}))
    maker = registered_learner(learner.pop("name", None))
    parts = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    built: dict[str, Any] = {"learner": _fill(maker, learner, "learner")}
    for name, value in values.items():
        factory = parts.get(name)
        nested = isinstance(value, dict) and factory is not dataclasses.MISSING
        built[name] = _fill(factory, value, name) if nested else _tuples(value)
    return _fill(Config, built, "config")


def registered_learner(name: Any) -> Any:
    """The config class of a learner; a config file cannot name code of anybody's own.

    Raises:
        ValueError: not a registered name.
    """
    if name not in learners.names():
        near = difflib.get_close_matches(str(name), learners.names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"learner={name!r}; allowed: {', '.join(learners.names())}{hint}")
    return learners.get(name)


def _fill(maker: Any, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in dataclasses.fields(maker)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(
            f"{where}: unknown field {unknown[0]!r}; allowed: {', '.join(sorted(known))}"
        )
    return maker(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
