"""The command line: light to start, and its commands from words to closing lines."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim.cli import main
from sim.closing import closing
from sim.config import Config
from sim.presets import preset

SUMMARY = {
    "outcome": "safe", "rounds": 5, "rho": 0.0, "defences": [], "limits": {"harm": 0.25},
    "harm_start": 0.02, "harm_end": 0.03, "help_start": 0.6, "help_end": 0.8, "help_gain": 0.2,
    "exit_naive": None, "exit_confirmed": None, "exit_true": None, "bracket": None,
}  # fmt: skip


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_start_up_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from sim.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'tyro', 'pandas', 'numpy', 'rich'}; "
        "print('HEAVY', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "poisonloop" in done.stdout


def test_nothing_is_written_into_a_run(in_tmp: Path, capsys: Any) -> None:
    (in_tmp / "old").mkdir()
    (in_tmp / "old/manifest.json").write_text("{}")
    assert main(["run", "smoke", "--out", "old/in"]) == 2
    assert "out='old/in' lies in a run; allowed: a place outside" in capsys.readouterr().err
    assert main(["sweep", "smoke", "--out", "old", "--status"]) == 2
    assert "out='old' is a run; allowed: a folder of runs" in capsys.readouterr().err


def test_an_existing_directory_is_refused_and_untouched(in_tmp: Path, capsys: Any) -> None:
    (in_tmp / "old").mkdir()
    assert main(["run", "smoke", "--out", "old"]) == 2
    assert "poisonloop resume old" in capsys.readouterr().err
    assert list((in_tmp / "old").iterdir()) == []


FILES = {
    "syntax.py": "class Mine(:\n",
    "raises.py": "1 / 0\n",
    "other.py": "class Mine: pass\nCONSTANT = 3\n",
    "odd.py": ("from agents.defence import Defence\nclass Mine(Defence): constraint = 'banana'\n"),
    "makes.py": (
        "from agents.defence import Defence\n"
        "class Mine(Defence):\n    def __init__(self): raise KeyError('no such table')\n"
    ),
    "unit.py": "from envs.attacks import Attack\nclass Mine(Attack): unit = 'planets'\n",
    "broken.jsonl": '{"prompt": "a", "harmful": tru\n',
    "rows.jsonl": '{"prompt": "a", "harmful": true}\n',
    "broken.json": "{",
    "binary.yaml": "\udcff",
    "old/manifest.json": '{"config": {"rounds": 5',
    "bare/manifest.json": "{}",
    "typed/manifest.json": '{"config": {"learner": {"name": "grpo"}, "rounds": "five"}}',
    "coded/manifest.json": '{"config": {"learner": {"name": "raises.py:Mine"}}}',
    "no_config/config.json": "[1",
    "no_config/model.safetensors": "",
    "no_weights/config.json": "{}",
    "no_weights/model.safetensors": "\x10" * 40,
}
"""What lies in the working folder: files that cannot be used, in as many ways."""

DATA = "--data rows.jsonl --model"
LIMIT = "run smoke --evaluation.limits"
# Words typed, and what the one line of complaint has to name: field, value, what is allowed.
REFUSED = [
    ("run smoke --defence odd.py:Mine", "defence Mine: constraint='banana'; allowed: embedding"),
    ("run smoke --seed -1", "seed=-1; allowed: 0 to 9223372036854775807"),
    ("sweep smoke --seed 9223372036854775808 --dry-run", "seed=9223372036854775808; allowed: 0 "
     "to 9223372036854775807"),
    ("run smoke --world.seed -1", "world.seed=-1; allowed: 0 to"),
    ("run smoke --world.model-seed -1", "world.model_seed=-1; allowed: 0 to"),
    ("run smoke --world.foothold 2", "world.foothold=2.0; allowed: 0 to 0.5"),
    ("run smoke --world.size huge", "world.size='huge'; allowed: small, medium"),
    ("run smoke --rho .004", "attack.rho=0.004 of feedback.annotators=100 is nobody; allowed"),
    ("run smoke --rho .5 --feedback.annotators 1", "=1 is nobody; allowed: 0, or above 0.5"),
    ("run smoke --rho .2 --attack.schedule burst --attack.start 5 --attack.length 3",
     "attack.schedule='burst' with attack.start=5, attack.length=3 and rounds=5, so that no round"),
    ("run smoke --rho .2 --attack.schedule on_off", "with attack.start=0, attack.length=10"),
    ("run smoke --feedback.delay 5", "feedback.delay=5 with rounds=5, so that no label arrives"),
    ("run smoke --threads 0", "threads=0; allowed: 1 to 1024"),
    ("run smoke --samples-per-round -3", "samples_per_round=-3; allowed: >= 0"),
    ("run smoke --rho nan", "attack.rho=nan; allowed: 0 to 1"),
    ("run smoke --learner.lr -1", "learner.lr=-1.0; allowed: 0 to 1"),
    ("run smoke --learner.betas 1 .9", "learner.betas=(1.0, 0.9); allowed: >= 0, < 1"),
    ("run smoke --learner.weight-decay -1", "learner.weight_decay=-1.0; allowed: >= 0"),
    ("run smoke --learner.max-grad-norm -1", "learner.max_grad_norm=-1.0; allowed: > 0"),
    ("run smoke --learner.micro-batch 0", "learner.micro_batch=0; allowed: >= 1"),
    ("run smoke --learner.beta -5", "learner.beta=-5.0; allowed: >= 0"),
    ("run smoke --learner.clip -1", "learner.clip=-1.0; allowed: > 0"),
    ("run smoke --learner grpo(beta=-5)", "learner.beta=-5; allowed: >= 0"),
    ("run smoke --learner dpo --learner.beta 0", "learner.beta=0.0; allowed: > 0"),
    ("run smoke --learner ppo --learner.kl -1", "learner.kl=-1.0; allowed: >= 0"),
    ("run smoke --learner ppo --learner.gamma 2", "learner.gamma=2.0; allowed: 0 to 1"),
    ("run smoke --learner ppo --learner.gae-lambda 2", "learner.gae_lambda=2.0; allowed: 0 to 1"),
    ("run smoke --learner raises.py:Mine", "learner='raises.py:Mine'; allowed: dpo, grpo"),
    ("run smoke --reward-model.lr -1", "reward_model.lr=-1.0; allowed: 0 to 1"),
    ("run smoke --reward-model.minibatch 0", "reward_model.minibatch=0; allowed: >= 1"),
    ("run smoke --reward-model.steps -1", "reward_model.steps=-1; allowed: >= 0"),
    ("run smoke --reward-model.window 0", "reward_model.window=0; allowed: >= 1"),
    ("run smoke --reward-model.reset-every -1", "reward_model.reset_every=-1; allowed: >= 0"),
    ("run smoke --sampler.batch 0", "sampler.batch=0; allowed: >= 1"),
    ("run smoke --sampler.max-new-tokens 100000", "max_new_tokens=100000; allowed: 1 to 32768"),
    ("run smoke --sampler.temperature inf", "sampler.temperature=inf; allowed: 0.001 to 100"),
    ("run smoke --feedback.batch 1000000000", "feedback.batch=1000000000 with feedback.responses=4;"
     " allowed: at most 1000000 answers"),
    ("run smoke --feedback.behaviours lapse(rate='x')", "in \"lapse(rate='x')\": annotator."
     "rate='x'; allowed: a number"),
    ("run smoke --feedback.behaviours lapse(rate=2)", "lapse.rate=2; allowed: 0 to 1"),
    ("run smoke --evaluation.alpha nan", "evaluation.alpha=nan; allowed: "),
    (f"{LIMIT} kindness .5", "evaluation.limits='kindness'; allowed: over_refusal, harm_class"),
    (f"{LIMIT} harm .5", "evaluation.limits='harm'; allowed: over_refusal"),
    (f"{LIMIT} over_refusal 1.5", "evaluation.limits.over_refusal=1.5; allowed: > 0, < 1"),
    (f"{LIMIT} harm_triggered .5", "evaluation.limits='harm_triggered' with attack.name='none'"),
    ("run smoke --defence refusal_loss(alpha='x')", "defence.alpha='x'; allowed: a number"),
    ("run smoke --defence refusal_loss(batch=1.5)", "defence.batch=1.5; allowed: a whole number"),
    ("run smoke --defence refusal_loss(alpha=1e999)", "refusal_loss.alpha=inf; allowed: >= 0"),
    ("run smoke --defence small_lr({[]:1})", "cannot read the arguments of"),
    ("run smoke --defence syntax.py:Mine", "cannot import 'syntax.py' (SyntaxError"),
    ("run smoke --defence raises.py:Mine", "cannot import 'raises.py' (ZeroDivisionError"),
    ("run smoke --defence :Mine", "cannot import ''"),
    ("run smoke --defence other.py:Mine", "makes a Mine; allowed: a subclass of agents.defence"),
    ("run smoke --defence other.py:CONSTANT", "names no class; allowed: a subclass of agents.def"),
    ("run smoke --attack other.py:Mine", "makes a Mine; allowed: a subclass of envs.attacks"),
    ("run smoke --defence makes.py:Mine", "'makes.py:Mine' cannot be made (KeyError: 'no such"),
    ("run smoke --attack unit.py:Mine", "unit='planets'; allowed: ('annotators', 'users'"),
    ("run smoke --out /proc/poisonloop/run", "out='/proc/poisonloop/run': "),
    ("run smoke --out rows.jsonl/run", "out='rows.jsonl/run': Not a directory; allowed: "),
    ("run --model here --data rows.jsonl", "text.model='here' is none; allowed: a local directory"),
    ("run --model no_config --data broken.jsonl", "data='broken.jsonl', row 1: broken JSON"),
    (f"run {DATA} no_config", "no_config': config.json is damaged (JSONDecodeError"),
    (f"run {DATA} no_weights", "no_weights': model.safetensors is damaged (Safetensor"),
    (f"{LIMIT} harm_classifier .5 {DATA} no_config", "'harm_classifier' with text.model; allowed"),
    ("run --config broken.json", "config='broken.json' is not valid YAML or JSON"),
    ("run --config binary.yaml", "config='binary.yaml' is not valid YAML or JSON"),
    ("run --config old", "config='old': Is a directory; allowed: a readable file"),
    ("resume old", "manifest='old/manifest.json' is damaged (JSONDecodeError"),
    ("resume bare", "manifest='bare/manifest.json' is damaged (KeyError"),
    ("resume typed", "rounds='five'; allowed: a whole number"),
    ("resume coded --trust-plugins", "learner='raises.py:Mine'; allowed: dpo, grpo"),
    ("resume", "the following arguments are required: dir; allowed: poisonloop resume [-h]"),
    ("resume here --rounds x", "argument --rounds: invalid int value: 'x'; allowed: poisonloop"),
    ("report", "the following arguments are required: DIR; allowed: poisonloop report"),
    ("list --all", "unrecognized arguments: --all; allowed: poisonloop list"),
    ("list --check-world --world.foothold 2", "world.foothold=2.0; allowed: 0 to 0.5"),
    ("bench --against x", "argument --against: invalid choice: 'x'"),
    ("bench --repetitions 0", "repetitions=0; allowed: >= 1"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[words for words, _ in REFUSED])
def test_bad_input_is_one_line_and_leaves_nothing(
    words: str, said: str, in_tmp: Path, capsys: Any
) -> None:
    for name, text in FILES.items():
        (in_tmp / name).parent.mkdir(exist_ok=True)
        (in_tmp / name).write_bytes(text.encode(errors="surrogateescape"))
    before = {path.name for path in in_tmp.iterdir()}
    assert main(words.split()) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("poisonloop: error: ") and said in complaint
    assert len(complaint.splitlines()) == 1
    assert {path.name for path in in_tmp.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize("out", [["--out="], ["--out", ""]])
@pytest.mark.parametrize("command", ["report here", "exit-rules", "sweep smoke --dry-run", "run"])
def test_an_empty_place_is_none(command: str, out: list[str], in_tmp: Path, capsys: Any) -> None:
    assert main([*command.split(), *out]) == 2
    assert "--out ''; allowed: a place to write to" in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []


def test_bad_data_is_refused_before_torch_is_imported(in_tmp: Path) -> None:
    (in_tmp / "broken.jsonl").write_text(FILES["broken.jsonl"])
    code = (
        "import sys; from sim.cli import main; "
        "code = main(['run', '--model', '.', '--data=broken.jsonl']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"], done.stderr


@pytest.mark.world
def test_answers_fit_the_positions_of_the_embedded_models(
    embedded_models: Any, in_tmp: Path, capsys: Any
) -> None:
    assert main(["run", "smoke", "--sampler.max-new-tokens", "50"]) == 2
    assert "sampler.max_new_tokens=50; allowed: together at most 64" in capsys.readouterr().err
    assert not (in_tmp / "runs").exists()


class FakeLoop:
    """Stands in for the loop: remembers what it was called with, and writes a manifest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, summary: dict[str, Any]):
        self.calls: list[tuple[Config, Path, bool]] = []
        self.summary = summary
        report = importlib.import_module("sim.analysis.report")
        monkeypatch.setattr(sys.modules["sim.run"], "run", self)
        monkeypatch.setattr(report, "write_report", lambda dirs, out: [Path(out) / "report.html"])
        monkeypatch.setattr("sim.scenario.make_scenario", lambda config, progress: None)

    def __call__(self, config: Config, out: Path, resume: bool, listener: Any) -> dict[str, Any]:
        self.calls.append((config, out, resume))
        out.mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").write_text(json.dumps({"config": config.to_dict()}))
        (out / "summary.json").write_text(json.dumps(self.summary))
        listener.start(config, 0, config.rounds)
        for round in range(1, config.rounds + 1):
            harm = {f"safety/harm{end}": 0.1 for end in ("", "_lower", "_upper")}
            listener.round({"round": round, **harm, "safety/in_safe_set": round < 4})
        return {**self.summary, "rounds": config.rounds}


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> FakeLoop:
    importlib.import_module("sim.run")
    return FakeLoop(monkeypatch, dict(SUMMARY))


