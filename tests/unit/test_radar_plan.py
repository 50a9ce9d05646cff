"""Plans of radar archives: splits that cannot leak, windows without gaps, nothing dropped silently.

Times in the tests are minutes from 2020-01-01T00:00Z unless a name says otherwise.
"""

import dataclasses
import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from data_prep.quality import (
    DuplicateError,
    frozen_stretches,
    gaps_of,
    in_order,
    intervals_by_series,
    runs_of,
    without_duplicates,
)
from data_prep.radar_plan import RadarPlanSettings, plan_radar
from data_prep.source import FrameRecord, Plan
from data_prep.splits import (
    TimeRange,
    assign_groups,
    cut_in_time,
    events_of,
    keyed_uniform,
    split_of_ranges,
    too_close,
)

EPOCH = 26_297_280.0  # 2020-01-01T00:00Z in minutes since 1970
TOLERANCE = 5 / 60
ALL_TRAIN = {"train": 1.0}


def frame(time: float, *, series: str = "", **facts) -> FrameRecord:
    """A frame that differs from all others, unless its digest is given."""
    facts = {"digest": f"{series}/{time}", "wet_fraction": 0.1, **facts}
    return FrameRecord(series=series, order=EPOCH + time, file=f"{series}{time}.h5", **facts)


def stretch(start: float, number: int, step: float = 5, **facts) -> list[FrameRecord]:
    return [frame(start + step * i, **facts) for i in range(number)]


def plan(records: list[FrameRecord], *, declared: float | None = 5, size=(8, 8), **choices) -> Plan:
    choices = {"frames": 4, "proportions": None if choices.get("test") else ALL_TRAIN, **choices}
    return plan_radar(
        records,
        RadarPlanSettings(**choices),
        height=size[0],
        width=size[1],
        declared_interval_minutes=declared,
    )


def starts(made: Plan, records: list[FrameRecord], split: str = "train") -> list[float]:
    """Minutes at which the sequences of a split begin."""
    return [records[s.frames[0]].order - EPOCH for s in made.sequences if s.split == split]


# What every plan keeps


def made_up_records(seed: int, num_events: int, loss: float, two_series: bool) -> list[FrameRecord]:
    """Events of one or two series, with frames missing, seconds of jitter, dry and dark times."""
    chance = random.Random(seed)
    jitter = chance.choice([0.0, 2 / 60])
    records: list[FrameRecord] = []
    start = 0.0
    for _ in range(num_events):
        number = chance.randrange(8, 30)
        for time in (start + 5 * i for i in range(number)):
            for series in ("nw", "se") if two_series else ("",):
                if chance.random() >= loss:
                    facts = {
                        "wet_fraction": chance.choice([0.0, 0.02, 0.4]),
                        "observed_fraction": chance.choice([0.0, 0.7, 1.0, 1.0, 1.0, 1.0]),
                    }
                    records.append(
                        frame(time + jitter * chance.uniform(-1, 1), series=series, **facts)
                    )
        start += 5 * number + chance.choice([30, 120, 400, 3000])
    return records


choices_of_plans = st.fixed_dictionaries(
    {
        "frames": st.integers(1, 5),
        "stride": st.integers(1, 3),
        "evaluation_stride": st.sampled_from([None, 1, 3]),
        "interval_minutes": st.sampled_from([None, 10.0]),
        "split_by": st.sampled_from(["event", "day", "time"]),
        "proportions": st.sampled_from([None, {"train": 1.0, "test": 1.0}]),
        "seed": st.integers(0, 9),
        "split_gap_minutes": st.sampled_from([0.0, 60.0, 200.0]),
        "min_wet_fraction": st.sampled_from([0.0, 0.1]),
        "min_observed": st.sampled_from([0.0, 0.9]),
        "tile": st.sampled_from([None, (4, 3)]),
    }
)


def plan_or_none(records: list[FrameRecord], choices: dict, declared: float | None) -> Plan | None:
    """None where the plan says that a split would be empty; that is no failure of a property."""
    try:
        return plan(records, declared=declared, **choices)
    except ValueError as error:
        assert re.search("No sequence of|never divided|for 3 splits|for 2 splits", str(error))
        return None


