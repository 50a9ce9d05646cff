"""Leaks between splits: the same frames, frames that look the same, the same times.

Three questions are asked of the samples themselves, whatever the archive's writer promised:

- identical: do two splits hold a frame with the same codes (by hash)? That is proof.
- same_time: do the records of two samples of one series name overlapping times? Proof, too.
- similar: is a frame nearly another split's? Each frame is averaged to 16 x 16 blocks (over its
  observed pixels), and a block counts as 1 above the frame's mean, else 0. The frame of the other
  split that differs in the fewest blocks is a near-duplicate if those are few (`max_distance`) and
  the block means correlate (`min_correlation`). That is a hint, for a person to look at.

What the last one finds: copies with noise, of another compression, resolution or brightness, in
other units. What it cannot find: copies that were cropped, shifted or mirrored, and changes that
are smaller than a block. What it finds by chance: slow weather and empty scenes, and look-alikes in
large collections of simple pictures such as digits. In radar of three Swiss events and a Dutch one
it called 0 to 97 % of the frames 5 minutes apart similar, and none of those 15 minutes apart.

Frames whose observed pixels are all equal (no rain) carry no information; they are left out and
counted. So are, for "similar", frames with fewer than 1 in 16 blocks above or below the mean.

Memory is about 1 kB for each different frame; time is mostly reading, and the comparison of
100,000 frames with 10,000 others takes about 6 seconds on 2 cores.

Shape letters: N frames, C channels, H height, W width, K blocks of a frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.source import Codes
from tmu_dist.data.archive import Archive, open_archive
from tmu_dist.data.manifest import SPLITS

_BLOCKS = 16
_PLAIN_PART = 16  # fewer than 1 in 16 blocks above (or below) the mean is no pattern
_BATCH_BYTES = 32 * 2**20
_ROWS, _COLUMNS = 1024, 8192  # of frames compared at a time


class FramePlace(NamedTuple):
    """Where a frame, or a sample, is."""

    url: str
    split: str
    sample_id: int
    frame: int | None = None
    """None: the sample as a whole."""

    def __str__(self) -> str:
        frame = "" if self.frame is None else f", frame {self.frame}"
        return f"{self.url} {self.split} sample {self.sample_id}{frame}"


class Leak(NamedTuple):
    """Something that two splits share, by the first place in each."""

    kind: Literal["identical", "same_time", "similar"]
    first: FramePlace
    second: FramePlace
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.first} and {self.second}: {self.what}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What was compared, and what was found."""

    leaks: tuple[Leak, ...]
    """Proofs first; one for each frame of the later split, not one for each pair."""
    frames: dict[str, int]
    """Different frames by split, without those that carry no information."""
    uninformative: int
    """Frames of samples whose observed pixels are all equal; not compared."""
    too_plain: int
    """Different frames with too little pattern to be called similar to another; compared for
    identity only."""

    def __str__(self) -> str:
        """Say it in a few lines, with at most 20 leaks."""
        kinds = ("identical", "same_time", "similar")
        counts = {kind: sum(leak.kind == kind for leak in self.leaks) for kind in kinds}
        lines = [str(leak) for leak in self.leaks[:20]]
        if len(self.leaks) > len(lines):
            lines.append(f"... and {len(self.leaks) - len(lines)} more")
        frames = ", ".join(f"{number:,} {split}" for split, number in self.frames.items())
        lines.append(
            f"Different frames: {frames}. Without information, not compared: "
            f"{self.uninformative:,}. With too little pattern to be called similar: "
            f"{self.too_plain:,}."
        )
        if self.leaks:
            found = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
            lines.append(f"Shared by two splits: {found}.")
        else:
            lines.append("No two splits share a frame.")
        return "\n".join(lines)


def audit_archive(url: str, *, show_progress: bool = False) -> list[Leak]:
    """Return what the splits of one archive share; empty when there is no leak.

    Raises:
        StorageError: there is no finished archive, or it cannot be reached.
        ShardError: a sample is damaged.
    """
    return list(audit_archives([url], show_progress=show_progress).leaks)