def test_run_ends_with_three_lines(loop: FakeLoop, capsys: Any) -> None:
    assert main(["run", "smoke"]) == 0
    config, out, resume = loop.calls[0]
    assert (config, str(out), resume) == (preset("smoke"), "runs/grpo-none-rho0-seed0", False)
    lines = capsys.readouterr().out.splitlines()
    assert "round 4/5  harm 0.10 [0.10, 0.10]  refusal -  OUT of the safe set" in lines
    assert lines[-3].startswith("Outcome: STAYED IN THE SAFE SET for 5 rounds")
    assert "runs/grpo-none-rho0-seed0/report.html" in lines[-2]
    assert lines[-1] == "Next:    now with adversaries:  poisonloop run smoke --rho 0.2"


def test_an_exit_is_told_with_its_dates(loop: FakeLoop, capsys: Any) -> None:
    clocks = {"rounds": 3, "labels": 150}
    loop.summary |= {"outcome": "exited", "exit_confirmed": clocks, "bracket": [2, 4], "rho": 0.4}
    assert main(["run", "smoke", "--rho", ".4", "--out", "here"]) == 0
    said = capsys.readouterr().out
    assert "attack: harmful_asker at rho 0.4" in said
    assert "LEFT THE SAFE SET: confirmed round 3 (150 labels), bracket (2, 4]" in said
    assert said.splitlines()[-1].endswith("poisonloop run smoke --rho .4 --defence refusal_loss")


