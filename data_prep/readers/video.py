"""What every video reader gives: which files are one clip, and the protocol of the data set.

A reader works on names. It knows whose clip a file is, which of its frames count, who trains and
who tests, and where sequences start. Pixels are read by `data_prep.readers.video_decoding`, and
cropped, resized and cut into sequences by `data_prep.video_source`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

from data_prep.files import list_files
from tmu_dist.data.manifest import SourceCard

Colour: TypeAlias = Literal["grey", "rgb"]
Resize: TypeAlias = Literal["bilinear", "area"]
CropRule: TypeAlias = Literal["whole", "centre", "middle-half"]

VIDEO_PATTERNS = (
    *("*.avi", "*.mp4", "*.mov", "*.mkv", "*.webm", "*.gif", "*.m4v", "*.mpg", "*.mpeg"),
    *("*.wmv", "*.flv", "*.ogv", "*.mts", "*.m2ts", "*.3gp"),
)
IMAGE_PATTERNS = ("*.png", "*.jpg", "*.jpeg", "*.bmp", "*.tif", "*.tiff", "*.webp")

_LAST_NUMBER = re.compile(r"(.*?)(\d+)(\D*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One recording: a video file, or images that follow each other."""

    series: str
    """Its name, unique in the data set."""
    files: tuple[str, ...]
    """Paths relative to the source: one video, or the images in order."""
    group: str
    """Person or recording: what must not be divided between splits."""
    official_split: str | None = None
    """Where the data set or the field puts it: "train", "val" or "test"."""
    numbers: tuple[int, ...] | None = None
    """Frame number of each image; None for a video."""
    ranges: tuple[tuple[int, int], ...] | None = None
    """Frames of a video that count, half-open, from 0, rising; None: all. Sequences are cut inside
    one of them."""
    range_groups: tuple[str, ...] = ()
    """Groups of the ranges, where each has its own; (): all have the clip's."""
    divisible: bool = False
    """Whether a part of the images tells as much as all of them, so that processes can share."""
    left_out: str = ""
    """Why the settings do not want this clip; "" for one that is wanted."""
    problem: str = ""
    """Why this clip cannot be used although it should; "" for one that can."""


class WindowRule(NamedTuple):
    """Where sequences start in a run of frames."""

    stride: int
    """Frames of the run from one start to the next."""
    backwards: bool = False
    """Count from the end: the last sequence ends with the run."""


class VideoDefaults(NamedTuple):
    """Settings that a data set is used with unless the user says otherwise."""

    frames: int
    frame_step: int
    size: tuple[int, int] | None
    """Height and width; None: those of the files."""
    crop: CropRule
    resize: Resize
    colour: Colour | None
    """None: grey where the files are grey."""


def check_actions(dataset: str, actions: Sequence[str], known: Sequence[str]) -> None:
    """Refuse actions that a data set does not have."""
    if unknown := [action for action in actions if action not in known]:
        raise ValueError(f"{dataset} has no action {unknown[0]!r}: choose from {', '.join(known)}.")


class VideoReader(Protocol):
    """How one data set is read; a frozen dataclass whose fields are its options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    name: ClassVar[str]
    """As in `--dataset NAME`."""
    source: ClassVar[SourceCard]
    """Who made the data, under which terms, as far as that is known."""
    defaults: ClassVar[VideoDefaults]
    grey: ClassVar[bool]
    """The pictures are grey, however they are stored."""
    spacing: ClassVar[int | None]
    """Difference of the frame numbers of neighbours; None: the median difference of each clip."""
    known_groups: ClassVar[tuple[str, ...]]
    """Groups that the complete data set has; () where any name is possible."""

    @property
    def by_time(self) -> bool:
        """Frames of videos are numbered by their times, not counted."""
        ...

    def clips(self, root: str, files: Sequence[str] | None = None) -> tuple[Clip, ...]:
        """Put files together to clips, by their names.

        Args:
            root: folder or URL of the data set.
            files: paths relative to it; None: all that are there.

        Raises:
            ValueError: no such folder, nothing in it for this reader, or an option that does not
                fit the names.
        """
        ...

    def window_rule(self, series: str, num_frames: int, span: int, split: str) -> WindowRule:
        """Say where sequences start.

        Args:
            series: a clip's, or one of its ranges'.
            num_frames: of the series.
            span: frames from the first of a sequence to the first of one that does not overlap.
            split: "train", "val" or "test".
        """
        ...

    def default_splits(self, groups: Sequence[str]) -> dict[str, str] | None:
        """Return the split of each group by the data set's protocol; None where it has none."""
        ...

    def record(self, root: str) -> dict[str, Any]:
        """Return options, and whatever else beside the clips determines the sequences, as JSON."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What a user of the sequences should know of the protocol."""
        ...


def visible_files(root: str, patterns: Sequence[str], include: Sequence[str] = ()) -> list[str]:
    """Find files by `data_prep.files.list_files`, without those whose names start with a dot.

    Such files belong to operating systems: "._clip.avi" is no clip.
    """
    files, _ = list_files(root, patterns, include)
    return [file for file in files if not file.rpartition("/")[2].startswith(".")]


def is_image(file: str) -> bool:
    """Say whether a file is an image, by its name."""
    return f"*.{file.rpartition('.')[2].lower()}" in IMAGE_PATTERNS


def natural_key(text: str) -> tuple[Any, ...]:
    """Sort key by which "frame10" comes after "frame9"."""
    parts = re.split(r"(\d+)", text)
    return (*((part, 0) if i % 2 == 0 else ("", int(part)) for i, part in enumerate(parts)), text)


def image_clip_name(path: str) -> tuple[str, int | None]:
    """Split the path of a numbered image into its clip's name and its number.

    The last number of the file name counts: "walk/p1_007.png" is number 7 of "walk/p1_*.png".
    Without a number, the clip is all such images of the folder: "walk/*", None.
    """
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    found = _LAST_NUMBER.fullmatch(stem)
    if found is None:
        return f"{folder}{slash}*", None
    before, number, after = found.groups()
    return f"{folder}{slash}{before}*{after}{dot}{suffix}", int(number)


def without_twins(clips: Sequence[Clip]) -> tuple[Clip, ...]:
    """Let one of several files of the same clip count: an avi before others, then by path."""

    def rank(clip: Clip) -> tuple[bool, int, str]:
        file = clip.files[0]
        return not file.lower().endswith(".avi"), file.count("/"), file

    chosen: dict[str, Clip] = {}
    result = []
    for clip in sorted(clips, key=rank):
        if clip.problem:
            result.append(clip)
            continue
        first = chosen.setdefault(clip.series, clip)
        if first is not clip:
            clip = replace(clip, left_out=f"the same clip as {first.files[0]}, which is used")
        result.append(clip)
    return tuple(sorted(result, key=lambda clip: (natural_key(clip.series), clip.files)))
