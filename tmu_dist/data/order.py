"""Which samples are read when, and by whom: pure functions of numbers.

The order of an epoch depends on the shard sizes, seed, epoch and fraction alone. World size, worker
count and restarts cannot change it, and a position in it is one number: samples consumed. Own keyed
hashing (splitmix64) instead of a library's generator, so the order outlives library versions.

Not here: reading (archive.py), batches as tensors and the run over epochs (loader.py).

Shape letters: N samples of the epoch, G samples of a global batch, B samples of one rank's part.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 2
"""Part of what a checkpoint records: raise it with any change to the order below."""

# Uses of the hash. Different uses of one seed must be independent.
_SUBSET, _SHARDS, _SAMPLES = 1, 2, 3


class EpochOrder(NamedTuple):
    """The samples of one epoch in the order of consumption."""

    ids: NDArray[np.int64]
    """Sample ids [N]: positions in the split, counted through its shards."""
    lanes: NDArray[np.int32]
    """Lane of each sample [N]: samples of one lane come from neighbouring shards."""


class GlobalBatch(NamedTuple):
    """The samples of one step over all ranks, or one rank's part of them."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    """1 for a sample, 0 for a repeat that only fills up the epoch's last batch."""
    global_count: int
    """Real samples in the whole global batch, also in one rank's part."""


def keyed_hash(values: NDArray[np.integer], *key: int) -> NDArray[np.uint64]:
    """Hash integers to 64 bits under a key of integers; splitmix64 rounds, vectorised."""
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _splitmix64(state ^ np.uint64(word % 2**64))
    return _splitmix64(_splitmix64(values.astype(np.uint64)) ^ state)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One output of splitmix64 (Steele, Lea, Flood 2014) per state; uint64 arrays wrap silently."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def count_of_fraction(num_samples: int, fraction: float, full: int | None = None) -> int:
    """Return how many samples a data fraction keeps: rounded up, at least one.

    Args:
        num_samples: how many there are.
        fraction: a multiple of `full`; above 1 where there are more samples than that.
        full: how many samples are 100 %; None: all of them.

    Raises:
        ValueError: the fraction is not positive, or asks for more samples than there are.
    """
    if not 0 < fraction < math.inf:
        raise ValueError(f"A data fraction must be > 0 and finite, got {fraction}.")
    full = num_samples if full is None else full
    # Less a hair, so that 0.07 * 100 (7.000000000000001 in floating point) keeps 7.
    count = max(1, math.ceil(full * fraction - 1e-9))
    if count > num_samples:
        raise ValueError(
            f"A data fraction of {fraction:g} is {count:,} samples, because {full:,} count as "
            f"100 %, but there are {num_samples:,}: use a fraction of at most "
            f"{math.floor(num_samples / full * 1e4) / 1e4:g}, or make a larger archive (data_prep "
            "with more training samples, and --full-train-samples to say how many are 100 %)."
        )
    return count


def epoch_order(
    shard_sizes: Sequence[int],
    *,
    seed: int,
    epoch: int,
    fraction: float = 1.0,
    full: int | None = None,
    shuffle: bool = True,
    window: int = 4096,
    lanes: int = 16,
) -> EpochOrder:
    """Return the order in which one epoch consumes the samples of a split.

    The shards are shuffled and laid end to end; that line is cut into `lanes` equal lanes, each
    lane is shuffled within windows, and the lanes are read in turn. Neighbours in the order come
    from different shards, yet a reader of one lane touches only few shards at a time.

    Whether a sample belongs to a fraction depends on its id alone: samples are ranked by a hash of
    their ids, and the first so many are kept. So a smaller fraction's subset lies in a larger one's
    and is spread over the whole split, and it is the same for every seed and epoch.

    Args:
        shard_sizes: samples per shard, in manifest order.
        seed: of the shuffling.
        epoch: which epoch, from 0.
        fraction: samples to use, as a multiple of `full`.
        full: how many samples are 100 %; None: all of them.
        shuffle: False gives the samples in natural (id) order, all in lane 0.
        window: samples per shuffle window in a lane.
        lanes: how many shard neighbourhoods are interleaved.

    Raises:
        ValueError: no samples, or an argument out of range.
    """
    sizes = np.asarray(shard_sizes, np.int64)
    if sizes.size == 0 or sizes.min() < 0 or sizes.sum() < 1:
        raise ValueError(f"There must be a sample in the shards, got sizes {list(shard_sizes)}.")
    if window < 1 or lanes < 1 or epoch < 0:
        raise ValueError(
            "window and lanes must be at least 1 and epoch at least 0, "
            f"got window={window}, lanes={lanes}, epoch={epoch}."
        )
    num_samples = int(sizes.sum())
    keep = count_of_fraction(num_samples, fraction, full)
    shards = np.arange(len(sizes))
    if shuffle:
        shards = shards[np.argsort(keyed_hash(shards, seed, epoch, _SHARDS), kind="stable")]
    first_ids = np.cumsum(sizes) - sizes
    ids = _concatenated_ranges(first_ids[shards], sizes[shards])
    if keep < num_samples:
        ids = ids[_is_kept(num_samples, keep)[ids]]
    if not shuffle:
        return EpochOrder(ids, np.zeros(len(ids), np.int32))
    return _shuffle_in_lanes(ids, keyed_hash(ids, seed, epoch, _SAMPLES), window, lanes)


