import numpy as np
import pytest

from envs.annotators import DEFAULT, NOISY, Behaviour, View, annotators
from envs.annotators.pool import Pool
from envs.types import HARMFUL, VOTE_A, VOTE_B, VOTE_SKIP, VOTE_TIE

N = 20_000


def view(margin, n=N, people=100, key=1):
    """``n`` votes on pairs with one margin, or with the margins given."""
    ua = np.broadcast_to(np.asarray(margin, np.float32), n)
    z = np.arange(n)
    zero = np.zeros(n, np.float32)
    return View(key, 0, z, z, z * 0, z * 0 + 1, z % people, ua, zero, zero, zero, zero > 0)


def pool(*specs, people=100):
    return Pool(people, tuple(annotators.create(spec) for spec in specs))


def first(votes):
    return (votes == VOTE_A).mean()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("name", annotators.names())
def test_contract_and_every_behaviour_does_something(name):
    behaviour = annotators.create(name)
    assert isinstance(behaviour, Behaviour) and annotators.summaries()[name].endswith(".")
    seen = view(np.linspace(-0.3, 0.3, N))
    judge = annotators.create("boltzmann(beta=8)")
    if name != "boltzmann":
        plain, with_it = Pool(100, (judge,)), Pool(100, (judge, behaviour))
    else:
        plain, with_it = Pool(100, ()), Pool(100, (behaviour,))
    votes = [p.honest(seen) for p in (plain, with_it)]
    assert votes[1].shape == (N,) and votes[1].dtype == np.int8
    changed = (votes[0] != votes[1]).any() or not np.allclose(plain.activity, with_it.activity)
    assert changed


def test_the_registered_names():
    assert {"boltzmann", "mistake", "lapse", "tie", "zipf"} <= set(annotators.names())


@pytest.mark.parametrize("beta, margin", [(4, 0.2), (1, -0.5), (0, 1.0), (2, 1.0)])
def test_boltzmann_probability(beta, margin):
    votes = pool(f"boltzmann(beta={beta})").honest(view(margin))
    p = sigmoid(beta * margin)
    assert first(votes) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / N))


