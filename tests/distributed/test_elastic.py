"""Any number of ranks, also one that changes within a run, takes the same path.

Sums over ranks and parts are in another order, and nothing else differs: in float64 losses stay the
same to 1e-9 (measured: 2e-16), and in float32 to `FLOAT32`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.conftest import TINY_MODEL
from tests.distributed.test_ranks import CPU, _enter
from tmu_dist.collectives import Collectives, torchrun_here
from tmu_dist.config import (
    DataConfig,
    RunConfig,
    ScaleConfig,
    ScheduleConfig,
    TrainingConfig,
    TransferConfig,
    WindowConfig,
)
from tmu_dist.data.transforms import Window, window_frames
from tmu_dist.evaluation import runner
from tmu_dist.run_folder import read_log
from tmu_dist.training import loop
from tmu_dist.training.loop import Run, train

pytestmark = pytest.mark.distributed

FLOAT32 = 1e-5
"""Of a loss; the largest difference measured was 1.4e-7, one rounding of a float32."""
NUM_TRAIN = 22
"""Sequences of an epoch: no multiple of any batch here."""


@dataclass(frozen=True)
class Leg:
    """A stretch of a run on one number of ranks."""

    ranks: int
    until: int
    at_once: int | None = None


@dataclass(frozen=True)
class Journey:
    """A run, leg after leg, each from the last one's checkpoint."""

    name: str
    like: str
    """Runs with one `like` must take one path."""
    config: RunConfig
    legs: tuple[Leg, ...]
    is_double: bool = False

    def of_leg(self, leg: Leg) -> RunConfig:
        return replace(
            self.config,
            output=f"{self.config.output}-{self.name}",
            training=replace(self.config.training, num_steps=leg.until),
            scale=ScaleConfig(sequences_at_once=leg.at_once),
        )


def journeys(config: RunConfig) -> list[Journey]:
    """Of one epoch and the beginning of another, but for batches of two."""

    def of(batch_size: int) -> RunConfig:
        return replace(config, training=replace(config.training, batch_size=batch_size))

    found = []
    for ranks in (1, 2, 3, 4):
        found += [
            Journey(f"double-{ranks}", "double", of(4), (Leg(ranks, 7),), is_double=True),
            # Three of four ranks have sequences.
            Journey(f"six-{ranks}", "six", of(6), (Leg(ranks, 5),)),
        ]
    changing = (Leg(2, 2, at_once=1), Leg(3, 4), Leg(1, 7, at_once=3))
    found += [
        Journey("double-changing", "double", of(4), changing, is_double=True),
        Journey("six-changing", "six", of(6), (Leg(2, 2), Leg(3, 4, at_once=1), Leg(1, 5))),
        # Two of four ranks have nothing but padding, ever.
        Journey("two-1", "two", of(2), (Leg(1, 3),), is_double=True),
        Journey("two-4", "two", of(2), (Leg(4, 3),), is_double=True),
    ]
    return found


@contextmanager
def in_double() -> Iterator[None]:
    """Frames and networks in float64, in training and in validation."""

    def double(*given: Any) -> Window:
        frames, observed = window_frames(*given)
        return Window(frames.double(), observed)

    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(loop, "window_frames", double),
            mock.patch.object(runner, "window_frames", double),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _travel(collectives: Collectives, planned: list[Journey]) -> None:
    """Run all legs on so many ranks, and write down what this rank learned from at which step."""
    rank, advance = collectives.ranks.rank, Run.advance
    lines: list[Any] = []

    def recorded(self: Run, batch: Any, *more: Any) -> None:
        advance(self, batch, *more)
        ids = batch.sample_ids_B[batch.weights_B > 0].tolist()
        lines.append([self.progress.step, self.progress.consumed, len(batch.weights_B), ids])

    world_size = collectives.ranks.world_size
    legs = [(each, leg) for each in planned for leg in each.legs if leg.ranks == world_size]
    for journey, leg in legs:
        config = journey.of_leg(leg)
        with (
            mock.patch.object(Run, "advance", recorded),
            in_double() if journey.is_double else nullcontext(),
        ):
            train(config, collectives, CPU)
        Path(f"{config.output}-{leg.until}-{rank}.json").write_text(json.dumps(lines))
        lines.clear()


def spawn_worlds(sizes: tuple[int, ...], job: Callable[..., None], *args: Any) -> None:
    """Like `spawn` for one number of ranks after the other, by the same processes."""
    worlds = [torchrun_here(size) for size in sizes]
    torch.multiprocessing.spawn(_in_worlds, (worlds, job, args), nprocs=max(sizes))


def _in_worlds(
    rank: int, worlds: list[list[dict[str, str]]], job: Callable[..., None], args: Any
) -> None:
    for variables in worlds:
        if rank < len(variables):
            _enter(rank, variables, job, args)


