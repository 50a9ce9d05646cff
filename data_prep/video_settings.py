"""What a user may say about videos and sequences of them; what is left out follows the data set."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal

from data_prep.readers.human36m import Human36mReader, HumanProtocol
from data_prep.readers.kth import KthRanges, KthReader, KthSplits
from data_prep.readers.video import Colour, Resize, VideoReader
from data_prep.readers.video_folder import Media, Numbering, VideoFolderReader
from data_prep.readers.weizmann import WeizmannReader
from data_prep.splits import check_proportions
from data_prep.video_resize import CropSetting
from tmu_dist.data.manifest import SPLITS

_READERS: dict[str, type[VideoReader]] = {
    "video-folder": VideoFolderReader,
    "kth": KthReader,
    "weizmann": WeizmannReader,
    "human36m": Human36mReader,
}
_ONLY_FOR = {
    "actions": ("kth", "weizmann", "human36m"),
    "ranges": ("kth",),
    "split_by": ("kth",),
    "protocol": ("human36m",),
    "val_sequences": ("human36m",),
    "media": ("video-folder",),
    "numbering": ("video-folder",),
    "group_pattern": ("video-folder",),
    "split_folders": ("video-folder",),
    "include": ("video-folder",),
    "proportions": ("video-folder",),
    "licence": ("video-folder",),
}
"""Settings that mean nothing for other data sets."""

_PAPER_VAL_SEQUENCES = 300


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """What is read, and how sequences are cut from it. Left-out settings follow the data set."""

    source: str
    """Folder (with subfolders) or URL of the clips or images."""
    dataset: Literal["video-folder", "kth", "weizmann", "human36m"] = "video-folder"
    """video-folder takes any clips (avi, mp4, mov, mkv, webm, gif ...) or frame images (png, jpg
    ...); the others know the names and the protocol of their data set."""
    name: str | None = None
    """Name of the archive; data set or folder when left out."""
    frames: int | None = None
    """Frames in a sequence: 20; weizmann and human36m 8."""
    frame_step: int | None = None
    """Every n-th frame of the clip: 1; human36m 2 (of the stored frames)."""
    stride: int | None = None
    """Frames of the clip from the start of one sequence to the next: without overlap; kth 3 for
    jogging and running, weizmann 1 in short clips, human36m 10 (test 5)."""
    size: tuple[int, int] | None = None
    """HEIGHT WIDTH to store: 128 128; video-folder that of the files, which must be one."""
    crop: CropSetting | None = None
    """Part of the frame to use: whole; centre (largest part of the shape of `size`); middle-half
    (of rows and columns); or TOP LEFT HEIGHT WIDTH in pixels. kth whole, human36m middle-half,
    others centre."""
    resize: Resize | None = None
    """bilinear (no antialiasing, as OpenCV), or area (mean over the new pixel). video-folder area,
    others bilinear."""
    colour: Colour | None = None
    """grey or rgb: kth grey (rgb repeats it), weizmann and human36m rgb, video-folder as the files
    are."""
    actions: tuple[str, ...] | None = None
    """kth, weizmann, human36m: only these actions; all, of human36m Walking."""
    ranges: KthRanges | None = None
    """kth: apart (no sequence leaves a range of 00sequences.txt), joined (ranges without a frame
    between them are one), or whole (all frames, without the list); apart."""
    split_by: KthSplits | None = None
    """kth: persons (nobody is in two splits), or repetitions (of every clip the last range of
    00sequences.txt tests, the one before validates and the earlier ones train: where there are few
    persons); persons."""
    protocol: HumanProtocol | None = None
    """human36m: by-subject (S8 validates, nothing leaks), or paper (validation sequences drawn from
    those of training, which they overlap); by-subject."""
    val_sequences: int | None = None
    """human36m, protocol paper: how many are drawn; 300."""
    media: Media | None = None
    """video-folder with videos and images: which of them are meant."""
    numbering: Numbering | None = None
    """video-folder: stated (numbers in image names and times in videos show which frames are
    missing), or counted (no frame is missing); stated."""
    group_pattern: str | None = None
    """video-folder: regular expression with one pair of brackets, searched in a clip's path; clips
    in which the brackets match the same text (a person, a recording) are never divided between
    splits. Each clip by itself when left out."""
    split_folders: bool = False
    """video-folder: the first folder of each path, train, val or test, is its split."""
    include: tuple[str, ...] = ()
    """video-folder: shell patterns of paths, such as "walk/*"; others are left out."""
    proportions: tuple[float, float, float] | None = None
    """video-folder: shares of train, val and test; 0.8 0.1 0.1."""
    train_groups: tuple[str, ...] | None = None
    """Groups (kth person01 ..., weizmann daria ..., human36m S1 ...) to train on; all that are in
    no other split."""
    val_groups: tuple[str, ...] | None = None
    """Groups to validate on. By default kth person15 person16, weizmann the last three, human36m
    S8; video-folder draws them."""
    test_groups: tuple[str, ...] | None = None
    """Groups to test on. By default kth person17 to person25, weizmann none, human36m S9 S11;
    video-folder draws them."""
    seed: int = 0
    """Of drawing groups (video-folder) or validation sequences (human36m, protocol paper)."""
    licence: str | None = None
    """video-folder: terms under which the clips may be used, for the archive's source card."""

    def __post_init__(self) -> None:
        for name, datasets in _ONLY_FOR.items():
            if getattr(self, name) not in (None, False, ()) and self.dataset not in datasets:
                raise ValueError(
                    f"{name} means nothing for the data set {self.dataset}, only for "
                    f"{', '.join(datasets)}: leave it out."
                )
        for name in ("frames", "frame_step", "stride", "val_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size is HEIGHT WIDTH in pixels, got {self.size}.")
        if isinstance(self.crop, tuple) and (min(self.crop[:2]) < 0 or min(self.crop[2:]) < 1):
            raise ValueError(f"crop is TOP LEFT HEIGHT WIDTH in pixels, got {self.crop}.")
        check_proportions(self._proportions)
        self._check_splits()
        _ = self._reader  # its options are checked

    def _check_splits(self) -> None:
        """Refuse settings of splits that exclude each other."""
        named = [split for split, groups in self._groups.items() if groups is not None]
        if self.protocol == "paper" and named:
            raise ValueError(
                f"protocol paper says who trains, validates and tests: leave {named[0]}_groups out,"
                " or use protocol by-subject."
            )
        if self.val_sequences is not None and self.protocol != "paper":
            raise ValueError("val_sequences are drawn with protocol paper only: leave it out.")
        if self.seed and self.dataset != "video-folder" and self.protocol != "paper":
            raise ValueError(f"Nothing is drawn for the data set {self.dataset}: leave seed out.")
        ways = [f"{split}_groups" for split in named[:1]]
        ways += ["split_folders"] if self.split_folders else []
        ways += ["proportions"] if self.proportions is not None else []
        if len(ways) > 1:
            raise ValueError(f"{ways[0]} and {ways[1]} both say how to split: leave one out.")

    @cached_property
    def _reader(self) -> VideoReader:
        reader = _READERS[self.dataset]
        options = {each.name: getattr(self, each.name) for each in fields(reader)}
        return reader(**{name: value for name, value in options.items() if value is not None})

    @property
    def _name(self) -> str:
        if self.name is not None:
            return self.name
        folder = PurePosixPath(self.source.rstrip("/")).name
        return (folder or "video") if self.dataset == "video-folder" else self.dataset

    @property
    def _frames(self) -> int:
        return self.frames or self._reader.defaults.frames

    @property
    def _frame_step(self) -> int:
        return self.frame_step or self._reader.defaults.frame_step

    @property
    def _crop(self) -> CropSetting:
        return self.crop or self._reader.defaults.crop

    @property
    def _resize(self) -> Resize:
        return self.resize or self._reader.defaults.resize

    @property
    def _every(self) -> int:
        """Of videos of any folder, only frames on which a sequence can have one are kept.

        The protocols of the data sets count from the end, or start anew after a gap, so any frame
        may be needed there.
        """
        if self.dataset != "video-folder":
            return 1
        return math.gcd(self._frame_step, self.stride or self._frames * self._frame_step)

    @property
    def _proportions(self) -> dict[str, float]:
        return dict(zip(SPLITS, self.proportions or (0.8, 0.1, 0.1), strict=True))

    @property
    def _groups(self) -> dict[str, tuple[str, ...] | None]:
        return {"train": self.train_groups, "val": self.val_groups, "test": self.test_groups}

    @property
    def _drawn(self) -> int:
        return (self.val_sequences or _PAPER_VAL_SEQUENCES) if self.protocol == "paper" else 0
