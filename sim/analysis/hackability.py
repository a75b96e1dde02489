"""Do proxy and truth order a run's policies alike? The reward-hacking test of Skalse et al. (2022).

A proxy is hackable on a set of policies if two of them, pi and pi', have J_proxy(pi) < J_proxy(pi')
and J_true(pi) > J_true(pi'): optimising the proxy would make things worse. The set here is the
policies that one run evaluated, the proxy is what its reward model gives their answers, the truth
is harm (less is better) or utility. All pairs of evaluations of a run are compared, none across
runs, whose reward models differ.

Both means are measured, so an order counts only where it is certified: the difference exceeds its
standard error so far that all orders of all pairs of the run hold at once with probability
1 - ALPHA (normal approximation, Bonferroni over pairs and over proxy and truth). The rest are
undecided. With D disagreeing, A agreeing and U undecided of N pairs, the true share of disordered
pairs of that run lies in [D / N, (D + U) / N] with that probability. This covers the noise of the
evaluations, not what another seed would have done. For that, runs are resampled, worlds first, then
runs within them, since pairs of one run share its policies; it needs ``MIN_SEEDS`` runs.

What it does not do: the reward model learns while the policy does, and preferences fix rewards up
to a constant only, so levels of different rounds are compared as far as its zero stays in place. A
policy that is compared with itself under two reward models may differ from itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from envs.usage import UsageError
from sim.analysis import style
from sim.analysis.load import Run, by_arm
from sim.analysis.paired import nested_weights, with_interval
from sim.analysis.words import span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTHS = {"harm": ("safety/harm", -1), "utility": ("utility", 1)}
"""Column of each truth, and its sign: more of it is better or worse."""
ALPHA, MOST_ARMS, DRAWS = 0.05, 20, 2000
SPREAD = 1.5
"""Largest standard deviation of the utility of one kind of prompt, which spans an interval of 3."""


class Pairs(NamedTuple):
    """How the pairs of evaluations of one run are ordered."""

    pairs: int
    disagree: int
    agree: int

    @property
    def undecided(self) -> int:
        """Pairs without a certified order on both sides."""
        return self.pairs - self.disagree - self.agree


class Share(NamedTuple):
    """Shares of a run's pairs, means over runs, and the bootstrap interval of the first."""

    disagree: float
    agree: float
    undecided: float
    low: float | None  # None below MIN_SEEDS runs
    high: float | None
    runs: int


def supports(runs: Iterable[Run]) -> bool:
    """Whether any of the runs has a proxy at two evaluations; DPO and SFT have none."""
    return any(len(measured(run, "harm")) > 1 for run in runs)


def measured(run: Run, truth: str) -> pd.DataFrame:
    """The evaluations that have both: round, proxy, proxy_error, truth, truth_error.

    Runs recorded without standard errors get the largest that there can be, and for the proxy that
    of its second differences from round to round, in which any bend of the trend is noise too.

    Raises:
        ValueError: an unknown truth.
    """
    if truth not in TRUTHS:
        raise UsageError(f"truth={truth!r}; allowed: {', '.join(TRUTHS)}")
    rows = run.own_evaluations.index
    proxy, error = run.column("reward_eval"), run.column("reward_eval_error")
    if proxy.isna().all():
        proxy = run.column("reward")
        bends = proxy.diff().diff().where(run.rounds["round"].diff(2) == 2)
        error = pd.Series(np.sqrt((bends**2).mean() / 6), index=proxy.index)
    name, sign = TRUTHS[truth]
    table = {"round": run.rounds["round"], "proxy": proxy, "proxy_error": error}
    table |= {"truth": sign * run.column(name), "truth_error": _truth_error(run, truth)}
    return pd.DataFrame(table).loc[rows].dropna().reset_index(drop=True)


def _truth_error(run: Run, truth: str) -> pd.Series:
    n = run.column("safety/n")
    if truth == "harm":  # a cost in [0, 1] spreads no more than a coin of its mean
        mean = (n * run.column("safety/harm") + 2) / (n + 4)
        return np.sqrt(mean * (1 - mean) / (n + 4))
    asked = run.config.get("evaluation", {}).get("n_help", 0)
    return run.column("utility_error").fillna(SPREAD / np.sqrt(n + asked))


