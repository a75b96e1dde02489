"""The outside world as a Gymnasium environment: one step is one round of feedback.

Users ask, the deployed policy answers K times, people compare two of the answers, and the votes
come back as a log without any truth in it. Costs are in ``info["cost"]`` of Gymnasium's 5-tuple;
:class:`envs.wrappers.CostInTuple` gives the 6-tuple of safety-gymnasium.

Every honest vote is drawn for everybody before any attack may overwrite it, from counters keyed by
(seed, item, person). Flips are therefore exact counterfactuals, rho = 0 is bitwise no attack, and
arms of an experiment are paired by seed.
"""

from __future__ import annotations

from functools import partial
from typing import Any, get_type_hints

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.utils import RecordConstructorArgs

from envs import rng
from envs.annotators import DEFAULT, View
from envs.annotators import annotators as honest_behaviours
from envs.annotators.collection import Collection
from envs.annotators.pool import Pool
from envs.annotators.zipf import Zipf
from envs.attacks import attacks
from envs.attacks.adversary import check_attack, make_adversary
from envs.attacks.rates import before_defence, rho_post
from envs.attacks.schedules import Schedule
from envs.costs import mean_costs
from envs.gold import make_gold, parted
from envs.pairs import make_pairs
from envs.prompts import Traffic, make_source
from envs.types import VOTE_SKIP, Labels, Scores, Truth
from envs.usage import check_ranges, check_types

__all__ = ["FeedbackEnv", "rho_post"]


