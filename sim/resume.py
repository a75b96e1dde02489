"""What a stopped or finished run directory may be continued with, and how far."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.usage import UsageError
from sim.checks import plugins
from sim.config import Config, from_dict
from sim.config_file import from_manifest
from sim.evaluation_config import STOPS, stopped_by
from sim.launch import launched
from sim.manifest import plugin_hashes, versions
from sim.record import Record
from sim.scenario import Scenario
from sim.seal import read_sealed, write_sealed


def saved_config(path: Path) -> Config | None:
    """The config of the run in ``path``, None where there is no run."""
    manifest = path / "manifest.json"
    return from_manifest(manifest) if manifest.is_file() else None


def recorded_config(path: Path) -> Config:
    """The config of the run in ``path``.

    Raises:
        ValueError: there is no run.
    """
    config = saved_config(path)
    if config is None:
        raise UsageError(f"run={str(path)!r} has no manifest.json; allowed: a run directory")
    return config


def is_finished(path: Path, config: Config) -> bool:
    """Whether ``path`` holds the whole run of ``config``, its end undamaged."""
    return saved_config(path) == config and Record(path).summary() is not None


def resumable(path: Path, rounds: int | None = None, trust_plugins: bool = False) -> Config:
    """The config to continue the run in ``path`` with.

    Args:
        path: a run directory.
        rounds: a later end than the run was asked for.
        trust_plugins: whether code outside the project that the run names may be executed.

    Raises:
        ValueError: no run there, nothing left to do, an earlier end, or code that is not trusted.
    """
    config = recorded_config(path)
    check_trust(path, config, trust_plugins)
    longest = config.rounds
    if rounds is not None and rounds < longest:
        raise UsageError(f"rounds={rounds}; allowed: >= {longest}, the run's own")
    summary = Record(path).summary()
    if summary is not None and _whole(path):
        _refuse_ended(path, config, summary, rounds or longest)
    return replace(config, rounds=rounds or longest)


def check_trust(path: Path, config: Config, trust_plugins: bool) -> None:
    """Refuse to execute what the run in ``path`` names, unless its user says so.

    Raises:
        ValueError: it names code outside the project, which is not trusted.
    """
    outside = list(plugins(config))
    if outside and not trust_plugins:
        raise UsageError(
            f"run={str(path)!r} would execute {', '.join(outside)}; "
            "allowed: add --trust-plugins if that code is yours"
        )


def _whole(path: Path) -> bool:
    """Whether nothing is damaged; what is, resuming may mend, and says it if it cannot."""
    try:
        Record(path).check()
    except UsageError:
        return False
    return True


def _refuse_ended(path: Path, config: Config, summary: dict[str, Any], rounds: int) -> None:
    """Refuse a run that has its ``summary`` and cannot go on to ``rounds``.

    Raises:
        ValueError: it has them, or its end is final.
    """
    run = f"run={str(path)!r}"
    if summary.get("outcome") == "diverged":
        at = summary["diverged"]["round"]
        raise UsageError(
            f"{run} diverged in round {at} and would again; allowed: a new run, with a lower "
            "learner.lr"
        )
    if kind := stopped_by(config.evaluation, **{k: summary.get(f"exit_{k}") for k in STOPS}):
        raise UsageError(
            f"{run} ended at its {kind} exit, as evaluation.{STOPS[kind]} asks; allowed: a new "
            "run without it"
        )
    if (at := summary.get("attacker_stopped")) is not None:
        raise UsageError(
            f"{run} was ended in round {at} by its attacker (attack.stop_at); allowed: a new run "
            "without it"
        )
    if rounds == config.rounds:
        raise UsageError(
            f"{run} has finished its {rounds} rounds; allowed: --rounds above {rounds} to extend it"
        )


def check_origin(path: Path, config: Config, scenario: Scenario) -> None:
    """Refuse to go on with another config, other models, data or code than the run began with.

    Raises:
        ValueError: another config than for the rounds, or a model, data file or plug-in has another
            content than the manifest says.
    """
    manifest = read_sealed(path / "manifest.json")
    if replace(from_dict(manifest["config"]), rounds=config.rounds) != config:
        raise UsageError(f"out={str(path)!r} holds a run of another config; allowed: another --out")
    found = {"model_hashes": scenario.hashes, "plugin_hashes": plugin_hashes(config)}
    for kind, hashes in found.items():
        for name, began in manifest.get(kind, {}).items():
            if hashes.get(name) != began:
                raise UsageError(
                    f"run={str(path)!r} began with another {name} ({began[:8]}, now "
                    f"{str(hashes.get(name))[:8]}); allowed: the same one, or a new run"
                )


def extend(path: Path, config: Config) -> None:
    """Write into the manifest how a run goes on: later end, package versions, processes.

    With a later end it counts as unfinished until it is there. Other versions are allowed, since
    nobody keeps the old ones for ever; from there on the bytes may differ from an uninterrupted
    run's.
    """
    file = path / "manifest.json"
    manifest = read_sealed(file)
    known = [manifest["versions"], *manifest.get("continued_with", [])]
    if versions() != known[-1]:
        manifest["continued_with"] = [*known[1:], versions()]
    shared = [manifest.get("processes", 1), *manifest.get("continued_in_processes", [])]
    if launched() != shared[-1]:
        manifest["continued_in_processes"] = [*shared[1:], launched()]
    rounds = manifest["config"]["rounds"]
    if rounds < config.rounds:
        (path / "summary.json").unlink(missing_ok=True)  # first: the longer run has not finished
        manifest["config"]["rounds"] = config.rounds
        manifest["extended_at"] = [*manifest.get("extended_at", []), rounds]
    write_sealed(file, manifest, indent=1)
