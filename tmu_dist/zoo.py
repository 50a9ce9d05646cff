"""The zoo: `python -m tmu_dist.zoo list|show|add`. A folder of teachers, each a folder with a card.

The zoo, like everything that is added to it, may lie on a disk or in a store.

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
from tmu_dist.data.storage import join_url, list_objects
from tmu_dist.folders import list_folders
from tmu_dist.teachers.card import TeacherCard, TeacherError
from tmu_dist.teachers.store import CARD_FILE, load_card, load_model, write_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.zoo`."""
    parser = argparse.ArgumentParser(prog="python -m tmu_dist.zoo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--zoo", default="zoo", help="folder of teachers, or its URL")
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
            is_in_zoo = chosen.teacher in list_folders(chosen.zoo, "", CARD_FILE)
            found = join_url(chosen.zoo, chosen.teacher) if is_in_zoo else chosen.teacher
            console.print_json(load_card(found).to_json())
        else:
            folder = add_teacher(chosen.source, chosen.zoo, name=chosen.name)
            console.print(f"added {folder}: use it as --transfer.teachers {folder}")


def list_cards(zoo: str | Path) -> list[TeacherCard]:
    """The cards of all teachers of a zoo, by name."""
    names = list_folders(str(zoo), "", CARD_FILE)
    return [load_card(join_url(str(zoo), name)) for name in names]


def add_teacher(source: str, zoo: str | Path, *, name: str | None = None) -> str:
    """Copy a network into the zoo, after proving that it is whole; returns its folder.

    Raises:
        TeacherError: the source is missing or damaged, or the name is taken.
        WriteError, StorageError: the zoo cannot be written.
    """
    loaded = load_model(source)
    card = replace(loaded.card, name=name or loaded.card.name)
    folder = join_url(str(zoo), card.name)
    if list_objects(str(zoo), card.name):
        raise TeacherError(f"The zoo already has {folder}: choose another --name or remove it.")
    write_model(folder, loaded.model, card)
    return folder


def _table(cards: list[TeacherCard], zoo: str) -> Table:
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
