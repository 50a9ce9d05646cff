"""What training takes: traced without numbers, predicted from settings, beside what there is."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.contracts.test_predictor import small
from tests.transfer_methods import built, case_of
from tmu_dist.collectives import RankGroup
from tmu_dist.config import ConfigError, RunConfig, with_overrides
from tmu_dist.models.shapes import FrameShape
from tmu_dist.run_folder import read_json, read_log
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import load_card
from tmu_dist.training import loop, memory, memory_room
from tmu_dist.training.launch import launch
from tmu_dist.training.memory import (
    ACTIVATIONS,
    BATCH,
    OPTIMIZER,
    TEACHERS,
    WEIGHTS,
    TrainingMemory,
    memory_at_most,
    training_memory,
)
from tmu_dist.training.memory_room import MemoryMeter, Room, check_fits, room_of
from tmu_dist.training.memory_trace import GRADIENTS, Tracing
from tmu_dist.training.progress import ProgressDisplay

CPU = torch.device("cpu")
FRAME = FrameShape(channels=1, height=16, width=16)
LARGER: dict[str, Any] = {"training.batch_size": 8, "training.reverse_input": "off"}
"""So much that activations outweigh what opening and loading takes."""


def predicted(config: RunConfig, **facts: Any) -> TrainingMemory:
    """Of a run whose teachers lie in folders."""
    return training_memory(config, FRAME, cards(config), device=CPU, **facts)


def cards(config: RunConfig) -> list[TeacherCard]:
    return [load_card(run) for run in config.transfer.teachers]


# Tracing


def test_storages_count_once_while_they_live() -> None:
    with Tracing(CPU) as tracing:
        with tracing.of("kept"):
            kept = torch.empty(1000)
            view = kept.view(10, 100)[3:]
        with tracing.of("passing"):
            sums = (view + view).sum()
        assert dict(tracing.live) == {"kept": 4032, "passing": 64}  # multiples of 64
        assert tracing.peak == {"kept": 4032, "passing": 2816 + 64}
        with tracing.of(""):
            torch.empty(10**6)
        del kept
        assert tracing.live["kept"] == 4032, "a view holds it"
        del view, sums
        assert sum(tracing.live.values()) == 0
        tracing.forget_peak()
        tracing.hold("elsewhere", 7)
        assert sum(tracing.peak.values()) == 0


def test_what_a_backward_pass_makes_is_told_apart_and_what_it_needs_is_kept() -> None:
    with Tracing(CPU) as tracing, tracing.of("work"):
        weight = nn.Parameter(torch.empty(64, 64))
        before = tracing.live["work"]
        loss = (torch.empty(64, 64) @ weight).square().sum()  # keeps its factor and the product
        assert tracing.live["work"] - before == 2 * 64 * 64 * 4 + 64
        loss.backward()
        assert weight.grad is not None
        assert tracing.live["work"] - before == 64
        assert tracing.live[GRADIENTS] == 64 * 64 * 4


def test_nothing_is_computed_or_drawn() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with Tracing(CPU):
        huge = torch.rand(10**7, 10**6)
        assert huge.sum().item() == 1.0 and torch.rand(2, 2).tolist() == [[1.0, 1.0]] * 2
        assert not (huge > 0).any() and int(torch.ones(1, dtype=torch.int64)) == 1
        nn.init.trunc_normal_(torch.empty(4))  # draws again until nothing is outside
        moved = nn.Conv2d(3, 3, 3).to("cpu").to(torch.bfloat16)
        assert moved.weight.dtype == torch.bfloat16
    assert torch.equal(torch.rand(2), expected)


# Predicting


class Counter(TorchDispatchMode):
    """The most bytes of real tensors, made inside, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self.seen:
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live += size
        self.most = max(self.most, self.live)

        def gone(_: object) -> None:
            del self.seen[key]
            self.live -= size

        self.seen[key] = weakref.ref(storage, gone)


def counted(config: RunConfig) -> int:
    """The peak of a run's real tensors in its second iteration, and in the look before it."""
    with Counter() as counter:
        run = built(config)
        method, stream = run.transfer.method, run.loader.stream(start=0)
        batches = [run.prepare(next(stream), step) for step in (1, 2, 3)]
        run.training_step(batches[0])
        gc.collect()  # what building left in cycles is no part of a step
        counter.most = counter.live
        method.liveness(run.trainee, batches[0])
        run.training_step(batches[1], batches[2])
    return counter.most


@pytest.mark.parametrize("name", ["scratch", "art", "tmu"])
def test_predictions_are_what_real_tensors_take(
    name: str, tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    config = case_of(with_overrides(tiny_config, LARGER), name, teacher_runs)
    assert predicted(config).peak_bytes == pytest.approx(counted(config), rel=0.05)


def test_two_short_windows_tell_what_a_long_one_takes(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = predicted(tmu_config).peak_bytes
    monkeypatch.setattr(memory, "_is_even", lambda config: False)
    assert predicted(tmu_config).peak_bytes == pytest.approx(short, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"compute.recompute": True}, ACTIVATIONS),
        ({"scale.sequences_at_once": 2}, ACTIVATIONS),
        ({"training.batch_size": 4}, BATCH),
        ({"placement.kind": "cached", "placement.cache": "somewhere"}, TEACHERS),
    ],
)
def test_settings_that_take_less(changes: dict[str, Any], part: str, tmu_config: RunConfig) -> None:
    config = with_overrides(
        tmu_config,
        {
            **LARGER,
            "training.sampling": "always",
            "compute.arithmetic": "plain",
            "compute.convolution": "direct",
        },
    )
    before, after = predicted(config), predicted(with_overrides(config, changes))
    assert after.parts[part] < before.parts[part]
    assert after.peak_bytes < before.peak_bytes


