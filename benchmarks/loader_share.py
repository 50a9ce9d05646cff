"""What part of a training step's wall time is waiting for data?

    python -m benchmarks.loader_share [--rounds 3] [--sizes small paper] [--quick]

A TMU student learns from two teachers (freshly made, untrained: costs do not depend on what a
network has learned), one update a step on a batch of 8, from the same sequences of moving digits in
every form an archive has, on the local disk: tars compressed by zstd, tars as they are, Zarr; read
by the training process (0 workers), by one and by two reading processes. Ordinary runs: what is
told is their own log's `data_wait_fraction` of every step.

- step: median over the steps after the first two, waiting included;
- wait: of these steps until their batch was there, median; and of all of them as a part of their
  time;
- first wait: before the first step, reading processes started and the archive's checksums begun;
- loader alone: seconds a batch when nothing else happens. A step that took no longer than this
  would wait for data half of its time without reading processes.

Prints the table and writes results.json and table.md to docs/results/loader-share.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.provenance import (
    command_line,
    median_and_range,
    provenance,
    publish,
    record_folder,
    say,
)
from benchmarks.streaming.data import write_zarr_archive
from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from tmu_dist.collectives import Collectives
from tmu_dist.config import (
    DataConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    TransferConfig,
    WindowConfig,
)
from tmu_dist.data.archive import open_archive
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.run_folder import Event
from tmu_dist.training.loop import train

BATCH_SIZE = 8
UNTIMED_STEPS = 2
WORKERS = (0, 1, 2)
FORMS = ("tar, zstd", "tar", "zarr")


class Size(NamedTuple):
    """Frames, network, and how many steps are timed."""

    frame_size: int
    digit_size: int
    num_layers: int
    hidden_channels: int
    steps: int
    sequences: int


SIZES = {
    "small": Size(32, 14, num_layers=4, hidden_channels=32, steps=12, sequences=1024),
    "paper": Size(64, 28, num_layers=4, hidden_channels=64, steps=4, sequences=1024),
}
QUICK_SIZES = {"small": Size(32, 14, 1, 8, steps=2, sequences=64)}


def write_archives(folder: Path, size: Size) -> dict[str, str]:
    """The same sequences in every form; their folders."""
    urls = {form: str(folder / form.replace(", ", "-")) for form in FORMS}
    config = MovingMNISTConfig(
        digits=2,
        train=size.sequences,
        val=8,
        test=8,
        frame_size=size.frame_size,
        digit_size=size.digit_size,
    )
    write_moving_mnist(config, urls["tar, zstd"], workers=1, show_progress=False)
    raw = replace(config, compression="none")
    write_moving_mnist(raw, urls["tar"], workers=1, show_progress=False)
    archive = open_archive(urls["tar"])
    samples: Mapping[str, Any] = {
        split: archive.read(split, range(archive.manifest.num_samples(split)))
        for split in ("train", "val")
    }
    write_zarr_archive(urls["zarr"], samples, archive.manifest.units)
    return urls


def run_of(size: Size, url: str, output: str, **settings: Any) -> RunConfig:
    """A short run; its settings may say more."""
    steps = UNTIMED_STEPS + size.steps
    run = RunConfig(
        output=output,
        window=WindowConfig(),
        data=DataConfig(url=url, max_validation_samples=1),
        model=ModelConfig(num_layers=size.num_layers, hidden_channels=size.hidden_channels),
        transfer=TransferConfig(method="scratch"),
        training=TrainingConfig(num_steps=steps, batch_size=BATCH_SIZE, reverse_input="off"),
        schedule=ScheduleConfig(log_every=1, validate_every=steps, checkpoint_every=steps),
        launch=LaunchConfig(launcher="local", device="cpu"),
    )
    return replace(run, **settings)


def make_teachers(size: Size, url: str, folder: Path) -> tuple[str, ...]:
    """Two runs of one step."""
    once = ScheduleConfig(log_every=1, validate_every=1, checkpoint_every=1)
    outputs = tuple(str(folder / f"teacher-{number}") for number in range(2))
    for seed, output in enumerate(outputs):
        one_step = TrainingConfig(num_steps=1, batch_size=1, reverse_input="off", seed=seed)
        run = run_of(size, url, output, training=one_step, schedule=once)
        train(run, Collectives(), torch.device("cpu"))
    return outputs


def measure_run(config: RunConfig) -> dict[str, Any]:
    """Seconds of the timed steps, and of them spent waiting."""
    steps: list[tuple[float, float]] = []

    def listen(event: Event) -> None:
        if event["event"] == "train":
            seconds = BATCH_SIZE / event["samples_per_second"]
            steps.append((seconds, seconds * event["data_wait_fraction"]))

    train(config, Collectives(), torch.device("cpu"), listener=listen)
    seconds, waited = zip(*steps[UNTIMED_STEPS:], strict=True)
    return {"first_wait": steps[0][1], "seconds": seconds, "waited": waited}


def seconds_alone(url: str, workers: int, batches: int = 100) -> float:
    """Of a batch, when nothing but reading happens; after an epoch's worth that is not timed."""
    loader = SequenceLoader(
        open_archive(url), "train", global_batch_size=BATCH_SIZE, num_workers=workers
    )
    stream = loader.stream(0)
    for _ in itertools.islice(stream, loader.steps_per_epoch):
        pass
    started = time.perf_counter()
    for _ in itertools.islice(stream, batches):
        pass
    return (time.perf_counter() - started) / batches


