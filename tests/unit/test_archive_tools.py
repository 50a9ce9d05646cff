"""verify and show, and the stock webdataset library as a second reader."""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from PIL import Image

from data_prep.__main__ import main
from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from data_prep.verify import verify_archive
from data_prep.writers.webdataset import (
    Sample,
    read_manifest,
    shard_path,
    write_manifest,
    write_shard,
)
from tmu_dist.data.loader import open_archive

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


def test_the_command_line_writes_what_the_function_writes(whole, tmp_path):
    arguments = "--digits 1 --train 7 --val 2 --test 2 --frames 4 --frame-size 16 --digit-size 7"
    arguments += " --speed 1 2 --samples-per-shard 4 --workers 1"
    assert main(["moving-mnist", *arguments.split(), "--out", str(tmp_path)]) == 0
    assert read_manifest(str(tmp_path)) == read_manifest(str(whole))


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


def test_stock_webdataset_reads_identical_frames(whole):
    def decode(sample: dict) -> tuple[np.ndarray, dict]:
        npy = zstandard.ZstdDecompressor().decompress(sample["frames.npy.zst"])
        return np.load(io.BytesIO(npy)), json.loads(sample["meta.json"])

    shards = sorted(str(path) for path in (whole / "train").glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).map(decode)
    seen = list(dataset)
    assert [meta["sample_id"] for _, meta in seen] == list(range(7))
    expected = open_archive(str(whole)).read("train", list(range(7)))
    assert np.array_equal(np.stack([frames for frames, _ in seen]), expected)


def test_tar_members_are_plain_and_anonymous(whole):
    with tarfile.open(whole / FIRST) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == [
        "train-00000000.frames.npy.zst",
        "train-00000000.meta.json",
    ]
    for member in members:
        assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
        assert (member.uname, member.gname, member.mode) == ("", "", 0o644)
        assert member.isreg()
        assert not member.pax_headers
