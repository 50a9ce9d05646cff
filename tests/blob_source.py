"""A small source of sequences for tests of the pipeline: blobs that drift, made from nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.source import (
    ArchiveFacts,
    BadFile,
    Frame,
    FrameRecord,
    Job,
    Plan,
    SequencePlan,
)
from tmu_dist.data.manifest import SourceCard, Units

UNITS = Units(
    quantity="reflectivity", unit="dBZ", scale=70 / 254, offset=0.0, max_code=254, missing_code=255
)


@dataclass(frozen=True)
class BlobSource:
    """Frames of 12 x 10 pixels, five minutes apart, with a missing corner; windows of 4 frames."""

    num_files: int = 40
    frames_per_job: int = 6
    bad: tuple[int, ...] = ()
    """Numbers of files that cannot be read."""
    skipped: tuple[int, ...] = ()
    """Numbers of files that are left out by design."""
    stride: int = 1
    step: int = 1
    """Files from one frame of a sequence to the next."""
    speed: int = 1

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "blobs",
            "speed": self.speed,
            "size": (12, 10),
            "plan": {"stride": self.stride, "step": self.step},
        }

    def jobs(self) -> list[Job]:
        names = [f"f{i:03d}" for i in range(self.num_files)]
        step = self.frames_per_job
        return [tuple(names[i : i + step]) for i in range(0, len(names), step)]

    def describe_files(self, job: Job) -> list[tuple[str, int]]:
        return [(name, 100) for name in job]

    def wet_threshold(self) -> float | None:
        return 7.0

    def convert(self, job: Job) -> Iterator[Frame | BadFile]:
        for name in job:
            number = int(name[1:])
            if number in self.bad:
                yield BadFile(name, "is truncated")
            elif number in self.skipped:
                yield BadFile(name, "is a forecast", by_design=True)
            else:
                codes_CHW = blob(number, self.speed)
                digest = hashlib.sha256(codes_CHW.tobytes()).hexdigest()
                yield Frame(
                    FrameRecord(series="", order=5.0 * number, file=name, digest=digest), codes_CHW
                )

    def plan(self, records: Sequence[FrameRecord]) -> Plan:
        places = {int(record.order // 5): i for i, record in enumerate(records)}
        sequences = []
        length = 3 * self.step
        for first in range(0, self.num_files - length, self.stride):
            numbers = range(first, first + length + 1, self.step)
            if all(n in places for n in numbers):
                split = "train" if first + length < self.num_files // 2 else "test"
                if split == "test" and first < self.num_files // 2:
                    continue
                for left in (0, 2):
                    sequences.append(
                        SequencePlan(
                            split=split,
                            key=f"{split}-{first:04d}-l{left}",
                            frames=tuple(places[n] for n in numbers),
                            left=left,
                            weight=2.0,
                            meta={"first": first},
                        )
                    )
        return Plan(
            sequences=tuple(sequences), num_frames=4, height=12, width=8, report={"dropped": {}}
        )

    def facts(self, plan: Plan) -> ArchiveFacts:
        return ArchiveFacts(
            name="blobs",
            channels=1,
            dtype="uint8",
            units=UNITS,
            frame_interval_minutes=5.0,
            grid=None,
            source=SourceCard(name="blobs", licence="none needed"),
        )


def blob(number: int, speed: int = 1) -> np.ndarray:
    """Frame of one number, codes_CHW: something that moves, and a missing corner."""
    y, x = np.mgrid[:12, :10]
    centre = (number * speed) % 10
    codes_HW = (200 * np.exp(-((x - centre) ** 2 + (y - 6) ** 2) / 8)).astype(np.uint8)
    codes_HW[:3, :3] = 255
    return codes_HW[None]
