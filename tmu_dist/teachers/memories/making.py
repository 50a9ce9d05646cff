"""Making and checking the files of cached teachers: what runs teachers over whole archives.

Legend: B batch, T time, C channels, H, W height, width, N bytes of a record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tmu_dist.arithmetic import arithmetic
from tmu_dist.data.archive import Archive
from tmu_dist.data.transforms import window_frames
from tmu_dist.teachers.bank import FrozenTeacher, Teaching
from tmu_dist.teachers.memories.bank import Lesson, TrainingSamples
from tmu_dist.teachers.memories.files import (
    MemoriesError,
    MemoryFolder,
    MemoryReader,
    Plan,
    RecordLayout,
)
from tmu_dist.teachers.memories.price import gib

log = logging.getLogger(__name__)

SHARD_MIB = 256.0
_RECOMPUTED = 2
"""Records of each folder that `verify` computes again."""
_CLOSE = {"fp32": 1e-4, "tf32": 0.01, "bf16": 0.05, "fp16": 0.01}
"""How far these may be off, as part of the largest number: another device, or another number of
sequences at once, sums in another order."""


class Part(NamedTuple):
    """What one folder of a cache holds: one teacher, one archive, one direction of time."""

    teacher: int
    archive: int
    is_backwards: bool


class Work:
    """The teachings that a run asks for, and the teachers that can give them, one at a time.

    Args:
        address: the cache, a path or a URL.
        lessons: of each teacher; at least one.
        archives: that the run learns from, in the loader's order.
        samples: what it uses of each.
        directions: of time: whether backwards.
        device: where teachers run.
        at_once: sequences of a forward pass.
    """

    def __init__(
        self,
        address: str,
        lessons: Sequence[Lesson],
        archives: Sequence[Archive],
        samples: Sequence[TrainingSamples],
        *,
        directions: Sequence[bool],
        device: torch.device,
        at_once: int,
    ) -> None:
        self.address = address
        self.lessons = tuple(lessons)
        self.archives = tuple(archives)
        self.samples = tuple(samples)
        self.directions = tuple(directions)
        self.device = device
        self.at_once = at_once
        self._window = lessons[0].window
        self._loaded: tuple[int, FrozenTeacher] | None = None

    def parts(self) -> Iterator[Part]:
        """All folders of the run's cache, those of a teacher one after the other."""
        for teacher in range(len(self.lessons)):
            yield from self.parts_of(teacher)

    def parts_of(self, teacher: int) -> Iterator[Part]:
        """The folders of one teacher."""
        for archive in range(len(self.archives)):
            for is_backwards in self.directions:
                yield Part(teacher, archive, is_backwards)

    def folder(self, part: Part) -> MemoryFolder:
        """Where a part is."""
        return MemoryFolder(self.address, self._facts(part))

    def reader(self, part: Part) -> MemoryReader:
        """What a part holds; errors as of `MemoryReader`."""
        return MemoryReader(self.address, self._facts(part), self.about(part))

    def about(self, part: Part) -> dict[str, str]:
        """Which one it is, in words."""
        lesson, samples = self.lessons[part.teacher], self.samples[part.archive]
        return lesson.about(samples, is_backwards=part.is_backwards)

    def plan(self, part: Part, layout: RecordLayout, shard_bytes: int) -> Plan:
        """What its folder is to hold."""
        return Plan(
            facts=self._facts(part),
            about=self.about(part),
            layout=layout,
            num_records=len(self.samples[part.archive].used_ids),
            records_per_shard=max(1, shard_bytes // layout.record_bytes),
        )

    def ids(self, part: Part, places: Sequence[int]) -> list[int]:
        """The samples whose records have these places."""
        return self.samples[part.archive].used_ids[list(places)].tolist()

    def frames(self, part: Part, ids: Sequence[int]) -> Tensor:
        """Sequences as training shows them to teachers, [B, T, C, H, W]."""
        archive = self.archives[part.archive]
        codes_BTCHW = torch.from_numpy(archive.read("train", ids)).to(self.device)
        frames_BTCHW = window_frames(codes_BTCHW, self._window, archive.manifest.units).frames_BTCHW
        return frames_BTCHW.flip(1) if part.is_backwards else frames_BTCHW

    def teach(self, part: Part, frames_BTCHW: Tensor) -> Teaching:
        """What the teacher makes of them, as in training; it is loaded when it is first asked."""
        if self._loaded is None or self._loaded[0] != part.teacher:
            self._loaded = None  # one at a time in memory
            self._loaded = part.teacher, self.lessons[part.teacher].teacher.load(self.device)
        fed_back = self._window.num_target_frames - 1
        sees_truth_BT = torch.ones(len(frames_BTCHW), fed_back, dtype=torch.bool)
        with arithmetic(self.lessons[part.teacher].precision, self.device):
            taught: Teaching = self._loaded[1](
                frames_BTCHW,
                num_input_frames=self._window.num_input_frames,
                num_frames=self._window.num_frames,
                sampling_mask_BT=sees_truth_BT.to(self.device),
                noise_BTZ=None,
            )
        return taught

    def records(
        self, part: Part, layout: RecordLayout, places: Sequence[int]
    ) -> Iterator[NDArray[np.uint8]]:
        """Compute records, a few at a time: uint8 [B, N].

        Libraries add in an order that depends on how many sequences there are at once. So there
        are always as many as in training, filled up by repeats, and the last digits agree, too.
        """
        for start in range(0, len(places), self.at_once):
            ids = self.ids(part, places[start : start + self.at_once])
            filled_up = torch.arange(self.at_once, device=self.device) % len(ids)
            yield layout.encode(self.teach(part, self.frames(part, ids)[filled_up]), ids)

    def _facts(self, part: Part) -> dict[str, object]:
        lesson, samples = self.lessons[part.teacher], self.samples[part.archive]
        return lesson.facts(samples, is_backwards=part.is_backwards)


def make(
    work: Work, *, part: tuple[int, int] = (0, 1), shard_bytes: int = int(SHARD_MIB * 2**20)
) -> None:
    """Compute what is missing; whole shards stay as they are.

    Args:
        work: whose cache.
        part: which one of how many parts of the shards.
        shard_bytes: of a shard, where nothing is there yet.

    Raises:
        WriteError, StorageError: it could not be written; what was written is kept.
        MemoriesError: a teacher tells numbers that cannot be kept.
    """
    num_records, num_bytes, waiting = 0, 0, 0
    for each in work.parts():
        plan = _make_folder(work, each, part, shard_bytes)
        num_records += plan.num_records
        num_bytes += plan.num_records * plan.layout.record_bytes
        waiting += not work.folder(each).is_whole()
    if waiting:
        log.info("%d folders of %s wait for the other parts.", waiting, work.address)
    else:
        log.info("%s is whole: %s records, %s.", work.address, f"{num_records:,}", gib(num_bytes))


def _make_folder(work: Work, part: Part, share: tuple[int, int], shard_bytes: int) -> Plan:
    folder = work.folder(part)
    plan = folder.plan()
    if plan is None:
        taught = work.teach(part, work.frames(part, work.ids(part, [0])))
        plan = work.plan(part, RecordLayout.of(taught), shard_bytes)
        folder.begin(plan)
    missing = folder.missing_shards(plan)
    mine = [shard for shard in missing if shard % share[1] == share[0]]
    with tqdm(
        total=sum(len(plan.rows(shard)) for shard in mine),
        desc=" ".join(work.about(part).values()),
        unit=" sequences",
        disable=None if mine else True,  # None: only where a person looks on
    ) as progress:
        for shard in mine:
            rows = plan.rows(shard)
            records_BN = np.empty((len(rows), plan.layout.record_bytes), np.uint8)
            done = 0
            for some_BN in work.records(part, plan.layout, rows):
                records_BN[done : done + len(some_BN)] = some_BN
                done += len(some_BN)
                progress.update(len(some_BN))
            folder.write_shard(shard, records_BN)
    if (mine or not folder.is_whole()) and not folder.missing_shards(plan):
        folder.finish(plan)
    return plan


def verify(work: Work) -> None:
    """Read every record, compare every shard's sha256, and compute a few records again.

    Raises:
        MemoriesError: lists what is damaged, or is not what the teacher tells.
    """
    wrong: list[str] = []
    for part in work.parts():
        reader = work.reader(part)
        for shard in tqdm(
            range(reader.plan.num_shards),
            desc=" ".join(work.about(part).values()),
            unit=" shards",
            disable=None,
        ):
            places = reader.plan.rows(shard)
            try:
                reader.read(places, work.ids(part, places))  # which names the sample
                reader.check_shard(shard)
            except MemoriesError as error:
                wrong.append(str(error))
        if not wrong:
            wrong += _recomputed(work, part, reader)
    if wrong:
        raise MemoriesError("\n".join(wrong))
    log.info("%s is whole and what the teachers tell.", work.address)


def _recomputed(work: Work, part: Part, reader: MemoryReader) -> list[str]:
    """Differences between a few records and what the teacher tells now."""
    layout, count = reader.plan.layout, reader.plan.num_records
    places = np.random.default_rng().choice(count, min(_RECOMPUTED, count), replace=False).tolist()
    lesson = work.lessons[part.teacher]
    memories = lesson.teacher.use.memories
    close = max(_CLOSE[lesson.arithmetic], _CLOSE["fp32" if memories == "full" else memories])
    found = []
    for place in places:
        (sample_id,) = work.ids(part, [place])
        (kept,) = reader.read([place], [sample_id])
        (again,) = next(work.records(part, layout, [place]))
        there, here = (layout.decode([record]).tensors() for record in (kept, again))
        for (name, layer), old in there.items():
            new = here[name, layer]
            error = float((old - new).abs().max()) / (float(new.abs().max()) or 1.0)
            if not error <= close:
                found.append(
                    f"{reader.url}: {name} of sample {sample_id} is not what "
                    f"{lesson.teacher.card.name} tells: off by {error:.2g} of "
                    "the largest number. Remove the folder and make it again."
                )
    return found