def audit_archives(
    urls: Sequence[str],
    *,
    max_distance: int = 12,
    min_correlation: float = 0.98,
    show_progress: bool = False,
) -> Audit:
    """Compare the splits of archives, of each one and of different ones.

    A test frame of one archive that another trains with is a leak, too; that two archives train
    with the same frames is none.

    Args:
        urls: folders or URLs.
        max_distance: blocks of 256 in which similar frames may differ.
        min_correlation: that the block means of similar frames must have.
        show_progress: draw a progress bar on stderr.

    Raises:
        ValueError: no URL, or one twice.
        StorageError: there is no finished archive, or it cannot be reached.
        ShardError: a sample is damaged.
    """
    if not urls or len(set(urls)) < len(urls):
        raise ValueError(f"Give one or more different archives, got {list(urls)}.")
    archives = [open_archive(url) for url in urls]
    collected = {split: _Frames() for split in SPLITS}
    spans: dict[str, list[_Span]] = {split: [] for split in SPLITS}
    total = sum(sum(map(a.manifest.num_samples, a.manifest.splits)) for a in archives)
    with tqdm(total=total, unit=" samples", disable=not show_progress) as progress:
        for archive in archives:
            for split in archive.manifest.splits:
                for ids, frames_BTCHW in _batches(archive, split):
                    collected[split].add(archive, split, ids, frames_BTCHW)
                    spans[split] += _spans(archive, split, ids)
                    progress.update(len(ids))
    proofs: list[Leak] = []
    hints: list[Leak] = []
    for one, other in combinations(SPLITS, 2):
        proofs += _identical(collected[one], collected[other])
        proofs += _same_times(spans[one], spans[other])
        hints += _similar(collected[one], collected[other], max_distance, min_correlation)
    return Audit(
        leaks=tuple(proofs + hints),
        frames={split: len(frames.places) for split, frames in collected.items() if frames.places},
        uninformative=sum(frames.uninformative for frames in collected.values()),
        too_plain=sum(int((~frames.has_pattern).sum()) for frames in collected.values()),
    )


