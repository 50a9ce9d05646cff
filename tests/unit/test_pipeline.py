"""The pipeline: the plan is what lies in the archive, whatever the workers and interruptions."""

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import pipeline, shards
from data_prep.pipeline import BadFilesError, OutputSettings, WorkSettings, build_archive
from data_prep.source import FrameRecord, SequencePlan
from data_prep.verify import verify_archive
from data_prep.workers import run_pieces
from data_prep.writers.objects import ArchiveExistsError
from tests.blob_source import BlobSource, blob
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import Manifest

TARS = OutputSettings(samples_per_shard=7)
RAW = OutputSettings(samples_per_shard=7, compression="none")
ZARR = OutputSettings(format="zarr", frames_per_shard=8)
each_output = pytest.mark.parametrize("output", [TARS, RAW, ZARR], ids=["tar", "raw tar", "zarr"])
HERE = WorkSettings(workers=1, show_progress=False)


def digest(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def build(out: Path, source: BlobSource | None = None, output: OutputSettings = TARS) -> Manifest:
    return build_archive(source or BlobSource(), str(out), output, HERE)


@each_output
def test_the_archive_holds_the_plan(tmp_path: Path, output: OutputSettings):
    manifest = build(tmp_path, output=output)
    archive = open_archive(str(tmp_path))
    assert manifest.num_samples("train") == 34 and manifest.num_samples("test") == 34
    for sample in (0, 1, 13, 33):
        (got_TCHW,) = archive.read("train", [sample])
        first, left = divmod(sample, 2)
        want_TCHW = np.stack([blob(first + t)[:, :, 2 * left : 2 * left + 8] for t in range(4)])
        np.testing.assert_array_equal(got_TCHW, want_TCHW)
        assert archive.read_meta("train", sample)["weight"] == 2.0
    assert verify_archive(str(tmp_path)) == []
    assert not (tmp_path / ".parts").exists() or not any((tmp_path / ".parts").rglob("*.*"))


@each_output
def test_statistics_count_every_training_frame_once(tmp_path: Path, output: OutputSettings):
    build(tmp_path, output=output)
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    frames = np.stack([blob(number) for number in range(20)])
    observed = frames[frames != 255].astype(float) * 70 / 254
    assert statistics["count"] == observed.size
    assert statistics["missing"] == 20 * 9
    assert statistics["mean"] == pytest.approx(observed.mean())
    assert statistics["variance"] == pytest.approx(observed.var())
    assert statistics["max"] == pytest.approx(observed.max())


@each_output
def test_workers_do_not_change_a_byte(tmp_path: Path, output: OutputSettings):
    build(tmp_path / "one", output=output)
    work = WorkSettings(workers=3, show_progress=False)
    build_archive(BlobSource(), str(tmp_path / "three"), output, work)
    assert digest(tmp_path / "one") == digest(tmp_path / "three")


@each_output
def test_an_interrupted_build_continues_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: OutputSettings
):
    build(tmp_path / "whole", output=output)
    calls = itertools.count()
    for limit in (3, 2, 1):  # stops in the middle of reading, then of writing
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "run_pieces", _stop_after(limit))
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "parts", output=output)
        assert not (tmp_path / "parts" / "manifest.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(BlobSource, "convert", _counting(BlobSource.convert, calls))
        build(tmp_path / "parts", output=output)
    assert next(calls) < len(BlobSource().jobs()), "finished jobs were read again"
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")


def test_what_a_killed_process_was_writing_goes(tmp_path: Path):
    """obstore writes NAME#1 and renames it; its lists do not show such files."""
    build(tmp_path / "whole")
    for left in (".parts/0123/job-000000-000.frames#1", "train/shard-000000.tar#2"):
        (tmp_path / "parts" / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts" / left).write_bytes(b"half")
    foreign = tmp_path / "parts" / "notes#1"
    foreign.write_text("somebody's own")
    build(tmp_path / "parts")
    assert foreign.is_file()
    foreign.unlink()
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    assert not (tmp_path / "parts" / ".parts").exists()


def test_a_store_in_memory_is_one_process_s(tmp_path: Path):
    with pytest.raises(ValueError, match=r"memory://x exists in this process only.* workers 1"):
        build_archive(BlobSource(), "memory://x", TARS, WorkSettings(workers=2))
    unsaid = WorkSettings(show_progress=False)
    assert build_archive(BlobSource(), "memory://y", TARS, unsaid) == build(tmp_path)


def _stop_after(limit: int):
    """run_pieces that does a few new pieces and is interrupted then."""

    def run(work, pieces, **settings):
        results = run_pieces(work, pieces, **settings)
        for number, result in enumerate(results):
            if number == limit:
                raise KeyboardInterrupt
            yield result

    return run


def _counting(function, calls):
    def counted(self, job):
        next(calls)
        return function(self, job)

    return counted


def test_uncompressed_is_another_archive_and_compressed_is_the_one_it_was(tmp_path: Path):
    compressed, raw = build(tmp_path / "zstd"), build(tmp_path / "none", output=RAW)
    assert (compressed.compression, raw.compression) == ("zstd", "none")
    # Archives from before there was a choice are found again.
    assert "compression" not in compressed.created_by["output"]
    assert raw.created_by["output"]["compression"] == "none"
    with pytest.raises(ArchiveExistsError, match="output.compression None there, 'none' here"):
        build(tmp_path / "zstd", output=RAW)
    archives = [open_archive(str(tmp_path / name)) for name in ("zstd", "none")]
    assert archives[0].read_meta("train", 3) == archives[1].read_meta("train", 3)
    first, second = (archive.read("train", list(range(34))) for archive in archives)
    np.testing.assert_array_equal(first, second)


def test_an_interrupted_build_does_not_take_over_shards_of_the_other_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_manifest", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "mixed", output=TARS)
    build(tmp_path / "mixed", output=RAW)
    build(tmp_path / "plain", output=RAW)
    assert digest(tmp_path / "mixed") == digest(tmp_path / "plain")


def test_tars_are_of_the_wanted_size_whether_compressed_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "_TAR_BYTES", 10 * 4 * 12 * 8)
    monkeypatch.setattr(shards, "_TAR_BYTES_PER_SAMPLE", 0)
    compressed = build(tmp_path / "zstd", output=OutputSettings())
    raw = build(tmp_path / "none", output=OutputSettings(compression="none"))
    assert [tar.num_samples for tar in raw.shards("train")] == [10, 10, 10, 4]
    assert compressed.shards("train")[0].num_samples > 10


def test_zarr_is_always_compressed():
    with pytest.raises(ValueError, match="compression=none is for tars"):
        replace(ZARR, compression="none")


def test_the_same_command_again_does_nothing_and_another_is_refused(tmp_path: Path):
    first = build(tmp_path)
    before = digest(tmp_path)
    assert build(tmp_path) == first
    assert digest(tmp_path) == before
    with pytest.raises(ArchiveExistsError, match="speed"):
        build(tmp_path, BlobSource(speed=2))
    work = replace(HERE, overwrite=True)
    replaced = build_archive(BlobSource(speed=2), str(tmp_path), TARS, work)
    assert replaced.content_hash != first.content_hash
    assert verify_archive(str(tmp_path)) == []


def test_bad_files_stop_the_build_by_name(tmp_path: Path):
    with pytest.raises(BadFilesError, match=r"f007: is truncated.*--on-bad-file skip"):
        build(tmp_path, BlobSource(bad=(7, 30)))
    assert not (tmp_path / "manifest.json").exists()


def test_skipped_bad_files_are_in_the_report_and_in_no_sequence(tmp_path: Path):
    work = replace(HERE, on_bad_file="skip")
    manifest = build_archive(BlobSource(bad=(7,)), str(tmp_path), TARS, work)
    assert manifest.num_samples("train") == 26  # four windows of two tiles need file 7
    report = json.loads((tmp_path / "report.json").read_text())
    assert "f007" in json.dumps(report) and "is truncated" in json.dumps(report)


def test_what_is_left_out_by_design_stops_nothing_but_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    build(tmp_path, BlobSource(skipped=(7,)))
    assert "Left out on purpose, in whole or in part: 1 files, such as" in caplog.text
    assert "is a forecast" in (tmp_path / "report.json").read_text()


def test_a_repaired_file_costs_only_its_own_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BadFilesError):
        build(tmp_path, BlobSource(bad=(39,)))
    calls = itertools.count()
    monkeypatch.setattr(BlobSource, "convert", _counting(BlobSource.convert, calls))
    build(tmp_path)
    assert next(calls) == 1


