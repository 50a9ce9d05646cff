"""Random access to the samples of an archive, every read checked.

Both formats look the same from outside; how samples of one are read is in tar_archive.py and
zarr_archive.py, which are loaded when an archive needs them. Objects are read in place, by ranges
of remote objects, or through the node's cache (cache.py). No torch here; the loader turns arrays
into tensors.

Shape letters: B samples, T time, C channels, H height, W width.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data import storage
from tmu_dist.data.manifest import MANIFEST_PATH, Manifest, ManifestError, Shard, ZarrShard
from tmu_dist.data.ranges import WrongSizeError

if TYPE_CHECKING:
    from tmu_dist.data.cache import NodeCache

Codes: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]
"""Frames as they are stored; what the numbers mean is in the manifest (`Units`)."""


class ShardError(ValueError):
    """A shard that is missing, truncated or altered, or a sample that is not what it should be."""


class DamageError(ValueError):
    """Bytes of a shard that are not what they should be; it does not know which shard's."""


def open_archive(url: str, *, cache: NodeCache | None = None) -> Archive:
    """Open a finished archive of either format: read and check its manifest.

    Args:
        url: its folder.
        cache: where this node keeps copies of shards; None reads local shards in place and byte
            ranges of remote ones.

    Raises:
        StorageError: nothing there, unreachable, or no manifest (written last, so the archive
            was not finished).
        ManifestError: the manifest is of another schema or contradicts itself.
    """
    try:
        text = storage.read_text(url, MANIFEST_PATH)
    except storage.MissingObjectError as error:
        raise storage.MissingObjectError(
            f"{url} is not a finished archive: it has no {MANIFEST_PATH}. Check the URL, or run "
            "the `python -m data_prep` command that writes it to its end."
        ) from error
    try:
        return Archive(url, Manifest.from_json(text), cache=cache)
    except ManifestError as error:
        raise ManifestError(f"{storage.join_url(url, MANIFEST_PATH)}: {error}") from error


class SampleIndex:
    """In which shard the samples of an archive are, by split and id."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._ends = {
            split: list(itertools.accumulate(shard.num_samples for shard in shards))
            for split, shards in manifest.splits.items()
        }

    def ends(self, split: str) -> list[int]:
        """Return, for each shard of a split, the id after its last sample's; not to be changed.

        Raises:
            ValueError: no such split.
        """
        if split not in self._ends:
            self._manifest.shards(split)  # refuses an unknown split by name
        return self._ends[split]

    def locate(self, split: str, sample_id: int) -> tuple[int, int]:
        """Return the number of a sample's shard in its split, and of the sample in that shard.

        Raises:
            ValueError: no such split or sample.
        """
        ends = self.ends(split)
        if not 0 <= sample_id < ends[-1]:
            self.check(split, [sample_id])
        number = bisect.bisect_right(ends, sample_id)
        return number, sample_id - (ends[number - 1] if number else 0)

    def check(self, split: str, sample_ids: Sequence[int]) -> None:
        """Refuse ids that a split does not have.

        Raises:
            ValueError: no such split or sample.
        """
        end = self.ends(split)[-1]
        if min(sample_ids, default=0) < 0 or max(sample_ids, default=0) >= end:
            wrong = next(sample_id for sample_id in sample_ids if not 0 <= sample_id < end)
            raise ValueError(f"Split {split!r} has samples 0..{end - 1}, not {wrong}.")


class ShardReader(Protocol):
    """How samples of one format are read; opens what it needs when it needs it."""

    def read(self, split: str, sample_ids: Sequence[int], frames_BTCHW: Codes) -> None:
        """Fill `frames_BTCHW` with the samples.

        Raises:
            ValueError: no such split or sample.
            ShardError: names the shard and the sample.
        """
        ...

    def expect(self, split: str, sample_ids: Sequence[int]) -> None:
        """Take a hint that these samples will soon be read, in this order."""
        ...

    def read_meta(self, split: str, sample_id: int) -> Any:
        """Return a sample's record, not yet checked.

        Raises:
            ValueError: no such split or sample.
            ShardError: names the shard and the sample.
        """
        ...


class Archive:
    """The samples of an archive by split and id. May be sent to other processes."""

    def __init__(self, url: str, manifest: Manifest, *, cache: NodeCache | None = None) -> None:
        self.url = url
        self.manifest = manifest
        self.cache = cache
        self.index = SampleIndex(manifest)
        self._reader = _shard_reader(url, manifest, self.index, cache)

    def __reduce__(self) -> tuple[Any, ...]:
        # Open files and stores belong to one process.
        return _reopened, (self.url, self.manifest, self.cache)

    def read(self, split: str, sample_ids: Sequence[int], out: Codes | None = None) -> Codes:
        """Return frames_BTCHW of the given samples, in their order, of the manifest's dtype.

        Args:
            split: which split.
            sample_ids: plain integers.
            out: filled and returned, if given; C-contiguous, of the right shape and dtype.

        Raises:
            ValueError: no such split or sample, or an `out` that cannot be filled.
            ShardError: names the shard and the sample.
        """
        shape = (len(sample_ids), *self.manifest.sample_shape)
        if out is None:
            out = np.empty(shape, self.manifest.dtype)
        elif out.shape != shape or out.dtype != self.manifest.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous {self.manifest.dtype} of shape {shape}, got "
                f"{out.dtype} of shape {out.shape} and strides {out.strides}."
            )
        self._reader.read(split, sample_ids, out)
        return out

    def expect(self, split: str, sample_ids: Sequence[int]) -> None:
        """Say that these samples will soon be read: ranges of remote shards are fetched ahead."""
        self._reader.expect(split, sample_ids)

    def read_meta(self, split: str, sample_id: int) -> dict[str, Any]:
        """Return the record that was written beside a sample.

        Raises:
            ValueError: no such split or sample.
            ShardError: the record is missing, altered or another sample's.
        """
        record = self._reader.read_meta(split, sample_id)
        if not isinstance(record, dict) or record.get("sample_id") != sample_id:
            shard, in_shard = self.index.locate(split, sample_id)
            path = self.manifest.shards(split)[shard].path
            problem = f"its record is not of sample_id {sample_id}"
            raise shard_error(self.url, path, f"sample {in_shard}", problem)
        return record


def shard_error(url: str, path: str, where: str, problem: str) -> ShardError:
    """Say what is wrong where, and what to do."""
    return ShardError(
        f"{storage.join_url(url, path)}, {where}: {problem}. Run `python -m data_prep verify "
        f"{url}` for the whole damage; write or copy the archive again."
    )


def problem_of(error: Exception, shard: Shard | ZarrShard) -> str:
    """Say what was wrong with a shard when it was read."""
    if isinstance(error, DamageError):
        return str(error)
    if isinstance(error, storage.MissingObjectError):
        return "the shard is missing"
    if isinstance(error, WrongSizeError):
        return (
            f"the shard is truncated or replaced: it has {error.num_bytes} bytes, "
            f"the manifest says {shard.num_bytes}"
        )
    return f"cannot be read: {error}"


def _reopened(url: str, manifest: Manifest, cache: NodeCache | None) -> Archive:
    return Archive(url, manifest, cache=cache)


def _shard_reader(
    url: str, manifest: Manifest, index: SampleIndex, cache: NodeCache | None
) -> ShardReader:
    # Loaded when needed, because both import from here.
    if manifest.format == "webdataset":
        from tmu_dist.data.tar_archive import TarReader

        return TarReader(url, manifest, index, cache)
    from tmu_dist.data.zarr_archive import ZarrReader

    return ZarrReader(url, manifest, index, cache)