@pytest.mark.parametrize("kind", ["tiny_config", "tmu_config"])
def test_half_precision_keeps_less_of_a_step(kind: str, request: pytest.FixtureRequest) -> None:
    """Also where whether teachers teach is looked at, which keeps most of all."""
    config = with_overrides(
        request.getfixturevalue(kind), {**LARGER, "compute.convolution": "direct"}
    )
    halved = predicted(with_overrides(config, {"training.precision": "bf16"}))
    assert halved.parts[ACTIVATIONS] < predicted(config).parts[ACTIVATIONS]


def test_ranks_share_batches_and_teachers(tmu_config: RunConfig) -> None:
    config = with_overrides(tmu_config, LARGER)
    alone, masked = predicted(config), predicted(config, has_missing=True)
    assert masked.parts[BATCH] > alone.parts[BATCH]
    shared = predicted(config, world_size=2)
    assert shared.parts[ACTIVATIONS] < alone.parts[ACTIVATIONS]
    assert shared.parts[OPTIMIZER] == alone.parts[OPTIMIZER]
    placed = with_overrides(config, {"placement.kind": "placed"})
    group = RankGroup(range(2), 1)
    assert predicted(placed, world_size=2, group=group).peak_bytes != shared.peak_bytes


@pytest.mark.parametrize("backbone", ["mim", "savp", "vpn"])
def test_no_network_takes_more_than_is_certain(backbone: str, tiny_config: RunConfig) -> None:
    config = replace(tiny_config, model=small(backbone))
    if backbone == "vpn":
        config = with_overrides(config, {"training.sampling": "always"})
    found = predicted(config)
    assert all(size >= 0 for size in found.parts.values()) and found.parts[WEIGHTS] > 0
    assert 0 < found.peak_bytes < memory_at_most(config, FRAME, 0)


# What there is


def needing(**parts: int) -> TrainingMemory:
    every = dict.fromkeys((WEIGHTS, OPTIMIZER, GRADIENTS, BATCH, TEACHERS, ACTIVATIONS), 0)
    return TrainingMemory(parts={**every, **parts})


def test_what_fits_is_not_mentioned(
    tiny_config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    room = Room(total_bytes=2000, free_bytes=1000)
    check_fits(needing(activations=1000), room, tiny_config, 1)
    assert not caplog.messages


def test_what_may_not_fit_is_told_with_what_to_change(
    tiny_config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    room = Room(total_bytes=2 * 2**30, free_bytes=2**30)
    with caplog.at_level(logging.WARNING):
        check_fits(needing(activations=2 * 2**30, weights=2**20), room, tiny_config, 1)
    (told,) = caplog.messages
    assert "is predicted to need 2 GiB" in told and "has 1 GiB free of 2 GiB" in told
    assert "Mostly activations (2 GiB)." in told
    # Of four sequences one fits; two would take all of it.
    assert "scale.sequences_at_once=1" in told and "compute.recompute=true" in told


def test_what_is_clearly_impossible_is_refused(tmu_config: RunConfig) -> None:
    room = Room(total_bytes=2**30, free_bytes=2**30)
    with pytest.raises(ConfigError, match=r"teachers \(2 GiB\).*placement\.kind=placed"):
        check_fits(needing(teachers=2 * 2**30), room, tmu_config, 1)


def test_room_and_what_is_taken_of_it() -> None:
    room, half = room_of(CPU), room_of(CPU, 2)
    assert room is not None and half is not None
    assert 0 < room.free_bytes <= room.total_bytes
    assert half.total_bytes == room.total_bytes // 2
    meter = MemoryMeter(CPU)
    before = memory_room.process_peak(CPU)
    held = torch.ones(2 * before // 4)
    taken = meter.peak_bytes()
    assert taken is not None and taken > 0.9 * held.nbytes
    assert memory_room.process_peak(CPU) > before


def test_a_run_tells_the_prediction_and_is_not_started_without_room(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_overrides(tmu_config, {"training.num_steps": 1})
    launch(replace(config, output=config.output + "-easy"))
    events = {event["event"] for event in read_log(config.output + "-easy")}
    assert "memory" not in events  # far from what there is

    monkeypatch.setattr(loop, "room_of", lambda *_: Room(total_bytes=2**30, free_bytes=2**20))
    launch(config)
    (event,) = (each for each in read_log(config.output) if each["event"] == "memory")
    result = read_json(config.output, "result.json")
    assert event["peak_bytes"] == sum(event["parts"].values()) == result["predicted_peak_bytes"]
    assert event["peak_bytes"] == predicted(config).peak_bytes
    ProgressDisplay("run", 1)(event)
    assert "predicted peak memory of a rank" in capsys.readouterr().err

    monkeypatch.setattr(loop, "room_of", lambda *_: Room(total_bytes=2**16, free_bytes=2**16))
    with pytest.raises(ConfigError, match="is predicted to need"):
        launch(replace(config, output=config.output + "-none"))
