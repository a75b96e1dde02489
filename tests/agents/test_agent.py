"""From votes to batches: every label meets the tokens it is about, and only those."""

import numpy as np
import pytest
import torch

from agents.batches import LabelBatch, PairBatch, RolloutBatch, SFTBatch
from agents.defence import Defence, StopLearning
from agents.served import Served
from envs.types import VOTE_A, VOTE_B, VOTE_SKIP, VOTE_TIE

COLUMNS = ("prompt_ids", "prompt_mask", "a_ids", "a_mask", "b_ids", "b_mask")


class Witness(Defence):
    """Keeps every batch it is shown."""

    def __init__(self):
        self.batches = []

    def feedback(self, ctx, batch):
        self.batches.append(batch)
        return batch

    def of(self, kind):
        return [b for b in self.batches if isinstance(b, kind)]


def random_labels(tiny, rng, round, delay, batch, responses):
    """Any number of votes, in any order, on the items of ``round - delay``."""
    n = int(rng.integers(0, 12))
    items = rng.integers(batch, size=n) + (round - delay) * batch
    a = rng.integers(responses, size=n)
    return tiny.labels(round)._replace(
        label_id=rng.permutation(1000)[:n] + 1000 * round,
        item=items,
        a=a,
        b=(a + rng.integers(1, responses, size=n)) % responses,
        annotator=rng.integers(50, size=n),
        vote=rng.choice([VOTE_A, VOTE_B, VOTE_TIE, VOTE_SKIP], n).astype(np.int8),
        weight=rng.choice([0.0, 0.5, 1.0], n).astype(np.float32),
        round=np.full(n, round),
    )


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("learner", ["dpo", "grpo"])
def test_labels_join_the_tokens_they_are_about(tiny, learner, delay):
    """Random logs against a plain loop over what was served, prompt by prompt, token by token."""
    agent = tiny.agent(learner, delay=delay, window=10_000, lr=1e-4)
    rng = np.random.default_rng(delay)
    shown, expected = {}, []
    for round in range(6):
        observation = tiny.observation(round)
        responses = agent.act(observation)
        shown[round] = (observation, responses)
        assert responses.version == round and responses.ids.shape == (8, 3, tiny.answer)
        if round < delay:
            assert not len(agent.learn(tiny.labels(0)._replace(vote=np.full(8, VOTE_SKIP))).target)
            continue
        labels = random_labels(tiny, rng, round, delay, 8, 3)
        learned = agent.learn(labels)
        kept = []
        for i in range(len(labels.vote)):
            if labels.vote[i] == VOTE_SKIP:
                continue
            seen, answers = shown[int(labels.item[i]) // 8]
            row = int(labels.item[i]) % 8
            target = {VOTE_A: 1.0, VOTE_B: 0.0, VOTE_TIE: 0.5}[int(labels.vote[i])]
            tokens = [seen["prompt_ids"][row], seen["prompt_mask"][row]]
            for side in (labels.a[i], labels.b[i]):
                tokens += [answers.ids[row, side], answers.mask[row, side]]
            stratum = seen["stratum"][row]
            kept.append((labels.label_id[i], target, labels.weight[i], stratum, tokens))
        expected += kept
        assert learned.label_id.tolist() == [k[0] for k in kept]
        assert learned.target.tolist() == [k[1] for k in kept]
        assert learned.weight.tolist() == [k[2] for k in kept]
    assert len(expected) > 15 and len({e[1] for e in expected}) == 3
    columns = agent.replay.columns
    assert columns["label_id"].tolist() == [e[0] for e in expected]
    assert columns["stratum"].tolist() == [e[3] for e in expected]
    for place, name in enumerate(COLUMNS):
        assert np.array_equal(columns[name], np.stack([e[4][place] for e in expected])), name


def test_votes_on_recorded_pairs_join_what_was_recorded(tiny):
    """With a delay, a resumed state, and rollouts of its own beside them."""
    agent = tiny.agent("grpo", delay=1)
    shown, rng = {}, np.random.default_rng(5)
    for round in range(3):
        seen = tiny.observation(round)
        ids = rng.integers(5, 9, (8, 2, tiny.answer))
        shown[round] = {**seen, "recorded_ids": ids, "recorded_mask": np.ones_like(ids, np.int8)}
        responses = agent.act(shown[round])
        assert responses.ids.shape[:2] == (8, 3), "people are served as ever"
        agent.served = [Served.from_state(served.state_dict()) for served in agent.served]
        labels = tiny.labels(max(round - 1, 0))
        labels = labels._replace(a=labels.item % 2, b=1 - labels.item % 2)
        agent.learn(labels if round else labels._replace(vote=np.full(8, VOTE_SKIP, np.int8)))
    columns = agent.replay.columns
    rounds, row = np.divmod(columns["item"], 8)
    assert set(rounds) == {0, 1}
    for name, side in (("a_ids", columns["item"] % 2), ("b_ids", 1 - columns["item"] % 2)):
        wanted = [shown[t]["recorded_ids"][r, s] for t, r, s in zip(rounds, row, side, strict=True)]
        assert np.array_equal(columns[name], np.stack(wanted))
    prompts = [shown[t]["prompt_ids"][r] for t, r in zip(rounds, row, strict=True)]
    assert np.array_equal(columns["prompt_ids"], np.stack(prompts))


def test_labels_of_a_round_no_longer_held_are_refused(tiny):
    agent = tiny.agent("grpo", delay=1)
    tiny.rounds(agent, 0, 3)
    agent.act(tiny.observation(3))
    with pytest.raises(AssertionError, match="no longer held"):
        agent.learn(tiny.labels(0))


@pytest.mark.parametrize(
    ("learner", "kind"), [("dpo", PairBatch), ("sft", SFTBatch), ("grpo", RolloutBatch)]
)
def test_what_a_learner_is_given(tiny, learner, kind):
    witness = Witness()
    agent = tiny.agent(learner, (witness,), epochs=1, minibatch=64)
    agent.act(tiny.observation(0))
    served = agent.served[-1].sampled.sequences
    labels = tiny.labels(0)._replace(vote=np.array([0, 1, 2, 3, 0, 1, 1, 3], np.int8))
    agent.learn(labels)
    assert isinstance(witness.batches[0], LabelBatch) and len(witness.batches) == 2
    log = witness.batches[0]
    assert log.label_id.tolist() == [0, 1, 2, 4, 5, 6] and log.new.all()
    assert log.target.tolist() == [1, 0, 0.5, 1, 0, 0]
    batch = witness.batches[1]
    assert isinstance(batch, kind)
    if learner == "grpo":
        assert torch.equal(batch.sequences.ids, served.ids)
        assert batch.group.tolist() == np.repeat(np.arange(8), 3).tolist()
        assert torch.equal(batch.logp_old, agent.served[-1].sampled.logprobs)
        scores = agent.reward_model.score(served)  # by the reward model as this round left it
        torch.testing.assert_close(batch.rewards["reward"], scores)
        return
    order = torch.argsort(batch.label_id)
    if learner == "dpo":
        assert batch.label_id[order].tolist() == [0, 1, 2, 4, 5, 6]
        assert batch.target[order].tolist() == [1, 0, 0.5, 1, 0, 0]
        return
    assert batch.label_id[order].tolist() == [0, 1, 4, 5, 6], "a tie has no winner"
    winner = np.where(labels.vote == VOTE_A, labels.a, labels.b)
    for label, answer in zip(batch.label_id[order], batch.sequences.ids[order], strict=True):
        assert torch.equal(answer, served.ids[labels.item[label] * 3 + winner[label]])


def test_a_label_hook_decides_what_is_learned_from(tiny):
    from dataclasses import replace

    class Judge(Defence):
        """Drops label 0, inverts label 1, silences label 4."""

        def feedback(self, ctx, batch):
            if not isinstance(batch, LabelBatch):
                return batch
            keep = batch.label_id != 0
            columns = {name: value[keep] for name, value in vars(batch).items()}
            ids = columns["label_id"]
            columns["target"] = np.where(ids == 1, 1 - columns["target"], columns["target"])
            columns["weight"] = np.where(ids == 4, 0, columns["weight"])
            return replace(batch, **columns)

    witness = Witness()
    agent = tiny.agent("dpo", (Judge(), witness), epochs=1, minibatch=64)
    learned = tiny.rounds(agent, 0, 1)[0]
    assert learned.weight.tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
    assert learned.target.tolist() == [1, 1, 1, 0, 0.5, 1, 0, 0]
    (pairs,) = witness.of(PairBatch)
    assert sorted(pairs.label_id.tolist()) == [1, 2, 3, 5, 6, 7]
    assert len(agent.replay.usable()) == 6


def test_dpo_and_sft_see_new_labels_only_and_the_log_sees_all(tiny):
    witness = Witness()
    agent = tiny.agent("dpo", (witness,), epochs=1, minibatch=64)
    tiny.rounds(agent, 0, 2)
    assert [len(b.target) for b in witness.of(PairBatch)] == [8, 8]
    logs = witness.of(LabelBatch)
    assert [len(b.target) for b in logs] == [8, 16] and logs[1].new.tolist() == [False] * 8 + [
        True
    ] * 8


@pytest.mark.parametrize("learner", ["dpo", "sft", "grpo"])
def test_a_round_without_votes(tiny, learner):
    """Label-driven learners stand still; rollout learners go on with the reward model they have."""
    agent = tiny.agent(learner)
    before = tiny.weights(agent.policy.model)
    agent.act(tiny.observation(0))
    learned = agent.learn(tiny.labels(0)._replace(vote=np.full(8, VOTE_SKIP)))
    assert len(learned.label_id) == 0 and agent.round == 1
    assert torch.equal(tiny.weights(agent.policy.model), before) == (learner != "grpo")


def test_stop_learning_ends_the_round_and_keeps_the_policy(tiny):
    class Brake(Defence):
        def feedback(self, ctx, batch):
            if isinstance(batch, RolloutBatch):
                raise StopLearning("brake")
            return batch

    agent = tiny.agent("grpo", (Brake(),))
    before = tiny.weights(agent.policy.model)
    learned = tiny.rounds(agent, 0, 2)
    assert torch.equal(tiny.weights(agent.policy.model), before)
    assert agent.round == 2 and len(learned[1].label_id) == 8
    assert learned[0].metrics["defence/stopped/brake"] == 1.0
    assert agent.reward_model.ctx.step > 0, "it had learned before the stop"


def test_responding_for_evaluation_changes_nothing_a_round_depends_on(tiny):
    measured, plain = tiny.agent("grpo"), tiny.agent("grpo")
    for round in range(2):
        measured.respond(*tiny.prompts(5), 2, seed=round)
        tiny.rounds(measured, round, round + 1)
        measured.respond(*tiny.prompts(5), 2, seed=round)
        tiny.rounds(plain, round, round + 1)
    assert torch.equal(tiny.weights(measured.policy.model), tiny.weights(plain.policy.model))


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("learner", ["ppo", "dpo"])
def test_state_in_the_middle_of_a_delay_resumes_bitwise(tiny, learner, delay):
    import copy

    def play(agent, start, stop):
        for round in range(start, stop):
            agent.act(tiny.observation(round))
            silent = round < delay
            labels = tiny.labels(0 if silent else round - delay)
            agent.learn(labels._replace(vote=np.full(8, VOTE_SKIP)) if silent else labels)

    whole, first = (tiny.agent(learner, delay=delay, window=20) for _ in range(2))
    play(whole, 0, 6)
    play(first, 0, 3)
    state = copy.deepcopy(first.state_dict())
    play(first, 3, 4)  # the saved state must not share memory with what goes on
    second = tiny.agent(learner, delay=delay, window=20)
    second.load_state_dict(state)
    play(second, 3, 6)
    assert torch.equal(tiny.weights(second.policy.model), tiny.weights(whole.policy.model))
    for name, column in whole.replay.columns.items():
        assert np.array_equal(column, second.replay.columns[name]), name


class Counter(Defence):
    """Logs how many steps it has surrounded, for either learner."""

    targets = frozenset({"policy", "reward_model"})

    def __init__(self):
        self.steps = 0
        self.logs = 0

    def feedback(self, ctx, batch):
        self.logs += isinstance(batch, LabelBatch)
        return batch

    def backward(self, ctx, run):
        self.steps += 1
        ctx.log({"defence/counter": self.steps})
        return run()


def test_each_learner_has_its_own_defence_and_the_label_log_is_read_once(tiny):
    agent = tiny.agent("grpo", (Counter,))
    learned = tiny.rounds(agent, 0, 2)[-1]
    policy, reward = (stack.members[0] for stack in agent.stacks().values())
    assert policy is not reward
    assert learned.metrics["defence/counter"] == policy.steps
    assert learned.metrics["reward_model/defence/counter"] == reward.steps == 4
    assert (policy.logs, reward.logs) == (2, 0)