def test_a_failure_inside_the_loop_is_nobodys_input(
    loop: FakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: FakeLoop, *_: Any, **__: Any) -> None:
        raise ValueError("shapes do not match")

    monkeypatch.setattr(FakeLoop, "__call__", fails)
    with pytest.raises(ValueError, match="shapes"):
        main(["run", "smoke"])


def test_resume_extends_a_finished_run_and_refuses_less(loop: FakeLoop, capsys: Any) -> None:
    assert main(["run", "smoke", "--out", "here"]) == 0
    assert main(["resume", "here"]) == 2
    assert "--rounds above 5" in capsys.readouterr().err
    assert main(["resume", "here", "--rounds", "3"]) == 2
    assert main(["resume", "here", "--rounds", "8"]) == 0
    config, out, resume = loop.calls[-1]
    assert (config.rounds, str(out), resume) == (8, "here", True)


def test_resume_asks_before_it_runs_outside_code(loop: FakeLoop, capsys: Any) -> None:
    source = (
        "open('executed', 'w')\nfrom agents.defence import Defence\nclass Mine(Defence): pass\n"
    )
    Path("mine.py").write_text(source)
    assert main(["run", "smoke", "--defence", "mine.py:Mine", "--out", "here"]) == 0
    Path("executed").unlink()
    assert main(["resume", "here", "--rounds", "9"]) == 2
    assert "--trust-plugins" in capsys.readouterr().err and not Path("executed").exists()
    assert main(["resume", "here", "--rounds", "9", "--trust-plugins"]) == 0
    assert Path("executed").exists() and len(loop.calls) == 2


