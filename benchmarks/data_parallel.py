"""How near do two data-parallel processes come to twice one process?

    python -m benchmarks.data_parallel [--quick] [--precisions fp32 bf16] [--batch 8] [--rounds 5]

The training step of a run (`tmu_dist.training.build`) at the paper's size: 64x64 frames, 10 seen
and 10 predicted, ConvLSTM of 4 x 64 with 5x5 kernels, memory transfer from two teachers, random
weights and frames, one update a step. Two processes stand side by side, each on a core of its own
with one thread, joined by gloo. They are timed in turns, in a new order in each round:

    one         the first process alone, without data-parallel training, while the other one waits
    two         both, data-parallel, each on as large a batch as `one` (weak scaling)
    two, halves both, data-parallel, on half of that batch each (strong scaling)
    unlinked    like `two` without exchanging gradients (`no_sync`)
    apart       both, without data-parallel training: what this machine gives two processes

Efficiency is the sequences a second of two processes by twice those of `one` in the same round.
`apart` is its ceiling: what is missing there is shared memory and caches, and no software's. What
`unlinked` gains on `two` is the exchange; what `apart` gains on `unlinked`, the rest of
DistributedDataParallel. Also timed: the exchange of all gradients by itself.

Prints the table and writes results.json and table.md to docs/results/data-parallel. --quick takes
less than five minutes: smaller batches and fewer rounds.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.backbones.costs import SIZES, Size, make_method, training_batch
from benchmarks.provenance import (
    command_line,
    median_and_range,
    provenance,
    publish,
    record_folder,
    say,
)
from tmu_dist.collectives import Collectives, joined_ranks, torchrun_here
from tmu_dist.config import RunConfig, with_overrides
from tmu_dist.models.build import count_trained
from tmu_dist.training.build import build_step
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import TrainingBatch

MODES = ("one", "two", "two, halves", "unlinked", "apart")
PRECISIONS = ("fp32", "bf16")
RANKS = 2
CPU = torch.device("cpu")


class Rank:
    """One process: the same step with and without data-parallel training.

    Args:
        size: of network and sequences.
        precision: of the step.
        collectives: both processes.
    """

    def __init__(self, size: Size, precision: str, collectives: Collectives) -> None:
        config = with_overrides(
            RunConfig(), {"training.precision": precision, "training.reverse_input": "off"}
        )

        def build(ranks: Collectives) -> TrainingStep:
            torch.manual_seed(0)
            method = make_method(size, "convlstm", "tmu", CPU)
            student = method.build_student()
            return build_step(config, method, student, method.trainee(student), CPU, ranks)

        self.alone, self.linked = build(Collectives()), build(collectives)
        self.batch = training_batch(size, self.alone.trainee, CPU)  # type: ignore[arg-type]
        self.gradients = torch.zeros(count_trained(self.alone.trainee))

    def seconds(self, mode: str, batch: int, steps: int) -> tuple[float, float]:
        """Of so many steps of one mode, and of this process on a core in them.

        Args:
            mode: of `MODES`; "exchange": all gradients by themselves.
            batch: sequences of `one`.
            steps: how many.
        """
        rows = self.batch.rows(slice(batch // 2 if mode == "two, halves" else batch))
        if mode != "one":
            dist.barrier()  # both begin together
        started, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._step(mode, rows)
        return time.perf_counter() - started, time.process_time() - worked

    def _step(self, mode: str, rows: TrainingBatch) -> None:
        if mode == "exchange":
            dist.all_reduce(self.gradients)
            return
        step = self.alone if mode in ("one", "apart") else self.linked
        linked = self.linked.forward
        assert isinstance(linked, DistributedDataParallel)
        with linked.no_sync() if mode == "unlinked" else nullcontext():
            step(rows)


def serve(connection: Connection, variables: Mapping[str, str], size: Size, precision: str) -> None:
    """Measure as often as asked, on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(variables["RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    os.environ.update(variables)
    with joined_ranks("torchrun") as collectives:
        one = Rank(size, precision, collectives)
        connection.send(one.gradients.numel())
        while (asked := connection.recv()) is not None:
            connection.send(one.seconds(*asked))


def measure(size: Size, precision: str, *, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """By mode and round: `sequences_per_second`, and `on_core`, the part of the time that a process
    was given a core; `exchange_seconds` of so many `gradients`."""
    context = torch.multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(RANKS)]
    processes = [
        context.Process(target=serve, args=(theirs, variables, size, precision), daemon=True)
        for (_, theirs), variables in zip(pipes, torchrun_here(RANKS), strict=True)
    ]
    for process in processes:
        process.start()
    ranks = [ours for ours, _ in pipes]
    gradients = [rank.recv() for rank in ranks]  # both are ready

    def times(mode: str, count: int) -> tuple[float, float]:
        """Seconds of a step, and the part of them on a core; of the slower process."""
        asked = ranks[:1] if mode == "one" else ranks
        for rank in asked:
            rank.send((mode, batch, count))
        elapsed, worked = max(rank.recv() for rank in asked)
        return elapsed / count, worked / elapsed

    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    on_core: dict[str, list[float]] = {mode: [] for mode in MODES}
    exchange = []
    for number in range(rounds + 1):  # the first one warms up
        say(f"{precision}: " + (f"round {number} of {rounds}" if number else "warming up"))
        for mode in random.Random(number).sample(MODES, len(MODES)):
            seconds, part = times(mode, steps if number else 1)
            if number:
                sequences = batch if mode in ("one", "two, halves") else RANKS * batch
                speeds[mode].append(sequences / seconds)
                on_core[mode].append(part)
        if number:
            exchange.append(times("exchange", 10)[0])
    for rank in ranks:
        rank.send(None)
    for process in processes:
        process.join()
    return {
        "gradients": gradients[0],
        "sequences_per_second": speeds,
        "on_core": on_core,
        "exchange_seconds": exchange,
    }


def efficiencies(speeds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """By mode and round: sequences a second by twice those of `one` in the same round."""
    return {
        mode: [two / (RANKS * one) for two, one in zip(of_mode, speeds["one"], strict=True)]
        for mode, of_mode in speeds.items()
        if mode != "one"
    }


def table(record: Mapping[str, Any]) -> str:
    """Markdown: speed and efficiency of every mode."""
    machine = record["machine"]
    lines = [
        f"Size: {record['size']}. {machine['processor']}, one thread a process, torch "
        f"{record['versions']['torch']}, {record['rounds']} round(s) of {record['steps']} steps: "
        "median (least - most). Efficiency: by twice `one` of the same round; of `apart`, it is "
        "this machine's ceiling. On a core: the part of the time that the slower process had one; "
        "well below 1 for `one` or `apart`, others used the machine, and the rest says nothing.",
        "",
        "| precision | processes | sequences of a process | sequences/s | efficiency | on a core |",
        "|---" * 6 + "|",
    ]
    notes = []
    for precision, found in record["precisions"].items():
        speeds, ratios = found["sequences_per_second"], efficiencies(found["sequences_per_second"])
        for mode, values in speeds.items():
            share = record["batch"] // 2 if mode == "two, halves" else record["batch"]
            efficiency = median_and_range(ratios[mode], 3) if mode in ratios else ""
            lines.append(
                f"| {precision} | {mode} | {share} | {median_and_range(values, 3)} | {efficiency} "
                f"| {median_and_range(found['on_core'][mode], 2)} |"
            )
        exchange = [1e3 * seconds for seconds in found["exchange_seconds"]]
        notes.append(
            f"{precision}: all {found['gradients']:,} gradients by themselves are exchanged in "
            f"{median_and_range(exchange, 1)} ms."
        )
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    parser = command_line(__doc__, sizes=SIZES)
    parser.add_argument(
        "--precisions", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"]
    )
    parser.add_argument("--batch", type=int, choices=(2, 4, 6, 8), default=8, help="of `one`")
    parser.add_argument("--steps", type=int, default=2, help="of a mode in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="--batch 4 --steps 2 --rounds 3")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.batch, chosen.steps, chosen.rounds = 4, 2, 3
    if len(os.sched_getaffinity(0)) < RANKS:
        parser.error(f"{RANKS} cores are needed")
    settings = {name: getattr(chosen, name) for name in ("batch", "steps", "rounds")}
    record = {
        **provenance("benchmarks.data_parallel", "cpu", chosen.revision),
        "size": chosen.size,
        **settings,
        "precisions": {
            precision: measure(SIZES[chosen.size], precision, **settings)
            for precision in chosen.precisions
        },
    }
    publish(record, table(record), record_folder(chosen, "data-parallel"))


if __name__ == "__main__":
    main()
