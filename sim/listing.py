"""``poisonloop list``: everything that can be named on the command line, with one line each."""

from __future__ import annotations

from sim.cli import parser_of


def list_components(words: list[str]) -> int:
    """``poisonloop list``."""
    parser = parser_of("list", "Every learner, attack, annotator, defence, world and preset.")
    parser.add_argument(
        "--check-world", action="store_true", help="measure the embedded models' calibration"
    )
    parser.add_argument("--world.seed", dest="seed", type=int, default=0, metavar="N")
    parser.add_argument("--world.model-seed", dest="model_seed", type=int, default=0, metavar="N")
    asked = parser.parse_args(words)
    if not asked.check_world:
        show()
        return 0
    from sim.calibration import show_calibration

    show_calibration(asked.seed, asked.model_seed)
    return 0


def components() -> dict[str, dict[str, str]]:
    """One-line summaries by name, by the flag they are given to."""
    from agents.defence import defences
    from agents.learners import learners
    from envs.annotators import annotators
    from envs.attacks import attacks
    from sim.config import SUMMARIES

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
