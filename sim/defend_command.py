"""``poisonloop defend``: a model that was defended before its release, as a folder of its own.

The folder holds what any loader of causal language models reads, tokenizer included, and
``defended.json``: which defences made it, with what, of which models and which world. Runs with the
same defences use the same weights, by their hash, from the cache.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.defence import defences
from agents.engines.transformers_engine import SamplerConfig
from envs.usage import UsageError
from sim import flags
from sim.checks import check, settled
from sim.closing import retyped
from sim.config import Config, TextConfig
from sim.defended import offline_names
from sim.files import check_out, new_folder
from sim.presets import PRESETS

USAGE = """\
usage: poisonloop defend [PRESET] --defence NAME --out DIR [flags of `poisonloop run`]

  poisonloop defend --defence rep_noise --out models/rep_noise
  poisonloop defend --defence rep_noise --world.seed 3 --out models/rep_noise-3
  poisonloop defend --model DIR --data FILE --defence rep_noise --out models/mine

Trains the model against harmful fine-tuning before anybody attacks it, and saves model, tokenizer
and defended.json to DIR, which must not exist. Only offline defences do so: {offline}.

presets: {presets}
"""


def defend(words: list[str]) -> int:
    """Build the model that ``words`` describe, or find it in the cache, and save it."""
    preset, options = flags.read(words)
    if "--help" in options:
        lists = {"offline": ", ".join(offline_names()), "presets": ", ".join(PRESETS)}
        print(USAGE.format(**lists), end="")
        return 0
    given, file = flags.take(options, "--out"), flags.take(options, "--config")
    config = flags.build(preset, options, file)
    if given is None:
        raise UsageError("--out is missing; allowed: a new directory for the model")
    out = Path(given)
    if out.exists():
        raise UsageError(f"out={given!r} exists; allowed: a new directory")
    refuse_online(config)
    check(config)
    check_out(out)
    _save(settled(config), out)
    print(f"Model:    {out}/ ({', '.join(config.defences)})")
    for line in next_lines(words, config, out):
        print(line)
    return 0


def next_lines(words: list[str], config: Config, out: Path) -> list[str]:
    """What to type next: the same flags, which find the model in the cache, and the saved folder.

    Args:
        words: what was typed after ``poisonloop defend``.
        config: what they mean.
        out: the saved folder.
    """
    again = retyped("run", words, "--rho", "--attack.rho")
    data = shlex.quote(config.text.data) if config.text.data else "FILE"
    parts = ["poisonloop run --model", shlex.quote(str(out)), "--data", data]
    positions = json.loads((out / "config.json").read_text()).get("max_position_embeddings")
    prompt, tokens = config.text.prompt_tokens, config.sampler.max_new_tokens
    fits = prompt if positions is None else min(prompt, positions - tokens)
    for field, value, usual in (
        ("text.prompt-tokens", fits, TextConfig().prompt_tokens),
        ("sampler.max-new-tokens", tokens, SamplerConfig().max_new_tokens),
    ):
        parts += [f"--{field} {value}"] if value != usual else []
    reads = "needs no --defence" if config.text.model else "reads prompts in this model's words"
    return [
        f"Attack:   {again} --rho .4",
        "          (the same flags find this model in the cache at once)",
        f"Or:       {' '.join(parts)} --rho .4",
        f"          (starts from the folder, and {reads})",
    ]


def refuse_online(config: Config) -> None:
    """Refuse a list of which not every member acts before release.

    Raises:
        ValueError: none is given, or one acts while the model is trained further.
    """
    members = [defences.create(spec) for spec in config.defences]
    online = [member.spec for member in members if not member.offline]
    if online or not members:
        known = ", ".join(offline_names()) or "none is registered; a class with offline = True"
        said = f"{online[0]!r} acts during training only" if online else "none"
        raise UsageError(f"defence={said}; allowed: offline defences ({known})")


def _save(config: Config, out: Path) -> None:
    """Copy the built model beside ``out`` and rename it, so that ``out`` is never half there."""
    from sim.files import dumps
    from sim.progress import quiet_loading
    from sim.scenario import make_scenario

    quiet_loading()
    scenario = make_scenario(config, progress=True)
    with new_folder(out) as model:
        for file in (path for path in scenario.policy.iterdir() if path.is_file()):
            shutil.copyfile(file, model / file.name)
        (model / "defended.json").write_text(dumps(facts(config, scenario)) + "\n")


def facts(config: Config, scenario: Any) -> dict[str, Any]:
    """What ``defended.json`` says: specs, hashes, world or data, versions."""
    from sim.manifest import plugin_hashes, versions

    source = {"text": asdict(config.text)} if config.text.model else {"world": asdict(config.world)}
    return {
        "defences": list(config.defences),
        "hashes": scenario.hashes,
        "plugin_hashes": plugin_hashes(config),
        **source,
        "sampler": asdict(config.sampler),
        "threads": config.threads,
        "versions": versions(),
    }