@settings(deadline=None, max_examples=100)
@given(
    st.builds(
        dict,
        seed=st.integers(0, 2**32),
        num_events=st.integers(4, 7),
        loss=st.sampled_from([0.0, 0.05, 0.2]),
        two_series=st.booleans(),
    ),
    choices_of_plans,
    st.sampled_from([None, 5.0]),
    st.randoms(),
)
def test_what_every_plan_keeps(facts, choices, declared, shuffler):
    records = made_up_records(**facts)
    made = plan_or_none(records, choices, declared)
    shuffled = list(records)
    shuffler.shuffle(shuffled)
    again = plan_or_none(shuffled, choices, declared)
    assert (made is None) == (again is None)
    event("no plan" if made is None else "a plan")
    if made is None or again is None:
        return
    check_same(made, records, again, shuffled)
    check_windows(made, records, choices)
    check_splits(made, records, choices["split_gap_minutes"])
    check_evaluation(made, records, choices)
    check_report(made, records)


def check_same(made: Plan, records, again: Plan, shuffled) -> None:
    """Permuting the records changes nothing but their numbers."""
    assert made.report == again.report
    for one, other in zip(made.sequences, again.sequences, strict=True):
        assert [records[i] for i in one.frames] == [shuffled[i] for i in other.frames]
        assert dataclasses.replace(one, frames=()) == dataclasses.replace(other, frames=())


def check_windows(made: Plan, records, choices) -> None:
    interval = made.report["interval_minutes"]
    assert interval in (choices["interval_minutes"] or 5, made.report["product_interval_minutes"])
    for sequence in made.sequences:
        frames = [records[i] for i in sequence.frames]
        assert len(frames) == made.num_frames == choices["frames"]
        assert len({f.series for f in frames}) == 1
        times = np.array([f.order for f in frames])
        assert (np.abs(np.diff(times) - interval) <= 2 * TOLERANCE).all()
        assert min(f.observed_fraction for f in frames) >= max(choices["min_observed"], 0.1)
        assert np.mean([f.wet_fraction for f in frames]) >= choices["min_wet_fraction"]
        assert sequence.weight == 1
        assert re.fullmatch("[A-Za-z0-9_-]{1,80}", sequence.key)
    assert len({s.key for s in made.sequences}) == len(made.sequences)


def check_splits(made: Plan, records, gap: float) -> None:
    used: dict[str, set[int]] = {}
    for sequence in made.sequences:
        used.setdefault(sequence.split, set()).update(sequence.frames)
    for split, frames in used.items():
        for other, others in used.items():
            if split != other:
                assert not frames & others
                mine = np.array([records[i].order for i in frames])
                theirs = np.array([records[i].order for i in others])
                assert np.abs(mine[:, None] - theirs).min() >= gap


def check_evaluation(made: Plan, records, choices) -> None:
    """Windows of validation and test do not overlap in time, or start as far apart as asked."""
    interval = made.report["interval_minutes"]
    spans: dict[tuple[str, str], set[tuple[float, float]]] = {}
    for s in made.sequences:
        if s.split != "train":
            first, last = records[s.frames[0]], records[s.frames[-1]]
            spans.setdefault((s.split, first.series), set()).add((first.order, last.order))
    for found in spans.values():
        ordered = sorted(found)
        for (start, end), (following, _) in pairwise(ordered):
            if choices["evaluation_stride"]:
                distance = choices["evaluation_stride"] * interval
                assert following - start >= distance - 2 * TOLERANCE
            else:
                assert following > end


def check_report(made: Plan, records) -> None:
    """All frames are accounted for, and the tables agree with the sequences."""
    report = json.loads(json.dumps(made.report, allow_nan=False))
    assert report == made.report
    frames = report["frames"]
    assert frames["found"] == len(records)
    assert frames["used"] + sum(frames["left_out"].values()) == frames["found"]
    assert frames["used"] == len({i for s in made.sequences for i in s.frames})
    by_split = Counter(s.split for s in made.sequences)
    table = report["splits"]
    assert {split: row["sequences"] for split, row in table.items() if row["sequences"]} == by_split
    assert report["sequences"]["written"] == len(made.sequences)
    near = sum(row["near_another_split"] for row in table.values())
    assert near == frames["left_out"]["near_another_split"]
    events = report["events"]["list"]
    in_events = sum(sum(event["splits"].values()) for event in events)
    assert in_events == sum(row["frames"] for row in table.values())
    assert in_events == sum(run["frames"] for run in report["runs"]["list"])


# Windows