def test_perfect_judges_never_err_and_skip_what_is_equal():
    seen = view(np.tile([1e-3, -1e-3, 0.0, 5.0], N // 4))
    votes = pool("boltzmann(beta=-1)").honest(seen)
    assert (votes == np.tile([VOTE_A, VOTE_B, VOTE_SKIP, VOTE_A], N // 4)).all()


def test_rationality_differs_between_people_and_stays_theirs():
    people = pool("boltzmann(beta=2.0, spread=0.5)")
    votes = people.honest(view(0.5, n=100_000))
    accuracy = (votes == VOTE_A).reshape(-1, 100).mean(0)
    trait = view(0.5, n=100).normal_trait("boltzmann")
    expected = sigmoid(2.0 * np.exp(0.5 * trait) * 0.5)
    assert np.abs(accuracy - expected).max() < 5 * np.sqrt(0.25 / 1000)
    same = pool("boltzmann(beta=2.0)").honest(view(0.5, n=100_000))
    assert np.std(accuracy) > 3 * (same == VOTE_A).reshape(-1, 100).mean(0).std()


def test_normal_traits_are_standard_normal():
    z = view(0.0, n=50_000, people=50_000).normal_trait("any")
    assert z.mean() == pytest.approx(0, abs=0.02) and z.std() == pytest.approx(1, abs=0.02)
    assert (np.abs(z) < 1.96).mean() == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize("spec, p", [("mistake(rate=0.1)", 0.9), ("lapse(rate=0.2)", 0.9)])
def test_mistakes_and_lapses_of_a_perfect_judge(spec, p):
    votes = pool("boltzmann(beta=-1)", spec).honest(view(1.0))
    assert first(votes) == pytest.approx(p, abs=0.01)


def test_a_lapse_equals_a_mistake_at_half_the_rate():
    lapse, mistake = (
        pool("boltzmann(beta=1)", spec).honest(view(0.7))
        for spec in ("lapse(rate=0.5)", "mistake(rate=0.25)")
    )
    assert (lapse == mistake).all()  # the same probability, the same draws


def test_ties_by_threshold():
    margins = [0.05, -0.05, 0.0, 0.2, -0.2]
    votes = pool("boltzmann(beta=-1)", "tie(threshold=0.1)").honest(view(margins, n=5))
    assert votes.tolist() == [VOTE_TIE, VOTE_TIE, VOTE_TIE, VOTE_A, VOTE_B]


def test_zipf_shares_by_hand():
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert pool("zipf", people=4).activity == pytest.approx(
        [1 / total, 0.5 / total, (1 / 3) / total, 0.25 / total]
    )
    assert pool("zipf(exponent=0)", people=4).activity == pytest.approx([0.25] * 4)


def test_arrivals_and_assignments_follow_activity():
    people = pool("zipf", people=10)
    draws = (np.arange(N) + 0.5) / N
    share = np.bincount(people.arrive(draws), minlength=10) / N
    assert share == pytest.approx(people.activity, abs=1e-3)
    assigned = people.assign(3, np.arange(N), 1)[:, 0]
    assert np.bincount(assigned, minlength=10) / N == pytest.approx(people.activity, abs=0.015)


def test_assignments_are_distinct_and_nested():
    people = pool("zipf", people=20)
    three, all_of_them = people.assign(3, np.arange(500), 3), people.assign(3, np.arange(500), 20)
    assert (three == all_of_them[:, :3]).all()
    assert (np.sort(all_of_them, 1) == np.arange(20)).all()


def test_a_vote_does_not_depend_on_who_else_votes():
    seen = view(np.linspace(-1, 1, 1000), n=1000)
    rows = np.arange(0, 1000, 7)
    part = seen.take(rows)
    people = pool(*DEFAULT)
    assert (people.honest(seen)[rows] == people.honest(part)).all()
    other = people.honest(seen._replace(key=2))
    assert (other != people.honest(seen)).any()


def test_people_err_independently_on_the_same_item():
    seen = view(0.0)._replace(item=np.zeros(N, np.int64), person=np.arange(N))
    votes = pool("boltzmann(beta=1)", people=N).honest(seen._replace(utility_a=seen.utility_a + 1))
    assert first(votes) == pytest.approx(sigmoid(1), abs=0.015)


def margins_of_an_aligned_policy(answer, n=N):
    """Differences between answers mixed as those of the aligned model (a quarter harmful)."""
    kinds = ("recipe", "noisy", "truncated", "refusal", "gibberish")
    mixtures = {False: (0.57, 0.08, 0.12, 0.2, 0.03), True: (0.005, 0.0, 0.0, 0.925, 0.07)}
    world, draw = answer.world, np.random.default_rng(0)
    table, utility = world.table("online"), []
    harmful = draw.random(n) < 0.25
    rows = np.zeros(n, np.int64)
    for stratum in (False, True):
        choices = np.flatnonzero((table.stratum == HARMFUL) == stratum)
        rows[harmful == stratum] = draw.choice(choices, (harmful == stratum).sum())
    for _ in range(2):
        mixed = [draw.choice(len(kinds), n, p=mixtures[stratum]) for stratum in (False, True)]
        spoken = np.stack([world.answers(table.key[rows], kind, draw) for kind in kinds])
        said = spoken[np.where(harmful, mixed[1], mixed[0]), np.arange(n)]
        utility.append(world.oracle.score(table.key[rows], said).utility)
    return utility[0] - utility[1]


@pytest.mark.parametrize("specs, low, high", [(NOISY, 0.76, 0.80), (DEFAULT, 0.96, 0.99)])
def test_accuracy_of_the_presets(specs, low, high, answer):
    margin = margins_of_an_aligned_policy(answer)
    votes = pool(*specs).honest(view(margin))
    differ = margin != 0
    accuracy = ((votes == VOTE_A) == (margin > 0))[differ].mean()
    assert low <= accuracy <= high
    assert (votes[~differ] == VOTE_SKIP).all()


@pytest.mark.parametrize(
    "spec, field",
    [
        ("mistake(rate=1.5)", "rate"),
        ("lapse(rate=-1)", "rate"),
        ("tie(threshold=0)", "threshold"),
        ("zipf(exponent=-1)", "exponent"),
        ("boltzmann(spread=-1)", "spread"),
        ("boltzmann(gamma=1)", "gamma"),
        ("telepathy", "telepathy"),
        ("lapse(rate='x')", "annotator.rate='x'"),
        ("mistake(rate=True)", "annotator.rate=True"),
        ("tie(threshold=1e999)", "threshold"),
        ("boltzmann(beta=-1e999)", "beta"),
        ("zipf(exponent=1e999)", "exponent"),
    ],
)
def test_bad_behaviours_are_refused(spec, field):
    with pytest.raises(ValueError, match=f"{field}.*allowed"):
        annotators.create(spec)
