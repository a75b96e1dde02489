"""The command ``poisonloop``.

Dispatch comes first and imports nothing heavy: torch, transformers and tyro are loaded by the
subcommand that needs them. Every ``UsageError`` becomes one line on stderr and exit code 2; set
``POISONLOOP_TRACEBACK=1`` to see where it came from. Other exceptions are nobody's input: they give
a traceback and exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

USAGE = """\
usage: poisonloop COMMAND ...

An online feedback-poisoning simulator: when does a policy that learns from people leave
the safe set, if some of them are adversaries, and which defence keeps it there?

commands:
  run [PRESET] [--rho .1] ...     one experiment, with a report at its end
  sweep [PRESET] [--rho 0 .1] ... experiments over lists of values, in parallel
  resume DIR [--rounds N]         continue a stopped run, or extend a finished one
  fork RUN --at N [--defence X]   continue a run from a round under something else
  report DIR ...                  one page from run directories: report.html
  export RUN --format NAME        its comparisons as a data set for TRL's trainers
  defend --defence NAME --out DIR build a model defended before its release, and save it
  score DEFENCE                   contract, paired arms and adaptive attackers, on one card
  battery                         every defence against every learner, one table
  list                            every learner, attack, defence, world and preset
  train-classifier --data FILE    a harm classifier or helpfulness model for real text, with its F1
  prepare-data --model M --data D what a data set lacks: answers, roles, splits, a classifier
  best-of-n [PRESET] ...          harm of the worst of N answers, without any training
  bench                           where the time of a round goes
  memory [--model M]              what fits where: whole models, adapters, precisions
  papers [NAME]                   published experiments, with the paper's numbers beside ours
  exit-rules                      rules that date an exit, where the truth is known

`poisonloop COMMAND --help` shows a command's flags.

try:
  poisonloop run smoke
  poisonloop run --rho 0.2 --defence refusal_loss
"""

MODELS = ("--model", "--base", "--classifier") + tuple(
    f"--text.{name}"
    for name in ("model", "reward-model", "classifier", "judge", "helpfulness", "fluency")
)
DATA = ("--data", "--text.data")
COMMANDS = {
    "run": ("sim.run_command", "run"),
    "sweep": ("sim.sweep_command", "command"),
    "resume": ("sim.run_command", "resume"),
    "fork": ("sim.fork.command", "fork"),
    "report": ("sim.report_command", "report"),
    "export": ("sim.export_command", "export"),
    "battery": ("sim.battery.command", "command"),
    "defend": ("sim.defend_command", "defend"),
    "score": ("sim.score.command", "score"),
    "list": ("sim.listing", "list_components"),
    "train-classifier": ("sim.scorers.command", "command"),
    "prepare-data": ("sim.scorers.prepare", "command"),
    "best-of-n": ("sim.best_of_n", "command"),
    "bench": ("sim.bench.command", "main"),
    "memory": ("sim.memory_command", "command"),
    "papers": ("sim.papers.command", "command"),
    "exit-rules": ("sim.exit_rules_command", "command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for anything the user got wrong)."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"poisonloop {version('poisonloop')}")
        return 0
    from envs.usage import Interrupted, UsageError
    from sim import launch

    if not _asks_hub(words):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is local
    warnings.showwarning = _show_warning
    try:
        launch.check(words[0])
        launch.join()
        if ("--out", "") in _values(words):
            raise UsageError("--out ''; allowed: a place to write to")
        if words[0] in ("run", "sweep", "defend", "train-classifier", "prepare-data", "papers"):
            _read_data(words)
        code = _command(words[0])(words[1:]) or 0
        launch.leave()
        return code
    except UsageError as error:
        if os.environ.get("POISONLOOP_TRACEBACK"):
            raise
        launch.leave_it_to_main()
        print(f"poisonloop: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        launch.leave_it_to_main()
        print(f"poisonloop: stopped: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads has seen enough: `poisonloop list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        from sim.files import remedy

        launch.leave_it_to_main()
        if not remedy(error):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"poisonloop: stopped: {where}{error.strerror}{remedy(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if launch.is_main():
            print("stopped; what was recorded can be continued", file=sys.stderr)
        return 130
    except Exception:
        launch.leave_it_to_main()
        raise


def _show_warning(message: Warning | str, *_where: Any, **_line: Any) -> None:
    """Say it in one line, as errors are said."""
    if os.environ.get("RANK", "0") == "0":
        print(f"poisonloop: warning: {message}", file=sys.stderr)


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        from envs.usage import UsageError

        raise UsageError(f"command={name!r}; allowed: {', '.join(COMMANDS)}")
    module, function = COMMANDS[name]
    return getattr(importlib.import_module(module), function)


def _read_data(words: list[str]) -> None:
    """Read the data file that ``words`` name before torch is imported: bad rows are found at once.

    Raises:
        ValueError: it cannot be used.
    """
    for flag, file in _values(words):
        if flag in DATA:
            from envs.readers import read_rows

            read_rows(file)


def _values(words: list[str]) -> list[tuple[str, str]]:
    """Flags with every word that stands behind each, whatever it is."""
    pairs, flag = [word.partition("=")[::2] for word in words if "=" in word], ""
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
        else:
            pairs.append((flag, word))
    return pairs


def _asks_hub(words: list[str]) -> bool:
    """Whether a model or a data set is named as it is on the hub, which is asking for it."""
    from sim.hub import is_hub_id

    return any(
        (flag in MODELS and is_hub_id(value)) or (flag in DATA and _lies_on_hub(value))
        for flag, value in _values(words)
    )


def _lies_on_hub(data: str) -> bool:
    """Whether some part of ``data`` has no place here; what names nothing is refused later."""
    from envs.readers import parts
    from envs.usage import UsageError

    try:
        return any(part.path is None for part in parts(data))
    except UsageError:
        return False


class _Parser(argparse.ArgumentParser):
    """Complains as the other commands do."""

    def error(self, message: str) -> NoReturn:
        """Refuse the words, in one line.

        Raises:
            ValueError: always.
        """
        from envs.usage import UsageError

        allowed = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise UsageError(f"{message}; allowed: {allowed}")


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that reads no abbreviations."""
    return _Parser(f"poisonloop {name}", description=description, allow_abbrev=False)


if __name__ == "__main__":
    sys.exit(main())
