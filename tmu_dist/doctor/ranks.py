"""What the ranks of a run see together: the exchange, reading, the teachers, a few real steps.

Every rank looks for itself, at what the run itself would use: its process group, its loader, its
teachers where they would lie, its training step on its first batches. The run folder is not
touched.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tmu_dist.collectives import Collectives, Ranks
from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.data.loader import Batch, SequenceLoader, open_archives
from tmu_dist.doctor.rank_facts import (
    ExchangeFacts,
    Failure,
    LoaderFacts,
    Part,
    RankFacts,
    RanksSeen,
    StepFacts,
    TeacherFacts,
)
from tmu_dist.teachers.bank import held_bytes
from tmu_dist.teachers.placement import plan_placement
from tmu_dist.training.loop import Run
from tmu_dist.training.memory_room import process_peak, room_of
from tmu_dist.training.parts import open_loaders
from tmu_dist.transfer.base import TaughtMethod, TrainingBatch
from tmu_dist.transfer.prepare import planned_teachers

Item = TypeVar("Item")

_LATENCY_EXCHANGES, _BANDWIDTH_EXCHANGES = 20, 3
_MESSAGE_BYTES = 16 * 2**20
_STEPS = 3
_FORWARD_PASSES = 3
_READ_SECONDS = 3.0
_MOST_BATCHES = 200
_REPORT_PATIENCE = timedelta(minutes=15)
"""For the others' facts: they may still be waiting in an exchange that this rank has given up."""


def look_at_ranks(
    config: RunConfig,
    collectives: Collectives,
    device: torch.device,
    *,
    inputs_ready: bool = True,
) -> RanksSeen:
    """Look from every rank, and tell all of them what was seen. All ranks call it at once.

    Nothing is raised for what goes wrong: that is what is looked for.

    Args:
        config: the run, with absolute paths.
        collectives: the ranks; a process group with a short timeout finds soon what hangs.
        device: of this rank.
        inputs_ready: False: archive or teachers are not there yet; only the exchange is tried.
    """
    size = collectives.ranks.world_size
    if size == 1:
        return RanksSeen(ranks=(look_at_rank(config, collectives, device, inputs_ready),))
    # A group of its own: that of the run may be out of step when one of its ranks has failed.
    reports = dist.new_group(backend="gloo", timeout=_REPORT_PATIENCE)
    facts = look_at_rank(config, collectives, device, inputs_ready)
    gathered: list[RankFacts | None] = [None] * size
    try:
        dist.all_gather_object(gathered, facts, group=reports)
    except RuntimeError as error:
        return RanksSeen(ranks=(facts,), error=_told(error))
    return RanksSeen(ranks=tuple(each for each in gathered if each is not None))


def look_at_rank(
    config: RunConfig,
    collectives: Collectives,
    device: torch.device,
    inputs_ready: bool = True,
    *,
    node: str | None = None,
    tell: Callable[[RankFacts], None] = lambda facts: None,
) -> RankFacts:
    """What this rank sees, part by part; one that fails is the last, as later ones need it.

    Args:
        config, collectives, device, inputs_ready: as in `look_at_ranks`.
        node: address of this machine; None: its name.
        tell: is given the facts so far before every part and at the end.
    """
    facts = introduce(collectives.ranks, device, node or platform.node())
    with closing(_Look(config, collectives, device)) as look:
        for part, action in look.parts(inputs_ready).items():
            tell(facts := replace(facts, part=part))
            started = time.perf_counter()
            try:
                facts = replace(facts, **{part: action()})
            except Exception as error:  # nothing is hidden: it is what was looked for
                found = {look.culprit(part, error): look.failure(error)}
                facts = replace(facts, failures=found)
                break
            facts = replace(facts, seconds={**facts.seconds, part: time.perf_counter() - started})
    tell(facts := replace(facts, part="end"))
    return facts


def introduce(ranks: Ranks, device: torch.device, node: str) -> RankFacts:
    """Who a rank is, before it has looked at anything."""
    interface = _interface(device) if ranks.world_size > 1 else ""
    return RankFacts(
        rank=ranks.rank,
        world_size=ranks.world_size,
        node=node,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        interface=interface,
        link_bits_per_second=_link_speed(interface),
    )


