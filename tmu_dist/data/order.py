"""Which samples are read when, and by whom: pure functions of numbers.

The order of an epoch depends on the data sets (shard sizes, fractions, weights), seed and epoch
alone. World size, worker count and restarts cannot change it, and a position in it is one number:
samples consumed. Own keyed hashing (splitmix64) instead of a library's generator, so the order
outlives library versions.

Not here: reading (archive.py), batches as tensors and the run over epochs (loader.py).

Shape letters: N samples of the epoch, S steps, G samples of a global batch, B samples of one rank's
part.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tmu_dist.draws import keyed_hash, keyed_uniform

ORDER_VERSION = 3
"""Part of what a checkpoint records: raise it with any change to the order below."""

# Uses of the hash. Different uses of one seed must be independent.
_SUBSET, _SHARDS, _SAMPLES, _MIXTURE = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of an order, and how much of it is used."""

    shard_sizes: tuple[int, ...]
    """Samples per shard, in manifest order."""
    fraction: float = 1.0
    """Samples to use, as a multiple of `full`."""
    full: int | None = None
    """How many samples are 100 %; None: all of them."""

    def __post_init__(self) -> None:
        if not self.shard_sizes or min(self.shard_sizes) < 0 or not self.num_samples:
            raise ValueError(
                f"There must be a sample in the shards, got sizes {list(self.shard_sizes)}."
            )

    @property
    def num_samples(self) -> int:
        """All samples, also those that the fraction leaves out."""
        return sum(self.shard_sizes)

    @property
    def num_used(self) -> int:
        """Samples that the fraction keeps.

        Raises:
            ValueError: as in `count_of_fraction`.
        """
        return count_of_fraction(self.num_samples, self.fraction, self.full)


class EpochOrder(NamedTuple):
    """The samples of one epoch in the order of consumption."""

    ids: NDArray[np.int64]
    """Sample ids [N]: positions in the split, counted through its shards; of several data sets,
    counted on from one to the next."""
    lanes: NDArray[np.int32]
    """Lane of each sample [N]: samples of one lane come from neighbouring shards."""


class GlobalBatches(NamedTuple):
    """The samples of consecutive steps over all ranks, or one rank's part of them."""

    ids: NDArray[np.int64]
    """[S, G], of one rank [S, B]."""
    weights: NDArray[np.float32]
    """1 for a sample, 0 for a repeat that only fills up the epoch's last batch."""
    counts: NDArray[np.int64]
    """Real samples in each whole global batch [S], also in one rank's part."""


class ShardUses(NamedTuple):
    """When some ranks use which shards in one epoch, as positions in it."""

    shards: NDArray[np.int64]
    """Numbers of shards, counted on from one data set to the next, by rising first use."""
    first: NDArray[np.int64]
    """Where the first step that needs the shard starts."""
    last: NDArray[np.int64]
    """Where the last step that needs it starts."""


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


def counts_of_epoch(data_sets: Sequence[DataSet], weights: Sequence[float] = ()) -> list[int]:
    """Return how many samples of each data set an epoch consumes.

    Args:
        data_sets: what is mixed.
        weights: of each data set, its share of the epoch; an epoch is as long as all used samples
            together. Empty: every used sample exactly once.

    Raises:
        ValueError: not one positive weight for each data set, or one so small that an epoch has no
            sample of its data set.
    """
    used = [data_set.num_used for data_set in data_sets]
    if not weights:
        return used
    if len(weights) != len(used) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"A mixture needs one positive, finite weight for each of its {len(used)} data sets, "
            f"got {list(weights)}."
        )
    shares = [sum(used) * weight / math.fsum(weights) for weight in weights]
    counts = [math.floor(share) for share in shares]
    # The largest remainders get what is missing; of equal ones the first data set's.
    by_remainder = sorted(range(len(used)), key=lambda k: counts[k] - shares[k])
    for k in by_remainder[: sum(used) - sum(counts)]:
        counts[k] += 1
    if min(counts) < 1:
        raise ValueError(
            f"With weights {list(weights)}, an epoch of {sum(used):,} samples has none of data set "
            f"{counts.index(min(counts))}: give it more weight, or leave it out."
        )
    return counts


