"""What of a run may be changed at a fork, and the directory that the fork goes on in."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from agents.defence import defences
from envs.usage import UsageError
from sim.config import Config
from sim.evaluation_config import STOPS
from sim.identity import leaves
from sim.record import Record
from sim.seal import read_sealed

FREE = ("attack.", "learner.", "defences", "rounds")
"""Fields in which a fork may differ from its parent; what they begin with."""


def changes(parent: Config, config: Config) -> dict[str, list[Any]]:
    """What the fork changes: values before and after, by dotted field.

    Raises:
        ValueError: a field that makes other people, draws, models or another world.
    """
    before, after = (json.loads(json.dumps(dict(leaves(c.to_dict())))) for c in (parent, config))
    found = {
        name: [before.get(name), after.get(name)]
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }
    for name, (was, asked) in found.items():
        if not name.startswith(FREE):
            raise UsageError(
                f"{name}={asked!r} in a fork of a run with {was!r}; allowed: another attack, "
                "learner or defence, and more rounds (people, draws, world and models are the "
                "parent's)"
            )
    return found


def check_fork(path: Path, parent: Config, config: Config, at: int) -> None:
    """Refuse what cannot go on in mid-way, before anything is built.

    Args:
        path: the parent's directory.
        parent: its config.
        config: the fork's.
        at: the round after which it is another run.

    Raises:
        ValueError: names what is wrong and what is allowed.
    """
    from sim.fork.rebuild import nearest

    changes(parent, config)
    _check_offline(parent, config)
    if not (path / "rounds.jsonl").is_file():
        raise UsageError(f"run={str(path)!r} has no rounds.jsonl; allowed: a run with its rows")
    record = Record(path)
    record.check_rows()
    last = max((commit["round"] for commit in record.commits()), default=-1)
    if not 0 <= at <= last:
        allowed = f"0 to {last}, the rounds of {str(path)!r}" if last >= 0 else "a run with rounds"
        raise UsageError(f"at={at}; allowed: {allowed}")
    if at >= config.rounds:
        raise UsageError(f"at={at} with rounds={config.rounds}; allowed: --rounds above {at}")
    _check_ended(path, parent, config, at)
    nearest(path, at)


def _check_offline(parent: Config, config: Config) -> None:
    """Refuse to add or drop a defence that acts before the release."""
    lists = [[defences.create(spec) for spec in c.defences] for c in (parent, config)]
    offline = [[d.spec for d in members if d.offline] for members in lists]
    heads = [[d.offline for d in members] for members in lists]
    scattered = any(sorted(head, reverse=True) != head for head in heads)
    if parent.defences == config.defences or (offline[0] == offline[1] and not scattered):
        return
    from sim.defended import offline_names

    online = ", ".join(name for name in defences.names() if name not in offline_names())
    kept = f"after {', '.join(offline[0])}, " if offline[0] else ""
    raise UsageError(
        f"defences={list(config.defences)} in a fork of a run with {list(parent.defences)}: "
        f"{', '.join(offline[1] or offline[0])} acts before the release of a model, not in "
        f"mid-way; allowed: {kept}any of {online}"
    )


def _check_ended(path: Path, parent: Config, config: Config, at: int) -> None:
    """A run that was ended by its own rule would end again at once."""
    file = path / "summary.json"
    summary = read_sealed(file) if file.is_file() else {}
    for kind, field in STOPS.items():
        left = summary.get(f"exit_{kind}") or {}
        if getattr(config.evaluation, field) and left.get("rounds", at + 1) <= at:
            raise UsageError(
                f"at={at}: the exit is {kind} in round {left['rounds']:.0f}, where "
                f"evaluation.{field} ends a run; allowed: below {left['rounds']:.0f}"
            )
    if config.attack == parent.attack and summary.get("attacker_stopped") == at:
        raise UsageError(
            f"at={at}: there the attacker ended the run (attack.stop_at); allowed: below {at}, or "
            "another attack"
        )


def branch(path: Path, parent: Config, config: Config, at: int, out: Path, command: str) -> None:
    """Make the directory in which the fork goes on; ``sim.run(config, out, resume=True)`` does.

    Args:
        path: the parent's directory.
        parent: its config.
        config: the fork's, checked and settled.
        at: a round that the parent committed.
        out: a new directory.
        command: what makes the fork again.

    Raises:
        ValueError: the parent is damaged, in use, or does not come out as recorded.
    """
    import torch

    from sim.fork.rebuild import graft, rebuild
    from sim.fork.state import forked_state
    from sim.manifest import manifest
    from sim.resume import check_origin
    from sim.scenario import make_scenario

    torch.set_num_threads(config.threads)
    scenario = make_scenario(parent)
    check_origin(path, parent, scenario)
    writable = os.access(path, os.W_OK)  # nobody goes on with a run that cannot be written
    with Record(path).alone() if writable else nullcontext():
        source, again = path, out.with_name(f".{out.name}-round{at}")
        if at not in Record(path).checkpoints():
            source = again
            try:
                rebuild(path, parent, at, again)
            except UsageError:  # it would be again
                shutil.rmtree(again, ignore_errors=True)
                raise
        state = forked_state(parent, config, scenario, Record(source).state(at))
        told = {"parent": str(path.resolve()), "at": at, "changed": changes(parent, config)}
        told["rebuilt"] = source != path
        before = Record(path).manifest().get("fork")
        facts = {**manifest(config, scenario), "command": command}
        facts["fork"] = {**told, "of": before}
        graft(source, at, out, facts, state)
    shutil.rmtree(again, ignore_errors=True)