def measure_size(size: Size, rounds: int, folder: Path) -> dict[str, Any]:
    """By form and workers: what the runs logged, and the loader alone."""
    urls = write_archives(folder, size)
    teachers = make_teachers(size, urls["tar"], folder)
    found: dict[str, Any] = {
        form: {str(workers): {"runs": [], "alone": []} for workers in WORKERS} for form in FORMS
    }
    for number in range(rounds):
        for form, workers in itertools.product(FORMS, WORKERS):
            say(f"round {number + 1}: {form}, {workers} workers")
            config = run_of(
                size,
                urls[form],
                str(folder / f"run-{number}-{FORMS.index(form)}-{workers}"),
                transfer=TransferConfig(method="tmu", teachers=teachers),
            )
            data = replace(config.data, num_workers=workers)
            row = found[form][str(workers)]
            row["runs"].append(measure_run(replace(config, data=data)))
            row["alone"].append(seconds_alone(urls[form], workers))
    return found


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a line for every size, form and number of workers."""
    machine = record["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} thread(s), {record['rounds']} round(s), batches "
        f"of {BATCH_SIZE}: median (least - most) of all steps or rounds.",
        "",
        "| size | archive | workers | step [s] | wait [ms] | wait, part | first wait [s] "
        "| loader alone [ms] |",
        "|---" * 8 + "|",
    ]
    for size, forms in record["sizes"].items():
        for form, by_workers in forms.items():
            for workers, row in by_workers.items():
                seconds = [s for run in row["runs"] for s in run["seconds"]]
                waited = [s for run in row["runs"] for s in run["waited"]]
                columns = [
                    size,
                    form,
                    workers,
                    median_and_range(seconds, 3),
                    median_and_range([1e3 * s for s in waited], 2),
                    f"{sum(waited) / sum(seconds):.2%}",
                    f"{statistics.median(run['first_wait'] for run in row['runs']):.2f}",
                    median_and_range([1e3 * s for s in row["alone"]], 2),
                ]
                lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", choices=tuple(SIZES), nargs="+", default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="a tiny network, for tests")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    found = {}
    sizes = QUICK_SIZES if chosen.quick else {name: SIZES[name] for name in chosen.sizes}
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure_size(size, chosen.rounds, Path(folder))
    record = {
        **provenance("benchmarks.loader_share", "cpu", chosen.revision),
        "rounds": chosen.rounds,
        "sizes": found,
    }
    publish(record, table(record), record_folder(chosen, "loader-share"))


if __name__ == "__main__":
    main()
