"""Reports: one page with the answer, every table and picture, every run and what was said.

Everything is read from run directories, and nothing that a run names is imported, so a report on
somebody else's run is safe to make. The page opens from disk, without a network; pictures lie
beside it as PNG, tables as CSV and Parquet.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import pandas as pd

from envs.usage import UsageError
from sim.analysis import cautions, headline, page_data, pages, samples, style, vector
from sim.analysis.gallery import PICTURES, SHEETS, Picture, Sheet
from sim.analysis.load import Run, by_arm, load_runs
from sim.analysis.page_tables import write_tables
from sim.analysis.plots import plot_cost_trace, plot_reward_vs_harm, plot_rho
from sim.files import check_out

ANSWER = Sheet(
    "answer",
    "By attack and defence",
    headline.answer_table,
    "Finished runs, pooled over learners, worlds and whatever else differs; forks are left out. "
    "Shares: Clopper-Pearson. Median exit: of the runs that left, as if there were no others.",
)


ALONE = (
    Picture("cost_trace", "Harm over rounds", lambda runs: plot_cost_trace(runs[0]), bool),
    Picture("reward_vs_harm", "Reward and harm", lambda runs: plot_reward_vs_harm(runs[0]), bool),
    Picture("rho", "Five meanings of ρ", lambda runs: plot_rho(runs[0]), bool),
)
"""Pictures of a run by itself."""


def write_report(
    run_dirs: Iterable[Path | str], out: Path | str | None = None, tables: Path | None = None
) -> list[Path]:
    """Write a page with its pictures and tables.

    Args:
        run_dirs: run directories, or directories of them.
        out: the page (``.html``), or a folder for it; a single run's own directory by default.
            What an earlier page there showed and this one does not is taken away.
        tables: folder for the tables; ``tables`` beside the page by default.

    Returns:
        The files written, the page first, then pictures, then tables.

    Raises:
        ValueError: no run, an unreadable run, several runs without ``out``, or a place that cannot
            be written to.
    """
    given = [Path(path) for path in run_dirs]
    runs = load_runs(given)
    if out is None and len(runs) > 1:
        raise UsageError(f"out=None with {len(runs)} runs; allowed: a place for their report")
    out = runs[0].path if out is None else Path(out)
    page = out if out.suffix.lower() in (".html", ".htm") else out / "report.html"
    if page.is_dir():
        raise UsageError(f"out={str(page)!r} is a folder; allowed: a file to write the page to")
    check_out(page.parent)
    folder = page.parent / "tables" if tables is None else Path(tables)
    check_out(folder, "tables")
    runs = [run for members in by_arm(runs).values() for run in members]
    several = len(runs) > 1
    line = ["poisonloop", "report", *map(str, _shortest(given))]
    figures, drawn = _pictures(runs, page.parent / "figures", line)
    asked = [sheet for sheet in (ANSWER, *SHEETS) if several or sheet.name == "runs"]
    sheets = {sheet: sheet.make(runs) for sheet in asked}
    sheets = {sheet: frame for sheet, frame in sheets.items() if len(frame)}
    said = samples.collect(runs)
    document = _document(runs, figures, sheets, said, line)
    page.parent.mkdir(parents=True, exist_ok=True)
    anew = page.exists()
    page.write_text(document, encoding="utf-8")
    frames = {sheet.name: frame for sheet, frame in sheets.items()}
    written = [*drawn, *write_tables(runs, frames, folder)]
    if anew:
        _drop_older(page.parent / "figures", folder, written)
    return [page, *written]


def write_figure(run_dirs: Iterable[Path | str], name: str, out: Path) -> Path:
    """Draw one picture of a report by its name.

    Raises:
        ValueError: no such picture, runs that do not support it, an unknown format, or a place that
            cannot be written to.
    """
    check_out(out.parent)
    runs = load_runs(run_dirs)
    known = {picture.name: picture for picture in (*ALONE, *PICTURES)}
    if name not in known:
        raise UsageError(f"--figure {name}; allowed: {', '.join(known)}")
    picture = known[name]
    if picture in ALONE and len(runs) > 1:
        raise UsageError(f"--figure {name} with {len(runs)} runs; allowed: one run directory")
    if not picture.supports(runs):
        able = [p.name for p in known.values() if p not in ALONE or len(runs) == 1]
        able = [name for name in able if known[name].supports(runs)]
        raise UsageError(
            f"--figure {name}: these runs have nothing to show in it; allowed: {', '.join(able)}"
        )
    return vector.write(picture.draw(runs), out)


def _shortest(given: Sequence[Path]) -> list[Path]:
    """The same runs by fewer names: a folder in place of all the runs that lie in it."""
    lying: dict[Path, list[Path]] = {}
    for path in given:
        lying.setdefault(path.parent, []).append(path)
    names: list[Path] = []
    for parent, paths in lying.items():
        found = (path.parent for path in parent.glob("*/manifest.json"))
        inside = {path for path in found if not path.name.startswith(".")}
        names += [parent] if len(paths) > 1 and inside == set(paths) else paths
    return names


def _pictures(runs: list[Run], folder: Path, line: list[str]) -> tuple[list[str], list[Path]]:
    """Every picture that the runs support, as markup and as files."""
    shown, files = [], []
    for picture in PICTURES if len(runs) > 1 else ALONE:
        if not picture.supports(runs):
            continue
        ax = picture.draw(runs)
        anew = shlex.join([*line, "--figure", picture.name, "--out", f"{picture.name}.svg"])
        words = vector.words_under(ax)
        shown.append(pages.figure(picture.name, picture.title, vector.svg(ax), words, anew))
        files.append(style.save(ax, folder / f"{picture.name}.png"))
    return shown, files


def _drop_older(figures: Path, tables: Path, kept: Sequence[Path]) -> None:
    """Take away the pictures and tables of an earlier page that this one does not have."""
    could = [figures / f"{picture.name}.png" for picture in (*ALONE, *PICTURES)]
    for sheet in (ANSWER, *SHEETS):
        could += [tables / f"{sheet.name}.csv", tables / f"{sheet.name}.parquet"]
    for path in set(could) - set(kept):
        path.unlink(missing_ok=True)


def _document(
    runs: list[Run],
    figures: list[str],
    sheets: dict[Sheet, pd.DataFrame],
    said: samples.Samples,
    line: list[str],
) -> str:
    arms = len(by_arm(runs))
    alone = runs[0] if len(runs) == 1 else None
    title = alone.title if alone else f"{len(runs)} runs, {arms} arms"
    parts = [("answer", "The answer", _answer(runs, sheets))]
    if figures:
        parts.append(("pictures", "Pictures", "".join(figures)))
    if not alone:
        parts.append(("glance", "Arms at a glance", _GLANCE))
    tables = "".join(
        _sheet(sheet, frame)
        for sheet, frame in sheets.items()
        if sheet.name not in ("answer", "runs")
    )
    if tables:
        parts.append(("tables", "Tables", tables))
    if len(said.rows):
        parts.append(("samples", "What was said", _samples(said)))
    every = [sheet for sheet in sheets if sheet.name == "runs"]
    parts += [("runs", "Every run", _sheet(sheet, sheets[sheet], runs)) for sheet in every]
    parts.append(("again", "How to make it again", _again(runs, line)))
    body = (
        f'<header><h1>{escape(title)}</h1><button type="button" id="theme">dark</button></header>'
        f'<div id="overview">{pages.contents([(name, words) for name, words, _ in parts])}<main>'
        + "".join(pages.section(*part) for part in parts)
        + '</main></div><main id="run" hidden aria-live="polite"></main>'
        "<noscript><p>Without scripts the samples, the arms at a glance and the pages of single "
        "runs are not shown.</p></noscript>"
    )
    data = {
        "run-data": page_data.as_json(page_data.run_data(runs)),
        "sample-data": samples.as_json(said.rows),
    }
    return pages.page(title, body, data)


def _answer(runs: list[Run], sheets: dict[Sheet, pd.DataFrame]) -> str:
    if len(runs) == 1:
        words = f'<p class="lead">{escape(cautions.ending(runs[0]))}</p>'
        return (
            words
            + pages.quiet("One run: another seed may end otherwise.")
            + ('<p><a href="#run-0">Its rounds, settings and manifest</a></p>')
        )
    first, *rest = headline.answer(runs)
    table = "".join(_sheet(sheet, frame) for sheet, frame in sheets.items() if sheet is ANSWER)
    return (
        f'<p class="lead">{escape(first)}</p>{"".join(f"<p>{escape(words)}</p>" for words in rest)}'
        f'<div class="cautions"><h3>Before you believe it</h3>'
        f"{pages.listed(cautions.cautions(runs))}</div>{table}"
    )


def _sheet(sheet: Sheet, frame: pd.DataFrame, runs: Sequence[Run] = ()) -> str:
    links = [f"#run-{place}" for place in range(len(runs))]
    heading = "" if runs else f"<h3>{escape(sheet.title)}</h3>"
    table = pages.table(frame, links, sheet.title)
    body = heading + table + pages.quiet(sheet.caution)
    return f'<div class="sheet" id="table-{sheet.name}">{body}</div>'


_GLANCE = (
    '<p class="quiet">Harm over rounds, a thin line a run; above the dashed limit the policy is '
    "outside. A ring is a confirmed exit. Follow a run to its own page.</p>"
    '<div class="filters"><label>arm has <input type="search" id="glance-filter"></label>'
    '<span id="glance-count" role="status"></span></div><div id="glance-cards"></div>'
)


def _samples(said: samples.Samples) -> str:
    return (
        pages.quiet(
            "What was asked and answered, who voted, and how an honest person would have voted on "
            "the same pair. Harm is the scorer's cost, which no learner sees. " + samples.told(said)
        )
        + '<div class="filters" id="filters"></div><p id="shown" role="status"></p>'
        '<div id="cards"></div><div class="pager" id="pager"></div>'
    )


def _again(runs: list[Run], line: list[str]) -> str:
    commits = sorted(
        {str((run.manifest.get("git") or {}).get("commit")) for run in runs} - {"None"}
    )
    code = f"Code of the runs: commit {', '.join(commits)}." if commits else ""
    return (
        "<p>This page, from the folder in which it was made:</p>"
        + pages.command(shlex.join([*line, "--out", "report.html"]))
        + "<p>Every table of it as CSV and Parquet, with every round of every run:</p>"
        + pages.command(shlex.join([*line, "--out", "report.html", "--tables", "tables"]))
        + pages.quiet(f"{code} A run's page holds its manifest, from which it can be run anew.")
    )
