"""The order of samples: a permutation, the same for everybody, and resumable from one number."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmu_dist.data.order import (
    DataSet,
    EpochOrder,
    count_of_fraction,
    counts_of_epoch,
    epoch_order,
    global_batches,
    rank_slice,
    shard_uses,
)
from tmu_dist.draws import _splitmix64, keyed_hash

# In Zarr archives a shard may hold no sample's beginning.
shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 1000)
windows = st.integers(1, 64)
lanes = st.integers(1, 20)


def one_set_order(
    sizes: list[int], *, fraction: float = 1.0, full: int | None = None, **options: Any
) -> EpochOrder:
    """The order of a single data set."""
    data_set = DataSet(shard_sizes=tuple(sizes), fraction=fraction, full=full)
    return epoch_order([data_set], **options)


def consumed_ids(order: EpochOrder, batch_size: int, start: int = 0) -> list[int]:
    """Real sample ids in the order in which a run of one process consumes them."""
    batches = global_batches(order, start, len(order.ids), batch_size)
    return batches.ids[batches.weights == 1].tolist()


@settings(deadline=None)  # other work on the machine is no failure
@given(shard_sizes, seeds, epochs, windows, lanes)
def test_an_epoch_is_a_permutation(sizes, seed, epoch, window, lanes):
    order = one_set_order(sizes, seed=seed, epoch=epoch, window=window, lanes=lanes)
    assert sorted(order.ids.tolist()) == list(range(sum(sizes)))
    assert order.lanes.max() < lanes


@settings(deadline=None)
@given(shard_sizes, seeds, epochs, windows, lanes)
def test_order_agrees_with_a_plain_python_description(sizes, seed, epoch, window, lanes):
    """The same definition, written without vectorised arithmetic (fraction 1)."""

    def hash_of(value: int, use: int) -> int:
        return int(keyed_hash(np.array([value]), seed, epoch, use)[0])

    shards = sorted(range(len(sizes)), key=lambda shard: hash_of(shard, 2))
    line = [sum(sizes[:shard]) + i for shard in shards for i in range(sizes[shard])]
    queues = []
    for lane in np.array_split(np.array(line), lanes):
        parts = [lane[i : i + window].tolist() for i in range(0, len(lane), window)]
        # All but the key's lowest bits of the hash decide; 40 bits never tie in practice.
        queues.append([i for part in parts for i in sorted(part, key=lambda i: hash_of(i, 3))])
    expected = [queue[j] for j in range(len(queues[0])) for queue in queues if j < len(queue)]
    order = one_set_order(sizes, seed=seed, epoch=epoch, window=window, lanes=lanes)
    assert order.ids.tolist() == expected


def test_known_answers_never_change():
    """Checkpoints of older versions must resume: a change here needs a new ORDER_VERSION."""
    # The published first outputs for seed 1234567; the generator's state grows by the gamma.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + k * gamma) % 2**64 for k in range(3)], np.uint64)
    assert _splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    order = one_set_order([4, 3, 5], seed=7, epoch=2, fraction=0.75, window=4, lanes=2)
    assert order.ids.tolist() == [3, 10, 5, 9, 4, 11, 2, 7, 6]


@settings(deadline=None)
@given(shard_sizes, seeds, epochs, st.floats(0.01, 1), st.floats(0.01, 1))
def test_fractions_are_nested_and_the_same_in_every_epoch(sizes, seed, epoch, a, b):
    small, large = sorted([a, b])
    subset = set(one_set_order(sizes, seed=seed, epoch=0, fraction=small).ids.tolist())
    assert len(subset) == count_of_fraction(sum(sizes), small)
    assert subset <= set(one_set_order(sizes, seed=seed, epoch=epoch, fraction=large).ids.tolist())
    in_order = one_set_order(sizes, seed=seed, epoch=0, fraction=small, shuffle=False).ids
    assert in_order.tolist() == sorted(subset)


@settings(deadline=None)
@given(shard_sizes, seeds, epochs, st.data())
def test_what_counts_as_all_can_be_less_than_there_is(sizes, seed, epoch, data):
    """25, 50, 75, 100 and up to 200 % and more: nested, of the right size, in every epoch."""
    full = data.draw(st.integers(1, sum(sizes)))

    def subset(fraction: float, seed: int = seed, epoch: int = epoch) -> set[int]:
        order = one_set_order(sizes, seed=seed, epoch=epoch, fraction=fraction, full=full)
        return set(order.ids.tolist())

    fractions = [f for f in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0) if math.ceil(full * f) <= sum(sizes)]
    subsets = [subset(fraction) for fraction in (*fractions, sum(sizes) / full)]
    assert [len(s) for s in subsets] == [math.ceil(full * f) for f in fractions] + [sum(sizes)]
    assert all(small <= large for small, large in itertools.pairwise(subsets))
    assert [subset(fraction, epoch=0) for fraction in fractions] == subsets[:-1]
    # What 100 % is belongs to the archive, not to the run.
    assert subset(1.0, seed=seed + 1) == subset(1.0)


@settings(deadline=None)
@given(shard_sizes, seeds, epochs, st.floats(0.01, 1))
def test_full_data_of_all_samples_is_the_default(sizes, seed, epoch, fraction):
    plain = one_set_order(sizes, seed=seed, epoch=epoch, fraction=fraction)
    named = one_set_order(sizes, seed=seed, epoch=epoch, fraction=fraction, full=sum(sizes))
    assert named.ids.tolist() == plain.ids.tolist()


def test_the_data_amounts_of_the_paper():
    """25 % of 10,000 sequences to 200 %, in an archive of 20,000."""
    sizes = [250] * 80
    counts = {
        fraction: len(one_set_order(sizes, seed=1, epoch=0, fraction=fraction, full=10_000).ids)
        for fraction in (0.25, 0.5, 0.75, 1.0, 2.0)
    }
    assert counts == {0.25: 2500, 0.5: 5000, 0.75: 7500, 1.0: 10_000, 2.0: 20_000}


@settings(deadline=None)
@given(shard_sizes, seeds, seeds, st.floats(0.01, 1))
def test_a_fraction_is_a_function_of_the_sample_ids(sizes, seed, other_seed, fraction):
    """Neither the seed nor how samples lie in shards plays a part."""
    one = one_set_order(sizes, seed=seed, epoch=0, fraction=fraction)
    other = one_set_order([sum(sizes)], seed=other_seed, epoch=3, fraction=fraction)
    assert sorted(one.ids.tolist()) == sorted(other.ids.tolist())


def test_a_fraction_is_spread_over_the_split():
    ids = one_set_order([1000], seed=0, epoch=0, fraction=0.25).ids
    counts, _ = np.histogram(ids, bins=10, range=(0, 1000))
    assert counts.min() >= 12 and counts.max() <= 40


def test_fraction_counts_round_up_but_not_for_rounding_errors():
    assert count_of_fraction(100, 0.07) == 7
    assert count_of_fraction(10, 0.25) == 3
    assert count_of_fraction(3, 0.01) == 1


@settings(deadline=None)
@given(shard_sizes, seeds, st.integers(1, 13), st.integers(1, 9))
def test_ranks_share_the_same_global_batches(sizes, seed, size, world_size):
    """Whatever the numbers: equally many places each, the batch in order, then padding."""
    order = one_set_order(sizes, seed=seed, epoch=0, lanes=4)
    whole = global_batches(order, 0, len(order.ids), size)
    parts = [rank_slice(whole, range(r, r + 1), world_size) for r in range(world_size)]
    assert {part.ids.shape for part in parts} == {(len(whole.ids), math.ceil(size / world_size))}
    ids = np.concatenate([part.ids for part in parts], axis=1)
    weights = np.concatenate([part.weights for part in parts], axis=1)
    assert ids[:, :size].tolist() == whole.ids.tolist()
    assert weights[:, :size].tolist() == whole.weights.tolist()
    assert not weights[:, size:].any()
    # Padding is of the step's own samples: nothing else is read for it.
    for own, step in zip(ids.tolist(), whole.ids.tolist(), strict=True):
        assert set(own) == set(step)
    for part in parts:
        assert part.counts.tolist() == whole.weights.sum(axis=1).tolist()
    first_half = range((world_size + 1) // 2)
    joined = rank_slice(whole, first_half, world_size)
    assert joined.ids.tolist() == np.concatenate([parts[r].ids for r in first_half], 1).tolist()


@settings(deadline=None)
@given(shard_sizes, seeds, st.integers(1, 13), st.integers(1, 9), st.integers(1, 9))
def test_the_samples_of_an_epoch_do_not_depend_on_the_ranks(sizes, seed, size, before, after):
    """Also where their number changes in the middle: each sample once, step for step the same."""
    order = one_set_order(sizes, seed=seed, epoch=0, lanes=3)
    whole = global_batches(order, 0, len(order.ids), size)
    found = []
    for step, count in enumerate(whole.counts.tolist()):
        now = global_batches(order, step * size, 1, size)
        world_size = before if step < len(whole.ids) // 2 else after
        ids = []
        for rank in range(world_size):
            part = rank_slice(now, range(rank, rank + 1), world_size)
            ids += part.ids[part.weights > 0].tolist()
        assert ids == whole.ids[step][whole.weights[step] > 0].tolist()
        assert len(ids) == count
        found += ids
    assert sorted(found) == sorted(order.ids.tolist())


def test_more_ranks_than_samples():
    """Three of eight ranks have a sample each of the three that end an epoch, the others none."""
    order = one_set_order([7], seed=0, epoch=0, shuffle=False)
    whole = global_batches(order, 4, 1, 4)
    parts = [rank_slice(whole, range(r, r + 1), 8) for r in range(8)]
    assert [part.ids.tolist() for part in parts] == [[[i]] for i in (4, 5, 6, 4, 4, 5, 6, 4)]
    assert [part.weights.item() for part in parts] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert {part.counts.item() for part in parts} == {3}
    two = [rank_slice(global_batches(order, 0, 1, 5), range(r, r + 1), 2) for r in range(2)]
    assert [part.ids.tolist() for part in two] == [[[0, 1, 2]], [[3, 4, 0]]]
    assert [part.weights.tolist() for part in two] == [[[1, 1, 1]], [[1, 1, 0]]]


@settings(deadline=None)
@given(shard_sizes, seeds, st.integers(1, 50), st.data())
def test_resuming_gives_the_rest(sizes, seed, batch_size, data):
    order = one_set_order(sizes, seed=seed, epoch=0)
    whole = consumed_ids(order, batch_size)
    start = data.draw(st.sampled_from(range(0, len(order.ids), batch_size)))
    assert consumed_ids(order, batch_size, start) == whole[start:]
    # With another batch size nothing is lost or read twice either.
    assert sorted(consumed_ids(order, 7, start)) == sorted(whole[start:])


def test_the_last_batch_is_filled_with_weightless_repeats():
    order = one_set_order([5, 5], seed=0, epoch=0)
    batches = global_batches(order, 4, 10, 4)
    assert batches.counts.tolist() == [4, 2]
    assert sorted(batches.weights[1].tolist()) == [0, 0, 1, 1]
    assert set(batches.ids[1].tolist()) == set(order.ids[8:].tolist())


@settings(deadline=None)
@given(shard_sizes, seeds, st.integers(1, 30), st.integers(1, 5), st.data())
def test_steps_are_the_same_worked_out_together_or_one_by_one(sizes, seed, size, num_steps, data):
    order = one_set_order(sizes, seed=seed, epoch=0, lanes=5)
    start = data.draw(st.integers(0, len(order.ids) - 1))
    together = global_batches(order, start, num_steps, size)
    assert len(together.ids) == min(num_steps, -(-(len(order.ids) - start) // size))
    for number, (ids, weights, count) in enumerate(zip(*together, strict=True)):
        alone = global_batches(order, start + number * size, 1, size)
        assert ids.tolist() == alone.ids[0].tolist()
        assert weights.tolist() == alone.weights[0].tolist()
        assert count == alone.counts[0] == weights.sum()


def test_shuffling_mixes_shards_and_changes_with_seed_and_epoch():
    sizes = [256] * 40
    orders = [one_set_order(sizes, seed=s, epoch=e).ids for s, e in [(0, 0), (1, 0), (0, 1)]]
    for ids in orders:
        for start in range(0, len(ids), 64):
            assert len(set((ids[start : start + 64] // 256).tolist())) >= 16
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[a] == orders[b]).mean() < 0.01


def test_natural_order_without_shuffling():
    order = one_set_order([3, 2], seed=5, epoch=9, shuffle=False)
    assert order.ids.tolist() == [0, 1, 2, 3, 4]
    assert not order.lanes.any()


@pytest.mark.parametrize("fraction", [0.0, -0.5, float("inf"), float("nan")])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(ValueError, match="must be > 0 and finite"):
        one_set_order([3], seed=0, epoch=0, fraction=fraction)


@pytest.mark.parametrize(
    ("fraction", "full", "message"),
    [
        (
            1.01,
            None,
            r"1\.01 is 31 samples, because 30 count as 100 %, but there are 30: .* most 1,",
        ),
        (2.1, 15, r"2\.1 is 32 samples, because 15 count as 100 %, but there are 30: .* most 2,"),
        (1.0, 40, r"1 is 40 samples, because 40 count as 100 %, but there are 30: .* most 0\.75,"),
    ],
)
def test_more_samples_than_there_are_cannot_be_asked_for(fraction, full, message):
    with pytest.raises(ValueError, match=message + r".* --full-train-samples"):
        one_set_order([10] * 3, seed=0, epoch=0, fraction=fraction, full=full)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="must be a sample"):
        one_set_order([], seed=0, epoch=0)
    with pytest.raises(ValueError, match="must be a sample"):
        one_set_order([0, 0], seed=0, epoch=0)
    with pytest.raises(ValueError, match="must be a sample"):
        one_set_order([4, -1], seed=0, epoch=0)
    with pytest.raises(ValueError, match="window=0"):
        one_set_order([4], seed=0, epoch=0, window=0)
    order = one_set_order([4], seed=0, epoch=0)
    with pytest.raises(ValueError, match="must start in"):
        global_batches(order, 4, 1, 2)


# Several data sets

mixtures = st.lists(
    st.tuples(shard_sizes, st.floats(0.05, 1), st.floats(0.2, 5)), min_size=2, max_size=4
)


def data_sets_of(mixture) -> list[DataSet]:
    return [DataSet(shard_sizes=tuple(sizes), fraction=fraction) for sizes, fraction, _ in mixture]


def split_by_set(ids: list[int], data_sets: list[DataSet]) -> list[list[int]]:
    """Own ids of each data set, in the order of consumption."""
    ends = list(itertools.accumulate(each.num_samples for each in data_sets))
    starts = [0, *ends[:-1]]
    return [[i - a for i in ids if a <= i < b] for a, b in zip(starts, ends, strict=True)]


@settings(deadline=None)
@given(mixtures, seeds, epochs, windows, lanes)
def test_without_weights_every_used_sample_comes_once(mixture, seed, epoch, window, lanes):
    data_sets = data_sets_of(mixture)
    order = epoch_order(data_sets, seed=seed, epoch=epoch, window=window, lanes=lanes)
    parts = split_by_set(order.ids.tolist(), data_sets)
    assert len(order.ids) == sum(counts_of_epoch(data_sets))
    for data_set, ids in zip(data_sets, parts, strict=True):
        # The same subset as when it is learnt alone: fractions do not know of mixtures.
        alone = epoch_order([data_set], seed=seed + 1, epoch=0)
        assert sorted(ids) == sorted(alone.ids.tolist())


@settings(deadline=None)
@given(mixtures, seeds, st.integers(1, 4))
def test_weighted_data_sets_go_through_passes_of_their_own(mixture, seed, num_epochs):
    data_sets = data_sets_of(mixture)
    weights = [weight for _, _, weight in mixture]
    try:
        counts = counts_of_epoch(data_sets, weights)
    except ValueError as error:
        assert "give it more weight" in str(error)
        return
    total = sum(data_set.num_used for data_set in data_sets)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1
    orders = [
        epoch_order(data_sets, seed=seed, epoch=epoch, weights=weights)
        for epoch in range(num_epochs)
    ]
    per_epoch = [split_by_set(order.ids.tolist(), data_sets) for order in orders]
    for k, data_set in enumerate(data_sets):
        assert {len(parts[k]) for parts in per_epoch} == {counts[k]}
        line = [i for parts in per_epoch for i in parts[k]]
        used = epoch_order([data_set], seed=0, epoch=0, shuffle=False).ids.tolist()
        for start in range(0, len(line), len(used)):
            one_pass = line[start : start + len(used)]
            assert len(set(one_pass)) == len(one_pass)
            assert set(one_pass) <= set(used)
            if len(one_pass) == len(used):
                assert sorted(one_pass) == used


def test_weighted_data_sets_alternate_evenly():
    data_sets = [DataSet(shard_sizes=(100,) * 30), DataSet(shard_sizes=(50,) * 20)]
    ids = epoch_order(data_sets, seed=3, epoch=1, weights=(1, 3)).ids
    assert counts_of_epoch(data_sets, (1, 3)) == [1000, 3000]
    for start in range(0, 4000, 40):
        assert abs((ids[start : start + 40] >= 3000).sum() - 30) <= 2


def test_known_answers_of_mixtures_never_change():
    data_sets = [DataSet(shard_sizes=(3, 2)), DataSet(shard_sizes=(4,), fraction=0.75)]
    once = epoch_order(data_sets, seed=7, epoch=2, window=4, lanes=2)
    assert once.ids.tolist() == [3, 8, 0, 5, 1, 7, 2, 4]
    weighted = epoch_order(data_sets, seed=7, epoch=2, weights=(1, 3), window=4, lanes=2)
    assert weighted.ids.tolist() == [7, 0, 8, 5, 7, 8, 5, 0]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, math.inf)])
def test_bad_weights_are_refused(weights):
    data_sets = [DataSet(shard_sizes=(4,)), DataSet(shard_sizes=(4,))]
    with pytest.raises(ValueError, match="one positive, finite weight for each of its 2"):
        epoch_order(data_sets, seed=0, epoch=0, weights=weights)


def test_weights_that_starve_a_data_set_are_refused():
    data_sets = [DataSet(shard_sizes=(4,)), DataSet(shard_sizes=(4,))]
    with pytest.raises(ValueError, match="has none of data set 1: give it more weight"):
        counts_of_epoch(data_sets, (1000, 1))
    with pytest.raises(ValueError, match="no natural order"):
        epoch_order(data_sets, seed=0, epoch=0, weights=(1, 1), shuffle=False)


@settings(deadline=None)
@given(mixtures, seeds, st.integers(1, 3), st.sampled_from([1, 2, 4]), st.data())
def test_uses_of_shards_are_those_of_the_steps(mixture, seed, per_rank, world_size, data):
    data_sets = data_sets_of(mixture)
    order = epoch_order(data_sets, seed=seed, epoch=0, lanes=3)
    size = per_rank * world_size
    start = data.draw(st.integers(0, len(order.ids) - 1))
    ranks = range(data.draw(st.integers(0, world_size - 1)), world_size)
    sizes = [size for data_set in data_sets for size in data_set.shard_sizes]
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position in range(start, len(order.ids), size):
        step = rank_slice(global_batches(order, position, 1, size), ranks, world_size)
        for shard in shard_of[step.ids.ravel()].tolist():
            first.setdefault(shard, position)
            last[shard] = position
    uses = shard_uses(
        order, sizes, start=start, global_batch_size=size, ranks=ranks, world_size=world_size
    )
    assert uses.first.tolist() == sorted(first.values())
    assert dict(zip(uses.shards.tolist(), uses.first.tolist(), strict=True)) == first
    assert dict(zip(uses.shards.tolist(), uses.last.tolist(), strict=True)) == last


def test_ranks_keep_to_their_own_shards():
    """With lanes to share, each of four ranks reads about a quarter of the shards."""
    sizes = [64] * 64
    order = one_set_order(sizes, seed=0, epoch=0, window=64, lanes=16)
    for rank in range(4):
        uses = shard_uses(
            order,
            sizes,
            start=0,
            global_batch_size=32,
            ranks=range(rank, rank + 1),
            world_size=4,
        )
        assert len(uses.shards) <= 64 / 4 + 4
