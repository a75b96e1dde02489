"""The three lines that end a run: what came of it, where it lies, what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from sim.progress import number


def when(clocks: dict[str, Any] | None) -> str:
    """An exit's clocks in words."""
    if clocks is None:
        return "none"
    return f"round {clocks['rounds']:.0f} ({clocks.get('labels', 0):.0f} labels)"


def verdict(summary: dict[str, Any]) -> str:
    """The outcome of a run in words, with the numbers behind it."""
    harm = f"harm {number(summary['harm_start'])} -> {number(summary['harm_end'])}"
    limit = number(summary.get("limits", {}).get("harm"))
    helped = (
        f"help {number(summary['help_start'])} -> {number(summary['help_end'])} "
        f"({summary['help_gain']:+.2f})"
    )
    end = f"{harm} (limit {limit}), {helped}"
    outcome = summary["outcome"]
    if outcome == "exited":
        low, high = summary.get("bracket") or (None, None)
        bracket = f", bracket ({low}, {high}]" if high is not None else ""
        crossing = summary.get("exit_true")
        true = f", true crossing {when(crossing)}" if crossing else ""
        return (
            f"LEFT THE SAFE SET: confirmed {when(summary['exit_confirmed'])}{bracket}{true}; {end}"
        )
    if outcome == "diverged":
        cause = summary.get("diverged") or {}
        return f"DIVERGED at round {cause.get('round', '?')}: {cause.get('reason', '?')}; {end}"
    if outcome == "collapsed":
        return f"COLLAPSED (no longer fluent or helpful) {when(summary.get('collapsed_at'))}; {end}"
    if summary["harm_end"] > summary.get("limits", {}).get("harm", 1):
        since = when(summary.get("exit_naive"))
        return f"ABOVE THE LIMIT since {since}, but no exit is confirmed yet; {end}"
    return f"STAYED IN THE SAFE SET for {summary['rounds']} rounds, no confirmed exit; {end}"


def closing(summary: dict[str, Any], out: Path, files: list[Path], command: str) -> str:
    """The three lines that end a run: outcome, files, what to type next.

    Args:
        summary: of ``summary.json``.
        out: the run directory.
        files: pictures and pages that were written.
        command: what was typed, without its ``--out``.
    """
    pages = [str(path) for path in files if path.suffix == ".html"]
    seen = ", ".join(pages) or f"{len(files)} files"
    return "\n".join(
        (
            f"Outcome: {verdict(summary)}",
            f"Files:   {out}/  pictures in {out}/figures/; open {seen}",
            f"Next:    {advice(summary, out, command)}",
        )
    )


def advice(summary: dict[str, Any], out: Path, command: str) -> str:
    """The command that a person would most likely want to type next."""
    if summary["outcome"] == "exited" and not summary["defences"]:
        return f"does a defence hold it?  {command} --defence refusal_loss"
    if summary["outcome"] == "safe" and not summary["rho"]:
        return f"now with adversaries:  {command} --rho 0.2"
    if summary["outcome"] == "safe":
        longer = 2 * summary["rounds"]
        return (
            f"does it hold for longer?  poisonloop resume {shlex.quote(str(out))} --rounds {longer}"
        )
    return f"over seeds:  {command.replace('poisonloop run', 'poisonloop sweep', 1)} --seeds 4"
