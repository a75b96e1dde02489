"""``poisonloop list``: everything that can be named on the command line, with one line each."""

from __future__ import annotations

from typing import Any

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
        "worlds": {"embedded": world, "real text": text},
    }


def defence_rows() -> list[tuple[str, ...]]:
    """Every defence: what it constrains, when it acts, what it needs and costs, where it is from.

    The data are those of its default arguments.
    """
    from agents.defence import defences

    rows: list[tuple[str, ...]] = []
    for name, line in defences.summaries().items():
        member = defences.create(name)
        acts = "offline" if member.offline else "online"
        needs = ", ".join(sorted(member.needs)) or "-"
        facts = (member.constraint, acts, needs, member.cost, member.paper or "-")
        rows.append((name, *facts, line))
    return rows


def defence_table() -> Any:
    """The defences as a table with a heading; names never wrap."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = Text("defences (--defence, repeatable)")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("constraint", no_wrap=True)
    table.add_column("acts", no_wrap=True)
    for heading, width in (("data needed", 13), ("cost", 17), ("paper", 15)):
        table.add_column(heading, max_width=width, overflow="fold")
    table.add_column("what it does", min_width=26)
    for row in defence_rows():
        table.add_row(*map(Text, row))
    return table


def show() -> None:
    """Print one table per kind."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sim.sweep_table import wide_console

    console = wide_console()
    for title, lines in components().items():
        table = Table(
            title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_header=False
        )
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        for name, line in lines.items():
            table.add_row(Text(name), Text(line))
        console.print(table)
    console.print(defence_table())
    console.print(
        Text("Your own: --defence path/to/file.py:MyDefence(alpha=2), and so for every kind.")
    )
