"""Two commands about reading archives; neither changes one.

    python -m tmu_dist.data order URL --world 4 --epoch 3     who will read what, from the manifest
    python -m tmu_dist.data bench URL                         the loader beside the bare storage

Here are their arguments; what they find out is in commands/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tmu_dist.commands import command_errors
from tmu_dist.data.archive import open_archive
from tmu_dist.data.commands.bench import BenchSettings, run_bench
from tmu_dist.data.commands.bench_report import bench_record, bench_summary
from tmu_dist.data.commands.order import order_report, order_summary
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.data.manifest import SPLITS
from tmu_dist.files import atomic_file

_MIN_WIDTH = 120
"""Columns of a table where no terminal says how many there are."""

_ORDER_EXAMPLES = """examples:
  python -m tmu_dist.data order s3://bucket/rain --world 4 --epoch 3
      the fourth epoch, read by four processes of one machine
  python -m tmu_dist.data order s3://bucket/rain --world 16 --nodes 4 --batch-size 64 --json
      which shards each of four machines reads, for a script
  python -m tmu_dist.data order rain clips --weights 3 1 --start 52000
      what a run that mixes two archives and has consumed 52,000 samples reads next
"""
_BENCH_EXAMPLES = """examples:
  python -m tmu_dist.data bench archives/moving-mnist-3
  python -m tmu_dist.data bench s3://bucket/rain --reading all --workers 0 2 4 8 --json rain.json
      copies on this machine and byte ranges side by side

Object stores are reached as in training: credentials, region and AWS_ENDPOINT_URL come from the
environment. The first shards of an epoch are measured, as many as are read in --seconds.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.data`."""
    chosen = _parser().parse_args(arguments)
    with command_errors():
        chosen.run(chosen)


def _order(chosen: argparse.Namespace) -> None:
    archives = [open_archive(url) for url in chosen.urls]
    loader = SequenceLoader(
        archives,
        chosen.split,
        global_batch_size=chosen.batch_size,
        world_size=chosen.world,
        seed=chosen.seed,
        fraction=chosen.fraction,
        mix_weights=chosen.weights,
        shuffle=chosen.shuffle,
        shuffle_window=chosen.window,
        shuffle_lanes=chosen.lanes,
    )
    report = order_report(
        loader,
        archives,
        chosen.split,
        seed=chosen.seed,
        start=chosen.epoch * loader.num_samples if chosen.start is None else chosen.start,
        world_size=chosen.world,
        num_nodes=chosen.nodes,
        num_steps=chosen.steps,
    )
    if chosen.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(report)) + "\n")
    else:
        _console().print(order_summary(report))


def _bench(chosen: argparse.Namespace) -> None:
    settings = BenchSettings(
        url=chosen.url,
        split=chosen.split,
        batch_size=chosen.batch_size,
        workers=tuple(chosen.workers),
        seconds=chosen.seconds,
        reading=chosen.reading,
        cache_folder=chosen.cache_folder,
        cache_gib=chosen.cache_gib,
    )
    # torch means well: it has an opinion on more processes than cores, which are tried on purpose.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    with Console(stderr=True).status("") as status:
        result = run_bench(settings, lambda doing: status.update(f"measuring {doing}"))
    _console().print(bench_summary(result))
    if chosen.json is not None:
        with atomic_file(chosen.json) as staging:
            staging.write_text(json.dumps(bench_record(result), indent=1) + "\n")


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_MIN_WIDTH)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmu_dist.data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_order(commands)
    _add_bench(commands)
    return parser


def _add_order(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    order = commands.add_parser(
        "order",
        help="who will read what, from the manifest alone",
        description="Say who will read what in an epoch of training. Only manifests are read.",
        epilog=_ORDER_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = order.add_argument
    add("urls", nargs="+", metavar="URL", help="archives; several are mixed")
    where = order.add_mutually_exclusive_group()
    where.add_argument("--epoch", type=_count, default=0, help="from its beginning (default 0)")
    where.add_argument(
        "--start",
        type=_count,
        metavar="POSITION",
        help="from there on: samples consumed since the run began, as checkpoints have it",
    )
    add("--world", type=_positive, default=1, help="training processes (default 1)")
    add("--nodes", type=_positive, default=1, help="machines that they are spread over (default 1)")
    add(
        "--batch-size",
        type=_positive,
        default=8,
        help="training.batch_size: samples of a step over all processes (default 8)",
    )
    add("--split", choices=SPLITS, default="train")
    add("--seed", type=int, default=0, help="training.seed (default 0)")
    add("--fraction", type=float, default=1.0, help="data.fraction (default 1)")
    add("--weights", type=float, nargs="+", default=(), help="data.mix_weights, one per archive")
    add("--window", type=int, default=4096, help="data.shuffle_window (default 4096)")
    add("--lanes", type=int, default=16, help="data.shuffle_lanes (default 16)")
    add(
        "--no-shuffle",
        dest="shuffle",
        action="store_false",
        help="in the order of the sample ids, as evaluations read",
    )
    add("--steps", type=_count, default=5, help="steps to list sample by sample (default 5)")
    add("--json", action="store_true", help="print everything as JSON, every shard of every rank")
    order.set_defaults(run=_order)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="the loader beside the bare storage, on this machine",
        description="Measure the loader beside the bare storage, and say what limits it.",
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = bench.add_argument
    add("url", metavar="URL", help="the archive")
    add("--split", choices=SPLITS, default="train")
    add("--batch-size", type=_positive, default=8, help="samples of a batch (default 8)")
    add(
        "--workers",
        type=_count,
        nargs="+",
        default=(0, 1, 2, 4),
        help="data.num_workers to try; 0 reads in the training process (default 0 1 2 4)",
    )
    add(
        "--seconds",
        type=float,
        default=5.0,
        help="of each measurement, which ends with the batch or shard that passes them (default 5)",
    )
    add(
        "--reading",
        choices=("auto", "cache", "range", "all"),
        default="auto",
        help="data.reading, or all ways that this archive allows (default auto)",
    )
    add(
        "--cache-folder",
        help="data.cache_folder: copies are made in a folder bench-... in it, and removed",
    )
    add("--cache-gib", type=float, help="data.cache_gib")
    add("--json", type=Path, metavar="FILE", help="also write all numbers there")
    bench.set_defaults(run=_bench)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    main()