def test_facts_do_not_depend_on_the_kind_of_number():
    """Numbers from a record are Python's; numpy rounds 0.5479175 to another sixth digit."""
    facts = []
    for kind in (float, np.float64):
        records = [
            dataclasses.replace(f, wet_fraction=kind(0.5479175), observed_fraction=kind(0.5479175))
            for f in stretch(0, 5)
        ]
        facts.append([sequence.meta for sequence in plan(records).sequences])
    assert facts[0] == facts[1]


def test_keys_times_and_facts_of_a_sequence():
    records = stretch(5, 5, observed_fraction=0.5, wet_fraction=0.25)
    made = plan(records)
    assert [s.key for s in made.sequences] == ["20200101T0005-t0-l0", "20200101T0010-t0-l0"]
    assert made.sequences[1].meta == {
        "start": "2020-01-01T00:10:00Z",
        "end": "2020-01-01T00:25:00Z",
        "interval_minutes": 5,
        "series": "",
        "event": "20200101T0005",
        "observed_fraction": 0.5,
        "wet_fraction": 0.25,
    }
    assert made.sequences[1].frames == (1, 2, 3, 4)
    assert (made.num_frames, made.height, made.width) == (4, 8, 8)
    assert made.report["interval_minutes"] == made.report["product_interval_minutes"] == 5


def test_keys_name_the_series_where_there_are_several():
    names = ["a/b", "a_b", "", "x" * 70, "x" * 71]
    records = [f for name in names for f in stretch(0.5, 4, series=name)]
    keys = [s.key for s in plan(records).sequences]
    assert len(set(keys)) == 5
    assert "a_b-20200101T000030-t0-l0" in keys
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,80}", key) for key in keys)
    assert keys == [s.key for s in plan(records[::-1]).sequences]


def test_no_window_crosses_a_gap_or_a_series():
    records = stretch(0, 5) + stretch(30, 4)
    assert starts(plan(records), records) == [0, 5, 30]
    one_series_after_another = stretch(0, 3, series="a") + stretch(15, 3, series="b")
    with pytest.raises(ValueError, match="3 in its longest run"):
        plan(one_series_after_another)


def test_times_may_differ_by_seconds():
    records = [frame(t) for t in (0, 5.05, 9.97, 15)]
    assert len(plan(records).sequences) == 1
    for times in ((0, 5.2, 10, 15), (0, 5, 10, 14.8)):
        with pytest.raises(ValueError, match="No sequence of 4 frames every 5 minutes"):
            plan([frame(t) for t in times])


def test_the_stride_of_training_windows():
    records = stretch(0, 10)
    assert starts(plan(records, stride=3), records) == [0, 15, 30]


def test_validation_and_test_windows_do_not_overlap_by_default():
    records = stretch(0, 20) + stretch(1000, 12)
    day = ("2020-01-01T16:40/..",)
    assert starts(plan(records, test=day), records, "test") == [1000, 1020, 1040]
    five = plan(records, test=day, evaluation_stride=5)
    assert starts(five, records, "test") == [1000, 1025]
    assert starts(plan(records, test=day, evaluation_stride=1), records, "test")[:3] == [
        1000,
        1005,
        1010,
    ]


def test_a_frame_of_which_nothing_was_observed_is_a_gap():
    records = stretch(0, 9)
    records[4] = frame(20, observed_fraction=0.0)
    made = plan(records)
    assert starts(made, records) == [0, 25]
    assert made.report["frames"]["left_out"]["nothing_observed"] == 1


def test_every_second_frame_in_two_interleaved_runs():
    records = stretch(0, 9)
    made = plan(records, interval_minutes=10)
    assert starts(made, records) == [0, 5, 10]
    assert made.sequences[1].frames == (1, 3, 5, 7)
    assert made.report["interval_minutes"] == 10
    # A missing frame breaks the run that it belongs to, not the other one.
    records = [f for f in stretch(0, 12) if f.order != EPOCH + 25]
    assert starts(plan(records, interval_minutes=10), records) == [0, 10, 20]
    # For the test, windows of both runs must not overlap in time.
    records = stretch(0, 18)
    made = plan(records, interval_minutes=10, test=("2020",))
    assert starts(made, records, "test") == [0, 35]


@pytest.mark.parametrize("wanted", [7.5, 12, 2.5])
def test_frames_are_never_interpolated(wanted):
    with pytest.raises(ValueError, match="cannot be had from frames every 5 minutes"):
        plan(stretch(0, 20), interval_minutes=wanted)


