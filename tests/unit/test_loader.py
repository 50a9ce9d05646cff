"""The loader: the same batches for any readers, exact resumption."""

import itertools
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tmu_dist.data import storage
from tmu_dist.data.loader import Batch, SequenceLoader, open_archive
from tmu_dist.data.manifest import Manifest, ManifestError, Units
from tmu_dist.data.storage import StorageError
from tmu_dist.data.transforms import to_uint8, to_unit_interval

SHAPE = (3, 1, 4, 5)
NUM_TRAIN = 22
EIGHT_BITS = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)
SIXTEEN_BITS = Units(
    quantity="reflectivity",
    unit="dBZ",
    scale=70 / 65_534,
    offset=0.0,
    max_code=65_534,
    missing_code=65_535,
)


def frames_of(sample_id: int, dtype: str = "uint8") -> np.ndarray:
    """Frames that say which sample they are, in the highest codes of their type."""
    return np.full(SHAPE, sample_id if dtype == "uint8" else 65_534 - sample_id, dtype)


def write_archive(
    url: str, shape: tuple[int, ...] = SHAPE, dtype: str = "uint8", full: int | None = None
) -> str:
    """Write 22 training samples in shards of 8, 8 and 6, and 5 validation samples."""
    splits = {}
    for split, sizes in {"train": [8, 8, 6], "val": [5]}.items():
        first_ids = itertools.accumulate([0, *sizes[:-1]])
        splits[split] = tuple(
            write_shard(
                url,
                shard_path(split, number),
                [
                    Sample(f"{split}-{i:08d}", frames_of(i, dtype), {"sample_id": i})
                    for i in range(first, first + size)
                ],
            )
            for number, (first, size) in enumerate(zip(first_ids, sizes, strict=True))
        )
    num_frames, channels, height, width = shape
    manifest = Manifest(
        name="tiny",
        num_frames=num_frames,
        channels=channels,
        height=height,
        width=width,
        dtype=dtype,
        units=EIGHT_BITS if dtype == "uint8" else SIXTEEN_BITS,
        frame_interval_minutes=None,
        full_train_samples=full,
        splits=splits,
        created_by={"source": "test"},
    )
    write_manifest(url, manifest)
    return url


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    return write_archive(str(tmp_path_factory.mktemp("archive")))


def train_loader(url: str, **options) -> SequenceLoader:
    return SequenceLoader(open_archive(url), "train", **({"global_batch_size": 4} | options))