def epoch_order(
    data_sets: Sequence[DataSet],
    *,
    seed: int,
    epoch: int,
    weights: Sequence[float] = (),
    shuffle: bool = True,
    window: int = 4096,
    lanes: int = 16,
) -> EpochOrder:
    """Return the order in which one epoch consumes the samples of a split.

    The shards of all data sets are shuffled and laid end to end; that line is cut into `lanes`
    equal lanes, each lane is shuffled within windows, and the lanes are read in turn. Neighbours in
    the order come from different shards, yet a reader of one lane touches only few shards at a
    time.

    With weights each data set has a line and passes of its own: an epoch takes the next so many of
    its samples, and begins another pass where one ends. The data sets alternate evenly: of n
    samples of an epoch, one lies in each n-th part of it.

    Whether a sample belongs to a fraction depends on its place in its data set alone: samples are
    ranked by a hash, and the first so many are kept. So a smaller fraction's subset lies in a
    larger one's and is spread over the whole split, the same for every seed, epoch and mixture.

    Args:
        data_sets: what is consumed.
        seed: of the shuffling.
        epoch: which epoch, from 0.
        weights: as in `counts_of_epoch`.
        shuffle: False gives the samples in natural (id) order, all in lane 0; without weights.
        window: samples per shuffle window in a lane.
        lanes: how many shard neighbourhoods are interleaved (with weights: of each data set).

    Raises:
        ValueError: an argument out of range.
    """
    if window < 1 or lanes < 1 or epoch < 0:
        raise ValueError(
            "window and lanes must be at least 1 and epoch at least 0, "
            f"got window={window}, lanes={lanes}, epoch={epoch}."
        )
    if weights and not shuffle:
        raise ValueError(
            "Samples that are mixed by weight have no natural order: use shuffle=True."
        )
    line = _Line(seed, window, lanes)
    if not weights:
        return line.one_pass(data_sets, 0, 0, epoch if shuffle else None)
    counts = counts_of_epoch(data_sets, weights)
    first_ids = _starts([data_set.num_samples for data_set in data_sets])
    first_shards = _starts([len(data_set.shard_sizes) for data_set in data_sets])
    parts, times = [], []
    for k, (data_set, count) in enumerate(zip(data_sets, counts, strict=True)):
        start, used = epoch * count, data_set.num_used
        passes = [
            line.one_pass([data_set], first_ids[k], first_shards[k], number)
            for number in range(start // used, (start + count - 1) // used + 1)
        ]
        skipped = start % used
        ids = np.concatenate([each.ids for each in passes])[skipped : skipped + count]
        lane = np.concatenate([each.lanes for each in passes])[skipped : skipped + count]
        parts.append(EpochOrder(ids, lane + np.int32(k * lanes)))
        # When each is consumed, in [0, 1); products and quotients are exact on every machine.
        jitter = keyed_uniform(np.arange(count), seed, epoch, _MIXTURE, k)
        times.append((np.arange(count) + jitter) / count)
    mixed = np.argsort(np.concatenate(times), kind="stable")
    return EpochOrder(
        np.concatenate([part.ids for part in parts])[mixed],
        np.concatenate([part.lanes for part in parts])[mixed],
    )


def global_batches(
    order: EpochOrder, start: int, num_steps: int, global_batch_size: int
) -> GlobalBatches:
    """Return the samples of up to `num_steps` steps from a position of the epoch on.

    The last batch of an epoch is filled up with repeats of its own samples of weight 0, so that
    all ranks take equally many steps. Samples of a step are sorted by lane: with `rank_slice`, a
    rank stays on its own lanes, and so on its own shards, as far as the sizes allow.
    """
    total = len(order.ids)
    if not 0 <= start < total:
        raise ValueError(f"A batch must start in [0, {total}), got {start}.")
    num_steps = min(num_steps, -(-(total - start) // global_batch_size))
    starts = start + global_batch_size * np.arange(num_steps)
    counts = np.minimum(total - starts, global_batch_size)
    in_batch = np.arange(global_batch_size)
    places = starts[:, None] + in_batch
    places[-1] = starts[-1] + in_batch % counts[-1]
    weights = (in_batch < counts[:, None]).astype(np.float32)
    by_lane = np.argsort(order.lanes[places], axis=1, kind="stable")
    return GlobalBatches(
        np.take_along_axis(order.ids[places], by_lane, axis=1),
        np.take_along_axis(weights, by_lane, axis=1),
        counts,
    )


def rank_slice(batches: GlobalBatches, ranks: range, world_size: int) -> GlobalBatches:
    """Return the part [S, B] of some neighbouring ranks in global batches [S, G].

    Every rank has equally many places; where G is no multiple of the ranks, the last places are
    filled up with repeats of weight 0.
    """
    size = batches.ids.shape[1]
    per_rank = -(-size // world_size)
    places = np.arange(ranks.start * per_rank, ranks.stop * per_rank)
    weights = batches.weights[:, places % size]
    weights[:, places >= size] = 0
    return batches._replace(ids=batches.ids[:, places % size], weights=weights)


def shard_uses(
    order: EpochOrder,
    shard_sizes: Sequence[int],
    *,
    start: int,
    global_batch_size: int,
    ranks: range,
    world_size: int,
) -> ShardUses:
    """Return which shards some ranks need, and from when to when, from a position on.

    Args:
        order: of the epoch.
        shard_sizes: of all data sets, one after the other.
        start: a position in the epoch.
        global_batch_size: samples per step over all ranks.
        ranks: neighbouring ranks, such as those of one node.
        world_size: number of all ranks.
    """
    ends = np.cumsum(shard_sizes)
    first = np.full(len(ends), -1, np.int64)
    last = np.full(len(ends), -1, np.int64)
    steps_at_once = max(1, 2**20 // global_batch_size)  # so that little memory is needed
    for block in range(start, len(order.ids), steps_at_once * global_batch_size):
        batches = global_batches(order, block, steps_at_once, global_batch_size)
        ids = rank_slice(batches, ranks, world_size).ids
        shards = np.searchsorted(ends, ids, side="right")
        positions = block + global_batch_size * np.arange(len(ids))
        positions = np.broadcast_to(positions[:, None], ids.shape)
        # Of several values for one place, numpy keeps the last.
        last[shards.ravel()] = positions.ravel()
        earliest = np.full(len(ends), -1, np.int64)
        earliest[shards.ravel()[::-1]] = positions.ravel()[::-1]
        first = np.where((first < 0) & (earliest >= 0), earliest, first)
    used = np.flatnonzero(first >= 0)
    used = used[np.argsort(first[used], kind="stable")]
    return ShardUses(used, first[used], last[used])


class _Line(NamedTuple):
    """How samples are laid out and shuffled."""

    seed: int
    window: int
    lanes: int

    def one_pass(
        self, data_sets: Sequence[DataSet], first_id: int, first_shard: int, number: int | None
    ) -> EpochOrder:
        """Return every used sample of some data sets once.

        Args:
            data_sets: neighbours in the mixture.
            first_id: id of their first sample.
            first_shard: number of their first shard.
            number: of the pass; None: in natural order.
        """
        sizes = np.concatenate([np.asarray(each.shard_sizes, np.int64) for each in data_sets])
        shards = np.arange(len(sizes))
        if number is not None:
            hashes = keyed_hash(first_shard + shards, self.seed, number, _SHARDS)
            shards = shards[np.argsort(hashes, kind="stable")]
        ids = _concatenated_ranges((np.cumsum(sizes) - sizes)[shards], sizes[shards])
        if any(each.num_used < each.num_samples for each in data_sets):
            ids = ids[np.concatenate([_is_used(each) for each in data_sets])[ids]]
        ids += first_id
        if number is None:
            return EpochOrder(ids, np.zeros(len(ids), np.int32))
        return self._shuffle(ids, keyed_hash(ids, self.seed, number, _SAMPLES))

    def _shuffle(self, ids: NDArray[np.int64], hashes: NDArray[np.uint64]) -> EpochOrder:
        """Cut into lanes, sort each window of a lane by hash, and read the lanes in turn."""
        num_samples, lanes = len(ids), self.lanes
        base, longer = divmod(num_samples, lanes)  # the first `longer` lanes hold one sample more
        lane_sizes = base + (np.arange(lanes) < longer)
        lane = np.repeat(np.arange(lanes), lane_sizes)
        index_in_lane = np.arange(num_samples) - (np.cumsum(lane_sizes) - lane_sizes)[lane]
        windows_per_lane = base // self.window + 1
        block = lane * windows_per_lane + index_in_lane // self.window
        # One sort key: the block in the high bits, as many bits of the hash as fit below. Blocks
        # are already in order, so this sorts inside each only; ties keep the order of the line.
        bits = (lanes * windows_per_lane).bit_length()
        key = (block.astype(np.uint64) << np.uint64(64 - bits)) | (hashes >> np.uint64(bits))
        shuffled = ids[np.argsort(key, kind="stable")]
        # Longer lanes come first, so the sample at index j of lane l is number j * lanes + l.
        in_turn = np.empty_like(shuffled)
        in_turn[index_in_lane * lanes + lane] = shuffled
        return EpochOrder(in_turn, (np.arange(num_samples) % lanes).astype(np.int32))


def _is_used(data_set: DataSet) -> NDArray[np.bool_]:
    """Say of each sample whether it is among those that the fraction keeps."""
    rank = keyed_hash(np.arange(data_set.num_samples), _SUBSET)  # one to one, so there are no ties
    return rank <= np.partition(rank, data_set.num_used - 1)[data_set.num_used - 1]


def _starts(lengths: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))[:-1]


def _concatenated_ranges(
    starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return start, start + 1, ... of every range, end to end."""
    offsets = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(offsets, lengths) + np.arange(lengths.sum())
