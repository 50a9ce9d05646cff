"""Videos and folders of images as a source of sequences: read, crop, resize, plan.

The data set's reader (`readers/`) knows names and protocol, `readers/video_decoding.py` gives
pixels, `video_resize.py` brings them to one size, and `video_plan.py` cuts sequences. Stored are
grey or red, green and blue as 0..255; every pixel counts as observed.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.files import describe, local_file
from data_prep.readers.radar import BadFileError
from data_prep.readers.video import Clip, Colour, is_image
from data_prep.readers.video_decoding import (
    CONVERSION_NOTE,
    VideoFacts,
    decoder_versions,
    probe_image,
    probe_video,
    read_image,
    video_frames,
)
from data_prep.source import ArchiveFacts, BadFile, Codes, Frame, FrameRecord, Job, Plan
from data_prep.video_plan import plan_video
from data_prep.video_resize import RESIZE_NOTES, crop_rectangle, resize
from data_prep.video_settings import VideoSettings
from data_prep.video_splits import VideoPlanSettings
from tmu_dist.data.manifest import Units

SOURCE_VERSION = 1
"""Raise it with any change that gives other bytes for the same files and settings."""

_FILES_PER_JOB = 256
_JOB_BYTES = 4 * 2**20
_MOST_PROBED, _MOST_TRIED = 64, 8


class Look(NamedTuple):
    """What stored frames are like."""

    size: tuple[int, int]
    """Height and width."""
    colour: Colour
    file_size: tuple[int, int] | None = None
    """Height and width that all files must have; None: they may differ."""


@dataclass(frozen=True, kw_only=True)
class VideoSource(VideoSettings):
    """Videos or images as sequences."""

    def settings(self) -> dict[str, Any]:
        look = self._look
        record = {
            "kind": "video",
            "source_version": SOURCE_VERSION,
            "dataset": self.dataset,
            "reader": self._reader.record(self.source),
            "name": self._name,
            "frames": self._frames,
            "frame_step": self._frame_step,
            "stride": self.stride,
            "size": look.size,
            "file_size": look.file_size,
            "crop": self._crop,
            "resize": self._resize,
            "colour": look.colour,
            "groups": self._groups,
            "proportions": self._proportions,
            "seed": self.seed,
            "drawn_val_sequences": self._drawn,
            "licence": self.licence,
        }
        return json.loads(json.dumps(record))  # tuples as the lists that a manifest has

    def jobs(self) -> list[Job]:
        jobs: list[Job] = []
        job: list[str] = []
        num_bytes = 0
        for part in self._parts():
            size = sum(size for _, size in describe(self.source, part))
            if job and (len(job) + len(part) > _FILES_PER_JOB or num_bytes + size > _JOB_BYTES):
                jobs.append(tuple(job))
                job, num_bytes = [], 0
            job += part
            num_bytes += size
        return [*jobs, tuple(job)]

    def describe_files(self, job: Job) -> list[tuple[str, int]]:
        return describe(self.source, job)

    def wet_threshold(self) -> float | None:
        return None

    def convert(self, job: Job) -> Iterator[Frame | BadFile]:
        for clip in self._reader.clips(self.source, job):
            if clip.problem:
                yield BadFile(clip.files[0], clip.problem)
            elif clip.numbers is None:
                yield from self._convert_video(clip)
            else:
                for file, number in zip(clip.files, clip.numbers, strict=True):
                    yield self._convert_image(clip, file, number)

    def plan(self, records: Sequence[FrameRecord]) -> Plan:
        videos = not all(is_image(record.file) for record in records)
        settings = VideoPlanSettings(
            frames=self._frames,
            frame_step=self._frame_step,
            stride=self.stride,
            every=self._every if videos else 1,
            groups=self._groups,
            proportions=self._proportions,
            seed=self.seed,
            drawn_val_sequences=self._drawn,
        )
        return plan_video(records, self._reader, settings, self._look.size)

    def facts(self, plan: Plan) -> ArchiveFacts:
        reader, look = self._reader, self._look
        card = reader.source
        if self.dataset == "video-folder":
            card = dataclasses.replace(
                card, name=self._name, **({"licence": self.licence} if self.licence else {})
            )
        return ArchiveFacts(
            name=self._name,
            channels=1 if look.colour == "grey" else 3,
            dtype="uint8",
            units=Units(
                quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None
            ),
            frame_interval_minutes=None,
            grid=None,
            source=card,
            notes={
                "reader": reader.name,
                "missing_rule": "every pixel of a frame counts as observed",
                "conversion": CONVERSION_NOTE,
                "crop": self._crop,
                "resize": RESIZE_NOTES[self._resize],
                "notes": list(reader.notes()),
                "left_out_clips": self._left_out(),
                "frames_per_second": self._rates(),
                "decoders": decoder_versions(),
            },
        )

    # What clips there are

    def _clips(self) -> list[Clip]:
        """All clips that are wanted; found anew each time, since files may come and go."""
        clips = [clip for clip in self._reader.clips(self.source) if not clip.left_out]
        if not clips:
            raise ValueError(
                f"{self.source} holds no clip that is wanted: check --source and --actions."
            )
        return clips

    def _parts(self) -> Iterator[tuple[str, ...]]:
        """Files that must stay together: a clip, or a part of one whose images are numbered."""
        for clip in self._clips():
            if clip.divisible and not clip.problem:
                files = iter(clip.files)
                while part := tuple(islice(files, _FILES_PER_JOB)):
                    yield part
            else:
                yield clip.files

    def _left_out(self) -> dict[str, Any]:
        """Clips that are not wanted, by reason."""
        reasons: dict[str, list[str]] = {}
        for clip in self._reader.clips(self.source):
            if clip.left_out:
                reasons.setdefault(clip.left_out, []).append(clip.files[0])
        return {reason: {"number": len(own), "first": own[0]} for reason, own in reasons.items()}

    def _rates(self) -> list[float]:
        """Frames per second of some clips, without repetition; [] of images."""
        rates = {facts.rate for facts in self._probed() if facts.rate is not None}
        return sorted(round(rate, 3) for rate in rates)

    def _probed(self) -> list[VideoFacts]:
        """What files of some clips, spread evenly, say of themselves."""
        clips = [clip for clip in self._clips() if not clip.problem]
        facts = []
        for clip in clips[:: -(-len(clips) // _MOST_PROBED)] if clips else []:
            probe = probe_video if clip.numbers is None else probe_image
            for file in clip.files[:_MOST_TRIED]:
                try:
                    with local_file(self.source, file) as path:
                        facts.append(probe(path))
                    break
                except BadFileError:
                    continue  # `convert` names it
        return facts

    # What becomes of a frame

    def _convert_video(self, clip: Clip) -> Iterator[Frame | BadFile]:
        (file,) = clip.files
        try:
            with local_file(self.source, file) as path:
                if clip.ranges and (reason := _rest(path, clip.ranges[-1][1])):
                    yield BadFile(file, reason, by_design=True)
                frames = video_frames(
                    path,
                    self._decoded_colour,
                    ranges=clip.ranges,
                    every=self._every,
                    by_time=self._reader.by_time,
                )
                for number, image_HWC in frames:
                    yield self._frame(clip, file, number, image_HWC)
        except BadFileError as error:
            yield BadFile(file, error.reason)

    def _convert_image(self, clip: Clip, file: str, number: int) -> Frame | BadFile:
        try:
            with local_file(self.source, file) as path:
                image_HWC = read_image(path, self._decoded_colour)
            return self._frame(clip, file, number, image_HWC)
        except BadFileError as error:
            return BadFile(file, error.reason)

    def _frame(self, clip: Clip, file: str, number: int, image_HWC: NDArray[np.uint8]) -> Frame:
        codes_CHW = self._stored(file, image_HWC)
        series, group = clip.series, clip.group
        if clip.ranges is not None:
            place = next(i for i, (_, end) in enumerate(clip.ranges) if number < end)
            series = f"{series}-{place + 1}"
            group = clip.range_groups[place] if clip.range_groups else group
        record = FrameRecord(
            series=series,
            order=number,
            file=file,
            key=str(number) if clip.numbers is None else "",
            group=group,
            official_split=clip.official_split,
            digest=hashlib.sha256(codes_CHW.data).hexdigest(),
        )
        return Frame(record, codes_CHW)

    def _stored(self, file: str, image_HWC: NDArray[np.uint8]) -> Codes:
        """Crop and resize a picture, channels first.

        Raises:
            BadFileError: the crop does not fit it, or it has not the size that all files have.
        """
        height, width, _ = image_HWC.shape
        if self._look.file_size not in (None, (height, width)):
            raise BadFileError(
                file,
                f"has frames of {height} x {width} pixels, unlike the other files: give --size "
                "HEIGHT WIDTH to bring all to one",
            )
        try:
            part = crop_rectangle(self._crop, height, width, self._look.size)
        except ValueError as error:
            raise BadFileError(file, f"{error}: change --crop") from error
        bottom, right = part.top + part.height, part.left + part.width
        resized_HWC = resize(
            image_HWC[part.top : bottom, part.left : right], self._look.size, self._resize
        )
        if self._look.colour == "rgb" and self._decoded_colour == "grey":
            resized_HWC = np.repeat(resized_HWC, 3, axis=2)
        return np.ascontiguousarray(resized_HWC.transpose(2, 0, 1))

    @cached_property
    def _look(self) -> Look:
        """Size and colour; from the files where neither settings nor data set say them.

        Raises:
            ValueError: no file can be read, or the files differ in size.
        """
        size = self.size or self._reader.defaults.size
        colour = self.colour or self._reader.defaults.colour
        if size is not None and colour is not None:
            return Look(size, colour)
        facts = self._probed()
        if not facts:
            raise ValueError(
                f"None of the files of {self.source} that were tried can be read: give --size and "
                "--colour, and each file will be named with its reason."
            )
        file_size = None
        if size is None:
            sizes = sorted({(each.height, each.width) for each in facts})
            if len(sizes) > 1:
                raise ValueError(
                    f"Frames have different sizes, such as {sizes[0][0]} x {sizes[0][1]} and "
                    f"{sizes[-1][0]} x {sizes[-1][1]} pixels: give --size HEIGHT WIDTH to bring "
                    "all to one."
                )
            file_size = sizes[0]
            part = crop_rectangle(self._crop, *file_size, file_size)
            size = part.height, part.width
        colour = colour or ("grey" if all(each.grey for each in facts) else "rgb")
        return Look(size, colour, file_size)

    @property
    def _decoded_colour(self) -> Colour:
        return "grey" if self._reader.grey else self._look.colour


def _rest(path: Path, end: int) -> str:
    """Say what lies behind the last range of a video; "" if nothing, or if the file is silent."""
    num_frames = probe_video(path).num_frames or 0
    if num_frames <= end:
        return ""
    return (
        f"has {num_frames} frames, and the listed ranges end with frame {end}: the rest is left "
        "out. (Of a copy at another frame rate, the list would be wrong: check such a clip.)"
    )
