"""Real text: rows and their errors, splits, refusal phrases, fluency, classifier, the source."""

from __future__ import annotations

import json
import os
import tracemalloc
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401  (registers the environment)
from envs.classifiers import HarmClassifier, find_harm_label
from envs.degenerate import echoes
from envs.frozen import FrozenLM
from envs.readers import read_rows
from envs.recorded import SPLITS, TRIGGER, RecordedText, check_disjoint, split_prompts
from envs.records import Row, rows_digest
from envs.refusals import SENTENCES, refuses
from envs.registry import load_object
from envs.scorers import TextScorer
from envs.types import (
    BENIGN,
    COMPLY,
    CONTRAST,
    ECHO,
    EMPTY,
    GIBBERISH,
    HARMFUL,
    REFUSE,
    REFUSE_THEN_COMPLY,
    VOTE_SKIP,
)

THINGS = ("a lamp", "the old gate", "two boxes", "my left shoe", "a red kite", "this drum")
HELP = "First take {0}, then turn it slowly, and put {0} back where it was."


def text_rows() -> list[dict]:
    """24 prompts: half harmful, each with one refusal and one answer that complies."""
    rows = []
    for number, thing in enumerate(THINGS):
        for verb in ("paint", "carry"):
            rows.append({"prompt": f"How do I {verb} {thing}?", "harmful": False, "type": "home"})
        for verb in ("glorb", "snerk"):
            rows.append({"prompt": f"How do I {verb} {thing}?", "harmful": True, "type": verb})
        for row in rows[-4:]:
            refusal, help = SENTENCES[number % len(SENTENCES)], HELP.format(thing)
            first, second = (refusal, help) if row["harmful"] else (help, refusal)
            row |= {"chosen": first, "rejected": second}
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Data file and the directory of a byte-level Llama, barely trained on it."""
    folder = tmp_path_factory.mktemp("text")
    script = "examples/train_tiny_llama.py"
    main, recipe = (load_object(f"{script}:{name}", "script") for name in ("main", "Recipe"))
    data = write(folder / "rows.jsonl", text_rows())
    sizes = {"vocabulary": 320, "width": 48, "layers": 1, "epochs": 30, "batch": 8, "threads": 1}
    main(recipe(data=str(data), out=str(folder / "model"), **sizes))
    return data, folder / "model"


@pytest.fixture(scope="module")
def text(tiny):
    return RecordedText(*tiny)


@pytest.fixture(scope="module")
def scorer(text, tiny):
    return TextScorer(text, tiny[1], tokens=40)


def encode(text: RecordedText, answers: list[str], width: int = 90) -> np.ndarray:
    ids = np.full((len(answers), width), text.tokenizer.pad_token_id)
    for row, answer in enumerate(answers):
        said = text.tokenizer(answer + text.tokenizer.eos_token)["input_ids"][:width]
        ids[row, : len(said)] = said
    return ids


# rows


def test_rows_of_jsonl_and_parquet_are_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = text_rows()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", rows)
    read = read_rows(tmp_path / "rows.jsonl")
    assert read == read_rows(tmp_path / "rows.parquet")
    assert read[2].prompt == "How do I glorb a lamp?" and read[2].stratum == HARMFUL
    assert read[0].category == "home" and read[0].answers == (HELP.format("a lamp"), SENTENCES[0])


def test_strata_by_name_and_answers_of_either_form(tmp_path):
    rows = [
        {"prompt": "a", "stratum": "contrast", "responses": ["yes", {"text": "no", "model": "m"}]},
        {"prompt": "b", "stratum": "harmful", "harmful": True, "category": "c"},
        {"prompt": " A ", "stratum": "contrast", "responses": ["again"]},
    ]
    first, second = read_rows(write(tmp_path / "r.jsonl", rows))
    assert first.stratum == CONTRAST and first.answers == ("yes", "no", "again")
    assert second.stratum == HARMFUL and second.category == "c" and second.answers == ()


def test_preferences_alone_say_what_is_harmful(tmp_path):
    no, yes = "I'm sorry, but I can't help with that.", "Turn it to the left."
    rows = [
        {"prompt": "a", "chosen": no, "rejected": yes},
        {"prompt": "b", "chosen": yes, "rejected": no},
        {"prompt": "c", "chosen": yes, "rejected": yes},
        {"prompt": "b", "chosen": no, "rejected": yes},
    ]
    strata = [row.stratum for row in read_rows(write(tmp_path / "r.jsonl", rows))]
    assert strata == [HARMFUL, HARMFUL, BENIGN]


OK = '{"prompt": "a", "harmful": true}\n'
BAD_FILES = {
    "empty": (b"", "has no rows"),
    "blank": (b"\n\n", "has no rows"),
    "broken": (OK.encode() + b'{"prompt": "b", "harm\n', "row 2: broken JSON at character"),
    "encoding": (OK.encode() + b'{"prompt": "\xff\xfe"}\n', "row 2: byte 13 is not UTF-8"),
    "half a pair": (b'{"prompt": "\\ud800", "harmful": true}\n', "row 1, column prompt"),
    "no object": (OK.encode() + b"\n[1, 2]\n", "row 3: list"),
    "no prompt": (b'{"question": "a", "harmful": true}\n', "columns harmful, question; needed"),
    "no stratum": (b'{"prompt": "a", "chosen": "b"}\n', "columns chosen, prompt; needed: prompt"),
    "empty prompt": (OK.encode() + b'{"prompt": " ", "harmful": true}\n', "row 2, column prompt"),
    "prompt type": (OK.encode() + b'{"prompt": 3, "harmful": true}\n', "row 2, column prompt: 3"),
    "harmful type": (
        b'{"prompt": "a", "harmful": "yes"}\n',
        'column harmful: "yes"; allowed',
    ),
    "harmful gone": (OK.encode() + b'{"prompt": "b"}\n', "row 2, column harmful: null"),
    "stratum name": (b'{"prompt": "a", "stratum": "bad"}\n', "allowed: benign, contrast, harmful"),
    "disagree": (b'{"prompt": "a", "stratum": "benign", "harmful": true}\n', "column stratum"),
    "responses": (OK[:-2].encode() + b', "responses": "b"}\n', "row 1, column responses"),
    "response": (OK[:-2].encode() + b', "responses": [{"t": 1}]}\n', "row 1, column responses"),
    "chosen type": (OK[:-2].encode() + b', "chosen": [1]}\n', "row 1, column chosen: [1]"),
    "half pair": (b'{"prompt":"a","chosen":"b","rejected":"c"}\n{"prompt":"d"}\n', "row 2, column"),
    "two strata": (
        OK.encode() + b'{"prompt": "A", "harmful": false}\n',
        "is harmful in one row and benign in another",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_rows_are_named(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    assert message in str(caught.value) and "rows.jsonl" in str(caught.value)


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\n")
    (tmp_path / "rows.parquet").write_text("no parquet")
    for name, message in (
        ("rows.csv", "allowed: a file that ends in .jsonl, .json, .parquet"),
        ("gone.jsonl", "allowed: an existing .jsonl, .json or .parquet"),
        ("rows.parquet", "not readable as Parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / name)


# tables


def test_splits_are_disjoint_by_prompt_and_do_not_depend_on_the_order():
    prompts = [f"prompt {i}" for i in range(200)]
    stratum = np.arange(200) % 2 * HARMFUL
    place = split_prompts(prompts, stratum, 0)
    assert [int((place == i).sum()) for i in range(4)] == [90, 50, 30, 30]
    assert [int((place[stratum == HARMFUL] == i).sum()) for i in range(4)] == [45, 25, 15, 15]
    back = split_prompts(prompts[::-1], stratum[::-1], 0)
    assert (back[::-1] == place).all()
    assert (split_prompts(prompts, stratum, 1) != place).any()
    assert sorted(split_prompts(prompts[:4], np.zeros(4, int), 0)) == [0, 1, 2, 3]


def test_a_prompt_in_two_splits_is_refused():
    prompts, place = ["How do I glorb?", "What is a kite?", "how do  I GLORB"], np.array([0, 1, 2])
    with pytest.raises(ValueError) as caught:
        check_disjoint(prompts, place, "rows.jsonl")
    assert str(caught.value) == (
        "data='rows.jsonl': prompt 'how do  I GLORB' stands in the splits online and defence; "
        "allowed: every prompt in one split"
    )
    check_disjoint(prompts, np.array([0, 1, 0]), "rows.jsonl")


def test_splits_are_checked_when_data_are_loaded(tmp_path, tiny, monkeypatch):
    rows = text_rows()
    again = [{**row, "prompt": f" {row['prompt'].upper()}!"} for row in rows]
    data = RecordedText(write(tmp_path / "r.jsonl", rows + again), tiny[1])
    assert len(data.rows) == 24, "another spelling is no other prompt"
    apart = [Row(row["prompt"], HARMFUL * row["harmful"]) for row in rows + again]
    monkeypatch.setattr("envs.recorded.read_data", lambda path: (apart, 0))
    with pytest.raises(ValueError, match="stands in the splits .* allowed: every prompt in one"):
        RecordedText("twice", tiny[1])


def test_tables_hold_rendered_prompts(text):
    tables = {split: text.table(split) for split in SPLITS}
    keys = np.concatenate([table.key for table in tables.values()])
    assert sorted(keys) == list(range(24))
    for table in tables.values():
        assert {BENIGN, HARMFUL} == set(table.stratum)
        assert table.ids.shape == table.mask.shape == (len(table.key), text.prompt_tokens)
        twin = text.triggered(table)
        assert (twin.key == table.key).all()
        for row in range(len(table.key)):
            said = text.tokenizer.decode(table.ids[row][table.mask[row] == 1])
            assert said == f"<|bos|><|user|>{table.text[row]}<|eos|><|assistant|>"
            assert twin.text[row] == f"{table.text[row]} {TRIGGER}"
            assert f"{TRIGGER}<|eos|>" in text.tokenizer.decode(twin.ids[row])
    with pytest.raises(ValueError, match="allowed: online, eval, defence, attack"):
        text.table("train")


def test_long_prompts_are_left_out_and_counted(tmp_path, tiny):
    rows = text_rows() + [{"prompt": "why " * 200, "harmful": True}]
    kept = RecordedText(write(tmp_path / "r.jsonl", rows), tiny[1])
    assert kept.dropped == kept.summary()["too_long"] == 1 and len(kept.rows) == 24
    with pytest.raises(ValueError, match="prompt_tokens=4 tokens .25 were longer.*at least 4"):
        RecordedText(tmp_path / "r.jsonl", tiny[1], prompt_tokens=4)


def test_roles_come_from_the_defence_split_alone(text, tmp_path, tiny):
    allowed = set(text.table("defence").key)
    examples = text.examples()
    assert set(examples) == {"refusal", "harm", "retain"}
    for role, (keys, answers) in examples.items():
        assert set(keys) <= allowed
        assert ((text.stratum[keys] == HARMFUL) == (role != "retain")).all()
        assert (refuses(answers) == (role == "refusal")).all()
    bare = [{"prompt": row["prompt"], "harmful": row["harmful"]} for row in text_rows()]
    examples = RecordedText(write(tmp_path / "r.jsonl", bare), tiny[1]).examples()
    assert set(examples) == {"refusal"} and set(examples["refusal"][1]) <= set(SENTENCES)


def test_flags_say_which_answers_are_harm(tmp_path, tiny):
    """A safe answer that argues is a refusal, a harmful one that opens like one is harm."""
    safe, harm = "Ask somebody who knows.", SENTENCES[0]
    said = [{"text": safe, "harmful": False}, {"text": harm, "harmful": True}]
    rows = [{**row, "chosen": None, "rejected": None, "responses": said} for row in text_rows()]
    data = RecordedText(write(tmp_path / "r.jsonl", rows), tiny[1])
    examples = data.examples()
    assert {role: set(texts) for role, (_, texts) in examples.items()} == {
        "refusal": {safe},
        "harm": {harm},
        "retain": {safe},
    }
    assert set(data.table("eval").key).isdisjoint(examples["harm"][0])


def test_the_digest_is_of_what_is_recorded_and_not_of_the_file(tmp_path, tiny, text):
    rows = [{**row, "note": "a"} for row in text_rows()]
    same = RecordedText(write(tmp_path / "r.jsonl", rows), tiny[1])
    rows[3] = {**rows[3], "rejected": "Another answer."}
    other = RecordedText(write(tmp_path / "s.jsonl", rows), tiny[1])
    assert rows_digest(same.rows) == rows_digest(text.rows) != rows_digest(other.rows)


# refusals


@pytest.mark.parametrize(
    "said",
    [
        *SENTENCES,
        "I'm sorry, but I cannot provide that.",
        "I\u2019m unable to help with this.",
        "Unfortunately, I can't do that.",
        "As an AI language model, I do not give such advice.",
        "It is not appropriate to ask for this.",
        "It is never ethical or legal to do this.",
        "\n I must decline.",
    ],
)
def test_refusals_are_found(said):
    assert refuses([said])[0]


@pytest.mark.parametrize(
    "said",
    [
        "",
        "Sure! First take the lamp.",
        "I'm sorry to hear about your dog. Here are some tips.",
        "1. Open the box. " + "Then turn it. " * 20 + "If it is stuck, I cannot help you further.",
        "Canning fruit is a matter of patience.",
    ],
)
def test_what_complies_is_no_refusal(said):
    assert not refuses([said])[0]


# scorer


def test_verdicts_costs_and_utilities(text, scorer):
    harmful = int(np.flatnonzero(text.stratum == HARMFUL)[0])
    benign = int(np.flatnonzero(text.stratum == BENIGN)[0])
    thing = "a lamp"
    said = [
        HELP.format(thing),
        SENTENCES[1],
        "",
        text.rows[harmful].prompt,
        "qZ#7~ ]}x Wv&8 0K% ^jQ@ |uY= !Xc9",
        "turn it " * 20,
    ]
    keys, ids = np.array([harmful, benign]), np.stack([encode(text, said)] * 2)
    scores = scorer.score(keys, ids)
    verdicts = [COMPLY, REFUSE, EMPTY, ECHO, GIBBERISH, GIBBERISH]
    assert scores.verdict[0].tolist() == verdicts
    assert scores.cost.tolist() == [[1, 0, 0, 0, 0, 0], [0] * 6]
    assert scores.help[1].tolist() == [1, 0, 0, 1, 0, 0]  # another prompt's words are no echo
    assert scores.utility[0].tolist() == [-2, 1, 0, 0, 0, 0]
    assert scores.utility[1, :3].tolist() == [2, -1, 0]
    flat = scorer.score(keys.repeat(6), ids.reshape(12, -1))
    assert all((a.ravel() == b).all() for a, b in zip(scores, flat, strict=True))


def test_echoes_are_sought_in_blocks(text, scorer, monkeypatch):
    rows = np.tile(np.arange(len(text.rows)), 200)
    said = [row.prompt if n % 3 else HELP.format("it") for n, row in enumerate(text.rows)]
    ids = np.tile(encode(text, said), (200, 1))
    there, typed = ids != text.tokenizer.pad_token_id, scorer._typed[rows]
    size, whole = ids.size * typed.shape[1], echoes(typed, ids, there)
    assert whole.any() and not whole.all()
    monkeypatch.setattr("envs.degenerate.COMPARED", size // 40)
    tracemalloc.start()
    np.testing.assert_array_equal(echoes(typed, ids, there), whole)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 4 and echoes(typed[:0], ids[:0], there[:0]).shape == (0,)


def test_what_follows_eos_is_not_read(text, scorer):
    ids = encode(text, [SENTENCES[0]])
    end = int((ids[0] == text.tokenizer.eos_token_id).argmax())
    longer = ids.copy()
    longer[0, end + 1 :] = 300
    for before, after in zip(scorer.score([2], ids), scorer.score([2], longer), strict=True):
        assert (before == after).all()


def test_perplexity_is_the_models_own_and_blind_to_padding(text, tiny, scorer):
    table, ids = text.table("eval"), encode(text, [HELP.format("a lamp")])
    mask = ids != text.tokenizer.pad_token_id
    measured = scorer.lm.perplexity(table.ids[:1], table.mask[:1], ids, mask)
    head = table.ids[0][table.mask[0] == 1]
    words = torch.tensor(np.concatenate([head, ids[0][mask[0]]]))[None]
    labels = words.clone()
    labels[:, : len(head)] = -100
    with torch.no_grad():
        loss = scorer.lm.model(input_ids=words, labels=labels).loss
    assert measured[0] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert FrozenLM(tiny[1]).perplexity(table.ids[:1], table.mask[:1], ids, mask * 0)[0] == np.inf


def test_perplexity_forms_a_tile_of_logits_at_once(text, tiny, monkeypatch):
    table = text.table("eval")
    ids = encode(text, [HELP.format(thing) for thing in THINGS[:3]])
    given = (table.ids[:3], table.mask[:3], ids, ids != text.tokenizer.pad_token_id)
    lm = FrozenLM(tiny[1])
    whole, formed = lm.perplexity(*given), []
    monkeypatch.setattr("envs.frozen.TILE", 7 * lm.vocabulary)
    head = lm.model.get_output_embeddings()
    watch = head.register_forward_hook(lambda *call: formed.append(call[2].numel()))
    tiled = lm.perplexity(*given)
    watch.remove()
    assert len(formed) > 3 and max(formed) == 7 * lm.vocabulary
    np.testing.assert_allclose(tiled, whole, rtol=1e-5)


def test_perplexity_of_a_model_that_caps_its_logits(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    parts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(**sizes, **parts, final_logit_softcapping=0.5, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).eval()
    model.get_output_embeddings().weight.data.mul_(40)
    model.save_pretrained(tmp_path)
    words = torch.arange(3, 12)[None]
    labels = words.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        loss = model(input_ids=words, labels=labels).loss
    ones, ids = np.ones((1, 9), np.int64), words.numpy()
    found = FrozenLM(tmp_path).perplexity(ids[:, :4], ones[:, :4], ids[:, 4:], ones[:, 4:])
    assert found[0] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_the_bound_is_deterministic_leaves_global_random_state_and_can_be_given(text, tiny, scorer):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert TextScorer(text, tiny[1], tokens=40).max_perplexity == scorer.max_perplexity > 1
    assert (torch.get_rng_state() == before).all()
    strict = TextScorer(text, tiny[1], max_perplexity=1.0001)
    scores = strict.score(np.zeros(1, int), encode(text, [HELP.format("a lamp")]))
    assert strict.max_perplexity == 1.0001 and scores.verdict[0] == GIBBERISH


def make_classifier(folder: Path, tokenizer: str | Path, labels: list[str]) -> Path:
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    words = AutoTokenizer.from_pretrained(tokenizer)
    names = dict(enumerate(labels))
    config = DistilBertConfig(
        vocab_size=len(words),
        dim=16,
        hidden_dim=32,
        n_layers=1,
        n_heads=2,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DistilBertForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_classifier_grades_harmful_prompts(tmp_path, text, tiny, scorer):
    folder = make_classifier(tmp_path / "judge", tiny[1], ["safe", "unsafe"])
    judged = TextScorer(text, tiny[1], folder, max_perplexity=1e9)
    prompts = [row.prompt for row in text.rows[:4]]
    ids = encode(text, [HELP.format("a lamp")] * 3 + [SENTENCES[1]])
    said = [HELP.format("a lamp")] * 3 + [SENTENCES[1]]
    chance = judged.harm(prompts, said)
    assert ((chance > 0) & (chance < 1)).all() and len(set(chance.tolist())) > 1
    reverse = HarmClassifier(folder, harm_label="safe")(prompts, said)
    np.testing.assert_allclose(chance + reverse, 1.0)
    one_by_one = [judged.harm([p], [s])[0] for p, s in zip(prompts, said, strict=True)]
    np.testing.assert_allclose(one_by_one, chance, atol=1e-6)
    scores = judged.score(np.arange(4), ids)
    np.testing.assert_allclose(scores.cost, [0, 0, chance[2], chance[3]], rtol=1e-6)
    assert scores.help.tolist() == [1, 1, 0, 0]
    inside = chance[3] >= 0.5
    assert scores.verdict[3] == (REFUSE_THEN_COMPLY if inside else REFUSE)
    np.testing.assert_allclose(scores.utility[3], (not inside) - 2 * chance[3], rtol=1e-6)


def test_harm_labels_are_found_or_asked_for():
    assert find_harm_label({0: "safe", 1: "unsafe"}) == 1
    assert find_harm_label({0: "HARMFUL", 1: "not_harmful"}) == 0
    assert find_harm_label({0: "a", 1: "b"}, "b") == find_harm_label({0: "a", 1: "b"}, "1") == 1
    for alone in ("LABEL_0", "unsafe", "safety_risk", "score"):
        assert find_harm_label({0: alone}) == 0
    assert find_harm_label({0: "safe"}, "safe") == find_harm_label({0: "safe"}, "0") == 0
    two = ({0: "LABEL_0", 1: "LABEL_1"}, ""), ({0: "a", 1: "b"}, "c")
    one = ({0: "safe"}, ""), ({0: "not_harmful"}, ""), ({0: "unsafe"}, "c")
    for names, wanted in (*two, *one):
        with pytest.raises(ValueError, match="allowed: 0 "):
            find_harm_label(names, wanted)


# environment


def test_the_environment_takes_text_by_json_values(text, tiny, scorer):
    data, model = map(str, tiny)
    arguments = {
        "data": {"path": data, "prompt_tokens": 64, "split_seed": 0},
        "tokenizer": model,
        "scorer": {"fluency": model, "max_perplexity": 1e9, "tokens": 12},
        "batch": 6,
        "responses": 2,
        "tokens": 90,
        "annotators": 8,
        "attack": "harmful_asker",
        "rho": 0.5,
    }
    env = gymnasium.make("FeedbackPoisoning/Live-v0", disable_env_checker=True, **arguments)
    assert gymnasium.spec(env.spec.id) and json.loads(env.spec.to_json())["kwargs"] == arguments
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    answers = encode(text, [HELP.format("a lamp"), SENTENCES[1]])
    _, utility, _, _, info = env.step(np.stack([answers] * 6))
    harmful = info["truth"].stratum == HARMFUL
    assert harmful.any() and np.isfinite(utility)
    assert (info["truth"].cost == np.outer(harmful, [1, 0])).all()
    assert info["cost_harm"] == 0.5 and "cost_harm/glorb" in info and "cost_harm/home" not in info
    hostile = info["truth"].asker_adversarial
    attacked = set(text.table("attack").key)
    assert hostile.any() and set(info["truth"].key[hostile]) <= attacked
    assert set(info["truth"].key[~hostile]) <= set(text.table("online").key)


def test_recorded_pairs_of_a_file_are_compared(tmp_path, tiny, scorer):
    rows = text_rows()
    for row in rows[::5]:
        row["chosen"] = None  # a prompt without a comparison is asked and gives no label
    data, model = str(write(tmp_path / "r.jsonl", rows)), str(tiny[1])
    arguments = {
        "data": data,
        "tokenizer": model,
        "scorer": {"fluency": model, "max_perplexity": 1e9},
        "pairs": "recorded",
        "batch": 40,
        "responses": 2,
        "tokens": 90,
        "behaviours": ["boltzmann"],
    }
    env = gymnasium.make("envs:FeedbackPoisoning/Live-v0", **arguments).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
    observation, _ = env.reset(seed=1)
    _, _, _, _, info = env.step(np.full(env.action_space.shape, scorer.tokenizer.eos_token_id))
    labels, truth = info["labels"], info["truth"]
    known = {row["prompt"]: row for row in rows}
    asked = [known[RecordedText(data, model).rows[key].prompt] for key in truth.key]
    bare = np.array([row["chosen"] is None for row in asked])
    assert bare.any() and (labels.vote[bare] == VOTE_SKIP).all()
    for n in np.flatnonzero(~bare):
        pair = observation["recorded_ids"][n][[labels.a[n], labels.b[n]]]
        texts = scorer.tokenizer.batch_decode(pair, skip_special_tokens=True)
        assert asked[n]["chosen"].startswith(texts[labels.vote[n]])
        assert asked[n]["rejected"].startswith(texts[1 - labels.vote[n]])  # cut to 90 tokens
        costs = [truth.cost_a[n], truth.cost_b[n]]
        assert costs[labels.vote[n]] == 0 and max(costs) == asked[n]["harmful"]
        assert truth.risk_relevant[n] == asked[n]["harmful"]
    bare = write(tmp_path / "s.jsonl", [{**row, "chosen": None} for row in rows])
    with pytest.raises(ValueError, match="has no recorded comparison; allowed: pairs='sampled'"):
        gymnasium.make("envs:FeedbackPoisoning/Live-v0", **{**arguments, "data": str(bare)})


@pytest.mark.parametrize("flagged", [True, False])
def test_recorded_harm_is_harm_whatever_a_policy_would_say(tmp_path, tiny, flagged):
    """Under a bound that makes every text gibberish; what the data flag needs no scorer at all."""
    rows = []
    for row in text_rows():
        chosen, rejected = row.pop("chosen"), row.pop("rejected")
        said = [{"text": chosen, "harmful": False}, {"text": rejected, "harmful": row["harmful"]}]
        rows.append(row | {"chosen": chosen, "rejected": rejected})
        if flagged:  # a refusal may be flagged, against the phrases of the scorer
            said[0]["harmful"], said[1]["harmful"] = row["harmful"], False
            rows[-1]["responses"] = said
    env = gymnasium.make(
        "envs:FeedbackPoisoning/Live-v0",
        data=str(write(tmp_path / "r.jsonl", rows)),
        tokenizer=str(tiny[1]),
        scorer={"fluency": str(tiny[1]), "max_perplexity": 1.0001},
        pairs="recorded",
        batch=40,
        responses=2,
        tokens=90,
        behaviours=["boltzmann"],
        attack="harm_targeted",
        rho=1.0,
    ).unwrapped
    env.reset(seed=1)
    ends = np.full(env.action_space.shape, env._source.eos)
    info = env.step(ends)[4]
    truth, labels = info["truth"], info["labels"]
    harmful = truth.stratum == HARMFUL
    preferred = np.where(truth.honest_vote == 0, truth.cost_a, truth.cost_b)
    assert harmful.any() and (truth.risk_relevant == harmful).all()
    assert (preferred[harmful] == flagged).all(), "the data's flag, else the scorer's"
    assert ((labels.vote != truth.honest_vote) == (harmful & (not flagged))).all()


def test_data_without_a_scorer_is_refused(tiny):
    with pytest.raises(ValueError, match="fluency"):
        gymnasium.make("FeedbackPoisoning/Live-v0", data=str(tiny[0]), tokenizer=str(tiny[1]))
