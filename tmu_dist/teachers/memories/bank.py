"""Teachers that have told all they know already: their memories come from files.

What a teacher makes of a sequence is the same in every epoch if it sees true frames alone. Then it
can be computed once (`python -m tmu_dist.memories make`) and read ever after, and no teacher's
weights are loaded in training. What is kept is known by all that it depends on (`Lesson.facts`):
the teacher's weights, the archive by its manifest's hash, the direction of time, the window, what
is wanted of which layers, and the precisions.

Legend: B batch, T time, C channels, Z noise, H, W height, width.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tmu_dist.config import Precision, WindowConfig
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import Manifest
from tmu_dist.data.order import ORDER_VERSION, DataSet, epoch_order
from tmu_dist.data.storage import local_path
from tmu_dist.teachers.adapter import TeacherPlan
from tmu_dist.teachers.bank import FrozenTeacher, Shown, Teaching
from tmu_dist.teachers.card import TeacherError
from tmu_dist.teachers.memories.files import MemoryReader
from tmu_dist.teachers.planned import PlannedTeacher

Item = TypeVar("Item")
Result = TypeVar("Result")

_SPLIT = "train"
_READERS = 16
"""Requests to a store at a time."""


@dataclass(frozen=True, kw_only=True)
class TrainingSamples:
    """The training sequences of one archive that a run uses."""

    archive: str
    manifest_hash: str
    num_samples: int
    """All of the split; the loader counts ids on from archive to archive by it."""
    used_ids: NDArray[np.int64]
    """Rising; the record of the sample `used_ids[k]` is number k."""

    @classmethod
    def of(cls, manifest: Manifest, fraction: float = 1.0) -> Self:
        """The samples that the loader uses of an archive.

        Raises:
            ValueError: no training split, or a fraction of more samples than there are.
        """
        sizes = tuple(shard.num_samples for shard in manifest.shards(_SPLIT))
        data_set = DataSet(shard_sizes=sizes, fraction=fraction, full=manifest.full_train_samples)
        ids = epoch_order([data_set], seed=0, epoch=0, shuffle=False).ids
        return cls(
            archive=manifest.name,
            manifest_hash=manifest.content_hash,
            num_samples=data_set.num_samples,
            used_ids=ids,
        )


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What one teacher is to tell, with all that it depends on but the sequence.

    Raises:
        TeacherError: the teacher draws random numbers.
    """

    teacher: PlannedTeacher
    window: WindowConfig
    precision: Precision
    """Of the student's arithmetic, which the teacher's follows unless it has its own."""

    def __post_init__(self) -> None:
        card = self.teacher.card
        if self.teacher.noise_size:
            raise TeacherError(
                f"Teacher {card.name!r} (model.cell={card.model.cell}) draws latents, so it tells "
                "something else in every epoch, which no file can hold: use another "
                "placement.kind, or leave this teacher out."
            )

    @property
    def arithmetic(self) -> Precision:
        """The precision in which the teacher computes."""
        own = self.teacher.use.precision
        return self.precision if own == "student" else own

    def facts(self, samples: TrainingSamples, *, is_backwards: bool) -> dict[str, Any]:
        """All that the teachings of an archive's samples in one direction of time depend on."""
        plan, use = self.teacher.plan, self.teacher.use
        card = asdict(self.teacher.card)
        network = ("frame", "model", "tmu", "num_slots", "sources", "art", "adapter")
        text = json.dumps({name: card[name] for name in network}, sort_keys=True)
        return {
            "teacher_weights": card["weights_sha256"],
            "teacher_network": hashlib.sha256(text.encode()).hexdigest(),
            "archive": samples.manifest_hash,
            "split": _SPLIT,
            "num_samples": len(samples.used_ids),
            "order_version": ORDER_VERSION,  # which samples a fraction has
            "is_backwards": is_backwards,
            "window": asdict(self.window),
            "wanted": use.wanted,
            "hides_targets": use.hides_targets,
            "frame": None if plan.frame is None else asdict(plan.frame),
            "layers": [[k, *layer] for k, layer in sorted(plan.layers.items())],
            "precision": self.arithmetic,
            "memories": use.memories,
        }

    def about(self, samples: TrainingSamples, *, is_backwards: bool) -> dict[str, str]:
        """Names for messages."""
        direction = "backwards" if is_backwards else "forwards"
        return {
            "teacher": self.teacher.card.name,
            "of archive": samples.archive,
            "in time": direction,
        }


def training_samples(urls: Sequence[str], fraction: float) -> tuple[TrainingSamples, ...]:
    """What a run learns from, archive by archive; the fraction is of the first one.

    Raises:
        StorageError, ManifestError: as `open_archive`.
        ValueError: as `TrainingSamples.of`.
    """
    return tuple(
        TrainingSamples.of(open_archive(url).manifest, 1.0 if number else fraction)
        for number, url in enumerate(urls)
    )