def global_batch(order: EpochOrder, start: int, global_batch_size: int) -> GlobalBatch:
    """Return the samples of the step that starts at a position of the epoch.

    The last batch of an epoch is filled up with repeats of its own samples of weight 0, so that
    all ranks take equally many steps. Samples are sorted by lane: with `rank_slice`, a rank stays
    on its own lanes, and so on its own shards, as far as the sizes allow.
    """
    if not 0 <= start < len(order.ids):
        raise ValueError(f"A batch must start in [0, {len(order.ids)}), got {start}.")
    real = slice(start, start + global_batch_size)
    count = len(order.ids[real])
    ids = np.resize(order.ids[real], global_batch_size)
    weights = (np.arange(global_batch_size) < count).astype(np.float32)
    by_lane = np.argsort(np.resize(order.lanes[real], global_batch_size), kind="stable")
    return GlobalBatch(ids[by_lane], weights[by_lane], count)


def rank_slice(batch: GlobalBatch, rank: int, world_size: int) -> GlobalBatch:
    """Return one rank's part [B] of a global batch [G], G = B * world_size."""
    per_rank, rest = divmod(len(batch.ids), world_size)
    if rest:
        raise ValueError(
            f"A global batch of {len(batch.ids)} cannot be dealt evenly to {world_size} ranks: "
            f"choose a multiple of {world_size}."
        )
    part = slice(rank * per_rank, (rank + 1) * per_rank)
    return batch._replace(ids=batch.ids[part], weights=batch.weights[part])


def _is_kept(num_samples: int, keep: int) -> NDArray[np.bool_]:
    """Say of each sample id whether it is among the `keep` that a fraction has."""
    rank = keyed_hash(np.arange(num_samples), _SUBSET)  # one to one, so there are no ties
    return rank <= np.partition(rank, keep - 1)[keep - 1]


def _concatenated_ranges(
    starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return start, start + 1, ... of every range, end to end."""
    offsets = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(offsets, lengths) + np.arange(lengths.sum())


def _shuffle_in_lanes(
    ids: NDArray[np.int64], hashes: NDArray[np.uint64], window: int, lanes: int
) -> EpochOrder:
    """Cut into lanes, sort each window of a lane by hash, and read the lanes in turn."""
    num_samples = len(ids)
    base, longer = divmod(num_samples, lanes)  # the first `longer` lanes hold one sample more
    lane_sizes = base + (np.arange(lanes) < longer)
    lane = np.repeat(np.arange(lanes), lane_sizes)
    index_in_lane = np.arange(num_samples) - (np.cumsum(lane_sizes) - lane_sizes)[lane]
    windows_per_lane = base // window + 1
    block = lane * windows_per_lane + index_in_lane // window
    # One sort key: the block in the high bits, as many bits of the hash as fit below. Blocks are
    # already in order, so this sorts inside each block only; ties keep the order of the line.
    bits = (lanes * windows_per_lane).bit_length()
    key = (block.astype(np.uint64) << np.uint64(64 - bits)) | (hashes >> np.uint64(bits))
    shuffled = ids[np.argsort(key, kind="stable")]
    # Longer lanes come first, so the sample at index j of lane l is number j * lanes + l.
    in_turn = np.empty_like(shuffled)
    in_turn[index_in_lane * lanes + lane] = shuffled
    return EpochOrder(in_turn, (np.arange(num_samples) % lanes).astype(np.int32))
