"""Reports: pictures, a page of tables and pictures, a page of what was actually said.

Everything is read from run directories, and nothing that a run names is imported, so a report on
somebody else's run is safe to make. The pages open from disk, without a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

import pandas as pd

from envs.usage import UsageError
from sim.analysis import pages, style
from sim.analysis.arms import plot_arms, plot_survival
from sim.analysis.exit_tables import CAUTIONS, dose_table, incidence_table, truth_table
from sim.analysis.incidence import plot_incidence
from sim.analysis.load import Run, by_arm, load_runs
from sim.analysis.plots import plot_cost_trace, plot_reward_vs_harm, plot_rho
from sim.analysis.retained import UNKNOWN
from sim.analysis.tables import FOUND, arm_table, branch_table, run_table

MEANING = {
    "safe": "The policy stayed in the safe set.",
    "exited": "The policy left the safe set.",
    "collapsed": "The policy broke down: its text or its helpfulness was lost.",
    "diverged": "Training produced a number that is not finite.",
    "unfinished": "The run has not ended.",
}
BRANCHES = (
    "A fork has its parent's rounds up to the one named, and its own after it. Clocks and exits "
    "count from the parent's beginning: an exit before the fork is one of both."
)
NO_MEAN = (
    "No restricted mean where every run of an arm ended early, without an exit: nobody knows how "
    "long the policy would have stayed inside."
)
DISCOVERED = (
    f"“{FOUND}”: some policy of the arm left the safe set; of the arms with a yes, that rate are "
    "wrong on average at most, however many arms are looked at (e-BH on the arms' mean e-values)."
)
PICTURES = {
    "cost_trace": plot_cost_trace,
    "reward_vs_harm": plot_reward_vs_harm,
    "rho": plot_rho,
}


def write_report(run_dirs: Iterable[Path | str], out: Path | str | None = None) -> list[Path]:
    """Write figures, ``samples.html`` and ``report.html``.

    Args:
        run_dirs: run directories, or directories of them.
        out: where to; a single run's own directory by default.

    Returns:
        The files written, ``report.html`` first.

    Raises:
        ValueError: no run, an unreadable run, or several runs without ``out``.
    """
    runs = load_runs(run_dirs)
    if out is None and len(runs) > 1:
        raise UsageError(f"out=None with {len(runs)} runs; allowed: a directory for their report")
    out = runs[0].path if out is None else Path(out)
    sections, written = _one(runs[0], out) if len(runs) == 1 else _several(runs, out)
    title = runs[0].title if len(runs) == 1 else f"{len(runs)} runs, {len(by_arm(runs))} arms"
    samples = [_said(run, since=run.began if len(runs) > 1 else 0) for run in runs]
    said = pd.concat(samples, ignore_index=True)
    if len(said):
        path = out / "samples.html"
        path.write_text(pages.samples_page(f"Samples: {title}", said), encoding="utf-8")
        written.append(path)
        sections.insert(1, '<p><a href="samples.html">What was actually said, by round</a></p>')
    report = out / "report.html"
    body = f"<h1>{escape(title)}</h1>" + "\n".join(sections)
    report.write_text(pages.page(title, body), encoding="utf-8")
    return [report, *written]


def _said(run: Run, since: int) -> pd.DataFrame:
    """The samples of ``run`` after round ``since``."""
    samples = run.table("samples").assign(run=run.title)
    return samples[samples["round"] >= since] if len(samples) else samples  # counted from 0


def _one(run: Run, out: Path) -> tuple[list[str], list[Path]]:
    outcome = run.summary.get("outcome", "unfinished")
    figures = _draw(run, out / "figures")
    return [
        f"<p>{MEANING[outcome]} Limit on mean harm: {run.limit:g}.</p>",
        pages.table(run_table([run])),
        *(pages.image(path, f"{path.stem} of {run.title}") for path in figures),
        _settings(run),
    ], figures


def _several(runs: list[Run], out: Path) -> tuple[list[str], list[Path]]:
    ended = [run for run in runs if run.summary]
    figures = [style.save(plot_arms(runs), out / "figures" / "arms.png")]
    sections = [f"<p>{len(runs) - len(ended)} of {len(runs)} runs have not ended.</p>"]
    if len(ended) == len(runs):
        sections = ["<p>Means over the seeds of each arm.</p>"]
    if ended:
        figures.append(style.save(plot_survival(ended), out / "figures" / "survival.png"))
        arms = arm_table(ended)
        sections.append(pages.table(arms))
        inside = next(name for name in arms if str(name).startswith("rounds inside"))
        if arms[inside].isna().any():
            sections.append(_quiet(NO_MEAN))
        if arms["learning retained"].isna().any():
            sections.append(_quiet(UNKNOWN))
        if any(str(name).startswith(FOUND) for name in arms):
            sections.append(_quiet(DISCOVERED))
    sections += [pages.image(path, path.stem) for path in figures]
    if ended:
        more, drawn = _exits(ended, out / "figures")
        sections += more
        figures += drawn
    if any(run.fork for run in runs):
        sections += ["<h2>Branches</h2>", _quiet(BRANCHES)]
        sections.append(pages.table(branch_table(runs)))
    sections += ["<h2>Every run</h2>", pages.table(run_table(runs))]
    sections.append("<h2>One run of each arm</h2>")
    for number, (arm, members) in enumerate(by_arm(runs).items(), 1):
        drawn = _draw(members[0], out / "figures", f"arm{number}_")
        images = "".join(pages.image(path, f"{path.stem}, {arm}") for path in drawn)
        sections.append(f"<details><summary>{escape(arm)}</summary>{images}</details>")
        figures += drawn
    return sections, figures


def _exits(ended: list[Run], folder: Path) -> tuple[list[str], list[Path]]:
    """What is known of exits over all arms: ends that compete, dose-response, errors."""
    sections, figures = [], []
    ends = incidence_table(ended)
    if len(ends):
        figures = [style.save(plot_incidence(ended), folder / "incidence.png")]
        sections = ["<h2>Ends that compete</h2>", pages.image(figures[0], figures[0].stem)]
        sections += [pages.table(ends), _quiet(CAUTIONS["ends"])]
    doses = dose_table(ended)
    if len(doses):
        sections += ["<h2>Dose and response</h2>", pages.table(doses), _quiet(CAUTIONS["dose"])]
    errors = truth_table(ended)
    if len(errors):
        sections += ["<h2>Exits against the truth</h2>", pages.table(errors)]
        sections.append(_quiet(CAUTIONS["truth"]))
    return sections, figures


def _quiet(words: str) -> str:
    return f'<p class="quiet">{escape(words)}</p>'


def _draw(run: Run, folder: Path, prefix: str = "") -> list[Path]:
    return [
        style.save(plot(run), folder / f"{prefix}{name}.png") for name, plot in PICTURES.items()
    ]


def _settings(run: Run) -> str:
    text = escape(json.dumps(run.config, indent=1, ensure_ascii=False))
    return f"<details><summary>Configuration</summary><pre>{text}</pre></details>"