class CachedBank:
    """What all teachers tell, from files. No weights are in memory.

    Args:
        address: the cache, a path or a URL.
        lessons: of each teacher.
        samples: of each archive, in the loader's order.
        directions: of time that are asked for: whether backwards.

    Raises:
        MemoriesError: some are not there, or not whole; names the folder and the command.
        StorageError: the store cannot be reached.
    """

    def __init__(
        self,
        address: str,
        lessons: Sequence[Lesson],
        samples: Sequence[TrainingSamples],
        *,
        directions: Sequence[bool] = (False,),
    ) -> None:
        self.own: tuple[FrozenTeacher, ...] = ()
        self._lessons = tuple(lessons)
        self._samples = tuple(samples)
        self._first_ids = [0, *itertools.accumulate(each.num_samples for each in samples)]
        self._pool = None if local_path(address) else ThreadPoolExecutor(_READERS, "memories")
        wanted = [
            (number, archive, is_backwards)
            for number in range(len(lessons))
            for archive in range(len(samples))
            for is_backwards in directions
        ]

        def opened(which: tuple[int, int, bool]) -> MemoryReader:
            number, archive, is_backwards = which
            lesson, of_archive = lessons[number], samples[archive]
            return MemoryReader(
                address,
                lesson.facts(of_archive, is_backwards=is_backwards),
                lesson.about(of_archive, is_backwards=is_backwards),
            )

        self._readers = dict(zip(wanted, self._each(opened, wanted), strict=True))

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        return tuple(lesson.teacher.parameters for lesson in self._lessons)

    @property
    def plans(self) -> tuple[TeacherPlan, ...]:
        return tuple(lesson.teacher.plan for lesson in self._lessons)

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        """As `TeacherBank.teach`; frames are known by their samples and not looked at.

        Raises:
            ValueError: no samples are named, or another window than that of the files.
            MemoriesError: a record is damaged.
            StorageError: the store cannot be reached.
        """
        window, key = self._lessons[0].window, shown.key
        if key is None or len(key.ids_B) != len(shown.frames_BTCHW):
            raise ValueError("Memories in files are known by the ids of their samples: name them.")
        if (shown.num_input_frames, shown.num_frames) != (
            window.num_input_frames,
            window.num_frames,
        ):
            raise ValueError(
                f"These memories are of windows of {window.num_frames} frames "
                f"({window.num_input_frames} of them inputs), not of {shown.num_frames} "
                f"({shown.num_input_frames})."
            )
        rows_of = self._by_archive(key.ids_B.tolist())
        requests = [
            (number, archive) for number in range(len(self._lessons)) for archive in rows_of
        ]

        def read(request: tuple[int, int]) -> list[NDArray[np.uint8]]:
            number, archive = request
            _, places, ids = rows_of[archive]
            return self._readers[number, archive, key.is_backwards].read(places, ids)

        def beside_frames(values: Tensor) -> Tensor:
            # Moved as they are told, which may be half as many bytes.
            there = values.to(shown.frames_BTCHW.device, non_blocking=True)
            return there.to(shown.frames_BTCHW.dtype)

        found = dict(zip(requests, self._each(read, requests), strict=True))
        taught = []
        for number in range(len(self._lessons)):
            records: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(key.ids_B)
            for archive, (rows, _, _) in rows_of.items():
                for row, record in zip(rows, found[number, archive], strict=True):
                    records[row] = record
            layout = self._readers[number, 0, key.is_backwards].plan.layout
            taught.append(layout.decode(records).map(beside_frames))
        return tuple(taught)

    def _by_archive(self, ids: Sequence[int]) -> dict[int, tuple[list[int], list[int], list[int]]]:
        """Rows of a batch by archive, their records' places, and their ids in the archive."""
        found: dict[int, tuple[list[int], list[int], list[int]]] = {}
        for row, sample_id in enumerate(ids):
            archive = bisect.bisect_right(self._first_ids, sample_id) - 1
            own_id = sample_id - self._first_ids[archive]
            used_ids = self._samples[archive].used_ids
            place = int(np.searchsorted(used_ids, own_id))
            assert used_ids[place] == own_id, "the loader uses samples that the bank does not know"
            rows, places, own_ids = found.setdefault(archive, ([], [], []))
            rows.append(row)
            places.append(place)
            own_ids.append(own_id)
        return found

    def _each(self, do: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results in order; of a store, several at a time."""
        return list(map(do, items) if self._pool is None else self._pool.map(do, items))
