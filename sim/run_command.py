"""``poisonloop run`` and ``poisonloop resume``: one experiment, from flags to its closing lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from agents.learners import learners
from envs.registry import brief
from envs.usage import Interrupted
from sim import flags
from sim.announcement import announce
from sim.checks import check, check_new, plugins, settled
from sim.cli import parser_of
from sim.closing import closing
from sim.config import DEFAULT_ATTACK, Config
from sim.config_file import to_yaml
from sim.launch import is_main
from sim.presets import PRESETS
from sim.progress import progress, quiet_loading
from sim.resume import resumable
from sim.track import check_track, tracked

RUN_USAGE = """\
usage: poisonloop run [PRESET] [flags]

presets: {presets}

the flags people type (each NAME may be a spec such as "refusal_loss(alpha=10)"):
  --rho SHARE         share of adversaries, 0 to 1
  --attack NAME       what they do (default above rho 0: {attack})
  --learner NAME      one of {learners}; its fields are --learner.lr and the like
  --defence NAME      repeat it to stack several
  --rounds N, --seed N, --engine NAME
  --model M, --data FILE   real text instead of the embedded world; M is a directory or a hub id
  --model.lora-rank N, --model.dtype bfloat16, --model.device cuda   how M is trained, and where
  --out DIR           where to write (default runs/<learner>-<attack>-rho<rho>-seed<seed>)
  --config FILE       YAML or JSON, read before the flags; a run's manifest.json will do
  --track NAME        show rounds elsewhere too: tensorboard (DIR/tensorboard)
  --print-config      print the resulting config and stop

every field, for the learner chosen:
"""


def run(words: list[str]) -> int:
    """``poisonloop run [PRESET]``."""
    preset, options = flags.read(words)
    if "--help" in options:
        return _run_help(preset, options)
    chosen_out, file = flags.take(options, "--out"), flags.take(options, "--config")
    track = flags.take(options, "--track")
    check_track(track)
    only_print = flags.switch(options, "--print-config")
    config = flags.build(preset, options, file)
    check(config)
    if only_print:
        print(to_yaml(config), end="")
        return 0
    announce(config, options)
    out = Path(chosen_out) if chosen_out else default_out(config)
    if is_main():
        check_new(out)
    return execute(config, out, resume=False, words=words, track=track)


def _run_help(preset: str | None, options: dict[str, list[str]]) -> int:
    kept = {k: v for k, v in options.items() if k == "--learner"}
    names = {"presets": PRESETS, "learners": learners.names()}
    lists = {name: ", ".join(values) for name, values in names.items()}
    print(RUN_USAGE.format(attack=DEFAULT_ATTACK, **lists))
    flags.show_fields(flags.build(preset, kept))
    return 0


def default_out(config: Config) -> Path:
    """``runs/<learner>-<attack>-rho<rho>-seed<seed>``, with the defences where there are some."""
    attack = re.sub(r"\W+", "-", brief(config.attack.name)).strip("-")
    defences = [re.sub(r"\W+", "-", brief(spec)).strip("-") for spec in config.defences]
    rho = f"rho{config.attack.rho:g}"
    return Path("runs") / "-".join(
        [config.learner_name, attack, rho, *defences, f"seed{config.seed}"]
    )


def execute(
    config: Config,
    out: Path,
    resume: bool,
    words: Sequence[str] = (),
    following: str = "",
    track: str | None = None,
) -> int:
    """Run ``config`` in ``out`` under a progress bar, report on it, and say what came of it.

    Args:
        config: a checked one.
        out: the run directory.
        resume: whether it is there already.
        words: what could be typed after ``poisonloop run`` to run it anew.
        following: what to type next, in place of what the outcome suggests.
        track: sink that shows the rounds, of :data:`sim.track.SINKS`.
    """
    from agents.processes import main_first
    from sim.analysis.report import write_report
    from sim.run import run as run_loop
    from sim.scenario import make_scenario

    quiet_loading()
    if not config.text.model:
        with main_first():
            make_scenario(settled(config), progress=True)  # builds missing models, in sight
    try:
        with progress() as listener:
            summary = run_loop(config, out, resume=resume, listener=tracked(listener, track, out))
    except Interrupted as error:
        again = f"\ncontinue with: poisonloop resume {shlex.quote(str(out))}"
        raise Interrupted(f"{error}{again if out.is_dir() else ''}") from error
    if not is_main():
        return 0
    outside = any(plugins(config))
    print(closing(summary, out, write_report([out], out), words, outside, following))
    return 0


def resume(words: list[str]) -> int:
    """``poisonloop resume DIR``."""
    parser = parser_of("resume", "Continue a stopped run, or extend a finished one.")
    parser.add_argument("dir", type=Path, help="a run directory")
    parser.add_argument("--rounds", type=int, help="extend the run to this many rounds")
    parser.add_argument(
        "--trust-plugins", action="store_true", help="run the code outside poisonloop it names"
    )
    parser.add_argument("--track", help="show rounds elsewhere too: tensorboard")
    asked = parser.parse_args(words)
    check_track(asked.track)
    config = resumable(asked.dir, asked.rounds, asked.trust_plugins)
    check(config)
    again = ["--config", str(asked.dir / "manifest.json")]
    return execute(config, asked.dir, resume=True, words=again, track=asked.track)
