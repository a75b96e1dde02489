"""``world.harm_domains``: a run whose harmful prompts are about some domains only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envs.types import BENIGN
from envs.usage import UsageError
from envs.world import DOMAINS, World
from sim.analysis.arm_names import arm_names
from sim.attacker import attack_prompts
from sim.checks import check
from sim.config import Config, WorldConfig, from_dict
from sim.identity import identity
from sim.scenario import make_scenario, world_of
from sim.sweep import directory

SOME = ("unsafe_help", "cyber")


@pytest.mark.parametrize("domains", [("plants",), ("bio", "bio")])
def test_unknown_and_repeated_domains_are_refused(domains: tuple[str, ...]) -> None:
    message = f"world.harm_domains='{domains[0]}'; allowed: unsafe_qa, unsafe_help, bio, cyber"
    with pytest.raises(UsageError, match=message):
        WorldConfig(harm_domains=domains)


def test_all_domains_are_told_as_before_and_some_by_name() -> None:
    assert WorldConfig(3).told == {"world": 3}
    assert WorldConfig(3, harm_domains=SOME).told == {"world": 3, "harm_domains": list(SOME)}
    assert world_of(WorldConfig(3).told).harm_domains == World(3).harm_domains
    check(Config(world=WorldConfig(harm_domains=SOME), defences=("refusal_loss",)))


def test_runs_without_the_field_keep_their_names() -> None:
    config = Config()
    some = replace(config, world=WorldConfig(harm_domains=SOME))
    recorded = config.to_dict()
    recorded["world"] = {k: v for k, v in recorded["world"].items() if k != "harm_domains"}
    assert from_dict(recorded) == config, "a run from before the field"
    assert identity(recorded) == identity(config.to_dict()) != identity(some.to_dict())
    assert directory(config) != directory(some)
    names = arm_names([config.to_dict(), some.to_dict()])
    assert len(set(names)) == 2


@pytest.mark.world
def test_every_prompt_of_a_run_is_of_the_domains(embedded_models: Any, tmp_path: Path) -> None:
    from sim.factory import make_env

    config = Config(world=WorldConfig(harm_domains=SOME))
    scenario, whole = make_scenario(config), make_scenario(Config())
    kept = {DOMAINS.index(name) for name in (*SOME, *DOMAINS[4:8])}
    env = make_env(config, scenario).unwrapped
    asked = env._source.tables[0]
    for table in (scenario.table, attack_prompts(scenario), asked):
        assert set(table.domain) == kept
        assert set(table.domain[table.stratum == BENIGN]) == {*map(DOMAINS.index, DOMAINS[4:8])}
    assert env.spec.kwargs["harm_domains"] == list(SOME)
    assert "harm_domains" not in make_env(Config(), whole).unwrapped.spec.kwargs
    assert set(whole.table.domain) > kept
    roles = scenario.roles["harm"].prompt_ids.unique(dim=0)
    assert len(roles) < len(whole.roles["harm"].prompt_ids.unique(dim=0))
