"""The online reward model: recovers a known order, listens to weights, forgets with the window."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from agents.batches import Sequences
from agents.learners.reward_model import (
    RewardModel,
    RewardModelConfig,
    load_reward_model,
    sequence_rewards,
)
from agents.replay import Replay


def make(tiny, seed=0, **fields):
    stack = tiny.stack((), "reward_model", seed)
    return RewardModel(RewardModelConfig(**fields), stack.ctx, stack)


def rows(tiny, n, seed=0, first_id=0, **columns):
    """``n`` labels in a replay's own columns."""
    pairs = tiny.pairs(n, seed)
    base = {
        "prompt_ids": pairs.a.prompt_ids,
        "prompt_mask": pairs.a.prompt_mask,
        "a_ids": pairs.a.ids,
        "a_mask": pairs.a.mask,
        "b_ids": pairs.b.ids,
        "b_mask": pairs.b.mask,
        "label_id": np.arange(first_id, first_id + n),
        "item": np.arange(n),
        "annotator_id": np.arange(n) % 3,
        "target": pairs.target,
        "weight": np.ones(n, np.float32),
        "round": np.zeros(n, np.int64),
        "stratum": np.zeros(n, np.int64),
    }
    return {name: np.asarray(value) for name, value in {**base, **columns}.items()}


def test_recovers_a_known_bradley_terry_order(tiny):
    """Votes drawn from sigma(s_a - s_b) over 8 answers; their order holds on new prompts."""
    rng = np.random.default_rng(0)
    n, answers = 1500, tiny.sequences(200, seed=8)
    _, first = np.unique(answers.ids.numpy(), axis=0, return_index=True)
    answers = answers.take(torch.from_numpy(np.sort(first)[:8]))
    score = rng.permutation(np.linspace(-3, 3, 8))
    a, b = rng.integers(8, size=n), rng.integers(8, size=n)
    vote = rng.random(n) < 1 / (1 + np.exp(score[b] - score[a]))
    prompt_ids, prompt_mask = tiny.prompts(n, 9)
    replay = Replay(n)
    replay.add(
        rows(
            tiny,
            n,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            a_ids=answers.ids[a],
            a_mask=answers.mask[a],
            b_ids=answers.ids[b],
            b_mask=answers.mask[b],
            target=vote.astype(np.float32),
        )
    )
    model = make(tiny, lr=1e-2, steps=40, minibatch=48)
    held_out = tuple(column.repeat_interleave(8, 0) for column in tiny.prompts(8, 10))
    repeated = (answers.ids.repeat(8, 1), answers.mask.repeat(8, 1))

    def agreement():
        rewards = model.score(Sequences(*held_out, *repeated)).view(8, 8).mean(0)
        return spearmanr(rewards.numpy(), score).statistic

    before = agreement()
    losses = [model.learn(replay, round, round)["reward_model/loss"] for round in range(5)]
    assert abs(before) < 0.7 and agreement() > 0.9
    assert losses[-1] < losses[0] - 0.1


def test_score_is_the_last_tokens_head(tiny):
    model = make(tiny).ctx.model
    sequences = tiny.sequences(6)
    rewards = sequence_rewards(model, sequences).detach()
    for i in range(6):
        ids = torch.cat(
            [
                sequences.prompt_ids[i][sequences.prompt_mask[i] == 1],
                sequences.ids[i][sequences.mask[i] == 1],
            ]
        )
        hidden = model.base_model(ids[None]).last_hidden_state[0, -1]
        assert rewards[i].item() == pytest.approx(model.score(hidden).item(), abs=1e-5)


def test_loss_by_hand_with_weights_and_ties(tiny):
    model, pairs = make(tiny), tiny.pairs(6)
    delta = model.score(pairs.a) - model.score(pairs.b)
    sigma = torch.sigmoid(delta)
    each = -pairs.target * sigma.log() - (1 - pairs.target) * (1 - sigma).log()
    expected = (pairs.weight * each).sum().item() / 6
    assert model.run(pairs).losses["loss"] == pytest.approx(expected, rel=1e-5)