def take(batches: Iterable[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def joined(parts: list[Batch]) -> tuple[list[int], list[float]]:
    """Ids and weights of one step over all ranks."""
    ids = torch.cat([part.sample_ids_B for part in parts]).tolist()
    return ids, torch.cat([part.weights_B for part in parts]).tolist()


def test_batches_hold_the_samples_they_name(url):
    for batch in take(train_loader(url).stream(0), 12):
        assert batch.frames_BTCHW.dtype == torch.uint8
        assert batch.sample_ids_B.dtype == torch.int64
        assert batch.weights_B.dtype == torch.float32
        expected = np.stack([frames_of(i) for i in batch.sample_ids_B.tolist()])
        assert np.array_equal(batch.frames_BTCHW.numpy(), expected)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_global_batches_do_not_depend_on_the_world_size(url, world_size):
    """Where 4 is no multiple of the ranks, the last places are padding."""
    alone = take(train_loader(url).stream(0), 13)
    streams = [
        train_loader(url, rank=rank, world_size=world_size).stream(0) for rank in range(world_size)
    ]
    for whole in alone:
        parts = [next(stream) for stream in streams]
        assert {len(part.weights_B) for part in parts} == {-(-4 // world_size)}
        ids, weights = joined(parts)
        assert (ids[:4], weights[:4]) == joined([whole])
        assert not any(weights[4:])
        assert {(p.global_count, p.consumed) for p in parts} == {
            (whole.global_count, whole.consumed)
        }


def test_batches_do_not_depend_on_the_worker_count(url):
    with_workers = take(train_loader(url, num_workers=2).stream(4), 8)
    for batch, expected in zip(with_workers, train_loader(url).stream(4), strict=False):
        assert torch.equal(batch.frames_BTCHW, expected.frames_BTCHW)
        assert torch.equal(batch.sample_ids_B, expected.sample_ids_B)
        assert torch.equal(batch.weights_B, expected.weights_B)
        assert batch[3:] == expected[3:]


def test_an_epoch_has_every_sample_once_and_its_last_batch_is_padded(url):
    loader = train_loader(url)
    assert (loader.num_samples, loader.steps_per_epoch) == (NUM_TRAIN, 6)
    epochs = []
    stream = loader.stream(0)
    for _ in range(2):
        batches = take(stream, loader.steps_per_epoch)
        assert [batch.global_count for batch in batches] == [4, 4, 4, 4, 4, 2]
        assert sorted(batches[-1].weights_B.tolist()) == [0, 0, 1, 1]
        real = [batch.sample_ids_B[batch.weights_B == 1] for batch in batches]
        epochs.append(torch.cat(real).tolist())
        assert sorted(epochs[-1]) == list(range(NUM_TRAIN))
    assert epochs[0] != epochs[1]
    assert batches[-1].consumed == 2 * NUM_TRAIN


def test_resuming_anywhere_continues_the_run(url):
    whole = take(train_loader(url).stream(0), 15)
    for done in range(1, 15):
        stream = train_loader(url).stream(whole[done - 1].consumed)
        for expected in whole[done:]:
            batch = next(stream)
            assert joined([batch]) == joined([expected])
            assert batch[3:] == expected[3:]


@pytest.mark.parametrize("start", range(2 * NUM_TRAIN + 3))
def test_any_position_is_a_place_to_start(url, start):
    """Also between the batches of the run before, on any number of ranks."""
    one_by_one = [
        b.sample_ids_B.item() for b in take(train_loader(url, global_batch_size=1).stream(0), 70)
    ]
    streams = [train_loader(url, rank=rank, world_size=2).stream(start) for rank in range(2)]
    for _ in range(3):
        parts = [next(stream) for stream in streams]
        end = min(start + 4, (start // NUM_TRAIN + 1) * NUM_TRAIN)
        real = [i for i, weight in zip(*joined(parts), strict=True) if weight]
        assert sorted(real) == sorted(one_by_one[start:end])
        assert {part.consumed for part in parts} == {end}
        start = end


def test_resuming_with_another_world_size_and_batch_size_loses_nothing(url):
    done = take(train_loader(url).stream(0), 3)
    streams = [
        train_loader(url, rank=rank, world_size=3, global_batch_size=6).stream(done[-1].consumed)
        for rank in range(3)
    ]
    ids = [i for batch in done for i in batch.sample_ids_B.tolist()]
    for _ in range(2):
        parts = [next(stream) for stream in streams]
        step_ids, weights = joined(parts)
        ids += [i for i, weight in zip(step_ids, weights, strict=True) if weight]
    assert sorted(ids) == list(range(NUM_TRAIN))
    assert parts[0].consumed == NUM_TRAIN


def test_one_pass_is_in_natural_order_with_equal_steps(url):
    loaders = [
        SequenceLoader(open_archive(url), "val", global_batch_size=4, rank=rank, world_size=2)
        for rank in range(2)
    ]
    steps = list(zip(*(loader.one_pass() for loader in loaders), strict=True))
    assert len(steps) == 2
    real = [i for step in steps for i, weight in zip(*joined(list(step)), strict=True) if weight]
    assert real == [0, 1, 2, 3, 4]
    assert steps[-1][0].consumed == 5


def test_fractions_and_unshuffled_streams(url):
    half = train_loader(url, fraction=0.5)
    assert half.num_samples == 11
    subset = [i for batch in half.one_pass() for i in batch.sample_ids_B[batch.weights_B == 1]]
    assert len(subset) == 11
    plain = train_loader(url, shuffle=False, global_batch_size=22)
    assert next(plain.stream(0)).sample_ids_B.tolist() == list(range(22))


def test_fractions_are_of_the_full_training_data(tmp_path):
    url = write_archive(str(tmp_path), full=10)

    def subset(fraction: float) -> set[int]:
        loader = train_loader(url, fraction=fraction, global_batch_size=1)
        ids = [batch.sample_ids_B.item() for batch in take(loader.stream(0), loader.num_samples)]
        assert len(set(ids)) == loader.num_samples
        return set(ids)

    subsets = [subset(fraction) for fraction in (0.25, 0.5, 0.75, 1.0, 2.0, 2.2)]
    assert [len(ids) for ids in subsets] == [3, 5, 8, 10, 20, 22]
    assert all(small < large for small, large in itertools.pairwise(subsets))
    with pytest.raises(ValueError, match="10 count as 100 %, but there are 22: .* at most 2.2"):
        train_loader(url, fraction=2.3)
    validation = SequenceLoader(open_archive(url), "val", global_batch_size=1)
    assert validation.num_samples == 5
    assert validation.state()["full_samples"] is None
    other = write_archive(str(tmp_path / "other"), full=11)
    with pytest.raises(ValueError, match="full_samples was 10 and is 11"):
        train_loader(other).check_state(train_loader(url).state())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sixteen_bits_travel_whole(tmp_path, num_workers):
    url = write_archive(str(tmp_path), dtype="uint16")
    for batch in take(train_loader(url, num_workers=num_workers).stream(0), 3):
        expected = np.stack([frames_of(i, "uint16") for i in batch.sample_ids_B.tolist()])
        assert batch.frames_BTCHW.dtype == torch.uint16
        assert np.array_equal(batch.frames_BTCHW.numpy(), expected)
        numbers, observed = to_unit_interval(batch.frames_BTCHW, SIXTEEN_BITS)
        assert np.array_equal(numbers.numpy(), expected.astype(np.float32) / np.float32(65_534))
        assert observed.all()


def test_loading_leaves_the_global_generator_alone(url):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(train_loader(url).stream(0), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_is_checked_and_differences_are_named(url, tmp_path):
    loader = train_loader(url)
    loader.check_state(loader.state())
    with pytest.raises(ValueError, match="seed was 0 and is 1; shuffle was True and is False"):
        train_loader(url, seed=1, shuffle=False).check_state(loader.state())
    with pytest.raises(ValueError, match="order_version was None"):
        loader.check_state({k: v for k, v in loader.state().items() if k != "order_version"})
    other = write_archive(str(tmp_path), shape=SHAPE[::-1])
    with pytest.raises(ValueError, match="manifest_hashes was"):
        train_loader(other).check_state(loader.state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size=2\)"),
        ({"fraction": 0.0}, "fraction must be > 0"),
        ({"fraction": 1.5}, "1.5 is 33 samples, because 22 count as 100 %, but there are 22"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_bad_arguments_are_refused(url, options, message):
    with pytest.raises(ValueError, match=message):
        train_loader(url, **options)


def test_bad_positions_and_splits_are_refused(url):
    with pytest.raises(ValueError, match="position 0 or later"):
        train_loader(url).stream(-1)
    with pytest.raises(ManifestError, match="no split 'test'"):
        SequenceLoader(open_archive(url), "test", global_batch_size=1)


def test_storage_errors_name_the_object(tmp_path):
    with pytest.raises(StorageError, match=rf"{tmp_path}/a/b\.txt does not exist"):
        storage.read_bytes(str(tmp_path), "a/b.txt")
    with pytest.raises(StorageError, match=r"There is no folder .*/nowhere"):
        storage.read_bytes(str(tmp_path / "nowhere"), "x")
    with pytest.raises(StorageError, match="Cannot open ftp://host: the scheme must be one of"):
        storage.read_bytes("ftp://host", "x")
    assert storage.list_paths(str(tmp_path / "nowhere")) == []
    assert not storage.exists(str(tmp_path), "x")


def test_file_urls_are_local_folders(tmp_path):
    folder = tmp_path / "with space"
    storage.write_bytes(str(folder), "a/b", b"data")
    assert storage.read_text(folder.as_uri(), "a/b") == "data"
    assert storage.list_paths(folder.as_uri()) == ["a/b"]


def test_scaling_and_its_inverse_are_exact():
    values = torch.arange(256, dtype=torch.uint8)
    scaled, observed = to_unit_interval(values, EIGHT_BITS)
    assert observed is None
    assert scaled.dtype == torch.float32
    assert (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_array_equal(to_uint8(scaled.numpy()), values.numpy())
    assert to_uint8(np.array([-0.5, 0.9999, 1.5])).tolist() == [0, 254, 255]
    with pytest.raises(ValueError, match="takes uint8"):
        to_unit_interval(scaled, EIGHT_BITS)
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.array([float("nan")]))


def test_missing_pixels_are_zeros_of_which_a_mask_says_so():
    codes = torch.tensor([0, 32_767, 65_534, 65_535], dtype=torch.uint16)
    numbers, observed = to_unit_interval(codes, SIXTEEN_BITS)
    assert numbers.tolist() == [0, 0.5, 1, 0]
    assert observed.tolist() == [True, True, True, False]


def test_a_real_archive_can_be_loaded(tmp_path):
    config = MovingMNISTConfig(
        digits=1, train=6, val=2, test=2, frames=3, frame_size=16, digit_size=7, speed=(1, 2)
    )
    write_moving_mnist(config, str(tmp_path), workers=1, show_progress=False)
    batch = next(train_loader(str(tmp_path)).stream(0))
    assert batch.frames_BTCHW.shape == (4, 3, 1, 16, 16)
    assert batch.frames_BTCHW.max() > 100


def test_manifest_and_storage_load_no_torch():
    code = "import sys, tmu_dist.data.storage, tmu_dist.data.archive, data_prep.__main__;"
    code += "assert not {'torch', 'ray', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