def test_the_interval_is_estimated_where_it_is_not_declared():
    records = stretch(0, 6, step=6) + stretch(300, 6, step=6)
    made = plan(records, declared=None)
    assert made.report["interval_minutes"] == 6
    assert len(made.sequences) == 6
    with pytest.raises(ValueError, match="time between frames is unknown"):
        plan([frame(0)], declared=None, frames=1)
    assert len(plan([frame(0)], declared=5, frames=1).sequences) == 1


def test_another_interval_than_the_declared_one_is_reported(caplog):
    records = stretch(0, 8, step=15)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="Most frames are 15 minutes apart: set interval_minutes"),
    ):
        plan(records)
    assert "The interval is 5 minutes, but" in caplog.text
    made = plan(records, interval_minutes=15)
    assert len(made.sequences) == 5
    # A product declared every 10 minutes that comes every 15: what there is can be had.
    assert len(plan(records, declared=10, interval_minutes=15).sequences) == 5
    (row,) = made.report["quality"]["intervals"]
    assert row["differs_from_declared"] and row["common_minutes"] == 15
    assert row["steps"] == [{"minutes": 15, "number": 7}]


def test_tiles_are_laid_and_the_rest_is_reported():
    records = stretch(0, 4)
    made = plan(records, size=(10, 7), tile=(4, 3))
    assert [(s.top, s.left) for s in made.sequences] == [(0, 0), (0, 3), (4, 0), (4, 3)]
    assert made.sequences[3].key == "20200101T0000-t4-l3"
    assert (made.height, made.width) == (4, 3)
    assert made.report["tiles"] == {
        "number": 4,
        "height": 4,
        "width": 3,
        "uncovered_fraction": round(1 - 48 / 70, 6),
    }
    stepped = plan(records, size=(10, 7), tile=(4, 3), tile_step=(3, 4))
    assert [(s.top, s.left) for s in stepped.sequences] == [
        (top, left) for top in (0, 3, 6) for left in (0, 4)
    ]
    with pytest.raises(ValueError, match="Tiles of 11 x 3 pixels do not fit the frames of 10 x 7"):
        plan(records, size=(10, 7), tile=(11, 3))


# Filters


def test_dry_windows_are_dropped_and_counted():
    records = stretch(0, 6, wet_fraction=0.0) + stretch(30, 6, wet_fraction=0.2)
    made = plan(records, min_wet_fraction=0.1)
    assert starts(made, records) == [20, 25, 30, 35, 40]  # from two wet frames of four on
    assert made.report["sequences"]["left_out"]["too_dry"] == 4
    with pytest.raises(ValueError, match="4 windows, .* 4 are too dry"):
        plan(stretch(0, 7), min_wet_fraction=0.5)


def test_kept_dry_windows_stand_for_the_dropped_ones():
    """The sum of the weights estimates the number of dry windows; keys alone decide."""
    records = stretch(0, 4003, wet_fraction=0.0) + stretch(30_000, 4, wet_fraction=1.0)
    made = plan(records, min_wet_fraction=0.1, keep_dry=0.25)
    weights = Counter(s.weight for s in made.sequences)
    assert weights[1.0] == 1 and set(weights) == {1.0, 4.0}
    spread = math.sqrt(4000 * 0.25 * 0.75) / 0.25
    assert abs(4 * weights[4.0] - 4000) < 4 * spread
    report = made.report["sequences"]
    assert report["dry_written"] == weights[4.0]
    assert report["left_out"]["too_dry"] == 4000 - weights[4.0]
    # Another stretch in the archive changes nothing for these windows.
    part = plan(records[:1000], min_wet_fraction=0.1, keep_dry=0.25)
    assert [s.key for s in part.sequences] == [s.key for s in made.sequences][: len(part.sequences)]
    other = plan(records, min_wet_fraction=0.1, keep_dry=0.25, seed=1)
    assert [s.key for s in other.sequences] != [s.key for s in made.sequences]


def test_a_rain_filter_needs_to_know_the_rain():
    records = stretch(0, 4, wet_fraction=None)
    assert plan(records).sequences[0].meta["wet_fraction"] is None
    with pytest.raises(ValueError, match="has no wet threshold"):
        plan(records, min_wet_fraction=0.1)