def trained(tiny, *parts, **fields):
    model, replay = make(tiny, minibatch=8, **fields), Replay(64)
    for part in parts:
        replay.add(part)
    model.learn(replay, 0, 5)
    return tiny.weights(model.ctx.model)


def test_a_zero_weight_label_is_an_absent_label(tiny):
    present = rows(tiny, 12)
    silent = rows(tiny, 5, seed=3, first_id=90, weight=np.zeros(5, np.float32))
    heard = rows(tiny, 5, seed=3, first_id=90)
    alone = trained(tiny, present)
    assert torch.equal(trained(tiny, silent, present), alone)
    assert torch.equal(trained(tiny, present, silent), alone)
    assert not torch.equal(trained(tiny, heard, present), alone)


def test_weights_matter(tiny):
    half = rows(tiny, 12, weight=np.linspace(0.1, 1, 12).astype(np.float32))
    assert not torch.equal(trained(tiny, half), trained(tiny, rows(tiny, 12)))


def test_no_usable_label_no_step(tiny):
    model, replay = make(tiny), Replay(8)
    before = tiny.weights(model.ctx.model)
    assert model.learn(replay, 0, 0) == {}
    replay.add(rows(tiny, 4, weight=np.zeros(4, np.float32)))
    assert model.learn(replay, 1, 1) == {}
    assert torch.equal(tiny.weights(model.ctx.model), before) and model.ctx.step == 0


def test_reset_returns_to_the_first_weights_and_moments(tiny):
    """After a reset the model is that of a fresh one given the same round's draws."""
    model, replay = make(tiny, reset_every=2, minibatch=8), Replay(64)
    replay.add(rows(tiny, 12))
    for round in range(3):  # resets on entering round 2
        model.learn(replay, round, seed=round)
    fresh = make(tiny, minibatch=8)
    fresh.learn(replay, 2, seed=2)
    assert torch.equal(tiny.weights(model.ctx.model), tiny.weights(fresh.ctx.model))
    warm = make(tiny, minibatch=8)
    for round in range(3):
        warm.learn(replay, round, seed=round)
    assert not torch.equal(tiny.weights(warm.ctx.model), tiny.weights(fresh.ctx.model))


def test_a_missing_head_is_drawn_from_the_seed(tiny, tmp_path):
    tiny.model(0).save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    first, again, other = (load_reward_model(tmp_path, seed).score.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_window_drops_the_oldest(tiny):
    replay = Replay(10)
    replay.add(rows(tiny, 7))
    replay.add(rows(tiny, 6, seed=1, first_id=7))
    assert replay.columns["label_id"].tolist() == list(range(3, 13)) and len(replay) == 10
    expected = rows(tiny, 6, seed=1)["a_ids"]
    assert (replay.columns["a_ids"][-6:] == expected).all()


def test_revision_joins_by_label_and_silences_dropped_ones(tiny):
    from dataclasses import replace

    replay = Replay(10)
    replay.add(rows(tiny, 5))
    log = replay.log(newest=2)
    assert log.new.tolist() == [False] * 3 + [True] * 2
    keep = np.array([4, 0, 2])  # in another order, two dropped
    revised = replace(
        log,
        **{name: getattr(log, name)[keep] for name in vars(log)}
        | {"target": np.array([0.9, 0.1, 0.3]), "weight": np.array([2.0, 1.0, 0.5])},
    )
    old = replay.columns["target"].copy()
    replay.revise(revised)
    assert replay.columns["target"][[4, 0, 2]].tolist() == pytest.approx([0.9, 0.1, 0.3])
    assert replay.columns["weight"].tolist() == [1.0, 0.0, 0.5, 0.0, 2.0]
    assert (replay.columns["target"][[1, 3]] == old[[1, 3]]).all()
    assert replay.usable().tolist() == [0, 2, 4]
    nothing = replace(log, **{name: getattr(log, name)[:0] for name in vars(log)})
    replay.revise(nothing)
    assert not replay.columns["weight"].any()