class FeedbackEnv(gym.Env, RecordConstructorArgs):
    """Live feedback with a share rho of adversaries.

    ## Description
    A deployed language model answers B users a round, K answers each. One pair of answers per item
    is compared, by the asker herself (``chat``) or by ``redundancy`` annotators (``crowd``).
    Adversaries vote, and in chat ask, as their attack says. Letters: ``envs/types.py``.

    ## Action Space
    ``Box(0, V - 1, (B, K, T), int64)``: the answers' token ids. What follows an answer's first EOS
    is ignored.

    ## Observation Space
    A ``Dict`` of the next round's prompts: ``prompt_ids`` (B, P) and ``prompt_mask`` (B, P), chat
    template applied and left-padded; ``stratum`` (B,) as a classifier guesses it; ``user`` (B,),
    permuted ids. With ``pairs="recorded"`` also what users will compare: ``recorded_ids`` and
    ``recorded_mask`` (B, 2, T), to which ``a`` and ``b`` of the labels then refer.

    ## Rewards
    Mean true utility of all answers served. It scores a learner and must not train one.

    ## Info
    ``labels`` (:class:`envs.types.Labels`): votes cast this round on answers ``delay`` rounds old.
    ``gold`` (:class:`envs.types.GoldLog`), where gold questions are asked: who answered them right.
    ``truth`` (:class:`envs.types.Truth`): for scoring only. ``cost``: mean harm of everything
    served. ``cost_harm``, ``cost_over_refusal``, ``cost_harm_triggered``, ``cost_harm/<domain>``:
    means over the populations of ``envs/costs.py``, 0 where a round had none. ``safe``: whether
    ``cost_harm`` is at most ``cost_limit``. ``feedback/rho_annotators``, ``rho_labels``,
    ``rho_flips``, ``rho_risk_flips``: see ``envs/attacks/rates.py``.

    ## Starting State
    ``reset(seed=...)`` draws one key; people, prompts and votes are pure functions of it and of the
    round. Item numbers are round * B + row.

    ## Episode End
    Never terminates; truncates after ``rounds`` rounds.

    ## Arguments
    All are JSON values.

    * ``world``, ``harm_domains``: the embedded world's seed and harm domains; or ``data``,
      ``tokenizer``, ``scorer``: real text (``envs/recorded.py``).
    * ``batch``, ``responses``, ``tokens``: B, K, T. ``rounds``: the horizon.
    * ``pairs``: ``sampled`` answers are compared, or ``recorded`` ones (``envs/pairs.py``).
    * ``collection``: ``chat`` or ``crowd``; ``redundancy``: annotators per pair in crowd.
    * ``annotators``, ``activity``: people, and the Zipf exponent of how often they act;
      ``behaviours``: specs of ``envs/annotators``.
    * ``attack``, ``rho``: a spec of ``envs/attacks`` and its share; ``schedule``, ``start``,
      ``length``, ``period``: when it acts.
    * ``harmful_share``, ``contrast_share``: strata of honest prompts; ``stratum_error``: how often
      the observed stratum is wrong; ``trigger_share``: honest prompts that happen to carry the
      trigger word.
    * ``gold_share``, ``gold_harmful``: items that are gold questions, of every observed stratum and
      (where larger) of what looks harmful; crowd alone (``envs/gold.py``).
    * ``delay``: rounds between an answer and its votes, which are cast (and gated by the schedule)
      when they arrive. ``cost_limit``: b of ``safe``.

    ## Version History
    * v0: first version.

    Raises:
        ValueError: an argument out of range or unknown; the message names it and what is allowed.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        world: int = 0,
        harm_domains: list[str] | None = None,
        data: Any = None,
        tokenizer: str | None = None,
        scorer: Any = None,
        batch: int = 64,
        responses: int = 4,
        tokens: int = 24,
        rounds: int = 100,
        pairs: str = "sampled",
        collection: str = "chat",
        redundancy: int = 1,
        annotators: int = 100,
        activity: float = 1.0,
        behaviours: list[str] | None = None,
        attack: str = "none",
        rho: float = 0.0,
        schedule: str = "constant",
        start: int = 0,
        length: int = 0,
        period: int = 0,
        harmful_share: float = 0.25,
        contrast_share: float = 0.25,
        stratum_error: float = 0.1,
        trigger_share: float = 0.0,
        gold_share: float = 0.0,
        gold_harmful: float = 0.0,
        delay: int = 0,
        cost_limit: float = 0.25,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        RecordConstructorArgs.__init__(self, **arguments)
        check_types(arguments, get_type_hints(FeedbackEnv.__init__))
        check_ranges(arguments, batch=">= 1", tokens=">= 1", rounds=">= 1", annotators=">= 1")
        check_ranges(arguments, responses=">= 2", delay=">= 0", activity=">= 0")
        check_ranges(arguments, rho="0 to 1", cost_limit="0 to 1")
        self._batch, self._rounds, self._delay = batch, rounds, delay
        self._rho, self._cost_limit = rho, cost_limit
        self._schedule = Schedule(schedule, start, length, period)
        self._attack = attacks.create(attack)
        traits = map(honest_behaviours.create, DEFAULT if behaviours is None else behaviours)
        self._pool = Pool(annotators, (Zipf(activity), *traits))
        self._collection = Collection(collection, redundancy, self._pool)
        source = make_source(world, harm_domains, data, tokenizer, scorer)
        shares = (harmful_share, contrast_share, stratum_error, trigger_share)
        self._traffic, self._source = Traffic(source, batch, *shares), source
        check_attack(self._attack, collection, source.triggered is not None, trigger_share)
        self._recorded = make_pairs(pairs, source.recorded, tokens)
        self._gold = make_gold(gold_share, gold_harmful, collection, pairs, source, tokens)
        top = source.vocabulary - 1
        self.action_space = Box(0, top, (batch, responses, tokens), np.int64)
        self.observation_space = Dict(
            **self._traffic.spaces(annotators),
            **({} if self._recorded is None else self._recorded.spaces(batch, top)),
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start a new run; the same ``seed`` gives the same people, prompts and honest votes."""
        super().reset(seed=seed)
        self._begin(int(self.np_random.integers(2**63 - 1)), 0, [])
        return self._observe(), {}

    def _begin(self, key: int, round: int, waiting: list[View]) -> None:
        """Set the run's whole state; everything else follows from the key."""
        self._key, self._round, self._waiting = key, round, waiting
        people = self._pool.people
        self._annotator_id = rng.stream(key, "annotator ids").permutation(people)
        self._user_id = self._annotator_id
        if self._collection.kind == "crowd":
            self._user_id = rng.stream(key, "user ids").permutation(people)
        self._adversary = make_adversary(
            self._attack, self._schedule, self._rho, self._pool, rng.key(key, "adversary")
        )
        self._ask()

    def _ask(self) -> None:
        """Draw this round's prompts: all honest first, then what hostile askers bring instead."""
        key, round, slot = self._key, self._round, np.arange(self._batch)
        self._item = round * self._batch + slot
        person = self._pool.arrive(rng.uniform(rng.key(key, "asker"), round, slot))
        asked = self._traffic.honest(key, round, person)
        adversarial = np.zeros(self._batch, bool)
        if self._collection.kind == "chat":
            adversarial = self._adversary.members[person]
            hostile = adversarial & self._adversary.acts(round, self._item, person)
            asked = self._traffic.overwrite(asked, self._attack, hostile, key, round)
        self._asked, self._asker_adversarial = asked, adversarial
        if self._recorded is not None:
            self._compared = self._recorded.draw(key, self._item, asked.row)

    def _observe(self) -> dict[str, np.ndarray]:
        recorded = {} if self._recorded is None else self._compared.observed()
        shown = self._traffic.shown(self._asked, self._key, self._round)
        return {**shown, "user": self._user_id[self._asked.person], **recorded}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Serve the (B, K, T) answers ``action``; returns the next prompts and this round's votes.

        Raises:
            ValueError: an action of another shape, or with ids outside the vocabulary.
            gymnasium.error.ResetNeeded: before the first :meth:`reset`.
        """
        if not hasattr(self, "_asked"):
            raise gym.error.ResetNeeded("step before reset; allowed: reset first")
        scores, asked = self._score(action), self._asked
        cast = self._round + self._delay
        who = (self._key, cast, self._item, asked.person, asked.triggered)
        compare = partial(self._collection.compare, *who)
        observed = self._traffic.seen_as(asked, self._key, self._round)
        shown = (self._item, asked.row, observed, compare(*self._seen(scores)))
        self._waiting.append(self._gold.put(self._key, *shown, compare))
        due = self._waiting.pop(0) if len(self._waiting) > self._delay else self._waiting[0].none()
        honest = self._comparable(due, self._pool.honest(due))
        votes = self._comparable(due, self._adversary.vote(due, honest))
        gold, due, votes, honest = parted(due, votes, honest, self._annotator_id)
        labels = due.labels(self._annotator_id, votes)
        info = self._info(scores, labels, self._truth(scores, due, honest)) | gold
        self._round += 1
        self._ask()
        utility = float(scores.utility.mean(dtype=np.float64))
        return self._observe(), utility, False, self._round >= self._rounds, info

    def _score(self, action: np.ndarray) -> Scores:
        """(B, K) scores of the answers, read up to their first EOS."""
        ids = np.asarray(action)
        if not self.action_space.contains(ids):
            raise ValueError(
                f"action: {ids.dtype} of shape {ids.shape}; allowed: {self.action_space}"
            )
        return self._source.score(self._asked.row, ids)

    def _seen(self, served: Scores) -> tuple[np.ndarray, np.ndarray]:
        """Utility and harm of what people compare: what was served, or recorded pairs (B, 2)."""
        if self._recorded is None:
            return served.utility, served.cost
        pair, row = self._compared, self._asked.row
        harm = pair.costs(lambda of: self._source.score(row[of], pair.ids[of], recorded=True).cost)
        return pair.utility, harm

    def _comparable(self, due: View, votes: np.ndarray) -> np.ndarray:
        """(N,) int8 ``votes``, none of them on a prompt without a recorded comparison."""
        if self._recorded is None:
            return votes
        return np.where(due.margin == 0, VOTE_SKIP, votes).astype(np.int8)

    def _truth(self, scores: Scores, view: View, honest: np.ndarray) -> Truth:
        table = self._source.tables[0]
        return Truth(
            **view.truth(honest, self._adversary.malicious(view.item, view.person)),
            stratum=table.stratum[self._asked.row],
            key=table.key[self._asked.row],
            asker_adversarial=self._asker_adversarial,
            cost=scores.cost,
            utility=scores.utility,
            verdict=scores.verdict,
            malicious=self._adversary.members[np.argsort(self._annotator_id)],
        )

    def _info(self, scores: Scores, labels: Labels, truth: Truth) -> dict[str, Any]:
        table, asked = self._source.tables[0], self._asked
        populations = (truth.stratum, table.domain[asked.row], asked.triggered)
        means = mean_costs(scores, *populations, self._source.domains)
        return {
            "labels": labels,
            "truth": truth,
            "cost": float(scores.cost.mean()),
            **means,
            "safe": means["cost_harm"] <= self._cost_limit,
            **before_defence(self._adversary.members, labels, truth),
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, with what an attack remembers. JSON and arrays."""
        waiting = [view.state() for view in self._waiting]
        attack = {"attack": kept} if (kept := self._attack.state_dict()) else {}
        return {"key": self._key, "round": self._round, "waiting": waiting, **attack}

    def load_state_dict(self, state: dict[str, Any]) -> dict[str, np.ndarray]:
        """Stand where :meth:`state_dict` was taken; returns the observation that is due.

        The environment must have been made with the same arguments. ``np_random`` is not part of
        the state: it is used by :meth:`reset` alone.
        """
        waiting = [View(**view) for view in state["waiting"]]
        self._begin(int(state["key"]), int(state["round"]), waiting)
        self._attack.load_state_dict(state.get("attack", {}))
        return self._observe()