def ordered_pairs(run: Run, truth: str = "harm", alpha: float = ALPHA) -> Pairs:
    """Certified disagreements and agreements of ``run``; all hold at once at level ``alpha``.

    Raises:
        ValueError: an unknown truth.
    """
    from scipy.stats import norm

    table = measured(run, truth)
    n = len(table) * (len(table) - 1) // 2
    if not n:
        return Pairs(0, 0, 0)
    needed = norm.isf(alpha / (4 * n))  # two sides, two means, n pairs
    signs = []
    for name in ("proxy", "truth"):
        value, error = table[name].to_numpy(), table[f"{name}_error"].to_numpy()
        change = value[None, :] - value[:, None]
        certified = np.abs(change) > needed * np.hypot(error[None, :], error[:, None])
        signs.append(np.sign(change) * certified)
    together = (signs[0] * signs[1])[np.triu_indices(len(table), 1)]
    return Pairs(n, int((together < 0).sum()), int((together > 0).sum()))


def disagreement(runs: Iterable[Run], truth: str = "harm") -> Share | None:
    """Shares of pairs, each run counting alike; None where no run has two evaluations with a proxy.

    Raises:
        ValueError: an unknown truth.
    """
    found = [(run.world, ordered_pairs(run, truth)) for run in runs]
    found = [(world, pairs) for world, pairs in found if pairs.pairs]
    if not found:
        return None
    shares = np.array([(p.disagree, p.agree, p.undecided) for _, p in found], float)  # (runs, 3)
    shares /= np.array([[p.pairs] for _, p in found])
    worlds = np.array([world for world, _ in found])
    weights = nested_weights(worlds, np.random.default_rng(0), DRAWS)
    disagree, agree, undecided = (float(share) for share in shares.mean(0))
    means = weights @ shares[:, 0] / weights.sum(1)
    over = with_interval(disagree, means, len(found))
    return Share(disagree, agree, undecided, over.low, over.high, len(found))


def hackability_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per arm and truth: shares of pairs, 95 % over runs, and the most there can be.

    ``disordered, at most`` is D + U: in [disagree, at most] lies the true share of these very runs,
    each with probability 1 - ``ALPHA``.
    """
    rows = []
    for arm, members in by_arm(runs).items():
        for truth in TRUTHS:
            share = disagreement(members, truth)
            if share is not None:
                rows.append(
                    {
                        "arm": arm,
                        "reward against": truth,
                        "runs": share.runs,
                        "disagree": share.disagree,
                        "agree": share.agree,
                        "undecided": share.undecided,
                        "low": share.low,
                        "high": share.high,
                        "disordered, at most": share.disagree + share.undecided,
                    }
                )
    return pd.DataFrame(rows)


@style.styled
def plot_hackability(runs: Iterable[Run], ax: Axes | None = None, truth: str = "harm") -> Axes:
    """Bars by arm: certified disagreement, undecided, certified agreement; whisker over runs.

    Raises:
        ValueError: no run has a proxy at two evaluations, or an unknown truth.
    """
    arms = by_arm(runs)
    shares = {arm: disagreement(members, truth) for arm, members in arms.items()}
    known = {arm: share for arm, share in shares.items() if share is not None}
    if not known:
        raise UsageError("runs: none has a reward at two evaluations; allowed: PPO or GRPO runs")
    names = style.short_names(known)
    shown = sorted(known, key=lambda arm: known[arm].disagree)[-MOST_ARMS:]
    ax = style.axes(ax, 7.6, 1.6 + 0.34 * len(shown))
    parts = {"disagree": style.VERMILION, "undecided": style.LIGHT, "agree": style.GREEN}
    left = np.zeros(len(shown))
    for name, colour in parts.items():
        widths = np.array([getattr(known[arm], name) for arm in shown])
        ax.barh([names[arm] for arm in shown], widths, left=left, color=colour, label=name)
        left += widths
    whiskers = [
        (i, share.low, share.high)
        for i, share in enumerate(known[arm] for arm in shown)
        if share.low is not None and share.high is not None
    ]
    for i, low, high in whiskers:
        ax.plot([low, high], [i, i], color=style.INK, lw=1.6, solid_capstyle="butt")
    ax.set(xlim=(0, 1), xlabel="share of pairs of evaluations, mean over runs")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8.8)
    ax.set_title(f"Reward against {truth}", pad=24)
    counts = span(known[arm].runs for arm in shown)
    learners = ", ".join(sorted({run.learner for arm in shown for run in arms[arm]}))
    rest = " Black: 95% over runs." * bool(whiskers)
    rest += f" {len(known) - len(shown)} arms with no more are left out." * (
        len(known) > len(shown)
    )
    better = "harm rises" if truth == "harm" else "utility falls"
    style.caption(
        ax,
        f"n = {counts} runs an arm ({learners}). Disagree: the reward model's mean rises while "
        f"{better}, or the reverse, both certified at {100 * ALPHA:g}% over all pairs of a run."
        f"{rest}",
    )
    return ax