def test_windows_that_show_too_little_are_dropped_and_counted():
    records = stretch(0, 8)
    records[3] = frame(15, observed_fraction=0.3)
    made = plan(records, min_observed=0.5)
    assert starts(made, records) == [20]
    assert made.report["sequences"]["left_out"]["too_little_observed"] == 4


# Duplicates, stuck radars, gaps


def test_identical_duplicates_are_left_out():
    records = stretch(0, 5)
    copy = dataclasses.replace(records[2], file="copy/of/it.h5")
    made = plan([copy, *records])
    assert made.report["frames"]["left_out"]["duplicates"] == 1
    assert made.report["quality"]["duplicates"] == {
        "identical": 1,
        "different": 0,
        "files": [{"left_out": "copy/of/it.h5", "kept": "10.h5"}],
    }
    assert [i for s in made.sequences for i in s.frames].count(0) == 0


def test_different_frames_of_one_time_are_an_error_that_names_the_files():
    records = stretch(0, 10)
    others = [
        dataclasses.replace(f, file=f"other/{f.file}", digest="x", key="data1") for f in records
    ]
    with pytest.raises(DuplicateError) as caught:
        plan(records + others)
    message = str(caught.value)
    assert message.startswith("10 frames differ")
    assert "2020-01-01T00:20:00Z: 20.h5 and other/20.h5 [data1]" in message
    assert message.count("other/") == 5 and "and 5 more" in message
    made = plan(records + others, on_duplicate="first")
    assert made.report["quality"]["duplicates"]["different"] == 10
    assert {i for s in made.sequences for i in s.frames} == set(range(10))
    # The same time in another series is no duplicate.
    plan(records + [dataclasses.replace(f, series="other") for f in others])
    assert (
        len(plan([records[0], dataclasses.replace(others[0], series="o")], frames=1).sequences) == 2
    )


def test_a_stuck_radar_is_reported():
    records = stretch(0, 9)
    for i in (3, 4, 5):
        records[i] = frame(5 * i, digest="stuck")
    for i in (7, 8):
        records[i] = frame(5 * i, digest="dry", wet_fraction=0.0)
    assert frozen_stretches(records, in_order(records)) == [
        {
            "series": "",
            "from": "2020-01-01T00:15:00Z",
            "to": "2020-01-01T00:25:00Z",
            "frames": 3,
        }
    ]
    quality = plan(records).report["quality"]["frozen"]
    assert (quality["stretches"], quality["frames"]) == (1, 3)


def test_gaps_are_listed_with_the_frames_that_are_missing():
    records = stretch(0, 4) + stretch(30, 4) + stretch(48, 4) + stretch(10_000, 4)
    made = plan(records, min_observed=0.0)
    gaps = made.report["quality"]["gaps"]
    assert (gaps["number"], gaps["missing_frames"]) == (1, 2)
    assert gaps["list"] == [
        {
            "series": "",
            "from": "2020-01-01T00:15:00Z",
            "to": "2020-01-01T00:30:00Z",
            "missing": 2,
        }
    ]
    kept = in_order(records)
    intervals = intervals_by_series(records, kept, 5)
    assert len(gaps_of(records, kept, intervals)) == 2  # a pause counts where no length is given


def test_values_above_the_range_are_counted():
    records = stretch(0, 4)
    records[2] = frame(10, above_range=7)
    above = plan(records).report["quality"]["above_range"]
    assert above == {"pixels": 7, "frames": 1, "worst": [{"file": "10.h5", "pixels": 7}]}


def test_runs_are_the_longest_stretches():
    records = stretch(0, 3) + stretch(20, 2) + stretch(0, 2, series="b")
    runs = runs_of(records, without_duplicates(records).kept, 5)
    assert [(run.series, run.frames) for run in runs] == [
        ("", (0, 1, 2)),
        ("", (3, 4)),
        ("b", (5, 6)),
    ]


# Splits


def event_frames(number: int, per_event: int = 12) -> list[FrameRecord]:
    return [f for i in range(number) for f in stretch(1000 * i, per_event)]


def test_whole_events_go_to_splits():
    records = event_frames(10)
    made = plan(records, proportions=None)
    rows = made.report["events"]["list"]
    assert len(rows) == 10 and all(len(row["splits"]) == 1 for row in rows)
    assert Counter(next(iter(row["splits"])) for row in rows) == {"train": 8, "val": 1, "test": 1}
    tables = [
        plan(records, proportions=None, seed=seed).report["events"]["list"] for seed in range(1, 5)
    ]
    assert any(table != rows for table in tables)