class _Look:
    """The parts of a look of one rank, and what one of them leaves to the next."""

    def __init__(self, config: RunConfig, collectives: Collectives, device: torch.device) -> None:
        self._config = config
        self._collectives = _Noting(collectives.ranks)
        self._device = device
        self._size = collectives.ranks.world_size
        self._batches: list[Batch] = []
        self._run: Run | None = None

    def parts(self, inputs_ready: bool) -> dict[Part, Callable[[], Any]]:
        """What there is to do, in order."""
        found: dict[Part, Callable[[], Any]] = {}
        if self._size > 1:
            found["exchange"] = self._exchange
        if inputs_ready:
            found |= {"loader": self._load, "teachers": self._build, "step": self._train}
        return found

    def failure(self, error: Exception) -> Failure:
        """What is told of an error of this rank."""
        is_own = self._size == 1 or error is self._collectives.own_error
        is_others = error is self._collectives.raised or _is_of_exchange(error)
        return Failure(
            text=_told(error),
            kind=type(error).__name__,
            may_follow=is_others and not is_own,
        )

    def culprit(self, part: Part, error: Exception) -> Part:
        """The check that an error belongs to: teachers and student are built together."""
        if part != "teachers":
            return part
        is_of_settings = isinstance(error, ConfigError) and "placement" not in str(error)
        return "teachers" if self._config.transfer.teachers and not is_of_settings else "step"

    def close(self) -> None:
        """Give back what the look holds."""
        if self._run is not None:
            self._run.close()

    def _exchange(self) -> ExchangeFacts:
        few = torch.zeros(2, device=self._device)
        many = torch.zeros(_MESSAGE_BYTES // 4, device=self._device)
        for message in (few, many):  # connections are made by the first exchanges
            dist.all_reduce(message)
        sent = 2 * (self._size - 1) / self._size * _MESSAGE_BYTES
        return ExchangeFacts(
            backend="nccl" if self._device.type == "cuda" else "gloo",
            latency_seconds=self._median(lambda: dist.all_reduce(few), _LATENCY_EXCHANGES),
            bytes_per_second=sent
            / self._median(lambda: dist.all_reduce(many), _BANDWIDTH_EXCHANGES),
        )

    def _load(self) -> LoaderFacts:
        return self._collectives.on_all(self._read)[self._collectives.ranks.rank]

    def _read(self) -> LoaderFacts:
        """Read this rank's first batches, and keep those that will be trained on."""
        data, training = self._config.data, self._config.training
        started = time.perf_counter()
        archives = open_archives(
            [data.url, *data.mix_with],
            reading=data.reading,
            cache_folder=data.cache_folder,
            cache_gib=data.cache_gib,
        )
        loader, _ = open_loaders(
            archives,
            data,
            training,
            self._collectives.ranks,
            pin_memory=self._device.type == "cuda",
        )
        came = []
        for batch in _first_batches(loader, data.num_workers, started):
            came.append(time.perf_counter())
            if len(self._batches) < min(_STEPS, training.num_steps):
                self._batches.append(batch)
        steady = came[data.num_workers :]  # the first ones of all processes come at once
        return LoaderFacts(
            processes=data.num_workers,
            first_seconds=came[0] - started,
            seconds_per_batch=max(steady[-1] - steady[0], 1e-9) / (len(steady) - 1),
            batches=len(came),
            sequences=training.batch_size / self._size,
        )

    def _build(self) -> TeacherFacts | None:
        self._run = run = Run(self._config, self._collectives, self._device)
        placement = run.transfer.placement
        if placement is None:
            return None
        planned = planned_teachers(self._config, run.card.frame, run.card.data)
        costs = [teacher.cost for teacher in planned]
        kinds = ("replicated", "sharded", "placed") if run.group.size > 1 else ("replicated",)
        predicted = {
            kind: plan_placement(kind, costs, run.group.size, None)  # type: ignore[arg-type]
            for kind in kinds
        } | {placement.kind: placement}
        assert isinstance(run.transfer.method, TaughtMethod)
        return TeacherFacts(
            count=len(planned),
            kind=placement.kind,
            predicted_bytes={
                kind: each.resident_bytes[run.group.place] for kind, each in predicted.items()
            },
            held_bytes=held_bytes(run.transfer.method.bank),
        )

    def _train(self) -> StepFacts:
        run = self._run
        assert run is not None
        batches = [run.prepare(batch, step) for step, batch in enumerate(self._batches, start=1)]
        seconds, losses = [], []
        for batch, following in pairwise(chain(batches, [None])):
            assert batch is not None
            started = time.perf_counter()
            losses.append(run.training_step(batch, following)["loss/total"])
            self._wait()
            seconds.append(time.perf_counter() - started)
        room = room_of(self._device)
        trained = [each for each in run.trainee.parameters() if each.requires_grad]
        return StepFacts(
            first_seconds=seconds[0],
            seconds=statistics.median(seconds[1:] or seconds),
            forward_seconds=self._forward_seconds(run, batches[0]),
            losses=tuple(losses),
            exchanges=2 if self._config.training.reverse_input == "update" else 1,
            gradient_bytes=sum(each.nbytes for each in trained),
            peak_bytes=process_peak(self._device),
            total_bytes=0 if room is None else room.total_bytes,
            taken_bytes=run.meter.peak_bytes(),
            predicted_bytes=run.memory.peak_bytes,
        )

    @torch.no_grad()
    def _forward_seconds(self, run: Run, batch: TrainingBatch) -> float:
        window = self._config.window
        part = batch.rows(slice(self._config.scale.sequences_at_once))

        def forward() -> None:
            with run.training_step.autocast():
                run.student(
                    part.frames_BTCHW,
                    num_input_frames=window.num_input_frames,
                    num_frames=window.num_frames,
                    sampling_mask_BT=part.sampling_mask_BT,
                    noise_BTZ=part.noise_BTZ,
                )

        return min(self._seconds(forward, _FORWARD_PASSES))

    def _median(self, action: Callable[[], object], times: int) -> float:
        return statistics.median(self._seconds(action, times))

    def _seconds(self, action: Callable[[], object], times: int) -> Iterator[float]:
        for _ in range(times):
            self._wait()
            started = time.perf_counter()
            action()
            self._wait()
            yield time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Noting(Collectives):
    """Remembers whether what `on_all` raised was this rank's own error."""

    own_error: Exception | None = None
    raised: Exception | None = None

    def on_all(self, action: Callable[[], Item]) -> list[Item]:
        def noting() -> Item:
            try:
                return action()
            except Exception as error:
                self.own_error = error
                raise

        try:
            return super().on_all(noting)
        except Exception as error:
            self.raised = error
            raise


def _first_batches(loader: SequenceLoader, processes: int, started: float) -> Iterator[Batch]:
    """Batches of the first pass for some seconds; at least as many as are trained on, and two after
    those that the reading processes bring at once."""
    least = max(_STEPS, processes + 2)
    most = max(least, min(_MOST_BATCHES, loader.steps_per_epoch))
    for number, batch in enumerate(loader.stream(0), start=1):
        yield batch
        is_late = time.perf_counter() - started > _READ_SECONDS
        if number >= most or (is_late and number >= least):
            return


def _is_of_exchange(error: Exception) -> bool:
    """Whether torch says so of an exchange: it has hardly any classes of its own for that."""
    return type(error).__module__ == "torch.distributed" or type(error) is RuntimeError


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _interface(device: torch.device) -> str:
    """The network interface that is chosen by its name; empty: the library chooses."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if device.type == "cuda":
        chosen = os.environ.get("NCCL_SOCKET_IFNAME") or chosen
    # NCCL also takes patterns, such as ^lo,docker.
    return chosen if re.fullmatch(r"[\w.-]+", chosen) else ""


def _link_speed(interface: str) -> float | None:
    """In bits per second; None where the system does not know (virtual ones, wireless)."""
    with suppress(OSError, ValueError):
        megabits = int(Path(f"/sys/class/net/{interface}/speed").read_text())
        return megabits * 1e6 if megabits > 0 else None
    return None
