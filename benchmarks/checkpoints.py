"""What does a checkpoint every 100 steps cost?

    python -m benchmarks.checkpoints [--size small|paper] [--device cpu|cuda] [--repeats 5]

A TMU student with two frozen teachers trains on a batch of 8, with random weights and frames, and
saves checkpoints with the project's own writer: to a folder of this disk, and to an S3 server on
loopback, which takes its processor time from the same machine. In every repeat and for each of
them, plain steps and steps after a checkpoint take turns in the same process:

- stalled: how long training waits until its snapshot is taken;
- slowed: how much longer than as many plain steps those take that run until it is written;
- cost: both, as a part of 100 plain steps of that repeat. Below the noise of the steps it may come
  out negative, so there is also
- at most: stalled, and all processor time of a checkpoint, as if the steps went without it;
- in line: the time of a checkpoint with nothing beside it, as if training waited for all of it.

Prints the table and writes results.json and table.md to docs/results/checkpoints. Needs localbucket
for the S3 server.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.backbones.costs import SIZES, Size, training_batch, training_step
from benchmarks.methods import METHODS, Teachers
from benchmarks.provenance import command_line, median_and_range, provenance, publish, say
from tests.s3_servers import localbucket, s3_environment
from tmu_dist.config import RunConfig
from tmu_dist.data.storage import list_objects
from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.training.checkpoint import CheckpointStore, Progress, Snapshot, rng_state
from tmu_dist.training.checkpoint_writer import CheckpointWriter
from tmu_dist.training.run_lock import lock_run
from tmu_dist.training.step import TrainingStep

STEPS_BETWEEN = 100


class Training(NamedTuple):
    """What a step needs, and what a checkpoint keeps."""

    student: Predictor
    card: TeacherCard
    step: TrainingStep
    run: Callable[[], object]
    """One step, to its end."""


class WatchedStore(CheckpointStore):
    """Says when a checkpoint is written."""

    def __init__(self, run: str) -> None:
        super().__init__(run, RunConfig(output=run), [], keep=2)
        self.written = threading.Event()

    def save(self, snapshot: Snapshot, before_change: Callable[[], None] = lambda: None) -> None:
        super().save(snapshot, before_change)
        self.written.set()


def prepare(size: Size, device: torch.device) -> Training:
    """A student, its teachers and its step, warmed up."""
    torch.manual_seed(1)
    teachers = Teachers(size, device)
    method = METHODS["tmu"].make(teachers.task, teachers)
    student = method.build_student().to(device)
    step = training_step(method, student, device)
    batch = training_batch(size, student, device)

    def run() -> None:
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    return Training(student, teachers.card, step, run)


@contextmanager
def places() -> Iterator[dict[str, str]]:
    """Addresses of a run folder in each kind of place."""
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=".") as folder:
        buckets = Path(folder).absolute()
        (buckets / "bucket").mkdir()
        with localbucket(buckets) as server:
            os.environ.update(s3_environment(server.endpoint))
            yield {"disk": str(buckets / "run"), "S3": "s3://bucket/run"}


def measure(size: Size, device: str, *, repeats: int, steps: int) -> dict[str, Any]:
    """Per place, seconds of every repeat by what took them, and `bytes` of a checkpoint.

    Args:
        size: of network and sequences.
        device: "cpu" or "cuda".
        repeats: checkpoints to measure in each place, after one that is not counted.
        steps: least number of steps to compare.
    """
    training = prepare(size, torch.device(device))
    with places() as addresses:
        stores = {place: WatchedStore(address) for place, address in addresses.items()}
        found: dict[str, Any] = {place: {"repeats": []} for place in stores}
        for number in range(repeats + 1):
            for place, store in stores.items():
                say(f"{place}: checkpoint {number} of {repeats}")
                seconds = _measure_one(training, store, number + 1, steps)
                if number:  # the first one takes memory that later ones use again
                    found[place]["repeats"].append(seconds)
        for place, store in stores.items():
            newest = f"checkpoints/step-{repeats + 1:08d}"
            found[place]["bytes"] = sum(list_objects(store.run, newest).values())
    return found


def _measure_one(
    training: Training, store: WatchedStore, number: int, steps: int
) -> dict[str, float]:
    """Seconds of one checkpoint: beside steps, and in line."""
    lock = lock_run(store.run)
    writer = CheckpointWriter(store, lock.check, max_failed=0)

    def save() -> None:
        writer.save(
            training.student,
            replace(training.card, step=number),
            training.step.state_dict(),
            progress=Progress(step=number),
            data={},
            rng_by_rank=[rng_state()],
        )

    plain = [_seconds(training.run) for _ in range(steps)]
    store.written.clear()
    stalled = _seconds(save)
    beside: list[float] = []
    while len(beside) < steps or not store.written.is_set():
        beside.append(_seconds(training.run))
    writer.finish()
    plain += [_seconds(training.run) for _ in range(len(beside))]
    started, processor = time.perf_counter(), time.process_time()
    save()
    writer.finish()
    in_line, processor = time.perf_counter() - started, time.process_time() - processor
    writer.close()
    lock.close()
    step = statistics.median(plain)
    return {
        "step": step,
        "stalled": stalled,
        "slowed": sum(beside) - step * len(beside),
        "steps_beside": len(beside),
        "processor": processor,
        "in_line": in_line,
    }


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def costs(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of one repeat: parts of the time of the steps between two checkpoints."""
    between = STEPS_BETWEEN * seconds["step"]
    return {
        "cost": (seconds["stalled"] + seconds["slowed"]) / between,
        "at most": (seconds["stalled"] + seconds["processor"]) / between,
        "in line": seconds["in_line"] / between,
    }


def table(record: Mapping[str, Any]) -> str:
    """Markdown: seconds of a checkpoint and its part of the steps' time, per place."""
    machine = record["machine"]
    lines = [
        f"Size: {record['size']}. {machine['processor']}, {machine['threads']} thread(s) of the "
        f"CPU, torch {record['versions']['torch']}, {record['repeats']} checkpoint(s) each: median "
        f"(least - most). Cost, at most and in line: parts of {STEPS_BETWEEN} plain steps.",
        "",
        "| place | MB | step, s | stalled, s | slowed, s | processor, s | cost, % | at most, % "
        "| in line, % |",
        "|---" * 9 + "|",
    ]
    for place, found in record["places"].items():
        repeats = found["repeats"]
        parts = [costs(each) for each in repeats]
        columns = [place, f"{found['bytes'] / 1e6:,.1f}"]
        for name in ("step", "stalled", "slowed", "processor"):
            columns.append(median_and_range([each[name] for each in repeats], 3))
        for name in ("cost", "at most", "in line"):
            columns.append(median_and_range([100 * each[name] for each in parts], 3))
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__, sizes=SIZES, takes_device=True, out="docs/results/checkpoints")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="to compare in a repeat, at least")
    chosen = parser.parse_args()
    record = {
        **provenance("benchmarks.checkpoints", chosen.device, chosen.revision),
        "size": chosen.size,
        "repeats": chosen.repeats,
        "places": measure(
            SIZES[chosen.size], chosen.device, repeats=chosen.repeats, steps=chosen.steps
        ),
    }
    publish(record, table(record), chosen.out)


if __name__ == "__main__":
    main()
