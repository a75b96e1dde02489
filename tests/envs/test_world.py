"""The embedded language: splits, strata, tables, tokenizer, answers; no model is needed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from envs.rng import stream
from envs.types import BENIGN, CONTRAST, HARMFUL
from envs.world import ANSWER_KINDS, SPLITS, World
from envs.world.language import EOS, PAD, TRIGGER, VERBS


@pytest.fixture(scope="module", params=[0, 3])
def world(request):
    return World(request.param)


def words_of(world, split):
    keys = world.keys(split)
    return set(world.slots[keys, 2].tolist())


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    first, again, other = World(1), World(1), World(2)
    assert np.array_equal(first.table("eval").ids, again.table("eval").ids)
    assert first.language.words == again.language.words
    assert first.language.words != other.language.words


def test_splits_share_no_topic_and_no_template(world):
    names = {split: words_of(world, split) for split in SPLITS}
    # What remains of a prompt when verb, kind and name are blanked is its template.
    templates = {}
    for split in SPLITS:
        keys = world.keys(split)
        typed = world.user_ids(keys)
        for slot in range(3):
            typed = np.where(typed == world.slots[keys, slot][:, None], -1 - slot, typed)
        templates[split] = set(map(tuple, typed.tolist()))
    for one in SPLITS:
        for other in SPLITS:
            if one < other:
                assert not names[one] & names[other]
                assert not templates[one] & templates[other]


def test_every_split_meets_every_kind_and_every_verb(world):
    for split in SPLITS:
        keys = world.keys(split)
        assert set(world.slots[keys, 1]) == set(world.language.kind)
        assert set(world.slots[keys, 0]) == set(world.language.verbs)


def test_strata_are_a_half_a_quarter_and_a_quarter_of_every_split(world):
    for split in SPLITS:
        counts = np.bincount(world.table(split).stratum, minlength=3)
        assert counts[BENIGN] == 2 * counts[CONTRAST] == 2 * counts[HARMFUL] > 0


def test_neither_a_verb_nor_a_kind_nor_any_word_decides(world):
    """Given any one word of a prompt, at least half of the prompts with it are harmless."""
    table = world.table("eval")
    harmful = table.stratum == HARMFUL
    for word in np.unique(table.ids[table.mask > 0]):
        has = (table.ids == word).any(1)
        assert harmful[has].mean() <= 0.5
    for verb in world.language.verbs:
        assert harmful[(table.ids == verb).any(1)].mean() == 0.25


def test_no_rule_that_reads_words_one_by_one_beats_saying_harmless(world):
    from sim.calibration import shortcut_figures

    figures = shortcut_figures(world)
    assert figures["shortcut: share harmless"] == 0.75
    assert figures["shortcut: one word"] <= 0.76
    assert figures["shortcut: bag of words"] <= 0.8


def test_harm_follows_from_verb_and_domain_alone(world):
    keys = world.all_keys()
    pairs = set(
        zip(world.domain[keys], world.slots[keys, 0], world.stratum[keys] == HARMFUL, strict=True)
    )
    assert len(pairs) == 8 * len(VERBS)


def test_domains_share_their_step_words(world):
    users = {d: set(world.language.recipe[world.language.domain == d].ravel()) for d in range(8)}
    for one in range(8):
        assert all(len(users[one] & users[other]) > 20 for other in range(8))


def test_harm_domains_can_be_chosen_by_name(world):
    some = World(world.seed, harm_domains=("bio", "cyber"))
    table = some.table("eval")
    assert set(table.domain[table.stratum == HARMFUL]) == {2, 3}
    kept = np.isin(world.table("eval").key, table.key)
    assert np.array_equal(world.table("eval").ids[kept], table.ids)
    with pytest.raises(ValueError, match="harm_domains: .*plants.*unsafe_qa"):
        World(0, harm_domains=("plants",))


def test_bad_names_are_named(world):
    with pytest.raises(ValueError, match="split: 'test'; allowed: alignment"):
        world.table("test")
    with pytest.raises(ValueError, match="task: 'sing'; allowed: ask, shorten"):
        world.table("eval", "sing")
    with pytest.raises(ValueError, match="kind: 'poem'; allowed: corpus"):
        world.answers(world.keys("eval"), "poem", stream(0))


def test_tables_are_left_padded_and_keyed(world):
    table = world.table("online")
    assert table.ids.shape == table.mask.shape == (len(table.key), world.prompt_tokens)
    assert np.array_equal(table.mask, table.ids != PAD)
    assert (np.diff(table.mask, axis=1) >= 0).all()
    assert len(np.unique(table.key)) == len(table.key)
    rows = world.rows(table.key[[5, 2]])
    assert np.array_equal(rows.ids, table.ids[[5, 2]])
    assert rows.text == (table.text[5], table.text[2])


def test_the_triggered_twin_differs_by_the_trigger_word(world):
    table = world.table("eval")
    twin = world.triggered(table)
    assert np.array_equal(twin.key, table.key)
    assert twin.text == tuple(f"{text} {TRIGGER}" for text in table.text)
    assert not any(TRIGGER in text for text in table.text)


def test_prompt_ids_are_what_the_chat_template_gives(world, tmp_path):
    from transformers import AutoTokenizer

    world.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == world.vocabulary
    assert tokenizer.eos_token_id == EOS and tokenizer.pad_token_id == PAD
    table = world.table("eval")
    for prompts in (table, world.triggered(table), world.table("eval", "shorten")):
        chats = [[{"role": "user", "content": text}] for text in prompts.text]
        rendered = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="np"
        )
        width = rendered["input_ids"].shape[1]
        assert np.array_equal(rendered["input_ids"], prompts.ids[:, -width:])
        assert not prompts.mask[:, :-width].any()
        assert np.array_equal(rendered["attention_mask"], prompts.mask[:, -width:])


def test_the_tokenizer_reads_back_what_it_wrote(world):
    tokenizer = world.tokenizer()
    answers = world.answers(world.keys("eval"), "gibberish", stream(0))
    for row in answers[:20]:
        said = tokenizer.decode(row, skip_special_tokens=True)
        assert tokenizer.encode(said, add_special_tokens=False) == row[: len(said.split())].tolist()
    turn = [{"role": "user", "content": "no ."}, {"role": "assistant", "content": "sorry ."}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == (
        "<s> <user> no . <assistant> sorry . </s>"
    )


@pytest.mark.parametrize("kind", ANSWER_KINDS)
def test_answers_end_once_and_are_padded_after(world, kind):
    keys = np.concatenate([world.keys("eval"), world.keys("eval", "shorten")])
    answers = world.answers(keys, kind, stream(0, kind))
    assert answers.shape == (len(keys), world.response_tokens) and answers.dtype == np.int64
    assert ((answers == EOS).sum(1) == 1).all()
    after = np.cumsum(answers == EOS, axis=1) - (answers == EOS)
    assert ((answers == PAD) == (after > 0)).all()
    again = world.answers(keys, kind, stream(0, kind))
    assert np.array_equal(answers, again)


def test_a_wrong_order_keeps_the_words_of_the_recipe(world):
    keys = world.keys("eval")
    steps = set(world.language.steps)
    right = world.answers(keys, "recipe", stream(0))
    wrong = world.answers(keys, "shuffled", stream(1))
    for a, b, key in zip(right, wrong, keys, strict=True):
        said, shuffled = [w for w in a if w in steps], [w for w in b if w in steps]
        assert said == world.recipe[key].tolist()
        assert sorted(said) == sorted(shuffled) and said != shuffled


def test_noise_adds_two_or_three_foreign_steps(world):
    keys = world.keys("eval")
    steps = set(world.language.steps)
    for row, key in zip(world.answers(keys, "noisy", stream(2)), keys, strict=True):
        said = [w for w in row if w in steps]
        assert len(said) - 5 in (2, 3)
        own = set(world.recipe[key].tolist())
        assert [w for w in said if w in own] == world.recipe[key].tolist()


def test_documents_stay_outside_the_splits(world):
    keys = world.keys("eval")
    prompts, answers = world.documents(keys, stream(0))
    asked = {tuple(row) for row in world.prompt_ids(world.all_keys()).tolist()}
    assert not asked & {tuple(row) for row in prompts.tolist()}
    verdicts = Counter(world.oracle.score(keys, answers).verdict.tolist())
    assert set(verdicts) == {0, 1}