def _batches(archive: Archive, split: str) -> Iterator[tuple[list[int], Codes]]:
    """Yield all samples of a split, about `_BATCH_BYTES` at a time."""
    manifest = archive.manifest
    sample_bytes = int(np.prod(manifest.sample_shape)) * np.dtype(manifest.dtype).itemsize
    at_once = max(1, _BATCH_BYTES // sample_bytes)
    number = manifest.num_samples(split)
    for first in range(0, number, at_once):
        ids = list(range(first, min(first + at_once, number)))
        yield ids, archive.read(split, ids)


@dataclass(slots=True)
class _Frames:
    """The different frames of a split: first place, hash, and what they look like."""

    places: list[FramePlace] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)
    """Position in `places` by hash."""
    signs_NK: list[NDArray[np.int8]] = field(default_factory=list)
    """+1 for blocks above the frame's mean, -1 for others."""
    shapes_NK: list[NDArray[np.float16]] = field(default_factory=list)
    """Block means less their mean, of length 1."""
    uninformative: int = 0

    @property
    def has_pattern(self) -> NDArray[np.bool_]:
        """Of each frame, whether enough blocks lie on both sides of the mean."""
        above = [int(np.count_nonzero(signs > 0)) for signs in self.signs_NK]
        blocks = [len(signs) for signs in self.signs_NK]
        return np.array(
            [min(up, k - up) * _PLAIN_PART >= k for up, k in zip(above, blocks)], np.bool_
        )

    def add(self, archive: Archive, split: str, ids: Sequence[int], frames_BTCHW: Codes) -> None:
        """Take in samples; frames that the split has already cost a hash only."""
        missing_code = archive.manifest.units.missing_code
        fresh: list[tuple[FramePlace, NDArray[Any]]] = []
        for sample_id, frames_TCHW in zip(ids, frames_BTCHW, strict=True):
            for frame, codes_CHW in enumerate(frames_TCHW):
                if not _has_information(codes_CHW, missing_code):
                    self.uninformative += 1
                    continue
                hashed = hashlib.blake2b(np.ascontiguousarray(codes_CHW).data, digest_size=16)
                hashed.update(f"{codes_CHW.shape} {codes_CHW.dtype}".encode())
                digest = hashed.digest()
                if digest not in self.numbers:
                    self.numbers[digest] = len(self.numbers)
                    fresh.append((FramePlace(archive.url, split, sample_id, frame), codes_CHW))
        if fresh:
            self.places += [place for place, _ in fresh]
            # A few at a time: block_means takes eight times the memory of 8-bit frames.
            step = max(1, _BATCH_BYTES // fresh[0][1].nbytes)
            means_NK = np.concatenate(
                [
                    block_means(np.stack([codes for _, codes in fresh[i : i + step]]), missing_code)
                    for i in range(0, len(fresh), step)
                ]
            )
            mean_N1 = np.nanmean(means_NK, axis=1, keepdims=True)
            deviations_NK = np.nan_to_num(means_NK - mean_N1)
            length_N1 = np.linalg.norm(deviations_NK, axis=1, keepdims=True)
            shapes_NK = deviations_NK / np.maximum(length_N1, 1e-12)
            self.signs_NK += list(np.where(deviations_NK > 0, 1, -1).astype(np.int8))
            self.shapes_NK += list(shapes_NK.astype(np.float16))


def _has_information(codes_CHW: NDArray[Any], missing_code: int | None) -> bool:
    """Say whether the observed pixels differ."""
    low, high = codes_CHW.min(), codes_CHW.max()
    if low == high or missing_code is None or high < missing_code:
        return bool(low != high)
    observed = codes_CHW[codes_CHW != missing_code]
    return bool(observed.size and observed.min() != observed.max())


def block_means(codes_NCHW: NDArray[Any], missing_code: int | None) -> NDArray[np.float32]:
    """Return the means of 16 x 16 blocks of each frame over observed pixels and channels.

    Blocks of frames whose size is no multiple of 16 differ by a pixel in size; frames of fewer
    pixels have a block for each.

    Returns:
        means_NK: NaN where nothing of a block was observed.
    """
    height, width = codes_NCHW.shape[2:]
    rows = np.unique(np.arange(_BLOCKS) * height // _BLOCKS)
    columns = np.unique(np.arange(_BLOCKS) * width // _BLOCKS)

    def sums(values_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        strips = np.add.reduceat(values_NCHW.sum(axis=1), columns, axis=2)
        return np.add.reduceat(strips, rows, axis=1).reshape(len(values_NCHW), -1)

    observed_NCHW = np.ones(codes_NCHW.shape, np.float32)
    values_NCHW = codes_NCHW.astype(np.float32)
    if missing_code is not None:
        observed_NCHW[codes_NCHW == missing_code] = 0
        values_NCHW *= observed_NCHW
    count_NK = sums(observed_NCHW)
    return np.divide(
        sums(values_NCHW), count_NK, out=np.full_like(count_NK, np.nan), where=count_NK > 0
    )


def _identical(one: _Frames, other: _Frames) -> list[Leak]:
    """Return the frames that two splits both have."""
    return [
        Leak("identical", one.places[one.numbers[digest]], place, "the same pixels")
        for digest, place in zip(other.numbers, other.places, strict=True)
        if digest in one.numbers
    ]


def _similar(one: _Frames, other: _Frames, max_distance: int, min_correlation: float) -> list[Leak]:
    """Return for each frame of the second split its nearest in the first, where that is near."""
    leaks = []
    sizes = {len(signs) for signs in one.signs_NK} & {len(signs) for signs in other.signs_NK}
    for num_blocks in sorted(sizes):
        ours = _comparable(one, num_blocks, without=None)
        theirs = _comparable(other, num_blocks, without=one)
        if not len(ours) or not len(theirs):
            continue
        nearest, distances = _nearest(
            np.stack([one.signs_NK[i] for i in ours]),
            np.stack([other.signs_NK[i] for i in theirs]),
        )
        for place, chosen, distance in zip(theirs, ours[nearest], distances, strict=True):
            if distance * _BLOCKS**2 > max_distance * num_blocks:
                continue
            shapes = one.shapes_NK[chosen].astype(np.float32), other.shapes_NK[place]
            correlation = float(shapes[0] @ shapes[1].astype(np.float32))
            if correlation >= min_correlation:
                what = f"{distance} of {num_blocks} blocks differ, correlation {correlation:.3f}"
                leaks.append(Leak("similar", one.places[chosen], other.places[place], what))
    return leaks


def _comparable(frames: _Frames, num_blocks: int, without: _Frames | None) -> NDArray[np.int64]:
    """Return the frames with a pattern of so many blocks that the other split does not hold."""
    fits = frames.has_pattern
    for number, (digest, signs) in enumerate(zip(frames.numbers, frames.signs_NK, strict=True)):
        if len(signs) != num_blocks or (without is not None and digest in without.numbers):
            fits[number] = False
    return np.flatnonzero(fits)


def _nearest(
    ours_NK: NDArray[np.int8], theirs_NK: NDArray[np.int8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each of their frames the position of our nearest, and the differing blocks."""
    num_blocks = ours_NK.shape[1]
    best = np.zeros(len(theirs_NK), np.int64)
    fewest = np.full(len(theirs_NK), num_blocks + 1, np.int64)
    for start in range(0, len(ours_NK), _COLUMNS):
        # Sums of +-1 are exact in float32, and a matrix product is the quickest way to them.
        block = ours_NK[start : start + _COLUMNS].astype(np.float32).T
        for first in range(0, len(theirs_NK), _ROWS):
            rows = slice(first, first + _ROWS)
            agreement = theirs_NK[rows].astype(np.float32) @ block
            chosen = agreement.argmax(axis=1)
            top = agreement[np.arange(len(chosen)), chosen]
            differing = ((num_blocks - top) / 2).astype(np.int64)
            closer = differing < fewest[rows]
            best[rows] = np.where(closer, start + chosen, best[rows])
            fewest[rows] = np.where(closer, differing, fewest[rows])
    return best, fewest


class _Span(NamedTuple):
    """What a sample's record says of its times."""

    series: tuple[str, str]
    """URL and name: series of different archives have nothing to do with each other."""
    start: float
    """Seconds since 1970, or whatever the source counts in (frames of a clip)."""
    end: float
    place: FramePlace


def _spans(archive: Archive, split: str, ids: Sequence[int]) -> Iterator[_Span]:
    """Yield the times of those samples whose records have them."""
    for sample_id in ids:
        meta = archive.read_meta(split, sample_id)
        start, end = _moment(meta.get("start")), _moment(meta.get("end"))
        if "series" in meta and start is not None and end is not None:
            place = FramePlace(archive.url, split, sample_id)
            yield _Span((archive.url, str(meta["series"])), start, end, place)


def _moment(written: Any) -> float | None:
    """Return a number as it is, an ISO time in seconds since 1970, and None for anything else."""
    if isinstance(written, int | float):
        return float(written)
    try:
        return datetime.fromisoformat(written).timestamp()
    except (TypeError, ValueError):
        return None


def _same_times(ones: Sequence[_Span], others: Sequence[_Span]) -> list[Leak]:
    """Return for each sample of the second split one of the first that overlaps it in time."""
    by_series: dict[tuple[str, str], list[_Span]] = {}
    for span in sorted(ones, key=lambda span: span.start):
        by_series.setdefault(span.series, []).append(span)
    starts = {series: np.array([s.start for s in spans]) for series, spans in by_series.items()}
    # Of all samples that start up to here, the one that ends last: if it does not overlap, none.
    latest: dict[tuple[str, str], list[_Span]] = {}
    for series, spans in by_series.items():
        latest[series] = [spans[0]]
        for span in spans[1:]:
            latest[series].append(max(latest[series][-1], span, key=lambda s: s.end))
    leaks = []
    for span in others:
        if span.series not in by_series:
            continue
        up_to = int(np.searchsorted(starts[span.series], span.end, side="right"))
        if up_to and latest[span.series][up_to - 1].end >= span.start:
            found = latest[span.series][up_to - 1]
            what = f"the same times of {span.series[1] or 'the series'}"
            leaks.append(Leak("same_time", found.place, span.place, what))
    return leaks
