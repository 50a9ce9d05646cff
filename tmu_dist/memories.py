"""What teachers tell, computed once and kept in files (placement.kind=cached).

    python -m tmu_dist.memories price [flags of the training]     what it costs, and when it pays
    python -m tmu_dist.memories make [--part 0/4] [flags ...]     make it; go on where it stopped
    python -m tmu_dist.memories verify [flags ...]                read all of it, recompute some

The flags are those of `python -m tmu_dist.train`; placement.kind=cached and placement.cache must be
among them. With --part several machines make a cache together, each its part of the shards.

Here are the arguments and the table; the work is in teachers/memories/making.py.
"""

from __future__ import annotations

import argparse
import logging
import re
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from tmu_dist.commands import command_errors
from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.data.loader import open_archives
from tmu_dist.data.transforms import check_long_enough
from tmu_dist.teachers.card import DataFacts, frame_shape
from tmu_dist.teachers.memories.bank import Lesson, TrainingSamples
from tmu_dist.teachers.memories.files import RecordLayout
from tmu_dist.teachers.memories.making import SHARD_MIB, Work, make, verify
from tmu_dist.teachers.memories.price import (
    Price,
    TeacherPrice,
    duration,
    free_bytes,
    gib,
    measure_storage,
)
from tmu_dist.train import parse_command
from tmu_dist.training.launch import pick_device, with_absolute_paths
from tmu_dist.transfer.prepare import planned_teachers

_MIN_WIDTH = 120
"""Columns of a table where no terminal says how many there are."""
_MEASURED_BATCHES = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.memories`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m tmu_dist.memories", description=__doc__, add_help=False, allow_abbrev=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("price", "make", "verify"))
    parser.add_argument("--part", type=_part, default=(0, 1), help="make: which shards, as 0/4")
    parser.add_argument(
        "--shard-mib", type=float, default=SHARD_MIB, help=f"make: of a shard ({SHARD_MIB:.0f})"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        parser.print_help()
        parser.exit()
    chosen, flags = parser.parse_known_args(given)
    recipe = parse_command(
        flags,
        prog=f"python -m tmu_dist.memories {chosen.command} [--part 0/1] [--shard-mib 256]",
        summary="Price, make or verify what the teachers of a training tell.",
    )
    with command_errors():
        work = work_of(recipe.config)
        if chosen.command == "price":
            show_price(price(work, num_epochs=epochs_of(recipe.config, work)))
        elif chosen.command == "make":
            make(work, part=chosen.part, shard_bytes=int(chosen.shard_mib * 2**20))
        else:
            verify(work)


def work_of(config: RunConfig) -> Work:
    """What a run needs of its cache.

    Raises:
        ConfigError: the run does not read memories from files.
        TeacherError: a teacher is missing, does not fit, or draws random numbers.
        StorageError, ManifestError, ValueError: the archives cannot be read, or do not fit.
    """
    config = with_absolute_paths(config)
    data, address = config.data, config.placement.cache
    if address is None:
        raise ConfigError(
            "These flags keep nothing: add --placement.kind cached --placement.cache FOLDER (a "
            "folder or URL), and --transfer.teacher-input truth."
        )
    archives = open_archives(
        [data.url, *data.mix_with],
        reading=data.reading,
        cache_folder=data.cache_folder,
        cache_gib=data.cache_gib,
    )
    manifest = archives[0].manifest
    check_long_enough(manifest.num_frames, config.window)
    frame = frame_shape(manifest)
    return Work(
        address,
        [
            Lesson(teacher=teacher, window=config.window, precision=config.training.precision)
            for teacher in planned_teachers(config, frame, DataFacts.of(manifest))
        ],
        archives,
        [
            TrainingSamples.of(archive.manifest, 1.0 if number else data.fraction)
            for number, archive in enumerate(archives)
        ],
        directions=(False,) if config.training.reverse_input == "off" else (False, True),
        device=pick_device(config.launch.device, local_rank=0),
        at_once=config.scale.sequences_at_once or config.training.batch_size,
    )


def epochs_of(config: RunConfig, work: Work) -> float:
    """How often a run sees all its sequences."""
    sequences = sum(len(samples.used_ids) for samples in work.samples)
    return config.training.num_steps * config.training.batch_size / sequences


def price(work: Work, *, num_epochs: float) -> Price:
    """Measure what making and reading would cost; leaves nothing behind.

    Args:
        work: whose cache.
        num_epochs: of the run.

    Raises:
        WriteError, StorageError: nothing can be written at the cache's address.
    """
    return Price(
        teachers=tuple(_price_of(work, teacher) for teacher in range(len(work.lessons))),
        free_bytes=free_bytes(work.address),
        num_epochs=num_epochs,
    )


def _price_of(work: Work, teacher: int) -> TeacherPrice:
    parts = list(work.parts_of(teacher))
    size = min(work.at_once, len(work.samples[0].used_ids))
    ids = work.ids(parts[0], range(size))
    frames_BTCHW = work.frames(parts[0], ids)
    taught = work.teach(parts[0], frames_BTCHW)  # warm
    layout = RecordLayout.of(taught)
    seconds = []
    for _ in range(_MEASURED_BATCHES):
        started = time.perf_counter()
        taught = work.teach(parts[0], frames_BTCHW)
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        seconds.append(time.perf_counter() - started)
    records_BN = layout.encode(taught, ids)
    write_seconds, read_seconds = measure_storage(work.address, layout, records_BN, ids)
    plans = [(work.folder(part), work.folder(part).plan()) for part in parts]
    made = [
        plan.num_records - sum(len(plan.rows(k)) for k in folder.missing_shards(plan))
        for folder, plan in plans
        if plan is not None
    ]
    return TeacherPrice(
        name=work.lessons[teacher].teacher.card.name,
        record_bytes=layout.record_bytes,
        num_records=sum(len(work.samples[part.archive].used_ids) for part in parts),
        num_made=sum(made),
        run_seconds=statistics.median(seconds) / size,
        write_seconds=write_seconds,
        read_seconds=read_seconds,
    )


def show_price(found: Price) -> None:
    """A small table, the totals, and what to do."""
    table = Table("teacher", "a record", "records", "there", "all", "run", "read", "to make")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found.teachers:
        table.add_row(
            each.name,
            gib(each.record_bytes),
            f"{each.num_records:,}",
            f"{each.num_made:,}",
            gib(each.total_bytes),
            f"{each.run_seconds * 1e3:,.2f} ms",
            f"{each.read_seconds * 1e3:,.2f} ms",
            duration(each.seconds_to_make),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_MIN_WIDTH)
    console.print(table)
    free = "unknown (a store)" if found.free_bytes is None else gib(found.free_bytes)
    epoch = found.break_even_epoch
    console.print(
        f"in all {gib(found.total_bytes)}, {gib(found.bytes_to_make)} of it to make; free: {free}\n"
        f"to make: {duration(found.seconds_to_make)} of one process; an epoch then saves "
        f"{duration(found.seconds_saved)}; pays from epoch: {epoch or 'never'}\n"
        f"{found.verdict()}"
    )


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} must be K/N with K from 0 to N - 1")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
