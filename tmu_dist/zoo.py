"""The zoo: `python -m tmu_dist.zoo list|show|add`. A folder of teachers, each a folder with a card.

python -m tmu_dist.zoo add runs/digits-teacher-1 --name digits-1
python -m tmu_dist.zoo list
python -m tmu_dist.zoo show digits-1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tmu_dist.commands import command_errors
from tmu_dist.files import atomic_directory
from tmu_dist.teachers.card import TeacherCard, TeacherError
from tmu_dist.teachers.store import CARD_FILE, load_card, load_model, write_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.zoo`."""
    parser = argparse.ArgumentParser(prog="python -m tmu_dist.zoo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--zoo", type=Path, default=Path("zoo"), help="folder of teachers")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="a table of all teachers")
    show = commands.add_parser("show", help="one teacher's card")
    show.add_argument("teacher", help="name in the zoo, or any model folder, run or URL")
    add = commands.add_parser("add", help="copy a trained network into the zoo")
    add.add_argument("source", help="run, checkpoint, teacher folder or URL")
    add.add_argument("--name", help="name in the zoo (default: the run's name)")
    chosen = parser.parse_args(arguments)
    console = Console()
    with command_errors():
        if chosen.command == "list":
            console.print(_table(list_cards(chosen.zoo), chosen.zoo))
        elif chosen.command == "show":
            in_zoo = chosen.zoo / chosen.teacher
            found = in_zoo if (in_zoo / CARD_FILE).is_file() else chosen.teacher
            console.print_json(load_card(str(found)).to_json())
        else:
            folder = add_teacher(chosen.source, chosen.zoo, name=chosen.name)
            console.print(f"added {folder}: use it as --transfer.teachers {folder}")


def list_cards(zoo: Path) -> list[TeacherCard]:
    """The cards of all teachers of a zoo, by name."""
    return [load_card(str(file.parent)) for file in sorted(zoo.glob(f"*/{CARD_FILE}"))]


def add_teacher(source: str, zoo: Path, *, name: str | None = None) -> Path:
    """Copy a network into the zoo, after proving that it is whole; returns its folder.

    Raises:
        TeacherError: the source is missing or damaged, or the name is taken.
    """
    loaded = load_model(source)
    card = replace(loaded.card, name=name or loaded.card.name)
    folder = zoo / card.name
    if folder.exists():
        raise TeacherError(f"The zoo already has {folder}: choose another --name or remove it.")
    with atomic_directory(folder) as staging:
        write_model(staging, loaded.model, card)
    return folder


def _table(cards: list[TeacherCard], zoo: Path) -> Table:
    table = Table(title=f"{zoo}: {len(cards)} teacher(s)")
    for heading in ("name", "method", "network", "frames", "archive", "step", "validation MSE"):
        table.add_column(heading)
    for card in cards:
        model, frame = card.model, card.frame
        table.add_row(
            card.name,
            card.method,
            f"{model.cell} {model.num_layers}x{model.hidden_channels}, patch {model.patch_size}",
            f"{frame.channels}x{frame.height}x{frame.width}",
            card.data.archive,
            str(card.step),
            f"{card.scores['mse_per_frame']:.2f}" if "mse_per_frame" in card.scores else "-",
        )
    return table


if __name__ == "__main__":
    main()
