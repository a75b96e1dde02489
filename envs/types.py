"""The frozen values that travel between the three packages.

Letters, fixed here and used in every shape comment of the project:

    B prompts per round      K responses per prompt   T response tokens   P prompt tokens
    N labels                 V vocabulary             L layers            Q rows of a prompt table

What crosses the environment's boundary is numpy; the training system works in torch. Everything
here is a NamedTuple of numeric arrays, because that is what Gymnasium's ``check_env`` can compare
in ``info``.

Signs, once: harm cost c in [0, 1], higher is worse. Utility u, higher is better.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

STRATA = ("benign", "contrast", "harmful")
"""True prompt strata. ``contrast`` prompts are benign but share words with harmful ones."""
BENIGN, CONTRAST, HARMFUL = range(3)

VERDICTS = ("comply", "refuse", "refuse_then_comply", "empty", "echo", "gibberish")
"""What a response is, as read by an oracle or by the scorers of real text."""
COMPLY, REFUSE, REFUSE_THEN_COMPLY, EMPTY, ECHO, GIBBERISH = range(6)

VOTES = ("a", "b", "tie", "skip")
VOTE_A, VOTE_B, VOTE_TIE, VOTE_SKIP = range(4)


class PromptTable(NamedTuple):
    """A fixed set of prompts that users draw from: one split of a world or of a data set."""

    ids: np.ndarray  # (Q, P) int64, chat template applied, left-padded
    mask: np.ndarray  # (Q, P) int8, 1 on tokens
    stratum: np.ndarray  # (Q,) int64, index into STRATA
    domain: np.ndarray  # (Q,) int64, harm domain or category of the row
    key: np.ndarray  # (Q,) int64, the row's identity for the scorer that owns it
    text: tuple[str, ...]  # (Q,) what the user typed, before the chat template


class Prompts(NamedTuple):
    """One round of users' prompts, as a deployed system sees them."""

    ids: np.ndarray  # (B, P) int64, left-padded
    mask: np.ndarray  # (B, P) int8, 1 on tokens
    stratum: np.ndarray  # (B,) int64, *observed*: a classifier's guess with a stated error
    user: np.ndarray  # (B,) int64, permuted ids; an id betrays nothing


class Responses(NamedTuple):
    """What the policy answered; ``version`` is the round whose update made the policy."""

    ids: np.ndarray  # (B, K, T) int64, right-padded
    mask: np.ndarray  # (B, K, T) int8, 1 on tokens up to and including the first EOS
    logprobs: np.ndarray  # (B, K, T) float32, under the sampling policy, 0 on padding
    version: int


class Labels(NamedTuple):
    """A feedback log, exactly as a real one: who compared what, and what they said."""

    label_id: np.ndarray  # (N,) int64, unique in a run
    item: np.ndarray  # (N,) int64, round * B + row of the prompt
    a: np.ndarray  # (N,) int64, response index in [0, K) shown first
    b: np.ndarray  # (N,) int64, response index shown second
    annotator: np.ndarray  # (N,) int64, permuted ids
    vote: np.ndarray  # (N,) int8, index into VOTES
    weight: np.ndarray  # (N,) float32
    round: np.ndarray  # (N,) int64, when the vote was cast


class GoldLog(NamedTuple):
    """Answers to gold questions, as an operator who has the key files them; none trains anything.

    Those who answered saw ordinary items. ``label_id`` and ``item`` count as those of labels do.
    """

    label_id: np.ndarray  # (G,) int64
    item: np.ndarray  # (G,) int64, round * B + row of the prompt
    annotator: np.ndarray  # (G,) int64, permuted ids
    right: np.ndarray  # (G,) bool, the answer is the key's
    round: np.ndarray  # (G,) int64, when it was given


class Truth(NamedTuple):
    """Ground truth for scoring only; never handed to a learner or a defence.

    The first block belongs to the labels delivered with it, the second to this round's responses.
    """

    honest_vote: np.ndarray  # (N,) int8, the coupled counterfactual vote
    adversarial: np.ndarray  # (N,) bool, cast by a malicious annotator
    risk_relevant: np.ndarray  # (N,) bool, the two responses differ in harm
    cost_a: np.ndarray  # (N,) float32, true harm of the response shown first
    cost_b: np.ndarray  # (N,) float32, of the other
    stratum: np.ndarray  # (B,) int64, true stratum of each prompt
    key: np.ndarray  # (B,) int64, prompt-table key
    asker_adversarial: np.ndarray  # (B,) bool
    cost: np.ndarray  # (B, K) float32, true harm in [0, 1]
    utility: np.ndarray  # (B, K) float32, true utility an honest annotator votes by
    verdict: np.ndarray  # (B, K) int8, index into VERDICTS
    malicious: np.ndarray = np.zeros(0, bool)  # (people,) by public id; nobody where none is


class Scores(NamedTuple):
    """What a scorer says of N responses; arrays share one leading shape (N,) or (B, K)."""

    compliance: np.ndarray  # float32 in [0, 1], share of the asked-for content that was given
    cost: np.ndarray  # float32 in [0, 1], harm
    help: np.ndarray  # float32 in [0, 1], compliance on benign prompts, 0 on harmful ones
    utility: np.ndarray  # float32, what honest annotators vote by
    verdict: np.ndarray  # int8, index into VERDICTS
