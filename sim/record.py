"""A run on disk: files are the product; plots, reports and notebooks read nothing else.

    manifest.json                what was asked for, versions, git state, hashes of the models
    rounds.jsonl                 one row per round
    labels/ truth/ samples/ gold/   tables as parts, part-<round>.parquet
    checkpoints/round-<n>/       state.safetensors + state.json: the last two, every
                                 ``keep_every``-th, and the one that a fork begins with
    policies/round-<n>.safetensors   evaluated policies, for the true crossing and for forks;
                                 a folder of peft's files where adapters are trained
    commits.jsonl                after each checkpoint: every new file's length and hash
    timings.jsonl                wall-clock, kept apart: it is not part of a run's identity

A file becomes visible only whole (temporary name, fsync, rename). ``resume`` goes back to the last
line of ``commits.jsonl`` whose files are all intact and removes what came later, so a half-written
line, part or checkpoint is dropped and never fatal.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from envs.usage import UsageError
from sim import hashes
from sim.files import alone_in, dumps, write_atomic
from sim.state import load_state, save_state

TABLES = ("labels", "truth", "samples", "gold")


class Record:
    """Writes one run directory, and finds its way back into one."""

    def __init__(self, path: Path):
        self.path = path
        self._fresh: list[Path] = []
        self._rounds_hash = hashlib.blake2b(digest_size=16)
        self._rounds_length = 0

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> Record:
        """Start a run directory.

        Raises:
            ValueError: the directory exists.
        """
        if path.exists():
            raise UsageError(
                f"out={str(path)!r} exists; allowed: a new directory, "
                f"or continue it with `poisonloop resume {path}`"
            )
        path.mkdir(parents=True)
        write_atomic(path / "manifest.json", json.dumps(manifest, indent=1).encode())
        return cls(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from writing here; the lock falls with the process that holds it.

        Raises:
            ValueError: another process writes here.
        """
        with alone_in(self.path, "run"):
            yield

    def write(
        self,
        round: int,
        row: dict[str, Any],
        tables: dict[str, dict[str, Any]] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> None:
        """Append one round: its row, and its part of every table.

        Columns are arrays of numbers, or lists of text (typed here, since a round may have none).
        """
        line = (dumps(row) + "\n").encode()
        with open(self.path / "rounds.jsonl", "ab") as file:
            file.write(line)
        self._rounds_hash.update(line)
        self._rounds_length += len(line)
        for name, columns in (tables or {}).items():
            self._write_part(name, round, columns)
        if seconds:
            with open(self.path / "timings.jsonl", "a") as file:
                file.write(dumps({"round": round, **seconds}) + "\n")

    def _write_part(self, table: str, round: int, columns: dict[str, Any]) -> None:
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        typed = {
            name: pa.array(values, pa.string()) if isinstance(values, list) else pa.array(values)
            for name, values in columns.items()
        }
        pq.write_table(pa.table(typed), buffer, compression="zstd")
        path = self.path / table / f"part-{round:06d}.parquet"
        write_atomic(path, buffer.getvalue())
        self._fresh.append(path)

    def save_policy(
        self, round: int, weights: dict[str, Any], adapter: dict[str, Any] | None = None
    ) -> None:
        """Keep an evaluated policy: its weights, or an ``adapter``'s with its config for peft."""
        from safetensors.torch import save

        path = self.path / "policies" / f"round-{round:06d}.safetensors"
        if adapter is not None:
            path = path.with_suffix("") / "adapter_model.safetensors"
            settings = path.with_name("adapter_config.json")
            write_atomic(settings, json.dumps(adapter, indent=1, sort_keys=True).encode())
            self._fresh.append(settings)
        write_atomic(path, save({k: v.detach().cpu().clone() for k, v in weights.items()}))
        self._fresh.append(path)

    def policy_path(self, round: int) -> Path:
        """Where the tensors of the policy of ``round`` are kept."""
        path = self.path / "policies" / f"round-{round:06d}.safetensors"
        return path if path.exists() else path.with_suffix("") / "adapter_model.safetensors"

    def checkpoint(self, round: int, state: dict[str, Any]) -> None:
        """Save ``state`` and commit everything written since the last checkpoint."""
        state_files = save_state(self._folder(round), state)
        with open(self.path / "rounds.jsonl", "rb") as file:
            os.fsync(file.fileno())
        files = [*self._fresh, *state_files]
        commit = {
            "round": round,
            "rounds": [self._rounds_length, self._rounds_hash.copy().hexdigest()],
            "files": {
                str(p.relative_to(self.path)): [p.stat().st_size, hashes.digest([p])] for p in files
            },
        }
        line = dumps({**commit, "checksum": _checksum(commit)}) + "\n"
        with open(self.path / "commits.jsonl", "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._fresh = []
        self._prune(round)

    def _folder(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round-{round:06d}"

    def _prune(self, newest: int) -> None:
        rounds = sorted(int(p.name[-6:]) for p in (self.path / "checkpoints").iterdir())
        manifest = json.loads((self.path / "manifest.json").read_text())
        every = manifest.get("config", {}).get("keep_every", 0)
        kept = {newest, *rounds[-2:], manifest.get("fork", {}).get("at")}
        for round in rounds:
            if round not in kept and not (every and round and round % every == 0):
                shutil.rmtree(self._folder(round))

    def checkpoints(self) -> list[int]:
        """The rounds whose whole state is still here, in order."""
        held = (c for c in self.commits() if self._folder(c["round"]).is_dir())
        return [commit["round"] for commit in held if self._intact(commit)]

    def state(self, round: int) -> dict[str, Any]:
        """What :meth:`checkpoint` was given in ``round``, one of :meth:`checkpoints`."""
        return load_state(self._folder(round))

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """Go back to the newest intact commit: its round and state, or None.

        Raises:
            ValueError: a table or policy of an earlier commit is damaged or gone, which no
                resuming can mend.
        """
        commits = self.commits()
        while commits and not self._intact(commits[-1]):
            commits.pop()
        self._check_kept(commits[:-1])
        if not commits and "fork" in json.loads((self.path / "manifest.json").read_text()):
            raise UsageError(
                f"run={str(self.path)!r} is a fork, and no checkpoint of it is whole; allowed: "
                "to fork again"
            )
        self._drop_after(commits)
        if not commits:
            return None
        return commits[-1]["round"], self.state(commits[-1]["round"])

    def adopt(self, source: Record, round: int) -> None:
        """Begin with all that ``source`` recorded up to ``round``; its state is yet to be saved.

        Files that are never written again are linked where the file system can.

        Args:
            source: another directory's record.
            round: one of its :meth:`checkpoints`.

        Raises:
            ValueError: a table or policy of it is damaged or gone.
        """
        commits = [commit for commit in source.commits() if commit["round"] <= round]
        for name in source._check_kept(commits):
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.path / name, path)
            except OSError:
                shutil.copyfile(source.path / name, path)
        self._fresh = [self.path / name for name in source._check_kept(commits[-1:])]
        head = (source.path / "rounds.jsonl").read_bytes()[: commits[-1]["rounds"][0]]
        self._go_back(head, commits[:-1])

    def _check_kept(self, commits: list[dict[str, Any]]) -> list[str]:
        """The files of ``commits`` that are there for good, which all must be whole."""
        files = [item for commit in commits for item in commit["files"].items()]
        kept = [(name, fact) for name, fact in files if not name.startswith("checkpoints/")]
        for name, written in kept:
            if not self._holds(name, *written):
                raise UsageError(
                    f"run={str(self.path)!r}: {name} is damaged or gone; allowed: the file as it "
                    "was written, or a new run"
                )
        return [name for name, _ in kept]

    def commits(self) -> list[dict[str, Any]]:
        """What was committed: round, length and hash of every file, in order."""
        path = self.path / "commits.jsonl"
        commits: list[dict[str, Any]] = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                commit = json.loads(line)
            except json.JSONDecodeError:
                break
            if commit.pop("checksum", None) != _checksum(commit):
                break
            commits.append(commit)
        return commits

    def _intact(self, commit: dict[str, Any]) -> bool:
        length, digest = commit["rounds"]
        rounds = self.path / "rounds.jsonl"
        head = rounds.read_bytes()[:length] if rounds.exists() else b""
        if hashlib.blake2b(head, digest_size=16).hexdigest() != digest:
            return False
        return all(self._holds(name, *written) for name, written in commit["files"].items())

    def _holds(self, name: str, size: int, digest: str) -> bool:
        """Whether a file is there, whole."""
        path = self.path / name
        return path.is_file() and path.stat().st_size == size and hashes.digest([path]) == digest

    def _drop_after(self, commits: list[dict[str, Any]]) -> None:
        """Remove everything that no remaining commit vouches for."""
        known = {name for commit in commits for name in commit["files"]}
        for name in (*TABLES, "policies", "checkpoints"):
            for path in sorted((self.path / name).rglob("*")):
                if path.is_file() and str(path.relative_to(self.path)) not in known:
                    path.unlink()
        for folder in sorted((self.path / "checkpoints").glob("*")):
            if not any(folder.iterdir()):
                folder.rmdir()
        length = commits[-1]["rounds"][0] if commits else 0
        rounds = self.path / "rounds.jsonl"
        head = rounds.read_bytes()[:length] if rounds.exists() else b""
        self._go_back(head, commits)
        (self.path / "summary.json").unlink(missing_ok=True)

    def _go_back(self, rows: bytes, commits: list[dict[str, Any]]) -> None:
        """Stand where ``rows`` are all rows and ``commits`` all commits."""
        write_atomic(self.path / "rounds.jsonl", rows)
        self._rounds_hash = hashlib.blake2b(rows, digest_size=16)
        self._rounds_length = len(rows)
        lines = [dumps({**commit, "checksum": _checksum(commit)}) + "\n" for commit in commits]
        write_atomic(self.path / "commits.jsonl", "".join(lines).encode())

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``; its presence means the run ended."""
        write_atomic(self.path / "summary.json", (dumps(summary) + "\n").encode())


def _checksum(commit: dict[str, Any]) -> str:
    return hashlib.blake2b(dumps(commit).encode(), digest_size=8).hexdigest()
