"""The command ``poisonloop``.

Dispatch comes first and imports nothing heavy: torch, transformers and tyro are loaded by the
subcommand that needs them. Every ``ValueError`` becomes one line on stderr and exit code 2; set
``POISONLOOP_TRACEBACK=1`` to see where it came from.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

USAGE = """\
usage: poisonloop COMMAND ...

An online feedback-poisoning simulator: when does a policy that learns from people leave
the safe set, if some of them are adversaries, and which defence keeps it there?

commands:
  run [PRESET] [--rho .1] ...     one experiment, with a report at its end
  sweep [PRESET] [--rho 0 .1] ... experiments over lists of values, in parallel
  resume DIR [--rounds N]         continue a stopped run, or extend a finished one
  report DIR ...                  pictures and pages from run directories
  list                            every learner, attack, defence, world and preset
  bench                           where the time of a round goes

`poisonloop COMMAND --help` shows a command's flags.

try:
  poisonloop run smoke
  poisonloop run --rho 0.2 --defence refusal_loss
"""

COMMANDS = {
    "run": ("sim.run_command", "run"),
    "sweep": ("sim.sweep_command", "command"),
    "resume": ("sim.run_command", "resume"),
    "report": ("sim.cli", "report"),
    "list": ("sim.listing", "list_components"),
    "bench": ("sim.bench", "main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for anything the user got wrong)."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is local
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"poisonloop {version('poisonloop')}")
        return 0
    try:
        return _command(words[0])(words[1:]) or 0
    except ValueError as error:
        if os.environ.get("POISONLOOP_TRACEBACK"):
            raise
        print(f"poisonloop: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was recorded can be continued", file=sys.stderr)
        return 130


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        raise ValueError(f"command={name!r}; allowed: {', '.join(COMMANDS)}")
    module, function = COMMANDS[name]
    return getattr(importlib.import_module(module), function)


def report(words: list[str]) -> int:
    """``poisonloop report DIR...``."""
    parser = parser_of("report", "Pictures and pages from run directories, or folders of them.")
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="run directories")
    parser.add_argument("--out", type=Path, help="default: the run itself, or runs/report")
    asked = parser.parse_args(words)
    from sim.analysis.load import load_runs
    from sim.analysis.report import write_report

    runs = [run.path for run in load_runs(asked.dirs)]
    alone = asked.dirs[0] if len(asked.dirs) == 1 else Path("runs/report")
    for path in write_report(runs, asked.out or alone):
        print(path)
    return 0


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that reads no abbreviations."""
    return argparse.ArgumentParser(
        f"poisonloop {name}", description=description, allow_abbrev=False
    )


if __name__ == "__main__":
    sys.exit(main())