def test_staged_frames_of_other_settings_are_removed(tmp_path: Path):
    with pytest.raises(BadFilesError):
        build(tmp_path, BlobSource(bad=(39,)))
    assert any((tmp_path / ".parts").rglob("*.frames"))
    build(tmp_path, BlobSource(speed=2))
    assert verify_archive(str(tmp_path)) == []
    assert not any((tmp_path / ".parts").rglob("*.frames"))


def test_shards_of_another_plan_are_not_taken_for_this_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for stride in (1, 2):  # two plans of the same frames, the first one left unfinished
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "write_manifest", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "mixed", BlobSource(stride=stride))
    build(tmp_path / "mixed", BlobSource(stride=1))
    build(tmp_path / "plain", BlobSource(stride=1))
    assert digest(tmp_path / "mixed") == digest(tmp_path / "plain")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_altered_staged_frame_is_noticed(tmp_path: Path):
    with pytest.raises(BadFilesError):
        build(tmp_path, BlobSource(bad=(39,)))
    block = next((tmp_path / ".parts").rglob("job-000001-000.frames"))
    data = bytearray(block.read_bytes())
    data[20] ^= 1
    block.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="altered"):
        build(tmp_path)


def test_full_train_samples_is_kept_in_the_manifest(tmp_path: Path):
    manifest = build(tmp_path, output=replace(TARS, full_train_samples=17))
    assert manifest.full_train_samples == 17


def test_frames_of_every_second_time_lie_in_two_stretches():
    records = [FrameRecord(series="", order=float(i), file=f"f{i}", digest="") for i in range(8)]
    sequences = [
        SequencePlan(split="train", key=str(first), frames=(first, first + 2, first + 4))
        for first in range(4)
    ]
    assert shards.frame_line(sequences, records) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_frame_with_two_successors_fits_no_line():
    records = [FrameRecord(series="", order=float(i), file=f"f{i}", digest="") for i in range(4)]
    sequences = [
        SequencePlan(split="train", key="a", frames=(0, 1)),
        SequencePlan(split="train", key="b", frames=(0, 2)),
    ]
    with pytest.raises(ValueError, match="write them as webdataset"):
        shards.frame_line(sequences, records)


def test_an_id_means_the_same_in_both_formats(tmp_path: Path):
    """Also where the array's order is not the plan's: windows of every second frame."""
    source = BlobSource(step=2)
    for output in (TARS, ZARR):
        build(tmp_path / output.format, source, output)
    tars, store = (open_archive(str(tmp_path / output.format)) for output in (TARS, ZARR))
    count = tars.manifest.num_samples("train")
    ids = list(range(count))
    np.testing.assert_array_equal(tars.read("train", ids), store.read("train", ids))
    firsts = [tars.read_meta("train", i)["first"] for i in ids]
    assert firsts == [store.read_meta("train", i)["first"] for i in ids]
    assert firsts != sorted(firsts)