@dataclass(frozen=True)
class Travelled:
    """What a journey left behind."""

    losses: list[dict[str, float]]
    validation: list[float]
    steps: dict[int, list[list[int]]]
    """Ids of real samples by step, rank for rank."""
    consumed: list[int]
    sizes: list[int]
    """Places of each rank's batch, by step."""


def travelled(journey: Journey) -> Travelled:
    steps: dict[int, list[list[int]]] = {}
    consumed, sizes = {}, {}
    for leg in journey.legs:
        output = journey.of_leg(leg).output
        for rank in range(leg.ranks):
            lines = json.loads(Path(f"{output}-{leg.until}-{rank}.json").read_text())
            for step, position, size, ids in lines:
                steps.setdefault(step, []).append(ids)
                assert consumed.setdefault(step, position) == position, "ranks have lost each other"
                assert sizes.setdefault(step, size) == size, "ranks have unequal batches"
    log = read_log(Path(output))
    losses = [
        {name: value for name, value in event.items() if name.startswith("loss/")}
        for event in log
        if event["event"] == "train"
    ]
    validation = [event["mse_per_frame"] for event in log if event["event"] == "validation"]
    return Travelled(losses, validation, steps, list(consumed.values()), list(sizes.values()))


@pytest.fixture(scope="module")
def found(
    archive_url: str, teacher_runs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Travelled]:
    """All journeys, by name."""
    config = RunConfig(
        output=str(tmp_path_factory.mktemp("elastic") / "run"),
        window=WindowConfig(num_input_frames=3, num_target_frames=3),
        data=DataConfig(url=archive_url),
        model=TINY_MODEL,
        transfer=TransferConfig(method="tmu", teachers=teacher_runs),
        training=TrainingConfig(sampling_stop_step=10),
        schedule=ScheduleConfig(log_every=1, validate_every=100, checkpoint_every=100),
    )
    planned = journeys(config)
    # The worlds come in the order in which the changing legs need them.
    spawn_worlds((2, 3, 4), _travel, planned)
    _travel(Collectives(), planned)
    return {journey.name: travelled(journey) for journey in planned}


def losses_differ(one: Travelled, other: Travelled) -> float:
    """The largest relative difference of any loss term of any step, or of a validation."""
    differences = [
        abs(mine[name] / theirs[name] - 1)
        for mine, theirs in zip(one.losses, other.losses, strict=True)
        for name in mine.keys() | theirs.keys()
    ]
    differences += [abs(a / b - 1) for a, b in zip(one.validation[-1:], other.validation[-1:])]
    return max(differences)


@pytest.mark.parametrize("ranks", ["2", "3", "4", "changing"])
@pytest.mark.parametrize(("like", "tolerance"), [("double", 1e-9), ("six", FLOAT32)])
def test_any_number_of_ranks_takes_the_same_path(
    like: str, ranks: str, tolerance: float, found: dict[str, Travelled]
) -> None:
    alone, shared = found[f"{like}-1"], found[f"{like}-{ranks}"]
    assert len(alone.losses) == len(alone.steps)
    assert alone.losses[0].keys() == {"loss/prediction", "loss/distillation", "loss/total"}
    assert losses_differ(shared, alone) <= tolerance
    # What a step does shows in the next one's loss, far above the tolerance.
    steps = [log["loss/total"] for log in alone.losses]
    assert all(abs(b / a - 1) > 10 * tolerance for a, b in itertools.pairwise(steps))


def test_ranks_that_have_nothing_but_padding_change_nothing(found: dict[str, Travelled]) -> None:
    assert all(step[2:] == [[], []] for step in found["two-4"].steps.values())
    assert losses_differ(found["two-4"], found["two-1"]) <= 1e-9


def test_every_rank_has_equally_many_places(found: dict[str, Travelled]) -> None:
    """Three of four ranks have the six sequences of a batch; the fourth has padding alone."""
    six = found["six-4"]
    assert set(six.sizes) == {2}
    assert all(len(step) == 4 and step[3] == [] for step in six.steps.values())


@pytest.mark.parametrize(("like", "batch_size"), [("double", 4), ("six", 6), ("two", 2)])
def test_every_sample_is_learned_from_once_an_epoch(
    like: str, batch_size: int, found: dict[str, Travelled]
) -> None:
    for name, each in found.items():
        if name.startswith(like):
            by_step = [list(itertools.chain(*ranks)) for ranks in each.steps.values()]
            steps_of_epoch = -(-NUM_TRAIN // batch_size)
            epoch = list(itertools.chain(*by_step[:steps_of_epoch]))
            if len(by_step) > steps_of_epoch:
                assert sorted(epoch) == list(range(NUM_TRAIN))
            counts = [len(ids) for ids in by_step]
            assert each.consumed == np.cumsum(counts).tolist()
            # Not the same multiset alone: the same batches, in the same order.
            alone = found[f"{like}-1"].steps
            assert by_step == [ranks[0] for ranks in alone.values()]
