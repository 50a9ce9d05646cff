"""The zoo: `python -m tmu_dist.zoo list|show|add|import`. A folder of teachers, each with a card.

The zoo, like everything that is added to it, may lie on a disk or in a store. `import` makes a
teacher of weights that other codebases trained (docs/importing_weights.md).

python -m tmu_dist.zoo add runs/digits-teacher-1 --name digits-1
python -m tmu_dist.zoo import model.ckpt-80000 --name theirs --frame 1x64x64
python -m tmu_dist.zoo list
python -m tmu_dist.zoo show digits-1
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tmu_dist.commands import command_errors
from tmu_dist.config import ModelConfig, WindowConfig, flatten
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import Units
from tmu_dist.data.storage import join_url, list_objects
from tmu_dist.folders import list_folders
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError, frame_shape
from tmu_dist.teachers.foreign.importing import Imported, import_network
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
    _add_import(commands)
    chosen = parser.parse_args(arguments)
    console = Console()
    with command_errors():
        if chosen.command == "list":
            console.print(_table(list_cards(chosen.zoo), chosen.zoo))
        elif chosen.command == "show":
            is_in_zoo = chosen.teacher in list_folders(chosen.zoo, "", CARD_FILE)
            found = join_url(chosen.zoo, chosen.teacher) if is_in_zoo else chosen.teacher
            console.print_json(load_card(found).to_json())
        elif chosen.command == "add":
            folder = add_teacher(chosen.source, chosen.zoo, name=chosen.name)
            console.print(f"added {folder}: use it as --transfer.teachers {folder}")
        else:
            folder = _free_folder(chosen.zoo, chosen.name)
            imported = _import(chosen)
            write_model(folder, imported.model, imported.card)
            _report(imported, console)
            console.print(f"imported {folder}: use it as --transfer.teachers {folder}")


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
    folder = _free_folder(str(zoo), card.name)
    write_model(folder, loaded.model, card)
    return folder


def _free_folder(zoo: str, name: str) -> str:
    folder = join_url(zoo, name)
    if list_objects(zoo, name):
        raise TeacherError(f"The zoo already has {folder}: choose another --name or remove it.")
    return folder


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `import`, with what a file of weights does not say."""
    foreign = commands.add_parser("import", help="make a teacher of another codebase's weights")
    foreign.add_argument("source", help="file of torch.save or safetensors: a path or a URL")
    foreign.add_argument("--name", required=True, help="name in the zoo")
    foreign.add_argument(
        "--archive",
        help="archive with what it learned from: frame shape, units, interval, normalisation",
    )
    foreign.add_argument(
        "--frame",
        help="CHANNELSxHEIGHTxWIDTH of its frames (default: the archive's); without --archive "
        "they are intensities in [0, 1]",
    )
    foreign.add_argument(
        "--interval-minutes", type=float, help="between frames, without --archive (default: none)"
    )
    foreign.add_argument("--input-frames", type=int, default=WindowConfig.num_input_frames)
    foreign.add_argument("--target-frames", type=int, default=WindowConfig.num_target_frames)
    foreign.add_argument(
        "--forget-bias", type=float, help="of C, where it is not the codebase's own"
    )


def _import(chosen: argparse.Namespace) -> Imported:
    """Read what `import` asks for."""
    frame = None if chosen.frame is None else _parsed_frame(chosen.frame)
    if chosen.archive is not None:
        if chosen.interval_minutes is not None:
            raise TeacherError("--archive says the interval: leave --interval-minutes out.")
        manifest = open_archive(chosen.archive).manifest
        data = DataFacts.of(manifest)
        frame = frame or frame_shape(manifest)
    else:
        data = DataFacts(
            archive="unknown",
            manifest_hash="unknown",
            units=Units(
                quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None
            ),
            frame_interval_minutes=chosen.interval_minutes,
        )
    if frame is None:
        raise TeacherError(
            "Weights do not say the shape of frames: give --frame CHANNELSxHEIGHTxWIDTH, or with "
            "--archive an archive of such frames."
        )
    return import_network(
        chosen.source,
        name=chosen.name,
        frame=frame,
        window=WindowConfig(
            num_input_frames=chosen.input_frames, num_target_frames=chosen.target_frames
        ),
        data=data,
        forget_bias=chosen.forget_bias,
    )


def _parsed_frame(text: str) -> FrameShape:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise TeacherError(f"--frame is CHANNELSxHEIGHTxWIDTH, such as 1x64x64, got {text!r}.")
    channels, height, width = map(int, text.split("x"))
    return FrameShape(channels=channels, height=height, width=width)


def _report(imported: Imported, console: Console) -> None:
    """Say what was found, and what was left out."""
    model = imported.card.model
    console.print(
        f"{imported.layout.name}: model.cell={model.cell}, {model.num_layers} layers of "
        f"{model.hidden_channels}, {model.kernel_size}x{model.kernel_size} filters, patch size "
        f"{model.patch_size}, gate_norm={model.gate_norm}, forget_bias={model.forget_bias}"
    )
    if imported.layout.unused:
        console.print(f"without effect there, left out: {', '.join(imported.layout.unused)}")
    for note in imported.layout.notes:
        console.print(f"note: {note}")


def _network(model: ModelConfig) -> str:
    """The backbone, and the settings that are not its defaults."""
    default = dict(flatten(asdict(ModelConfig())))
    chosen = {name: value for name, value in flatten(asdict(model)) if value != default[name]}
    return " ".join([model.cell, *(f"{k}={v}" for k, v in chosen.items() if k != "cell")])


def _table(cards: list[TeacherCard], zoo: str) -> Table:
    table = Table(title=f"{zoo}: {len(cards)} teacher(s)")
    for heading in ("name", "method", "network", "frames", "archive", "step", "validation MSE"):
        table.add_column(heading, overflow="fold")
    for card in cards:
        table.add_row(
            card.name,
            card.method,
            _network(card.model),
            str(card.frame),
            card.data.archive,
            str(card.step),
            f"{card.scores['mse_per_frame']:.2f}" if "mse_per_frame" in card.scores else "-",
        )
    return table


if __name__ == "__main__":
    main()