def test_two_series_of_one_time_are_in_one_split():
    """Two products of one radar, or neighbours under one front: the same weather."""
    records = [f for s in ("qpe", "raw") for f in event_frames(6)]
    records = [
        dataclasses.replace(f, series=("qpe", "raw")[i // 72]) for i, f in enumerate(records)
    ]
    made = plan(records, proportions=None)
    splits_of_time: dict[float, set[str]] = {}
    for s in made.sequences:
        for i in s.frames:
            splits_of_time.setdefault(records[i].order, set()).add(s.split)
    assert all(len(splits) == 1 for splits in splits_of_time.values())


def test_series_that_have_nothing_to_do_with_each_other():
    records = [f for n in range(10) for f in stretch(0, 5, series=f"sample{n}")]
    made = plan(records, proportions=None, split_by="series")
    split_of = {s.meta["series"]: s.split for s in made.sequences}
    assert Counter(split_of.values()) == {"train": 8, "val": 1, "test": 1}
    assert made.report["frames"]["left_out"]["near_another_split"] == 0
    with pytest.raises(ValueError, match=r"There are 1 events .*never divided"):
        plan(records, proportions=None, split_by="event")


def test_one_event_is_cut_in_time_where_nobody_said_how_to_split():
    made = plan(stretch(0, 60), proportions=None)  # within an hour: 11 frames
    rows = made.report["splits"]
    assert made.report["split_by"] == "time"
    assert (rows["train"]["frames"], rows["val"]["frames"], rows["test"]["frames"]) == (27, 5, 6)
    assert {s.split for s in made.sequences} == {"train", "val", "test"}


def test_too_few_frames_for_three_splits_all_train():
    made = plan(stretch(0, 35), proportions=None)
    assert {s.split for s in made.sequences} == {"train"}
    assert made.report["splits"]["train"]["frames"] == 35


def test_the_step_of_a_slow_product_is_no_pause():
    records = [frame(1440 * day) for day in range(60) if day != 30]
    made = plan(records, declared=1440, proportions=None, event_gap_hours=6)
    assert [row["frames"] for row in made.report["events"]["list"]] == [30, 29]


def test_days_are_utc_days_and_keep_their_distance():
    records = stretch(0, 4 * 288)
    made = plan(records, proportions=None, split_by="day")
    rows = made.report["splits"]
    assert sum(row["frames"] for row in rows.values()) == 4 * 288 - sum(
        row["near_another_split"] for row in rows.values()
    )
    days = {
        split: {s.meta["start"][:10] for s in made.sequences if s.split == split} for split in rows
    }
    assert sorted(len(d) for d in days.values()) == [1, 1, 2]
    assert rows["test"]["near_another_split"] == 0
    assert rows["train"]["near_another_split"] > 0


def test_a_cut_in_time_loses_the_gap():
    records = stretch(0, 100)
    made = plan(records, proportions=None, split_by="time", split_gap_minutes=30)
    rows = made.report["splits"]
    # Of 80, 10 and 10 frames, those less than 30 minutes before the next split are left out.
    assert {split: row["frames"] for split, row in rows.items()} == {
        "train": 75,
        "val": 5,
        "test": 10,
    }
    assert {split: row["near_another_split"] for split, row in rows.items()} == {
        "train": 5,
        "val": 5,
        "test": 0,
    }
    assert rows["train"]["last"] < rows["val"]["first"] < rows["test"]["first"]


def test_explicit_ranges():
    records = stretch(0, 48) + stretch(1440, 48) + stretch(2880, 48)
    made = plan(
        records,
        val=("2020-01-02",),
        test=("2020-01-03T01:00/..", "2020-01-01T03:00/2020-01-01T04:00"),
        split_gap_minutes=20,
    )
    rows = made.report["splits"]
    assert rows["val"]["frames"] == 48
    assert rows["test"]["frames"] == 36 + 12
    assert rows["train"]["frames"] == (36 - 3) + (12 - 3)
    assert rows["train"]["near_another_split"] == 6
    assert rows["test"]["first"] == "2020-01-01T03:00:00Z"


def test_frames_of_another_series_keep_the_distance_too():
    records = stretch(0, 10, series="a") + stretch(50, 10, series="b")
    made = plan(records, test=("2020-01-01T00:50/..",), split_gap_minutes=20)
    assert made.report["splits"]["train"]["near_another_split"] == 3


def test_a_target_that_is_all_test_needs_no_training():
    made = plan(stretch(0, 12), test=("2020",))
    assert {s.split for s in made.sequences} == {"test"}


def test_a_wanted_split_without_sequences_is_an_error_with_numbers():
    with pytest.raises(ValueError) as caught:
        plan(stretch(0, 20), proportions=None, split_by="time")
    message = str(caught.value)
    assert "No sequence of 4 frames every 5 minutes for train and val and test" not in message
    assert "val has 0 frames (and 2 that are too close to another split)" in message
    assert "split_gap_minutes (now 60)" in message


def test_too_few_events_say_what_else_there_is():
    with pytest.raises(ValueError, match=r"There are 2 events \(20200101T0000, .* 'time' cuts"):
        plan(event_frames(2), proportions=None, split_by="event")


def test_nothing_to_plan_from():
    with pytest.raises(ValueError, match="no file was converted"):
        plan([])
    with pytest.raises(ValueError, match="Nothing was observed in any of the 3 frames"):
        plan(stretch(0, 3, observed_fraction=0.0))


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"frames": 0}, "frames must be at least 1"),
        ({"evaluation_stride": 0}, "evaluation_stride must be at least 1"),
        ({"interval_minutes": 0.0}, "interval_minutes must be positive"),
        ({"event_gap_hours": float("nan")}, "event_gap_hours must be positive"),
        ({"split_gap_minutes": -1.0}, "split_gap_minutes must be at least 0"),
        ({"min_observed": 1.5}, r"min_observed must be in \[0, 1\]"),
        ({"keep_dry": 0.5}, "set min_wet_fraction"),
        ({"tile_step": (4, 4)}, "set tile"),
        ({"tile": (4, 0)}, "two numbers of at least 1"),
        ({"split_by": "range"}, "needs at least one of them"),
        ({"split_by": "day", "val": ("2020",)}, "time ranges go with split_by='range'"),
        ({"test": ("2020",), "proportions": ALL_TRAIN}, "proportions have no effect"),
        ({"test": ("yesterday",)}, "'yesterday' in the time range"),
        ({"proportions": {"dev": 1.0}}, "No split 'dev'"),
        ({"proportions": {"train": 0.0}}, "not all of them 0"),
        ({"proportions": {"train": 1.0, "val": -0.1}}, "must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        RadarPlanSettings(**choices)


# Groups and times


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), st.floats(0.5, 50), min_size=3, max_size=30),
    st.integers(0, 1000),
    st.randoms(),
)
def test_groups_are_assigned_the_same_in_any_order(groups, seed, shuffler):
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    assigned = assign_groups(groups, shares, seed)
    names = list(groups)
    shuffler.shuffle(names)
    backwards = dict(reversed(shares.items()))
    assert assign_groups({name: groups[name] for name in names}, backwards, seed) == assigned
    assert assigned.keys() == groups.keys()
    assert set(assigned.values()) == set(shares)


