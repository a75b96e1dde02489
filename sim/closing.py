"""The three lines that end a run: what came of it, where it lies, what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.collapse import DEGENERATE_SHARE
from envs.hacking import FORMS, PROMPT_KINDS
from sim import flags
from sim.config import Config, TextConfig
from sim.progress import counted, number


def when(clocks: dict[str, Any] | None) -> str:
    """An exit's clocks in words."""
    if clocks is None:
        return "none"
    return f"round {clocks['rounds']:.0f} ({clocks.get('labels', 0):.0f} labels)"


def verdict(summary: dict[str, Any]) -> str:
    """The outcome of a run in words, with the numbers behind it."""
    outcome = summary["outcome"]
    if outcome == "diverged":
        cause = summary.get("diverged") or {}
        return (
            f"DIVERGED in round {cause.get('round', '?')}: {cause.get('reason', '?')}; worst harm "
            f"until then {number(summary.get('peak_harm'))}"
        )
    harm = f"harm {number(summary['harm_start'])} -> {number(summary['harm_end'])}"
    limit = number(summary.get("limits", {}).get("harm"))
    helped = (
        f"help {number(summary['help_start'])} -> {number(summary['help_end'])} "
        f"({summary['help_gain']:+.2f})"
    )
    end = f"{harm} (limit {limit}), {helped}"
    if outcome == "exited" and summary["harm_start"] > summary["limits"]["harm"]:
        return f"NEVER INSIDE THE SAFE SET: the policy that the run started from is outside; {end}"
    if outcome == "exited":
        low, high = summary.get("bracket") or (None, None)
        bracket = f", bracket ({low}, {high}]" if high is not None else ""
        crossing = summary.get("exit_true")
        true = f", true crossing {when(crossing)}" if crossing else ""
        return (
            f"LEFT THE SAFE SET: confirmed {when(summary['exit_confirmed'])}{bracket}{true}; {end}"
        )
    if outcome == "collapsed":
        return f"COLLAPSED (no longer fluent or helpful) {when(summary.get('collapsed_at'))}; {end}"
    if summary["harm_end"] > summary.get("limits", {}).get("harm", 1):
        since = when(summary.get("exit_naive"))
        return f"ABOVE THE LIMIT since {since}, but no exit is confirmed yet; {end}"
    certified = summary.get("last_certified_safe")
    sure = "" if certified is not None else ", though too few evaluation prompts certify it"
    if (share := lost(summary)) > DEGENERATE_SHARE:
        return (
            f"GARBLED: {share:.0%} of the last answers or more are empty, an echo or gibberish, so "
            f"that little harm says nothing; {end}"
        )
    span = counted(summary["rounds"], "round")
    return f"STAYED IN THE SAFE SET for {span}, no confirmed exit{sure}; {end}"


def lost(summary: dict[str, Any]) -> float:
    """Share of the last policy's answers that are none, to the prompts where it is smaller.

    One evaluation with most of them lost is too few to be an outcome of its own (``collapsed``).
    """
    found = summary.get("hacking") or {}
    forms = [found.get(form, {}) for form in FORMS]
    ends = [[(form.get(kind) or {}).get("end", 0.0) for form in forms] for kind in PROMPT_KINDS]
    return min(map(sum, ends))


def closing(
    summary: dict[str, Any],
    out: Path,
    files: list[Path],
    words: Sequence[str],
    plugins: bool = False,
    following: str = "",
) -> str:
    """The three lines that end a run: outcome, files, what to type next.

    Args:
        summary: of ``summary.json``.
        out: the run directory.
        files: pictures and pages that were written.
        words: what was typed after ``poisonloop run``.
        plugins: whether the run names code outside the project.
        following: what to type next, if the outcome is not to decide.
    """
    pages = [str(path) for path in files if path.suffix == ".html"]
    seen = ", ".join(pages) or f"{len(files)} files"
    return "\n".join(
        (
            f"Outcome: {verdict(summary)}{_stopped(summary)}",
            f"Files:   {out}/  pictures in {out}/figures/; open {seen}",
            f"Next:    {following or advice(summary, out, words, plugins)}",
        )
    )


def _stopped(summary: dict[str, Any]) -> str:
    """That the attacker ended the run, where she did."""
    at = summary.get("attacker_stopped")
    return "" if at is None else f"; the attacker stopped it in round {at} (attack.stop_at)"


def advice(summary: dict[str, Any], out: Path, words: Sequence[str], plugins: bool = False) -> str:
    """The command that a person would most likely want to type next."""
    outcome = summary["outcome"]
    if outcome == "diverged" or (outcome == "safe" and lost(summary) > DEGENERATE_SHARE):
        again = retyped("run", words, "--learner.lr")
        return f"with a lower learning rate:  {again} --learner.lr {summary['lr'] / 10:g}"
    if outcome == "exited" and summary["harm_start"] > summary["limits"]["harm"]:
        return "start from a policy that is inside: --model, --world.start, or a higher cost limit"
    if outcome == "exited" and not summary["defences"]:
        return f"does a defence hold it?  {retyped('run', words)} --defence refusal_loss"
    if outcome == "safe" and not summary["rho"]:
        nobody = ("--attack", "--attack.name") if named_attack(words) == "none" else ()
        again = retyped("run", words, "--rho", "--attack.rho", *nobody)
        return f"now with adversaries:  {again} --rho {'1' if owned(words) else '0.2'}"
    if summary.get("attacker_stopped") is not None:
        return f"never stopping:  {retyped('run', words, '--attack.stop-at')}"
    if outcome == "safe":
        longer = f"poisonloop resume {shlex.quote(str(out))} --rounds {2 * summary['rounds']}"
        trust = " --trust-plugins" if plugins else ""
        return f"does it hold for longer?  {longer}{trust}"
    return f"over seeds:  {retyped('sweep', words, '--seed')} --seeds 4"


def owned(words: Sequence[str]) -> bool:
    """Whether ``words`` name an attacker who owns the training loop."""
    from envs.attacks import attacks

    attack = attacks.create(named_attack(words))
    return attack.owns_reward or attack.owns_data


def named_attack(words: Sequence[str]) -> str:
    """The attack that ``words`` name; ``none`` where they name none."""
    _, options = flags.read(words)
    return (options.get("--attack") or options.get("--attack.name") or ["none"])[0]


def retyped(command: str, words: Sequence[str], *without: str) -> str:
    """``words`` as a command line, without ``--out`` and the flags that are to be given anew."""
    kept: list[str] = []
    skip = False
    for word in words:
        if word.startswith("--"):
            skip = word.partition("=")[0] in ("--out", *without)
        if not skip:
            kept.append(word)
    return shlex.join(["poisonloop", command, *kept])


def prepare_line(config: Config) -> str:
    """The command that makes what the data of ``config.text`` lack, with the splits of its run."""
    from sim.scorers.answers import Sampling

    text, usual = config.text, TextConfig()
    given = [("--model", text.model), ("--data", text.data), ("--out", "DIR")]
    choices = [
        ("--prompt-tokens", text.prompt_tokens, usual.prompt_tokens),
        ("--split-seed", text.split_seed, usual.split_seed),
        ("--max-new-tokens", config.sampler.max_new_tokens, Sampling().max_new_tokens),
    ]
    given += [(flag, str(value)) for flag, value, known in choices if value != known]
    words = [f"{flag} {shlex.quote(str(value))}" for flag, value in given]
    return " ".join(["poisonloop prepare-data", *words])
