"""A whole training system in milliseconds: a random two-layer Llama over twenty words.

Its weights are wide, so that its distributions are uneven and every hook has something to change.
Everything here is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agents.agent import Agent, Learned
from agents.batches import Pairs, Sequences
from agents.context import Context, RoleData
from agents.defence import LOG, DefenceStack, defences
from agents.engines.transformers_engine import SamplerConfig, TransformersSampler
from agents.learners import learners
from agents.learners.reward_model import RewardModel, RewardModelConfig
from agents.policy import Policy
from agents.replay import Replay
from envs.types import GoldLog, Labels

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>")
WORDS = (*SPECIAL, *(f"w{i}" for i in range(14)))
PAD, BOS, EOS = range(3)
PROMPT, ANSWER, BATCH, RESPONSES, WINDOW = 6, 5, 8, 3, 64  # P, T, B, K, labels kept
LR = 3e-3
ROLES = ("refusal", "harm", "retain", "harm_heldout", "harm_prompts")
PAIRS = ("pair", "pair_heldout")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %} <assistant> {{ m['content'] }} {{ eos_token }}"
    "{% else %} <user> {{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def tokenizer() -> Any:
    """Words by whitespace, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)
    made.chat_template = TEMPLATE
    return made


def model(seed: int, scorer: bool = False, vocabulary: int = len(WORDS)) -> Any:
    """The policy, or with ``scorer`` a reward model."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **({"num_labels": 1} if scorer else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maker = LlamaForSequenceClassification if scorer else LlamaForCausalLM
        return maker(config).eval()


def sequences(n: int, seed: int) -> Sequences:
    """``n`` left-padded prompts, each with an answer of 1 to T tokens that ends."""
    rng = np.random.default_rng([seed, 2])
    words = rng.integers(len(SPECIAL), len(WORDS), (n, PROMPT + ANSWER))
    known = np.arange(PROMPT) >= rng.integers(0, PROMPT - 1, n)[:, None]
    length = rng.integers(1, ANSWER + 1, n)[:, None]
    said = np.arange(ANSWER) < length
    answer = np.where(np.arange(ANSWER) == length - 1, EOS, words[:, PROMPT:])
    columns = (np.where(known, words[:, :PROMPT], PAD), known, np.where(said, answer, PAD), said)
    return Sequences(*(torch.from_numpy(column.astype(np.int64)) for column in columns))


def roles() -> dict[str, RoleData]:
    """Every data role that a defence may ask for, eight rows each."""
    found = {name: RoleData(sequences(8, 50 + i), 9 + i) for i, name in enumerate(ROLES)}
    for key, name in enumerate(PAIRS, 20):
        harm, refusal = sequences(8, key), sequences(8, key + 10)
        same = refusal._replace(prompt_ids=harm.prompt_ids, prompt_mask=harm.prompt_mask)
        found[name] = RoleData(Pairs(harm, same), key)
    return found


def agent(learner: str, specs: Sequence[str] = ()) -> Agent:
    """A training system under the defences ``specs``, joined and prepared as a run's is."""
    words = tokenizer()
    policy = Policy(model(0), words)
    sampler = TransformersSampler(SamplerConfig(max_new_tokens=ANSWER), words)

    def defended(name: str, module: Any) -> DefenceStack:
        scorers = {"cost": lambda rows: (rows.ids == len(SPECIAL)).float().mean(1)}
        ctx = Context(name, module, words, policy, roles(), scorers, sampler, 0, LOG)
        stack = DefenceStack([defences.create(spec) for spec in specs], ctx)
        stack.prepare()
        return stack

    stack = defended("policy", policy.model)
    policy.snapshot_reference()
    config = learners.get(learner)(lr=LR, minibatch=8)
    trained = config.build(stack.ctx, stack, 1.0)
    reward_model = None
    if trained.uses == "rollouts":
        rewards = defended("reward_model", model(1, scorer=True))
        chosen = RewardModelConfig(lr=LR, minibatch=8, steps=2, window=WINDOW)
        reward_model = RewardModel(chosen, rewards.ctx, rewards)
    return Agent(policy, sampler, trained, reward_model, stack, Replay(WINDOW), RESPONSES, 0, 0)


def rounds(trained: Agent, start: int, stop: int) -> list[Learned]:
    """Rounds ``start`` to ``stop`` of answering and learning; what each did with its labels."""
    learned = []
    for round in range(start, stop):
        asked = sequences(BATCH, 1000 + round)
        trained.act(
            {
                "prompt_ids": asked.prompt_ids.numpy(),
                "prompt_mask": asked.prompt_mask.numpy().astype(np.int8),
                "stratum": np.arange(BATCH) % 3,
                "user": np.arange(BATCH),
            }
        )
        learned.append(trained.learn(votes(round), gold(round)))
    return learned


def votes(round: int) -> Labels:
    """Votes of two people on every second prompt of ``round``, of which one is a tie."""
    rng = np.random.default_rng([round, 4])
    labels, people = np.arange(BATCH) + round * BATCH, rng.integers(5, size=BATCH // 2)
    low = np.repeat(rng.integers(RESPONSES - 1, size=BATCH // 2), 2)
    swap = rng.integers(2, size=BATCH)
    return Labels(
        label_id=labels,
        item=labels // 2 * 2,
        a=low + swap,
        b=low + 1 - swap,
        annotator=np.stack([people, (people + 1) % 5], 1).ravel(),
        vote=np.array([0, 1, 0, 1, 2, 0, 1, 1], np.int8),
        weight=np.ones(BATCH, np.float32),
        round=np.full(BATCH, round),
    )


def gold(round: int) -> GoldLog:
    """Answers of the five people to gold questions on ``round``; person 0 is wrong."""
    each = np.arange(30)
    return GoldLog(
        label_id=each + round * BATCH,
        item=each % BATCH + round * BATCH,
        annotator=each % 5,
        right=each % 5 > 0,
        round=np.full(30, round),
    )
