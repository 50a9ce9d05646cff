"""Preparing and finishing places, verify and show, and webdataset as a second reader."""

import dataclasses
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.__main__ import main
from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from data_prep.verify import verify_archive
from data_prep.writers import webdataset as webdataset_writer
from data_prep.writers.objects import (
    ArchiveExistsError,
    prepare_archive,
    read_manifest,
    write_manifest,
    write_object,
)
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tmu_dist.data import storage
from tmu_dist.data.archive import ShardError, open_archive
from tmu_dist.data.manifest import Units

CONFIG = MovingMNISTConfig(
    digits=1,
    train=7,
    val=2,
    test=2,
    frames=4,
    frame_size=16,
    digit_size=7,
    speed=(1, 2),
    samples_per_shard=4,
)
FIRST, SECOND = "train/shard-000000.tar", "train/shard-000001.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_moving_mnist(CONFIG, str(folder), workers=1, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """The same samples, not compressed."""
    folder = tmp_path_factory.mktemp("raw")
    config = dataclasses.replace(CONFIG, compression="none")
    write_moving_mnist(config, str(folder), workers=1, show_progress=False)
    return folder


@pytest.fixture
def archive(whole, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "archive"))


def problems_of(archive: Path) -> list[str]:
    return [str(problem) for problem in verify_archive(str(archive), show_progress=False)]


def change_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def edit_manifest(archive: Path, edit: Callable[[dict], None]) -> None:
    path = archive / "manifest.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def test_a_whole_archive_has_no_problem(whole):
    assert problems_of(whole) == []


def test_uncompressed_archives_are_proven_too(raw, tmp_path):
    assert problems_of(raw) == []
    archive = Path(shutil.copytree(raw, tmp_path / "archive"))
    offset = read_manifest(str(archive)).shards("train")[0].offsets[2]
    change_byte(archive / FIRST, offset + 200)
    problems = problems_of(archive)
    assert problems[1].startswith(f"{FIRST}, sample 2 at byte {offset}: crc32c is")
    assert len(problems) == 2  # the frames can still be decoded


@pytest.mark.parametrize("said", ["zstd", "none"])
def test_a_manifest_that_names_the_other_compression_is_noticed(whole, raw, tmp_path, said):
    archive = Path(shutil.copytree(raw if said == "zstd" else whole, tmp_path / "archive"))
    edit_manifest(archive, lambda record: record.update(compression=said))
    problems = "\n".join(problems_of(archive))
    suffix = {"zstd": "npy.zst", "none": "npy"}[said]
    assert f"not KEY.frames.{suffix} and KEY.meta.json" in problems
    assert {"zstd": "is no zstd-compressed npy", "none": "is no npy array"}[said] in problems
    with pytest.raises(ShardError, match=r"sample 0 at byte 512: is no"):
        open_archive(str(archive)).read("train", [0])


def test_bytes_after_the_array_are_noticed(tmp_path, whole, monkeypatch):
    encode = webdataset_writer.encode_frames
    monkeypatch.setattr(webdataset_writer, "encode_frames", lambda *args: encode(*args) + b"?")
    config = dataclasses.replace(CONFIG, compression="none")
    write_moving_mnist(config, str(tmp_path), workers=1, show_progress=False)
    assert "is no npy array: 1 bytes follow the array" in problems_of(tmp_path)[0]


def test_an_altered_payload_is_named_with_sample_and_offset(archive):
    offset = read_manifest(str(archive)).shards("train")[0].offsets[2]
    change_byte(archive / FIRST, offset + 30)
    problems = problems_of(archive)
    assert problems[0].startswith(f"{FIRST}: has sha256")
    assert problems[1].startswith(f"{FIRST}, sample 2 at byte {offset}: crc32c is")
    assert all(f"{FIRST}, sample 2" in problem for problem in problems[1:])


def test_an_altered_record_is_noticed(archive):
    shard = read_manifest(str(archive)).shards("train")[0]
    record_start = shard.offsets[0] + -(-shard.sizes[0] // 512) * 512 + 512
    change_byte(archive / FIRST, record_start)
    problems = problems_of(archive)
    assert problems[0].startswith(f"{FIRST}: has sha256")
    assert "is no JSON" in problems[1]


def test_an_altered_tar_header_is_noticed(archive):
    offset = read_manifest(str(archive)).shards("train")[0].offsets[1]
    change_byte(archive / FIRST, offset - 512)
    problems = problems_of(archive)
    assert any("has 2 tar members, the manifest's 4 samples need 8" in p for p in problems)
    assert any(f"{FIRST}, sample 3" in p and "tar members are missing" in p for p in problems)


def test_a_truncated_shard_names_the_samples_that_are_lost(archive):
    offset = read_manifest(str(archive)).shards("train")[0].offsets[2]
    data = (archive / FIRST).read_bytes()
    (archive / FIRST).write_bytes(data[: offset + 10])
    problems = problems_of(archive)
    assert problems[0] == f"{FIRST}: has {offset + 10} bytes, the manifest says {len(data)}"
    assert any(p.startswith(f"{FIRST}, sample 2 at byte {offset}: only 10 of") for p in problems)
    assert any(p.startswith(f"{FIRST}, sample 3") for p in problems)
    assert not any("sample 0" in p or "sample 1" in p for p in problems)


def test_a_missing_shard_is_named(archive):
    (archive / SECOND).unlink()
    assert problems_of(archive) == [f"{SECOND}: {archive / SECOND} does not exist."]


def test_a_stray_shard_is_named(archive):
    shutil.copy(archive / FIRST, archive / "train/shard-000009.tar")
    (archive / "README.md").write_text("notes beside the splits are no problem")
    assert problems_of(archive) == ["train/shard-000009.tar: is not in the manifest"]


def test_two_shards_that_changed_places_are_noticed(archive):
    first, second = archive / FIRST, archive / SECOND
    first_data, second_data = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_data)
    second.write_bytes(first_data)
    problems = problems_of(archive)
    assert any(p.startswith(f"{FIRST}: has") for p in problems)
    assert any(p.startswith(f"{SECOND}: has") for p in problems)


def test_a_wrong_shape_in_the_manifest_is_noticed(archive):
    edit_manifest(archive, lambda record: record.update(height=15))
    problems = problems_of(archive)
    assert len(problems) == 11
    assert "holds uint8 of shape (4, 1, 16, 16), the manifest says uint8 of shape" in problems[0]


def test_a_damaged_manifest_is_an_error(archive):
    edit_manifest(archive, lambda record: record["splits"]["train"][0].pop("offsets"))
    with pytest.raises(ValueError, match=r"manifest\.json: manifest\.splits\.train\[0\] lacks off"):
        problems_of(archive)


def test_wrong_samples_in_sound_shards_are_noticed(tmp_path, whole):
    """A faulty writer: checksums agree, but a key is used twice and two ids are wrong."""
    url = str(tmp_path)
    frames = np.zeros((4, 1, 16, 16), np.uint8)
    shard = write_shard(
        url,
        shard_path("train", 0),
        [
            Sample("a", frames, {"sample_id": 0}),
            Sample("a", frames, {"sample_id": 7}),
            Sample("b.c", frames.astype(np.int16), {}),
        ],
    )
    manifest = dataclasses.replace(read_manifest(str(whole)), splits={"train": (shard,)})
    write_manifest(url, manifest)
    text = "\n".join(problems_of(tmp_path))
    assert "sample 0" not in text
    assert "key 'a' is used twice" in text
    assert "a.meta.json does not say sample_id 1" in text
    assert "named 'b.c.frames.npy.zst'" in text
    assert "holds int16" in text


def write_one_sample(url: str, frames: np.ndarray, units: Units, like: Path) -> None:
    """Write an archive of one sample."""
    shard = write_shard(url, shard_path("train", 0), iter([Sample("a", frames, {"sample_id": 0})]))
    manifest = dataclasses.replace(
        read_manifest(str(like)),
        splits={"train": (shard,)},
        units=units,
        dtype="uint16",
    )
    write_manifest(url, manifest)


def test_sixteen_bits_are_written_proven_and_read(tmp_path, whole):
    units = Units(
        quantity="rain_rate",
        unit="mm/h",
        scale=0.01,
        offset=0.0,
        max_code=60_000,
        missing_code=65_535,
    )
    frames = np.arange(4 * 16 * 16, dtype=np.uint16).reshape(4, 1, 16, 16) * 58
    frames[0, 0, 0, 0] = 65_535
    big_endian = frames.astype(">u2")  # as some readers give them; stored all the same
    for name, codes in (("little", frames), ("big", big_endian)):
        write_one_sample(str(tmp_path / name), codes, units, whole)
        assert problems_of(tmp_path / name) == []
        found = open_archive(str(tmp_path / name)).read("train", [0, 0])
        assert found.dtype == np.uint16
        assert np.array_equal(found, np.stack([frames, frames]))
    frames[1, 0, 3, 3] = 60_001
    write_one_sample(str(tmp_path / "wrong"), frames, units, whole)
    (problem,) = problems_of(tmp_path / "wrong")
    assert "holds the code 60001, the manifest's units know 0..60000 and 65535" in problem


def test_a_sample_of_another_dtype_is_refused_in_reading(tmp_path, whole):
    units = read_manifest(str(whole)).units
    write_one_sample(str(tmp_path), np.zeros((4, 1, 16, 16), np.uint8), units, whole)
    with pytest.raises(ShardError, match="holds uint8 frames .* the manifest says uint16"):
        open_archive(str(tmp_path)).read("train", [0])


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_records_are_read_beside_their_samples(where, whole):
    url = str(whole)
    if where == "memory":
        url = "memory://records"
        for path in storage.list_paths(str(whole)):
            storage.write_bytes(url, path, storage.read_bytes(str(whole), path))
    archive = open_archive(url)
    for split, ids in (("train", range(7)), ("test", range(2))):
        for sample_id in ids:
            meta = archive.read_meta(split, sample_id)
            assert (meta["sample_id"], meta["split"]) == (sample_id, split)
            assert len(meta["start_xy_px"]) == 1
    with pytest.raises(ValueError, match=r"samples 0\.\.6, not 7"):
        archive.read_meta("train", 7)


def test_altered_records_are_named_in_reading(archive):
    shard = read_manifest(str(archive)).shards("train")[0]
    header = shard.offsets[3] + -(-shard.sizes[3] // 512) * 512
    for place, message in ((header, "cannot be read"), (header + 512, "cannot be read")):
        change_byte(archive / FIRST, place)
        with pytest.raises(ShardError, match=rf"{FIRST}, sample 3 at byte .*{message}"):
            open_archive(str(archive)).read_meta("train", 3)
        change_byte(archive / FIRST, place)
    data = (archive / FIRST).read_bytes().replace(b'"sample_id":3', b'"sample_id":4')
    (archive / FIRST).write_bytes(data)
    with pytest.raises(ShardError, match="its record is not of sample_id 3"):
        open_archive(str(archive)).read_meta("train", 3)


def add_object(archive: Path, path: str) -> None:
    """Write one more object and list it."""
    stored = write_object(str(archive), path, b"{}")
    edit_manifest(archive, lambda record: record["objects"].append(dataclasses.asdict(stored)))


def test_other_objects_are_proven_too(archive):
    add_object(archive, "statistics.json")
    assert problems_of(archive) == []
    (archive / "statistics.json").write_text("{ ")
    (archive / "report.json").write_text("{}")
    assert problems_of(archive)[0] == "report.json: is not in the manifest"
    assert problems_of(archive)[1].startswith("statistics.json: has sha256")
    (archive / "statistics.json").unlink()
    assert f"statistics.json: {archive}/statistics.json does not exist." in problems_of(archive)


def paths_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_preparing_removes_what_archives_write_and_nothing_else(archive):
    created_by = read_manifest(str(archive)).created_by
    others = {"README.md", "data.json", "train/notes.txt", "other/shard-000000.tar"}
    for path in (*others, "report.json", ".parts/old/job.json", "val/c/0/0"):
        storage.write_bytes(str(archive), path, b"x")
    kept = others | {"val/c/0/0"}  # there is no Zarr archive here
    with pytest.raises(ArchiveExistsError, match="made with other arguments"):
        prepare_archive(str(archive), {"source": "other"})
    assert prepare_archive(str(archive), created_by) is not None
    assert paths_in(archive) >= kept | {"report.json", FIRST}
    assert not (archive / ".parts").exists()
    assert prepare_archive(str(archive), created_by, overwrite=True) is None
    assert paths_in(archive) == kept


def test_a_run_that_was_killed_finds_its_shards_and_another_finds_none(archive):
    created_by = read_manifest(str(archive)).created_by
    (archive / "manifest.json").unlink()
    storage.write_bytes(str(archive), ".parts/mine/job.json", b"x")
    storage.write_bytes(str(archive), ".parts/mine-too/job.json", b"x")
    assert prepare_archive(str(archive), created_by, parts=".parts/mine") is None
    assert {FIRST, SECOND, ".parts/mine/job.json"} <= paths_in(archive)
    assert not (archive / ".parts/mine-too").exists()
    assert prepare_archive(str(archive), created_by, parts=".parts/other") is None
    assert paths_in(archive) == set()


def test_an_archive_is_finished_only_with_all_of_its_shards_and_no_other(archive):
    manifest = read_manifest(str(archive))
    (archive / "manifest.json").unlink()
    storage.write_bytes(str(archive), "train/shard-000007.tar", b"of a larger run before")
    storage.write_bytes(str(archive), ".parts/mine/job.json", b"x")
    data = (archive / SECOND).read_bytes()
    (archive / SECOND).unlink()
    with pytest.raises(storage.MissingObjectError, match=rf"cannot be finished: {SECOND} was"):
        write_manifest(str(archive), manifest)
    (archive / SECOND).write_bytes(data[:100])
    with pytest.raises(storage.StorageError, match=rf"{SECOND} has 100 bytes and should have"):
        write_manifest(str(archive), manifest)
    assert not (archive / "manifest.json").exists()
    (archive / SECOND).write_bytes(data)
    write_manifest(str(archive), manifest)
    assert problems_of(archive) == []
    assert not (archive / ".parts").exists()


def test_a_zarr_store_of_somebody_else_is_left_alone(tmp_path):
    group = {"attributes": {}, "node_type": "group", "zarr_format": 3}
    for text in (json.dumps(group), "no JSON"):
        (tmp_path / "zarr.json").write_text(text)
        for overwrite in (False, True):
            with pytest.raises(ArchiveExistsError, match="a Zarr store that is no archive"):
                prepare_archive(str(tmp_path), {}, overwrite=overwrite)
    assert paths_in(tmp_path) == {"zarr.json"}


def test_preparing_removes_an_unfinished_zarr_archive(tmp_path):
    marked = {"attributes": {"tmu_dist_archive": 2}, "node_type": "group", "zarr_format": 3}
    (tmp_path / "zarr.json").write_text(json.dumps(marked))
    for path in ("train/zarr.json", "train/rain_rate/c/0/0/0", "train/crs/c", "train/notes.txt"):
        storage.write_bytes(str(tmp_path), path, b"x")
    assert prepare_archive(str(tmp_path), {}) is None
    assert paths_in(tmp_path) == {"train/notes.txt"}


def test_commands_report_by_exit_status(archive, capsys, tmp_path):
    assert main(["verify", str(archive)]) == 0
    assert f"{archive} is whole." in capsys.readouterr().out
    (archive / SECOND).unlink()
    (archive / FIRST).write_bytes(b"")
    assert main(["verify", str(archive)]) == 1
    output = capsys.readouterr()
    assert SECOND in output.out and FIRST in output.out
    assert "is broken" in output.err
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "not a finished archive" in capsys.readouterr().err


def test_the_command_line_writes_what_the_function_writes(whole, raw, tmp_path):
    arguments = "--digits 1 --train 7 --val 2 --test 2 --frames 4 --frame-size 16 --digit-size 7"
    arguments += " --speed 1 2 --samples-per-shard 4 --workers 1"
    command = ["moving-mnist", *arguments.split(), "--out"]
    assert main([*command, str(tmp_path / "a")]) == 0
    assert read_manifest(str(tmp_path / "a")) == read_manifest(str(whole))
    assert main([*command, str(tmp_path / "b"), "--compression", "none"]) == 0
    assert read_manifest(str(tmp_path / "b")) == read_manifest(str(raw))


def test_show_draws_a_contact_sheet_and_an_animation(whole, tmp_path):
    assert main(["show", str(whole), "--out", str(tmp_path / "new"), "--num", "3"]) == 0
    with Image.open(tmp_path / "new/moving-mnist-1-train.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
        # Samples 0, 3 and 6 in rows, 4 times in columns, 16 pixels drawn as 64.
        frames = open_archive(str(whole)).read("train", [6])[0]
        assert pixels.shape[0] >= 3 * 64
        corner = np.argwhere(pixels == 0).min(axis=0)
        bottom = pixels[corner[0] + 2 * 67 :, corner[1] :]
        assert np.array_equal(bottom[2:64:4, 2:64:4], frames[0, 0])
    with Image.open(tmp_path / "new/moving-mnist-1-train.gif") as animation:
        assert animation.n_frames == 4


def test_show_refuses_what_it_cannot_draw(archive, tmp_path, capsys):
    assert main(["show", str(archive), "--out", str(tmp_path), "--split", "dev"]) == 1
    assert "no split 'dev'" in capsys.readouterr().err
    assert main(["show", str(archive), "--out", str(tmp_path), "--num", "0"]) == 1
    change_byte(archive / FIRST, 512)
    assert main(["show", str(archive), "--out", str(tmp_path)]) == 1
    assert "python -m data_prep verify" in capsys.readouterr().err


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_stock_webdataset_reads_identical_frames(compression, whole, raw, monkeypatch):
    """By the code in docs/data_format.md."""
    folder = whole if compression == "zstd" else raw
    monkeypatch.chdir(folder.parent)
    document = (Path(__file__).parents[2] / "docs/data_format.md").read_text()
    (code,) = re.findall(r"```python\n(import glob.*?)```", document, re.DOTALL)
    code = code.replace("ARCHIVE", folder.name).replace("    ...", "    seen.append((key, frames))")
    seen: list[tuple[str, np.ndarray]] = []
    exec(code, {"seen": seen})
    assert [key for key, _ in seen] == [f"train-{i:08d}" for i in range(7)]
    for archive in (open_archive(str(one)) for one in (whole, raw)):
        assert np.array_equal([frames for _, frames in seen], archive.read("train", list(range(7))))


def test_stock_webdataset_decodes_uncompressed_frames_by_itself(raw):
    shards = sorted(str(path) for path in (raw / "train").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [sample["meta.json"]["sample_id"] for sample in samples] == list(range(7))
    expected = open_archive(str(raw)).read("train", list(range(7)))
    assert np.array_equal([sample["frames.npy"] for sample in samples], expected)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_tar_members_are_plain_and_anonymous(compression, whole, raw):
    with tarfile.open((whole if compression == "zstd" else raw) / FIRST) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == [
        "train-00000000.frames.npy" + (".zst" if compression == "zstd" else ""),
        "train-00000000.meta.json",
    ]
    for member in members:
        assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
        assert (member.uname, member.gname, member.mode) == ("", "", 0o644)
        assert member.isreg()
        assert not member.pax_headers
