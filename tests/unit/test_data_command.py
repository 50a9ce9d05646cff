"""The commands of tmu_dist.data: they tell what the loader does, and measure what they say."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tests.s3_servers import localbucket
from tests.tiny_zarr import ORIGINS
from tests.tiny_zarr import write_archive as write_zarr_archive
from tmu_dist.data.__main__ import main
from tmu_dist.data.archive import open_archive
from tmu_dist.data.commands.bench import BenchResult, BenchSettings, measured_part
from tmu_dist.data.commands.bench_readers import Measurement, Round, Way
from tmu_dist.data.commands.bench_report import advice
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.data.manifest import Manifest, Units
from tmu_dist.data.reading import Batch

SHAPE = (2, 1, 4, 4)
TRAIN_SIZES = (9, 4, 7, 1, 8, 6)
NUM_TRAIN = sum(TRAIN_SIZES)


def write_archive(url: str) -> str:
    """Write 35 training samples in shards of different sizes, and 3 of the test split."""
    splits = {}
    for split, sizes in {"train": TRAIN_SIZES, "test": (3,)}.items():
        ends = itertools.accumulate(sizes)
        splits[split] = tuple(
            write_shard(
                url,
                shard_path(split, number),
                [
                    Sample(f"{split}-{i:08d}", np.full(SHAPE, i, np.uint8), {"sample_id": i})
                    for i in range(end - size, end)
                ],
            )
            for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
        )
    manifest = Manifest(
        name="tiny",
        num_frames=SHAPE[0],
        channels=SHAPE[1],
        height=SHAPE[2],
        width=SHAPE[3],
        units=Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None),
        frame_interval_minutes=None,
        splits=splits,
        created_by={"source": "test"},
    )
    write_manifest(url, manifest)
    return url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_archive(str(tmp_path_factory.mktemp("archives") / "one"))


@pytest.fixture(scope="module")
def other_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_archive(str(tmp_path_factory.mktemp("archives") / "other"))


def order_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["order", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def batches_to_the_end(loader: SequenceLoader, start: int) -> Iterator[Batch]:
    """The loader's batches from a position to the end of its epoch."""
    end = (start // loader.num_samples + 1) * loader.num_samples
    for batch in loader.stream(start):
        yield batch
        if batch.consumed >= end:
            return


# order


@pytest.mark.parametrize(
    ("arguments", "options", "world_size", "start"),
    [
        ([], {}, 1, 0),
        (["--epoch", "2"], {}, 2, 2 * NUM_TRAIN),
        (["--start", "48", "--seed", "5"], {"seed": 5}, 4, 48),
        (["--start", "3", "--fraction", "0.5"], {"fraction": 0.5}, 2, 3),
        (
            ["--start", "9", "--window", "3", "--lanes", "2"],
            {"shuffle_window": 3, "shuffle_lanes": 2},
            2,
            9,
        ),
        (["--no-shuffle"], {"shuffle": False}, 4, 0),
        ([], {}, 3, 0),  # repeats of weight 0 fill up the last rank's places
    ],
)
def test_the_order_is_what_the_loader_yields(
    url: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    options: dict[str, Any],
    world_size: int,
    start: int,
) -> None:
    told = order_of(capsys, url, "--world", str(world_size), "--steps", "99", *arguments)
    check_against_loader(told, [url], world_size, start, options)


@pytest.mark.parametrize("start", [0, 81])
@pytest.mark.parametrize("weights", [[], [3.0, 1.0]])
def test_so_is_the_order_of_a_mixture(
    url: str, other_url: str, capsys: pytest.CaptureFixture[str], start: int, weights: list[float]
) -> None:
    chosen = ["--weights", *map(str, weights)] if weights else []
    told = order_of(
        capsys, url, other_url, "--world", "2", "--start", str(start), "--steps", "99", *chosen
    )
    check_against_loader(told, [url, other_url], 2, start, {"mix_weights": weights})
    counts = [archive["num_consumed"] for archive in told["archives"]]
    assert counts == ([53, 17] if weights else [35, 35])
    assert [archive["first_id"] for archive in told["archives"]] == [0, 35]


def check_against_loader(
    told: dict[str, Any], urls: Sequence[str], world_size: int, start: int, options: dict[str, Any]
) -> None:
    """Compare with what loaders of all ranks really yield until the epoch ends."""
    archives = [open_archive(url) for url in urls]
    for rank in range(world_size):
        loader = SequenceLoader(
            archives, "train", global_batch_size=8, rank=rank, world_size=world_size, **options
        )
        batches = list(batches_to_the_end(loader, start))
        assert told["num_steps"] == len(batches)
        assert told["num_samples"] == batches[-1].consumed - start
        uses: dict[tuple[int, str], list[int]] = {}
        for step, batch in zip(told["first_steps"], batches, strict=True):
            assert step["sample_ids"][rank] == batch.sample_ids_B.tolist()
            assert step["weights"][rank] == batch.weights_B.tolist()
            assert step["num_samples"] == batch.global_count
            assert step["position"] == batch.consumed - batch.global_count
            for sample_id in batch.sample_ids_B.tolist():
                number, in_archive = divmod(sample_id, NUM_TRAIN)
                shard = archives[number].index.locate("train", in_archive)[0]
                path = archives[number].manifest.shards("train")[shard].path
                uses.setdefault((number, path), []).append(step["position"])
        share = told["ranks"][rank]
        assert share["ranks"] == [rank]
        assert {
            (use["archive"], use["path"]): [use["first"], use["last"]] for use in share["shards"]
        } == {shard: [positions[0], positions[-1]] for shard, positions in uses.items()}
        firsts = [use["first"] for use in share["shards"]]
        assert firsts == sorted(firsts)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_node_reads_what_its_ranks_read(
    url: str, capsys: pytest.CaptureFixture[str], nodes: int
) -> None:
    told = order_of(capsys, url, "--world", "4", "--nodes", str(nodes), "--lanes", "4")
    assert [rank for node in told["nodes"] for rank in node["ranks"]] == [0, 1, 2, 3]
    assert len(told["nodes"]) == nodes
    for node in told["nodes"]:
        paths = {use["path"] for rank in node["ranks"] for use in told["ranks"][rank]["shards"]}
        assert {use["path"] for use in node["shards"]} == paths
        assert node["num_bytes"] == sum(use["num_bytes"] for use in node["shards"])


def test_the_working_set_is_the_most_that_is_in_use_at_once(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = order_of(capsys, url, "--world", "2", "--lanes", "2", "--window", "4")
    for share in (*told["ranks"], *told["nodes"]):
        uses = share["shards"]
        most = max(
            sum(use["num_bytes"] for use in uses if use["first"] <= position <= use["last"])
            for position in range(0, NUM_TRAIN, 8)
        )
        assert share["working_set_bytes"] == most
        assert most <= share["num_bytes"]
    assert told["nodes"][0]["working_set_bytes"] < told["nodes"][0]["num_bytes"]


def test_an_order_needs_no_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(write_archive(str(tmp_path / "archive")))
    for shard in folder.rglob("*.tar"):
        shard.unlink()
    assert order_of(capsys, str(folder))["num_samples"] == NUM_TRAIN


def test_an_order_is_shown_in_tables(
    url: str, other_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["order", url, other_url, "--start", "139", "--world", "2", "--nodes", "2"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Epoch 1 of train" in shown
    assert "1 sample in 1 step of 8 over 2 ranks on 2 nodes" in shown
    assert "7 repeats of weight 0" in shown
    (last,) = order_of(capsys, url, other_url, "--start", "139")["first_steps"][0]["sample_ids"]
    assert f"{last[0]} ({last[0]}) ({last[0]})" in shown
    assert "train/shard-00000" in shown and "data.cache_gib" in shown


def test_an_order_of_a_zarr_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = order_of(capsys, write_zarr_archive(str(tmp_path / "zarr")), "--batch-size", "2")
    assert told["samples_per_epoch"] == len(ORIGINS) == 2 * told["num_steps"]
    assert {use["path"] for use in told["nodes"][0]["shards"]} == {
        f"train/reflectivity/c/{number}/0/0" for number in range(3)
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["URL", "--world", "4", "--nodes", "3"], "--nodes"),
        (["URL", "--split", "val"], "no split 'val'"),
        (["URL", "--fraction", "2"], "fraction"),
        (["URL", "--weights", "1", "2"], "weight"),
        (["URL", "--epoch", "-1"], "at least 0"),
        (["URL", "--epoch", "1", "--start", "1"], "not allowed with"),
    ],
)
def test_orders_that_make_no_sense_are_refused(
    url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["order", *(url if each == "URL" else each for each in arguments)])
    assert leaving.value.code == 2
    shown = capsys.readouterr().err
    assert named in shown and "Traceback" not in shown


# bench


def bench(tmp_path: Path, url: str, *arguments: str) -> dict[str, Any]:
    """Measure for a moment."""
    file = tmp_path / "bench.json"
    main(["bench", url, "--seconds", "0.3", "--json", str(file), *arguments])
    return json.loads(file.read_text())


def check_record(record: dict[str, Any], num_samples: int) -> None:
    """Every number is there, positive, and agrees with the others."""
    assert record["num_samples"] == num_samples >= record["part_samples"] > 0
    assert record["advice"]
    for measured in record["measurements"]:
        rates = [turn["num_samples"] / turn["seconds"] for turn in measured["rounds"]]
        assert min(rates) > 0
        assert measured["samples_per_second"] == sorted(rates)[len(rates) // 2]
        is_loader = measured["num_workers"] is not None
        assert (measured["first_batch_seconds"] is not None) == is_loader
        if measured["num_workers"]:
            assert measured["cpu_ms_per_sample"] is None
        else:
            assert measured["cpu_ms_per_sample"] > 0
        if is_loader:
            assert all(turn["num_samples"] % 1 == 0 for turn in measured["rounds"])
            decoded = measured["samples_per_second"] * record["decoded_bytes_per_sample"]
            assert measured["decoded_bytes_per_second"] == pytest.approx(decoded)
            bare = max(
                each["samples_per_second"]
                for each in record["measurements"]
                if each["way"] == measured["way"] and each["num_workers"] is None
            )
            share = measured["samples_per_second"] / bare
            assert measured["share_of_bare"] == pytest.approx(share)


def contenders_of(record: dict[str, Any]) -> list[tuple[str, int | None, bool]]:
    return [(m["way"], m["num_workers"], m["is_cold"]) for m in record["measurements"]]


def test_a_local_archive_is_measured(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = bench(tmp_path, url, "--workers", "1", "0")
    check_record(record, NUM_TRAIN)
    assert contenders_of(record) == [
        ("whole shards", None, False),
        ("in place", None, False),
        ("in place", 0, False),
        ("in place", 1, False),
    ]
    shards = open_archive(url).manifest.shards("train")
    sizes = [size for shard in shards for size in shard.sizes]  # type: ignore[union-attr]
    assert min(sizes) <= record["stored_bytes_per_sample"] <= max(sizes)
    assert record["decoded_bytes_per_sample"] == 32
    assert record["num_bytes"] == sum(shard.num_bytes for shard in shards) >= record["part_bytes"]
    shown = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(line.split()) in shown for line in record["advice"])
    assert "data.num_workers=0" in shown and "data.num_workers=1" in shown


@pytest.mark.parametrize("reading", ["auto", "cache"])
def test_a_zarr_archive_is_measured(tmp_path: Path, reading: str) -> None:
    url = write_zarr_archive(str(tmp_path / "zarr"))
    folder = ["--cache-folder", str(tmp_path / "cache")] if reading == "cache" else []
    record = bench(tmp_path, url, "--workers", "0", "--reading", reading, *folder)
    check_record(record, len(ORIGINS))
    assert "pread of pieces" in {m["what"] for m in record["measurements"]}


def test_an_archive_in_s3_is_measured_in_every_way(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with localbucket(Path(url).parent.parent) as server:
        server.use(monkeypatch)
        folder = tmp_path / "cache"
        record = bench(
            tmp_path,
            f"s3://{Path(url).parent.name}/one",
            *("--workers", "0", "--reading", "all", "--cache-folder", str(folder)),
            *("--cache-gib", "0.5"),
        )
    check_record(record, NUM_TRAIN)
    assert contenders_of(record) == [
        *[("whole shards", None, False)] * 3,
        ("cache", 0, True),
        ("cache", None, False),
        ("cache", 0, False),
        *[("range", None, False)] * 4,
        ("range", 0, False),
    ]
    cold = record["measurements"][3]["rounds"]
    assert len(cold) == 1 and cold[0]["num_samples"] <= record["part_samples"], "once"
    assert record["cache_limit_bytes"] == 2**29
    assert list(folder.iterdir()) == [], "the copies are removed"


def test_bare_reading_takes_the_loader_s_samples_in_its_order(url: str) -> None:
    part, first_pass = measured_part(open_archive(url), BenchSettings(url=url, seconds=60), None)
    loader = SequenceLoader(part.archive(None), "train", global_batch_size=8)
    wanted = []
    for batch in batches_to_the_end(loader, 0):
        for sample_id in batch.sample_ids_B[batch.weights_B > 0].tolist():
            number, index = part.archive(None).index.locate("train", sample_id)
            shard = part.shards[number]
            wanted.append((shard.path, shard.offsets[index], shard.sizes[index]))  # type: ignore[union-attr]
    assert [(read.shard.path, read.offset, read.size) for read in part.reads] == wanted
    assert len(set(wanted)) == NUM_TRAIN == first_pass.rounds[0].num_samples


@pytest.mark.parametrize("kind", ["webdataset", "zarr"])
def test_when_time_is_short_a_part_is_measured(url: str, tmp_path: Path, kind: str) -> None:
    if kind == "zarr":
        url = write_zarr_archive(str(tmp_path / "zarr"))
    whole = open_archive(url)
    part, _ = measured_part(whole, BenchSettings(url=url, seconds=1e-9), None)
    (shard,) = part.shards
    first = SequenceLoader(whole, "train", global_batch_size=8).uses(0, range(1)).shards[0]
    assert shard == whole.manifest.shards("train")[first]
    assert part.num_samples == shard.num_samples < whole.manifest.num_samples("train")
    loader = SequenceLoader(part.archive(None), "train", global_batch_size=1)
    codes = [batch.frames_BTCHW[0].numpy() for batch in batches_to_the_end(loader, 0)]
    before = sum(each.num_samples for each in whole.manifest.shards("train")[:first])
    expected = whole.read("train", list(range(before, before + shard.num_samples)))
    assert sorted(code.tobytes() for code in codes) == sorted(e.tobytes() for e in expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["URL", "--reading", "range"], "--reading range is for object stores"),
        (["URL", "--cache-gib", "1"], "--cache-gib"),
        (["URL", "--seconds", "0"], "--seconds"),
        (["URL", "--split", "val"], "no split 'val'"),
        (["URL", "--workers", "-1"], "at least 0"),
        (["URL", "--batch-size", "0"], "at least 1"),
    ],
)
def test_measurements_that_make_no_sense_are_refused(
    url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["bench", *(url if each == "URL" else each for each in arguments)])
    assert leaving.value.code == 2
    shown = capsys.readouterr().err
    assert named in shown and "Traceback" not in shown


def test_a_truncated_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(write_archive(str(tmp_path / "archive")))
    damaged = folder / "train" / "shard-000002.tar"
    damaged.write_bytes(damaged.read_bytes()[:-512])
    with pytest.raises(SystemExit) as leaving:
        bench(tmp_path, str(folder), "--workers", "0")
    assert leaving.value.code == 2
    assert "shard-000002.tar" in capsys.readouterr().err


# advice


def measured(
    way: Way, rate: float, num_workers: int | None = None, cpu_ms: float | None = None
) -> Measurement:
    """A measurement of one second."""
    cpu_seconds = None if cpu_ms is None else cpu_ms * rate / 1e3
    return Measurement(
        way=way,
        what="pread" if num_workers is None else "loader",
        num_workers=num_workers,
        first_batch_seconds=None if num_workers is None else 0.5,
        rounds=[Round(rate, 1.0, cpu_seconds)],
    )


def result_of(*measurements: Measurement, url: str = "rain", cores: int = 8) -> BenchResult:
    return BenchResult(
        settings=BenchSettings(url=url, batch_size=10),
        num_cores=cores,
        num_samples=1000,
        num_bytes=2 * 2**30,
        cache_limit_bytes=None,
        part_samples=100,
        part_shards=1,
        part_bytes=110_000,
        stored_bytes_per_sample=1000.0,
        decoded_bytes_per_sample=4000,
        measurements=[measured("whole shards", 1e6), *measurements],
    )


def told(result: BenchResult) -> str:
    return "\n".join(advice(result))


def test_advice_names_the_fewest_processes_that_are_enough() -> None:
    text = told(
        result_of(
            measured("in place", 10_000, cpu_ms=0.1),
            measured("in place", 500, 0, cpu_ms=2.1),
            measured("in place", 480, 1),
            measured("in place", 1990, 4),
            measured("in place", 2000, 6),
        )
    )
    assert "gives 10,000 samples/s, 10 MB/s" in text
    assert "One core can check and decode 500 samples/s: 95%" in text
    assert "data.num_workers=0 the loader reaches 500 samples/s (5% of" in text
    assert "spends 20 ms on reading" in text
    assert "data.num_workers=4 it reaches 1,990 samples/s (20% of" in text
    assert "takes less than 5.03 ms waits" in text
    assert "More reading processes do not make it faster." in text


@pytest.mark.parametrize(
    ("rates", "cores", "expected"),
    [
        ({0: 1000, 1: 9000}, 8, "The storage is the limit."),
        ({0: 1000, 1: 2000}, 8, "More reading processes than these may make it faster."),
        ({0: 1000, 2: 2000}, 2, "The limit is this machine's processor (2 cores)."),
        ({0: 5000, 1: 900, 2: 1800}, 8, "Leave data.num_workers at 0"),
    ],
)
def test_advice_names_the_limit(rates: dict[int, float], cores: int, expected: str) -> None:
    loaders = [measured("in place", rate, workers) for workers, rate in rates.items()]
    text = told(result_of(measured("in place", 10_000, cpu_ms=0.1), *loaders, cores=cores))
    assert expected in text


def test_advice_on_a_store_chooses_the_faster_way_and_knows_small_caches() -> None:
    cold = measured("cache", 40, 0)
    cold.is_cold = True
    result = result_of(
        cold,
        measured("cache", 50_000, cpu_ms=0.01),
        measured("cache", 1000, 0, cpu_ms=0.9),
        measured("range", 300, cpu_ms=0.5),
        measured("range", 250, 0, cpu_ms=0.5),
        url="s3://bucket/rain",
    )
    text = told(result)
    assert "fastest through copies on this node" in text
    assert "With data.reading=cache and data.num_workers=0" in text
    assert "While copies are made, it reaches 40 samples/s" in text
    assert "in every epoch" not in text
    small = dataclasses.replace(result, cache_limit_bytes=2**30)
    assert "in every epoch: the shards have 2.0 GiB and the cache may hold 1.0" in told(small)


def test_advice_on_uncompressed_samples() -> None:
    bare, loader = measured("in place", 100, cpu_ms=1.0), measured("in place", 99, 0, cpu_ms=1.01)
    assert "next to no processor time" in told(result_of(bare, loader))