def test_proportions_are_approached():
    sizes = {f"group{i}": 1 + i % 7 for i in range(200)}
    for seed in range(20):
        assigned = assign_groups(sizes, {"train": 8, "val": 1, "test": 1}, seed)
        for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
            got = sum(sizes[name] for name, where in assigned.items() if where == split)
            assert abs(got / sum(sizes.values()) - share) < 0.02


def test_every_split_gets_a_group_even_of_very_unequal_ones():
    sizes = {"huge": 1000.0, "small": 1.0, "tiny": 0.1}
    for seed in range(10):
        assigned = assign_groups(sizes, {"train": 0.98, "val": 0.01, "test": 0.01}, seed)
        assert set(assigned.values()) == {"train", "val", "test"}
        assert assigned["huge"] == "train"


def test_assignment_is_the_same_on_every_machine():
    """Changed values mean other splits for everybody: not without a new version."""
    assert keyed_uniform(0, "keep_dry", "a") == 0.5038337174702704
    assigned = assign_groups({f"e{i}": 1 for i in range(8)}, {"train": 6, "val": 1, "test": 1}, 7)
    assert [name for name, split in assigned.items() if split != "train"] == ["e1", "e5"]


def test_unwanted_splits_get_nothing():
    assert assign_groups({"a": 1.0}, {"train": 1, "val": 0}, 0) == {"a": "train"}
    with pytest.raises(ValueError, match=r"There are 1 persons \(a\) for 2 splits \(train, test\)"):
        assign_groups({"a": 1.0}, {"test": 1, "train": 1}, 0, what="persons")
    with pytest.raises(ValueError, match="Sizes of groups must be positive: 'b' has 0"):
        assign_groups({"a": 1.0, "b": 0.0}, {"train": 1}, 0)


