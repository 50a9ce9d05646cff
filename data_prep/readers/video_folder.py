"""Any folder of clips: video files, or images of which each is one frame.

Images belong to one clip when they lie in one folder and their names differ in the last number
only: "walk/p1_0007.png" is frame 7 of the clip "walk/p1_*.png". The numbers say which frames
follow each other; where one is missing, no sequence goes on. Images without any number are one
clip in the order of their names. In videos, a frame's time takes the place of the number.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, TypeAlias

from data_prep.readers.video import (
    IMAGE_PATTERNS,
    VIDEO_PATTERNS,
    Clip,
    VideoDefaults,
    WindowRule,
    image_clip_name,
    is_image,
    natural_key,
    visible_files,
)
from tmu_dist.data.manifest import SourceCard

Media: TypeAlias = Literal["videos", "images"]
Numbering: TypeAlias = Literal["stated", "counted"]

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFolderReader:
    """Clips below a folder."""

    media: Media | None = None
    """What to take where there are videos and images; None: the one kind that is there."""
    numbering: Numbering = "stated"
    """stated: frames are numbered by the numbers in image names, and by the times in videos;
    counted: by their place in the folder or the video, so nothing counts as missing."""
    group_pattern: str | None = None
    """Regular expression searched in a clip's path. Clips for which its group (the one called
    "group", or its only one) matches the same text belong together. None: each clip by itself, but
    files that differ in the suffix only together."""
    split_folders: bool = False
    """The first folder of a path is the clip's split."""
    include: tuple[str, ...] = ()
    """Shell patterns of paths; others are left out."""

    name: ClassVar[str] = "video-folder"
    source: ClassVar[SourceCard] = SourceCard(name="folder of clips")
    defaults: ClassVar[VideoDefaults] = VideoDefaults(
        frames=20, frame_step=1, size=None, crop="centre", resize="area", colour=None
    )
    grey: ClassVar[bool] = False
    spacing: ClassVar[int | None] = None
    known_groups: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.group_pattern is None:
            return
        try:
            pattern = re.compile(self.group_pattern)
        except re.error as error:
            raise ValueError(
                f"group_pattern {self.group_pattern!r} is no regular expression: {error}."
            ) from error
        if "group" not in pattern.groupindex and pattern.groups != 1:
            raise ValueError(
                f"group_pattern {self.group_pattern!r} has {pattern.groups} groups: mark the "
                "person or recording with one pair of brackets, or call it (?P<group>...)."
            )

    @property
    def by_time(self) -> bool:
        return self.numbering == "stated"

    def clips(self, root: str, files: Sequence[str] | None = None) -> tuple[Clip, ...]:
        files = self._list(root) if files is None else files
        images: dict[str, list[str]] = {}
        clips = []
        for file in files:
            if is_image(file):
                images.setdefault(self._image_clip(file), []).append(file)
            else:
                clips.append(self._clip(file, (file,), None))
        clips += [self._of_images(series, own) for series, own in images.items()]
        return tuple(sorted(clips, key=lambda clip: natural_key(clip.series)))

    def window_rule(self, series: str, num_frames: int, span: int, split: str) -> WindowRule:
        return WindowRule(span)

    def default_splits(self, groups: Sequence[str]) -> dict[str, str] | None:
        return None

    def record(self, root: str) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def notes(self) -> tuple[str, ...]:
        if self.numbering == "counted":
            return ("Frames are counted: a frame that is missing in a clip goes unnoticed.",)
        return (
            "Frames follow each other when the numbers in image names, or the times in videos, "
            "differ by the clip's usual (median) step; no sequence goes over a gap.",
        )

    def _list(self, root: str) -> list[str]:
        """Find the files of one kind."""
        found = {
            "videos": visible_files(root, VIDEO_PATTERNS, self.include),
            "images": visible_files(root, IMAGE_PATTERNS, self.include),
        }
        if PurePosixPath(root).suffix:  # one file, which is found whatever its kind
            found["images"] = [file for file in found["images"] if is_image(file)]
            found["videos"] = [file for file in found["videos"] if not is_image(file)]
        found = {kind: files for kind, files in found.items() if self.media in (None, kind)}
        kinds = [kind for kind, files in found.items() if files]
        if not kinds:
            wanted = ", ".join(p.removeprefix("*.") for p in (*VIDEO_PATTERNS, *IMAGE_PATTERNS))
            raise ValueError(
                f"{root} holds no {self.media or 'videos or images'} ({wanted}): check --source"
                f"{' and --include' if self.include else ''}."
            )
        if len(kinds) > 1:
            raise ValueError(
                f"{root} holds {len(found['videos'])} videos and {len(found['images'])} images: "
                "say with --media videos or --media images what the frames are."
            )
        return found[kinds[0]]

    def _image_clip(self, file: str) -> str:
        if self.numbering == "stated":
            return image_clip_name(file)[0]
        folder, slash, _ = file.rpartition("/")
        return f"{folder}{slash}*"

    def _of_images(self, series: str, files: list[str]) -> Clip:
        files = sorted(files, key=natural_key)
        if series.endswith("*"):  # no number, or counted
            return self._clip(series, tuple(files), tuple(range(len(files))))
        numbered = sorted((image_clip_name(file)[1] or 0, file) for file in files)
        for (number, file), (following, other) in pairwise(numbered):
            if number == following:
                problem = f"{file} and {other} have the same number: --numbering counted"
                return self._clip(series, tuple(files), None, problem=problem)
        ordered = tuple(file for _, file in numbered)
        return self._clip(series, ordered, tuple(number for number, _ in numbered), divisible=True)

    def _clip(
        self,
        series: str,
        files: tuple[str, ...],
        numbers: tuple[int, ...] | None,
        *,
        divisible: bool = False,
        problem: str = "",
    ) -> Clip:
        return Clip(
            series=series,
            files=files,
            group=self._group(series),
            official_split=self._split(series),
            numbers=numbers,
            divisible=divisible,
            problem=problem,
        )

    def _group(self, path: str) -> str:
        """Return the person or recording of a clip.

        Raises:
            ValueError: the pattern does not match.
        """
        if self.group_pattern is None:
            return str(PurePosixPath(path).with_suffix("")) if not path.endswith("*") else path
        found = re.search(self.group_pattern, path)
        if found is None:
            raise ValueError(
                f"group_pattern {self.group_pattern!r} does not match the clip {path!r}: every "
                "clip needs a group."
            )
        return found["group"] if "group" in found.groupdict() else found[1]

    def _split(self, path: str) -> str | None:
        """Return the split that the first folder names.

        Raises:
            ValueError: it names none.
        """
        if not self.split_folders:
            return None
        split = _SPLIT_FOLDERS.get(path.partition("/")[0].lower())
        if split is None or "/" not in path:
            raise ValueError(
                f"The clip {path!r} lies in none of the folders train, val and test, which "
                "--split-folders asks for."
            )
        return split
