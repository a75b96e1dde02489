"""``poisonloop list``: everything that can be named on the command line, with one line each."""

from __future__ import annotations

from sim.cli import parser_of


def list_components(words: list[str]) -> int:
    """``poisonloop list``."""
    parser = parser_of("list", "Every learner, attack, annotator, defence, world and preset.")
    parser.add_argument(
        "--check-world", action="store_true", help="measure the embedded models' calibration"
    )
    for name, default in (("seed", 0), ("model-seed", 0), ("foothold", 0.01)):
        dest = "world_seed" if name == "seed" else name.replace("-", "_")
        kind = type(default)
        parser.add_argument(f"--world.{name}", dest=dest, type=kind, default=default, metavar="N")
    asked = parser.parse_args(words)
    if not asked.check_world:
        show()
        return 0
    show_calibration(asked.world_seed, asked.model_seed, asked.foothold)
    return 0


def show_calibration(world_seed: int, model_seed: int, foothold: float) -> None:
    """Measure one world's models, which are built when missing, and print the figures."""
    from rich.console import Console

    from sim.bootstrap import WorldModelsConfig
    from sim.calibration import check_world, table_of
    from sim.config import WorldConfig
    from sim.progress import quiet_loading

    WorldConfig(world_seed, model_seed, foothold)  # refuses what is out of range
    quiet_loading()
    config = WorldModelsConfig(world_seed=world_seed, model_seed=model_seed, foothold=foothold)
    Console().print(table_of(check_world(config)))


def components() -> dict[str, dict[str, str]]:
    """One-line summaries by name, by the flag they are given to."""
    from agents.defence import defences
    from agents.learners import learners
    from envs.annotators import annotators
    from envs.attacks import attacks
    from sim.presets import SUMMARIES

    world = "an invented language with an exact oracle of harm and help (--world.seed N)"
    text = "your own model and prompts (--model DIR --data FILE)"
    return {
        "presets (poisonloop run NAME)": SUMMARIES,
        "learners (--learner)": learners.summaries(),
        "attacks (--attack, with --rho)": attacks.summaries(),
        "annotator behaviours (--feedback.behaviours)": annotators.summaries(),
        "defences (--defence, repeatable)": defences.summaries(),
        "worlds": {"embedded": world, "real text": text},
    }


def show() -> None:
    """Print one table per kind."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False)
    for title, lines in components().items():
        table = Table(
            title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_header=False
        )
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        for name, line in lines.items():
            table.add_row(Text(name), Text(line))
        console.print(table)
    console.print(
        Text("Your own: --defence path/to/file.py:MyDefence(alpha=2), and so for every kind.")
    )
