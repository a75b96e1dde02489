"""``poisonloop fork``: from a recorded run and flags to another way on."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from envs.registry import brief
from envs.usage import UsageError
from sim import flags
from sim.announcement import announce_idle, names_attack
from sim.checks import check, check_new, settled
from sim.config import Config
from sim.fork.branch import branch, changes, check_fork
from sim.progress import quiet_loading
from sim.resume import check_trust, recorded_config
from sim.run_command import execute

USAGE = """\
usage: poisonloop fork RUN --at ROUND [flags]

Continue a recorded run from one of its rounds under another attack, learner or defence, with the
same people, prompts and draws. Everything else is the run's own.

  --at ROUND          the last round that both have in common, 0 to the run's last
  --defence NAME      repeat it to stack several; the whole list is prepared anew; `none` for none
  --attack NAME, --rho SHARE, --attack.schedule ...
  --learner NAME, --learner.lr ...   begins with a fresh optimizer
  --rounds N          where the fork ends (default: where the run does)
  --out DIR           where to write (default: beside the run)
  --trust-plugins     run the code outside poisonloop that the run names

then: poisonloop report RUN FORK --out DIR
"""


def fork(words: list[str]) -> int:
    """``poisonloop fork RUN --at ROUND``."""
    run, options = flags.read(words)
    if "--help" in options:
        print(USAGE, end="")
        return 0
    if run is None:
        raise UsageError("fork needs a run; allowed: poisonloop fork RUN --at ROUND [flags]")
    at, chosen_out = flags.whole(options, "--at"), flags.take(options, "--out")
    trusted = flags.switch(options, "--trust-plugins")
    if at is None:
        raise UsageError("fork needs --at; allowed: --at ROUND, the last round in common")
    path = Path(run)
    parent = recorded_config(path)
    check_trust(path, parent, trusted)
    asked = flags.changed(parent, options)
    config = settled(asked)
    check_fork(path, parent, config, at)
    check(config)
    out = Path(chosen_out) if chosen_out else default_out(path, parent, config, at)
    check_new(out)
    if names_attack(options):
        announce_idle([asked])
    quiet_loading()
    branch(path, parent, config, at, out, shlex.join(["poisonloop", "fork", *words]))
    sides = f"side by side:  poisonloop report {shlex.join([str(path), str(out)])} --out DIR"
    return execute(config, out, resume=True, following=sides)


def default_out(path: Path, parent: Config, config: Config, at: int) -> Path:
    """Beside the parent: its name, the round, and what is another there."""
    changed = {name.partition(".")[0] for name in changes(parent, config)}
    parts: list[Any] = [config.learner_name] if "learner" in changed else []
    if "attack" in changed:
        attack = config.attack
        parts += [brief(attack.name), f"rho{attack.rho:g}"] if attack.rho else ["clean"]
    if "defences" in changed:
        parts += map(brief, config.defences or ["none"])
    words = [re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts] or ["same"]
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name("-".join([named.name, f"from{at}", *words]))