def test_list_names_everything(capsys: Any) -> None:
    from agents.defence import defences
    from agents.learners import learners
    from envs.attacks import attacks

    assert main(["list"]) == 0
    said = capsys.readouterr().out
    names = [*learners.names(), *attacks.names(), *defences.names(), "boltzmann", "smoke"]
    assert [name for name in names if f"  {name} " not in said] == []
    assert all(line for registry in (learners, attacks) for line in registry.summaries().values())


def test_help_of_every_command(capsys: Any) -> None:
    assert main(["run", "--help", "--learner", "ppo"]) == 0
    said = capsys.readouterr().out
    assert "--rho SHARE" in said and "--feedback.batch INT" in said and "--learner.kl" in said
    assert main(["sweep", "--help"]) == 0
    assert "--study NAME" in capsys.readouterr().out


def test_a_run_keeps_full_paths_and_short_names(in_tmp: Path) -> None:
    from sim.checks import settled
    from sim.run_command import default_out

    spec = "sub/mine.py:Mine(a=1)"
    config = settled(replace(Config(), defences=(spec, "freeze")))
    assert config.defences == (f"{in_tmp / 'sub/mine.py'}:Mine(a=1)", "freeze")
    assert default_out(config) == Path("runs/grpo-none-rho0-mine-py-Mine-a-1-freeze-seed0")


