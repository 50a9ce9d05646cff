"""What does every backbone cost, plain and as the student of two teachers?

    python -m benchmarks.backbones [--size paper|small] [--device cpu|cuda] [--out FOLDER]

Each network of the registry is built plain and as a TMU student with two frozen teachers of its own
kind, with random weights and random frames: costs do not depend on what a network has learned.
Every cell of the table is a process of its own, so that a peak of memory is its own and one that
takes too long can be stopped (`--cap`); the cell then says so. Processes are asked for times one
after the other, in rounds and in a new order in each; times are medians of the rounds, ratios
medians of the ratios to the plain ConvLSTM within a round.

A training step is one update (forward, backward, Adam) on a batch of 8, teachers included; with
training.reverse_input=update an iteration has two. Half of the inputs after the first frames are
true. SAVP is trained without discriminators, VPN on true frames only. A forecast is that of one
sequence, closed-loop, with noise where a network takes any. Operations are those of convolutions
and matrix products, a product with its sum counted as two. Memory is what a step needs beyond the
libraries: weights, teachers, Adam's moments and activations.

Needs torch, numpy, pydantic and pyyaml only. Prints the table; with --out also writes results.json
and table.md.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import random
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.backbones.costs import SIZES, Case, parameters, serve
from benchmarks.backbones.report import PARTS, VARIANTS, Cell, table
from benchmarks.provenance import command_line, provenance, publish, say
from tmu_dist.backbones import BACKBONES


class Worker:
    """A process that measures one case, as long as that does not take more than `cap` seconds.

    What it finds is in `cell`. Once stopped, it keeps what it has and answers no more.
    """

    def __init__(self, case: Case, cap: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.case = case
        self.cell: Cell = {"seconds": []}
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, case), daemon=True)
        self._process.start()
        theirs.close()
        self._cap = self._seconds_left = cap

    def start(self) -> None:
        """Build everything, run it once, and measure what is measured only once."""
        with contextlib.suppress(EOFError):  # then there is no answer either
            self._connection.recv()  # its libraries are loaded, which does not count
        self.cell |= self._answer_to("start")

    def time(self, seconds: float) -> None:
        """Time one run, the mean of as many as fit into `seconds` and at least one."""
        if "stopped" in self.cell:
            return
        answer = self._answer_to(seconds)
        self.cell["seconds"] += [answer.pop("seconds")] if "seconds" in answer else []
        self.cell |= answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.join()

    def _answer_to(self, request: object) -> Cell:
        """What the process answers, or that and why it was `stopped`."""
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._connection.send(request)
        if not self._connection.poll(max(self._seconds_left, 0.0)):
            return self._stopped(f"more than {self._cap:g} s")
        self._seconds_left -= time.monotonic() - started
        try:
            answer: Cell = self._connection.recv()
        except EOFError:
            self._process.join()
            return self._stopped(f"its process ended with code {self._process.exitcode}")
        return self._stopped(answer["stopped"]) if "stopped" in answer else answer

    def _stopped(self, why: str) -> Cell:
        say(f"  {self.case.backbone}, {self.case.variant}, {self.case.part} was stopped: {why}")
        self.close()
        return {"stopped": why}


def measure(
    size: str,
    device: str,
    backbones: Sequence[str],
    parts: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    cap: float,
) -> dict[str, Any]:
    """Measure all backbones.

    Args:
        size: name of a size.
        device: "cpu" or "cuda".
        backbones: names of the registry.
        parts: "train" and "test", or one of them.
        rounds: how often every cell is timed.
        seconds: of a cell in a round, at least.
        cap: most seconds of a cell in all rounds, its start included.

    Returns:
        `networks`: cells by backbone, variant and part; `absent`: why others were left out.
    """
    networks: dict[str, dict[str, Any]] = {}
    absent = {}
    for name in backbones:
        try:
            networks[name] = {v: {"parameters": parameters(SIZES[size], name, v)} for v in VARIANTS}
        except ModuleNotFoundError as error:
            absent[name] = f"there is no {error.name}"
            say(f"{name} is left out: {absent[name]}")
    workers = [
        Worker(Case(size, name, variant, part, device), cap)
        for name, variant, part in itertools.product(networks, VARIANTS, parts)
    ]
    try:
        for worker in workers:
            case = worker.case
            say(f"{case.backbone}, {case.variant}, {case.part}: warming up")
            worker.start()
            networks[case.backbone][case.variant][case.part] = worker.cell
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}")
            for worker in random.Random(number).sample(workers, len(workers)):
                worker.time(seconds)
    finally:
        for worker in workers:
            worker.close()
    return {"networks": networks, "absent": absent}


def main() -> None:
    parser = command_line(__doc__, sizes=SIZES, takes_device=True)
    parser.add_argument("--backbones", choices=tuple(BACKBONES), nargs="+", default=list(BACKBONES))
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a cell in a round, at least")
    parser.add_argument("--cap", type=float, default=300.0, help="seconds of a cell in all")
    chosen = parser.parse_args()
    record = {
        **provenance("benchmarks.backbones", chosen.device, chosen.revision),
        "size": chosen.size,
        "rounds": chosen.rounds,
        **measure(
            chosen.size,
            chosen.device,
            chosen.backbones,
            chosen.parts,
            rounds=chosen.rounds,
            seconds=chosen.seconds,
            cap=chosen.cap,
        ),
    }
    publish(record, table(record), chosen.out)


if __name__ == "__main__":
    main()