@pytest.mark.parametrize(
    "text, first, beyond",
    [
        ("2020-01-01", 0, 1440),
        ("2020", 0, 366 * 1440),
        ("2020-02", 31 * 1440, 60 * 1440),
        ("2019-12/2020-01-01", -31 * 1440, 1440),
        ("2020-01-01T05:30/2020-01-01T08:00", 330, 481),
        ("2020-01-01T05:30:10Z", 330 + 10 / 60, 330 + 11 / 60),
        ("2020-01-01 05:30", 330, 331),
        ("../2020-01-01", -math.inf, 1440),
        ("2020-01-02/..", 1440, math.inf),
    ],
)
def test_a_written_time_is_meant_as_a_whole(text, first, beyond):
    parsed = TimeRange.parse(text)
    assert parsed.start == pytest.approx(EPOCH + first)
    assert parsed.end == pytest.approx(EPOCH + beyond)
    if math.isfinite(first):
        assert EPOCH + first in parsed and EPOCH + first - 1e-3 not in parsed
    if math.isfinite(beyond):
        assert EPOCH + beyond - 1e-3 in parsed and EPOCH + beyond not in parsed


@pytest.mark.parametrize(
    "text",
    ["", "/", "..", "2020-13", "2020-02-30", "2020-1-1", "2020-01-01T5", "a/b", "2020/2021/2022"],
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is no time"):
        TimeRange.parse(text)


def test_a_range_ends_after_its_start():
    with pytest.raises(ValueError, match="ends before it starts"):
        TimeRange.parse("2020-02/2020-01")


def test_ranges_must_not_overlap_and_must_hold_something():
    def ranges(**texts: Iterable[str]) -> dict[str, list[TimeRange]]:
        return {split: [TimeRange.parse(text) for text in some] for split, some in texts.items()}

    times = [EPOCH, EPOCH + 1440]
    assert split_of_ranges(ranges(test=["2020-01-02"]), times) == ["train", "test"]
    with pytest.raises(ValueError, match="'2020-01-01' of val and '2020' of test overlap"):
        split_of_ranges(ranges(val=["2020-01-01"], test=["2020"]), times)
    with pytest.raises(ValueError, match="No frame lies in the time range '2021'"):
        split_of_ranges(ranges(test=["2020-01-02", "2021"]), times)
    assert split_of_ranges(ranges(test=["2020", "2020-01-01"]), times) == ["test", "test"]


def test_a_cut_never_divides_a_time():
    times = [1.0, 1.0, 2.0, 3.0, 3.0, 4.0]
    shares = {"train": 0.5, "val": 0.25, "test": 0.25}
    assert cut_in_time(times, shares) == ["train"] * 3 + ["val"] * 2 + ["test"]
    assert cut_in_time([5.0, 1.0, 9.0], {"train": 98, "val": 1, "test": 1}) == [
        "val",
        "train",
        "test",
    ]
    with pytest.raises(ValueError, match="frames of 2 times for 3 splits"):
        cut_in_time([1.0, 2.0, 2.0], shares)


def test_events_are_separated_by_pauses():
    times = [EPOCH + t for t in (0, 5, 359, 720, 719.9)]
    assert events_of(times, 6) == [*["20200101T0000"] * 3, *["20200101T115954"] * 2]
    assert len(set(events_of([0.0, 360.0], 6))) == 2  # a pause of exactly that length separates
    assert events_of(times, 6.02) == ["20200101T0000"] * 5


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 100), max_size=8),
    st.lists(st.floats(0, 100), max_size=8),
    st.floats(0, 50),
)
def test_too_close_agrees_with_all_pairs(times, others, gap):
    expected = [any(abs(t - o) < gap for o in others) for t in times]
    assert too_close(np.array(times), np.array(others), gap).tolist() == expected