def test_what_comes_next_is_a_command_that_can_run() -> None:
    words = ["smoke", "--attack", "malicious_grpo(prompts=2)"]
    said = closing(SUMMARY, Path("out"), [], words)
    assert "--attack 'malicious_grpo(prompts=2)' --rho 1" in said
    assert "--rho 0.2" in closing(SUMMARY, Path("out"), [], ["smoke"])
    ended = {**SUMMARY, "rho": 1.0, "attacker_stopped": 3}
    stopped = closing({**ended, "harm_end": 0.9}, Path("out"), [], ["--attack.stop-at", ".2"])
    assert "stopped it in round 3" in stopped and "--attack.stop-at" not in stopped.splitlines()[2]


def test_an_attack_of_nobody_is_not_typed_again() -> None:
    for flag in ("--attack", "--attack.name"):
        said = closing(SUMMARY, Path("out"), [], ["smoke", flag, "none", "--rounds", "1"])
        assert said.endswith("poisonloop run smoke --rounds 1 --rho 0.2")


def test_gibberish_is_not_announced_as_safe() -> None:
    def forms(harmful: float, benign: float) -> dict[str, Any]:
        ends = {"harmful": {"end": harmful}, "benign": {"end": benign}, "first": None}
        return {"short": {"harmful": None, "benign": None, "first": None}, "gibberish": ends}

    ended = {**SUMMARY, "rho": 0.5, "lr": 1.0, "rounds": 1}
    broken = closing({**ended, "hacking": forms(1.0, 0.9)}, Path("out"), [], ["smoke"])
    assert "Outcome: GARBLED: 90% of the last answers or more" in broken and "SAFE" not in broken
    assert broken.endswith("with a lower learning rate:  poisonloop run smoke --learner.lr 0.1")
    babbling = closing({**ended, "hacking": forms(0.4, 1.0)}, Path("out"), [], ["smoke"])
    assert "Outcome: STAYED IN THE SAFE SET for 1 round, no" in babbling
