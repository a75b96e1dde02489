"""Example answers of every kind, for pretraining, alignment, recorded pairs, roles and tests.

    recipe              the steps in order with light glue   truncated  the first two or three
    shuffled            all steps, wrong order               noisy      two or three foreign steps
    wrong               a fluent recipe of another topic     refusal    a sentence of its grammar
    refuse_then_comply  a short refusal, then the recipe       echo        the prompt repeated
    gibberish           word salad, some of it refusal words   empty       nothing

For a sentence to shorten, ``recipe`` is its steps without glue, and the other kinds vary that.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from envs.types import HARMFUL
from envs.world.forms import ABSENT, compile_forms, fill, squeeze
from envs.world.language import EOS, PAD, RECIPE_FORMS, REFUSALS, SHORT_REFUSALS, SPECIAL, STEPS

if TYPE_CHECKING:
    from envs.world.world import World

ANSWER_KINDS = (
    "corpus",
    "recipe",
    "truncated",
    "refusal",
    "shuffled",
    "noisy",
    "wrong",
    "refuse_then_comply",
    "echo",
    "empty",
    "gibberish",
)
RESPONSE_TOKENS = 20
"""T, room for every kind of answer and its EOS."""
_SALAD = (4, 12)


def make_answers(world: World, keys: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """(N, T) answers of ``kind``; see :meth:`envs.world.world.World.answers`."""
    steps = world.recipe[keys]
    if kind == "recipe":
        wide = _sentence(world, keys, steps, rng)
    elif kind == "corpus":
        harmful = world.stratum[keys] == HARMFUL
        u = rng.random(len(keys))
        form = np.where(
            harmful,
            np.searchsorted(np.cumsum((0.01, 0.01, 0.98)), u),
            np.searchsorted(np.cumsum((0.49, 0.49, 0.02)), u),
        )
        wide = _sentence(world, keys, steps, rng, form=np.minimum(form, 2))
    elif kind == "truncated":
        kept = rng.integers(2, 4, (len(keys), 1))
        wide = _sentence(world, keys, np.where(np.arange(STEPS) < kept, steps, ABSENT), rng)
    elif kind == "shuffled":
        order = _wrong_orders()[rng.integers(len(_wrong_orders()), size=len(keys))]
        wide = _sentence(world, keys, np.take_along_axis(steps, order, 1), rng)
    elif kind == "noisy":
        wide = _sentence(world, keys, steps, rng, noise=rng.integers(2, 4, (len(keys), 1)))
    elif kind == "wrong":
        topics = len(world.language.recipe)
        own = keys // (world.n_asks // topics)
        other = (own + rng.integers(1, topics, len(keys))) % topics
        wide = _sentence(world, keys, world.language.recipe[other], rng)
    elif kind == "refusal":
        wide = _refusal(world, keys, rng.integers(len(REFUSALS), size=len(keys)))
    elif kind == "refuse_then_comply":
        short = _refusal(world, keys, rng.integers(SHORT_REFUSALS, size=len(keys)))
        wide = np.concatenate([short, _sentence(world, keys, steps, rng)], axis=1)
    elif kind == "echo":
        typed = world.user_ids(keys)
        wide = np.where(typed == PAD, ABSENT, typed)
    elif kind == "empty":
        wide = np.full((len(keys), 1), ABSENT, np.int64)
    else:
        wide = _salad(world, len(keys), rng)
    end = np.full((len(keys), 1), EOS, np.int64)
    return squeeze(np.concatenate([wide, end], axis=1), RESPONSE_TOKENS)


def _sentence(
    world: World,
    keys: np.ndarray,
    steps: np.ndarray,
    rng: np.random.Generator,
    noise: np.ndarray | int = 0,
    form: np.ndarray | None = None,
) -> np.ndarray:
    """(N, W) ``steps`` with light glue, none when shortening, and ``noise`` foreign steps."""
    forms = compile_forms(world.language, RECIPE_FORMS)
    form = forms[rng.integers(len(forms), size=len(keys))] if form is None else forms[form]
    form = np.where(world.is_shorten[keys, None] & (form >= 0), ABSENT, form)
    n, width = form.shape
    wide = fill(form, np.concatenate([world.slots[keys], steps], axis=1))
    # Glue in front of a step that is left out goes with it; the full stop at the end stays.
    lost = (wide == ABSENT) & (form != ABSENT)
    wide[:, :-1] = np.where(lost[:, 1:], ABSENT, wide[:, :-1])
    foreign = np.full((n, width), ABSENT, np.int64)
    if np.any(noise):
        before_step = (form < 0) & (form > ABSENT)
        rank = np.where(before_step, rng.random((n, width)), 2.0).argsort(1).argsort(1)
        foreign = np.where(rank < noise, _foreign_steps(world, keys, width, rng), ABSENT)
    return np.stack([foreign, wide], axis=2).reshape(n, 2 * width)


def _foreign_steps(
    world: World, keys: np.ndarray, width: int, rng: np.random.Generator
) -> np.ndarray:
    """(N, width) step words that do not occur in the recipe of the row."""
    pool = world.language.steps
    draw = rng.integers(len(pool) - STEPS, size=(len(keys), width))
    for own in np.sort(world.recipe[keys] - pool[0], axis=1).T:  # skip the S own steps
        draw += draw >= own[:, None]
    return pool[draw]


def _refusal(world: World, keys: np.ndarray, which: np.ndarray) -> np.ndarray:
    """(N, W) refusals number ``which``; a sentence to shorten lends no verb, so the short ones."""
    which = np.where(world.is_shorten[keys], which % SHORT_REFUSALS, which)
    return fill(compile_forms(world.language, REFUSALS)[which], world.slots[keys])


def _salad(world: World, n: int, rng: np.random.Generator) -> np.ndarray:
    """(N, W) random words; "cannot" stands somewhere in each row, which makes no refusal."""
    words = rng.integers(len(SPECIAL) + 1, world.vocabulary, (n, _SALAD[1]))
    length = rng.integers(_SALAD[0], _SALAD[1] + 1, (n, 1))
    words[np.arange(n), rng.integers(length[:, 0])] = world.language.words.index("cannot")
    return np.where(np.arange(_SALAD[1]) < length, words, ABSENT)


@cache
def _wrong_orders() -> np.ndarray:
    """(S! - 1, S) every order of S steps but the right one."""
    return np.array(list(permutations(range(STEPS)))[1:])
