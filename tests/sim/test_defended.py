"""The cache of defended models: one name, one content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.batches import Pairs, Sequences
from sim import defended
from sim.defended import fingerprint, offline_prefix
from sim.hashes import digest
from sim.presets import preset
from sim.scenario import Scenario, make_scenario, with_derived_roles

SPEC = "{folder}/mine.py:Mine"
BASE = (
    "from agents.offline import OfflineDefence\n"
    "class Base(OfflineDefence):\n"
    "    def __init__(self, steps=1, lr={lr}, batch=4):\n"
    "        super().__init__(steps, lr, batch)\n"
    "    def loss(self, ctx, step):\n"
    "        return ctx.lm_loss(ctx.data['refusal'].next(self.batch))\n"
)


def mine(folder: Path, lr: str, inherited: bool = False) -> str:
    """A defence in a file, or one whose base stands in another file."""
    folder.mkdir(exist_ok=True)
    name = f"base_{folder.name}"
    text = BASE.format(lr=lr)
    if inherited:
        (folder / f"{name}.py").write_text(text)
        path = f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
        text = f"{path}from {name} import Base\n"
    (folder / "mine.py").write_text(text + "class Mine(Base):\n    pass\n")
    return SPEC.format(folder=folder)


def named(spec: str, **fields: Any) -> str:
    """The fingerprint of ``spec`` on a made-up scenario."""
    config = preset("smoke")
    config = replace(config, text=replace(config.text, **fields))
    nowhere: Any = Path("policy")
    scenario = Scenario(*[nowhere] * 4, None, *[None] * 3, {}, {}, "none")  # type: ignore[list-item]
    return fingerprint(config, scenario, offline_prefix([spec]))


def test_the_name_tells_code_wherever_it_stands(tmp_path: Path) -> None:
    """Equal stems in two folders, and a base class in a file of its own, are told apart."""
    first = mine(tmp_path / "a", "1e-3")
    before = named(first)
    assert named(first) == before
    named(mine(tmp_path / "b", "1e-3"))  # another file of that name, loaded last
    mine(tmp_path / "a", "1e-4")
    assert named(first) != before
    inherited = mine(tmp_path / "c", "1e-3", inherited=True)
    before = named(inherited)
    (tmp_path / "c/base_c.py").write_text(BASE.format(lr="5e-4"))
    assert named(inherited) != before
    assert named(first, harm_label="1") != named(first), "it decides the learned cost"


def test_code_counts_as_it_was_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = mine(tmp_path / "a", "1e-3")
    before = named(spec)
    monkeypatch.setattr(defended, "SOURCES", ())
    assert named(spec) == before, "files are not read again"
    monkeypatch.setattr(defended, "CODE", "other")
    assert named(spec) != before


def test_digest_reads_in_blocks(tmp_path: Path) -> None:
    for name, text in (("a", "x" * 3_000_000), ("b", "y")):
        (tmp_path / name).write_text(text)
    files = [tmp_path / "a", tmp_path / "b"]
    assert digest(files) == digest(files) != digest(files[::-1])


def rows(prompts: list[int], tag: int) -> Sequences:
    ids = torch.tensor(prompts)[:, None]
    answers = torch.full((len(prompts), 2), tag) + torch.arange(len(prompts))[:, None]
    return Sequences(ids, torch.ones_like(ids), answers, torch.ones_like(answers))


def test_derived_roles_pair_prompts_and_hold_some_out() -> None:
    harm, refusal = rows([3, 1, 2, 4, 1, 9], 100), rows([1, 2, 3, 4, 5], 200)
    roles = with_derived_roles({"harm": harm, "refusal": refusal})
    assert set(roles) == {
        *("harm", "refusal", "harm_prompts", "harm_heldout", "pair", "pair_heldout"),
    }
    kept, held = (set(roles[name].prompt_ids[:, 0].tolist()) for name in ("harm", "harm_heldout"))
    assert kept.isdisjoint(held) and kept | held == {1, 2, 3, 4, 9}
    for name, prompts in (("pair", kept), ("pair_heldout", held)):
        pairs = roles[name]
        assert isinstance(pairs, Pairs)
        assert torch.equal(pairs.harm.prompt_ids, pairs.refusal.prompt_ids)
        assert set(pairs.harm.prompt_ids[:, 0].tolist()) == prompts - {9}, "9 is never refused"
    assert set(with_derived_roles({"refusal": refusal})) == {"refusal"}


@pytest.mark.world
def test_bytes_do_not_depend_on_who_builds(
    embedded_models: Any, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built at the run's own thread count, whatever the process has; damage is replaced."""
    spec = "reward_neutralization(steps=2, batch=4, group=4)"
    config = replace(preset("smoke"), defences=(spec,))
    found = []
    for threads in (1, 2):
        cache = in_tmp / str(threads)
        monkeypatch.setattr(defended, "cache_folder", lambda cache=cache: cache)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            scenario = make_scenario(config)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        found.append(scenario.hashes["defended"])
    assert found[0] == found[1] and scenario.prepared == 1
    (scenario.policy / "config.json").unlink()
    assert make_scenario(config).hashes["defended"] == found[0]
