"""``poisonloop report``: one page from run directories, or one of its pictures."""

from __future__ import annotations

from pathlib import Path

from envs.usage import UsageError
from sim.cli import parser_of

EPILOG = """A page FILE.html, or DIR/report.html; figures/ and tables/ lie beside it."""


def report(words: list[str]) -> int:
    """``poisonloop report DIR...``."""
    parser = parser_of("report", f"A page from run directories, or folders of them. {EPILOG}")
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="run directories")
    parser.add_argument(
        "--out", type=Path, help="FILE.html or a folder; default: the one DIR, or runs/report"
    )
    parser.add_argument("--tables", type=Path, metavar="DIR", help="default: beside the page")
    parser.add_argument(
        "--figure", metavar="NAME", help="only this picture, to --out FILE.svg, .png or .pdf"
    )
    asked = parser.parse_args(words)
    from sim.analysis.report import write_figure, write_report

    if asked.figure is not None:
        if asked.tables is not None:
            raise UsageError("--tables with --figure; allowed: one of them")
        print(write_figure(asked.dirs, asked.figure, asked.out or Path(f"{asked.figure}.svg")))
        return 0
    alone = asked.dirs[0] if len(asked.dirs) == 1 else Path("runs/report")
    for path in write_report(asked.dirs, asked.out or alone, asked.tables):
        print(path)
    return 0
