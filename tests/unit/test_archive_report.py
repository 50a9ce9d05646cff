"""The report of an archive: what goes into report.json, and what its page says and loads."""

import base64
import dataclasses
import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from data_prep.radar_plan import RadarPlanSettings, plan_radar
from data_prep.report import compose_report, write_report
from data_prep.report_charts import Lane, Stretch, event_chart, overview_chart
from data_prep.source import ArchiveFacts, BadFile, FrameRecord, Plan
from data_prep.statistics import CodeHistogram, statistics_record
from tests.radar_archive import CARD, UNITS, rain, write_radar_archive
from tmu_dist.colours import colour_scale
from tmu_dist.html_page import Html, element

FACTS = ArchiveFacts(
    name="rain",
    channels=1,
    dtype="uint8",
    units=UNITS,
    frame_interval_minutes=5.0,
    grid=None,
    source=CARD,
    notes={
        "reader": "synthetic",
        "missing_rule": "255 is <blind>",
        "notes": ["Drawn, not measured."],
        "conversion": [
            {"step": "z_r", "from": "rain_rate", "to": "reflectivity", "formula": "Z = a R^b",
             "a": 200.0, "b": 1.6}
        ],
    },
)  # fmt: skip
BAD = [
    BadFile("a/broken.h5", "is truncated at byte 7"),
    BadFile("b/none.h5", "is <no> HDF5"),
    BadFile("c/forecast.h5", "3 forecast fields left out", by_design=True),
]


def plan_with_gaps() -> Plan:
    """Three events of two, one and one hours; the first has two gaps, one frame is there twice."""
    records = []
    for day, numbers in ((1, [*range(8), *range(11, 15), *range(17, 25)]), (5, range(12)),
                         (9, range(12))):  # fmt: skip
        start = datetime(2024, 6, day, 12, tzinfo=UTC).timestamp() / 60
        for n in numbers:
            file = f"{day}-{n:02d}"
            records.append(
                FrameRecord(
                    series="", order=start + 5 * n, file=file, digest=file, wet_fraction=0.5
                )
            )
    records.append(dataclasses.replace(records[3], file="copy"))
    settings = RadarPlanSettings(frames=4, val=("2024-06-05",), test=("2024-06-09",))
    return plan_radar(records, settings, height=8, width=8, declared_interval_minutes=5.0)


def statistics() -> dict:
    histogram = CodeHistogram.empty("uint8")
    histogram.update(rain(0, 5, 40, 50))
    return statistics_record(histogram, UNITS, wet_threshold=7.0)


def write_page(folder: Path) -> str:
    return write_report(str(folder), folder / "page.html").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    report = compose_report(facts=FACTS, plan=plan_with_gaps(), bad_files=BAD, num_files=60)
    objects = {"report.json": report, "statistics.json": statistics()}
    write_radar_archive(folder, objects=objects)
    return write_page(folder)


def section(page: str, heading: str) -> str:
    """The part of the page below a heading."""
    assert f"<h2>{heading}</h2>" in page, re.findall("<h2>(.*?)</h2>", page)
    return page.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]


def rectangles(chart: str, fill: str) -> list[tuple[float, float]]:
    """First and last x of the boxes of a colour, from left to right."""
    found = re.findall(rf'<rect x="([\d.]+)"[^>]*? width="([\d.]+)"[^>]*?{re.escape(fill)}', chart)
    return sorted((float(x), float(x) + float(width)) for x, width in found)


# report.json


def test_bad_files_and_those_left_out_by_design_are_told_apart():
    report = compose_report(facts=FACTS, plan=plan_with_gaps(), bad_files=BAD, num_files=60)
    assert report["files"] == 60
    assert report["bad_files"] == {
        "number": 2,
        "reasons": {"is <no> HDF5": 1, "is truncated at byte 7": 1},
        "list": [
            {"file": "a/broken.h5", "reason": "is truncated at byte 7"},
            {"file": "b/none.h5", "reason": "is <no> HDF5"},
        ],
    }
    assert [row["file"] for row in report["left_out_files"]["list"]] == ["c/forecast.h5"]
    assert report["facts"]["reader"] == "synthetic"
    assert report["plan"]["quality"]["gaps"]["number"] == 2


def test_the_report_is_json_and_the_same_every_time():
    texts = {
        json.dumps(
            compose_report(facts=FACTS, plan=plan_with_gaps(), bad_files=BAD, num_files=60),
            sort_keys=True,
            allow_nan=False,
        )
        for _ in range(2)
    }
    assert len(texts) == 1


def test_long_lists_of_bad_files_are_counted_and_cut():
    bad = [BadFile(f"{i:05d}", "is empty" if i % 2 else f"odd {i}") for i in range(3000)]
    report = compose_report(facts=FACTS, plan=plan_with_gaps(), bad_files=bad, num_files=3000)
    files = report["bad_files"]
    assert files["number"] == 3000
    assert len(files["list"]) == len(files["reasons"]) == 1000
    assert files["reasons"]["is empty"] == 1500


# The page


def test_the_page_loads_nothing(page):
    assert "<script" not in page and "<link" not in page and "@import" not in page
    sources = re.findall(r'(?:src|href|srcset|data)="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {"#bar-hatch"}


def test_the_page_is_the_same_every_time(tmp_path):
    write_radar_archive(tmp_path, objects={"statistics.json": statistics()})
    assert write_page(tmp_path) == write_page(tmp_path)


def test_texts_of_others_stay_texts(page):
    assert "CC0 &amp; &lt;no strings attached&gt;" in page
    assert "<no strings" not in page and "<blind>" not in page and "is <no> HDF5" not in page


def test_terms_stand_before_everything_but_the_title(page):
    body = page.split("<body>")[1]
    terms = body.index("Terms of use:")
    assert body.index("<h1>rain</h1>") < terms < body.index("<dl")
    assert "Nobody&#x27;s weather service" in body and "Citation: Nobody (2024)" in body


def test_the_facts_are_there(page):
    folder_facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert folder_facts["Stored range"] == "0 to 70 dBZ, in steps of 0.276 (codes 0 to 254)"
    assert folder_facts["Grid"] == "40 × 50 pixels of 2 × 2 km"
    assert folder_facts["Projection"] == "EPSG:28992"
    assert folder_facts["Original files"] == "60"
    assert folder_facts["Format"] == "WebDataset tars, uint8, zstd"
    assert re.fullmatch(r"[0-9a-f]{64}", folder_facts["Content hash"])
    assert "255 is &lt;blind&gt;" in folder_facts["Missing pixels"]
    assert folder_facts["Conversion"].startswith("rain rate to reflectivity: Z = a R^b (a = 200")
    record = statistics()
    assert folder_facts["Mean"] == f"{record['mean']:.4g} dBZ"
    assert folder_facts["At least 7 dBZ"] == f"{100 * record['wet_fraction']:.3g} %"
    missing = record["missing"] / (record["missing"] + record["count"])
    assert folder_facts["Missing"] == f"{100 * missing:.3g} %"


def test_the_split_table_has_a_row_for_each_split(page):
    rows = re.findall(r"<tr><th>(.*?)</tr>", section(page, "Splits"))
    cells = [re.findall(r">([^<>]+)<", row) for row in rows[1:]]
    assert [row[:2] for row in cells] == [["train", "2"], ["val", "1"]]
    assert cells[0][4:7] == ["2024-06-01 12:00", "2024-06-01 14:00", "25 %"]


def test_examples_are_painted_with_their_times(page):
    part = section(page, "Example sequences")
    assert re.findall("<figcaption>(.*?)</figcaption>", part)[:3] == [
        "23:50",
        "23:55",
        "00:00 +1 d",
    ]
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]*)"', part)
    assert len(pictures) == 3 * 5
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB"))
    assert image.shape == (160, 200, 3)
    value_dbz = rain(0, 1, 40, 50)[0, 0, 25, 12] * UNITS.scale
    scale = colour_scale(UNITS)
    step = int(np.searchsorted(scale.bounds, value_dbz, side="right")) - 1
    assert value_dbz > 55
    assert "#" + bytes(image[4 * 25 + 2, 4 * 12 + 2]).hex() == scale.colours[step]


def test_the_histogram_is_of_the_observed_pixels_in_their_colours(page):
    part = section(page, "Values")
    titles = re.findall(r"<title>([\d.]+) to ([\d.]+): ([\d.e-]+) %</title>", part)
    assert sum(float(percent) for _, _, percent in titles) == pytest.approx(100, rel=0.01)
    scale = colour_scale(UNITS)
    fills = re.findall(r'fill="(#\w{6})"[^>]*><title>([\d.]+) to', part)
    for fill, low in fills:
        step = int(np.searchsorted(scale.bounds, float(low) + 1e-4, side="right"))
        assert fill == (scale.below_colour, *scale.colours)[step]
    assert len(fills) > 30


def test_gaps_and_splits_are_where_they_are_in_time(page):
    part = section(page, "Time coverage and gaps")
    chart = part.split("Event by event")[1].split("</svg>")[0]
    train = rectangles(chart, 'fill="var(--train)"')
    gaps = rectangles(chart, 'stroke="var(--gap)"')
    assert len(train) == 3 and len(gaps) == 2
    # Frames 0..7, 11..14 and 17..24 of 25: gaps of 3 and 2 frames.
    left, right = train[0][0], train[-1][1]
    per_frame = (right - left) / 25
    edges = [8, 11, 15, 17]
    found = [gaps[0][0], gaps[0][1], gaps[1][0], gaps[1][1]]
    assert [(x - left) / per_frame for x in found] == pytest.approx(edges, abs=0.05)
    assert [(x - left) / per_frame for x in (train[0][1], train[1][0])] == pytest.approx(
        [8, 11], abs=0.05
    )
    (val,) = rectangles(chart, 'fill="var(--val)"')
    assert (val[0] - left, val[1] - left) == pytest.approx((0, 12 * per_frame), abs=1)
    rows = re.findall(r"<tr><th>(2024.*?)</th><td>(\d+)</td>", part)
    assert rows == [("2024-06-01 12:35 to 12:55", "3"), ("2024-06-01 13:10 to 13:25", "2")]


def test_what_was_left_out_is_listed_with_reasons(page):
    part = section(page, "What was left out")
    assert "another frame of the same time" in part
    assert "Bad files: 2" in part and "Files left out: 1" in part
    assert re.search(r"a/broken.h5</th><td[^>]*>is truncated at byte 7", part)
    assert "Gaps: 2, with 5 frames missing." in part


def test_the_exact_settings_are_folded_away(page):
    part = section(page, "How it was made, and how to check it")
    folded = part.split("<details>")[1]
    assert "&quot;seed&quot;: 7" in folded


def test_archives_of_digits_have_a_page_too(tmp_path):
    config = MovingMNISTConfig(
        digits=1, train=3, val=2, test=2, frames=4, frame_size=16, digit_size=7, speed=(1, 2)
    )
    write_moving_mnist(config, str(tmp_path), workers=1, show_progress=False)
    page = write_page(tmp_path)
    missing = re.findall(r"([A-Z][a-z ]+): left out, because", page)
    assert {"Histogram", "Time coverage and gaps", "Losses"} <= set(missing)
    assert page.count("<img ") == (3 + 2 + 2) * 4
    assert "test</th>" in section(page, "Splits")


def test_video_reports_show_groups(tmp_path):
    splits = {
        "train": {"sequences": 9, "groups": {"number": 2, "sequences": {"anna": 6, "b&b": 3}}},
        "val": {"sequences": 1, "groups": {"number": 1, "sequences": {"carl": 1}}},
    }
    gaps = {"number": 1, "list": [{"clip": "walk", "after": 7.0, "before": 9.0}]}
    plan = {"splits": splits, "gaps": gaps, "split_rule": "by group", "notes": ["As published."]}
    write_radar_archive(tmp_path, objects={"report.json": {"plan": plan}})
    page = write_page(tmp_path)
    part = section(page, "Groups and gaps")
    short, long = rectangles(part, 'fill="var(--train)"')
    assert (short[1] - short[0]) * 2 == pytest.approx(long[1] - long[0], rel=0.01)
    assert len(rectangles(part, 'fill="var(--val)"')) == 1
    assert "b&amp;b" in part
    assert re.search(r"<th>walk</th><td>7</td><td>9</td>", part)
    assert "Split by group." in page and "As published." in page


def test_reports_of_another_shape_leave_sections_out(tmp_path):
    odd = {"plan": {"runs": {"list": [{"split": "train"}]}, "events": [], "splits": {"train": 3}},
           "facts": [], "bad_files": 3}  # fmt: skip
    write_radar_archive(tmp_path, objects={"report.json": odd, "statistics.json": {"count": 0}})
    page = write_page(tmp_path)
    assert "Time coverage and gaps: left out" in page and "Histogram: left out" in page


def test_a_damaged_report_is_named(tmp_path):
    write_radar_archive(tmp_path, objects={"report.json": {}})
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is not valid JSON"):
        write_page(tmp_path)


def test_the_command_writes_the_page(tmp_path, capsys):
    write_radar_archive(tmp_path / "rain")
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(tmp_path / "rain"), "--out", str(out)]) == 0
    assert "page.html" in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "span_hours", [0.01, 1.0, 5.0, 30.0, 24 * 20, 24 * 59.9, 24 * 61, 24 * 400, 24 * 365 * 40]
)
def test_time_axes_have_a_few_ticks_for_every_span(span_hours):
    start = datetime(2019, 12, 30, 21, 10, tzinfo=UTC)
    end = datetime.fromtimestamp(start.timestamp() + 3600 * span_hours, UTC)
    lane = Lane("x", start, end, [Stretch(start, end, "train", "all")])
    for chart in (overview_chart([lane]), event_chart([lane])):
        ticks = re.findall(r'text-anchor="middle">', chart)
        assert len(ticks) <= 10
    assert len(re.findall(r'text-anchor="middle">', event_chart([lane]))) >= 1
    if span_hours >= 5:
        assert len(re.findall(r'text-anchor="middle">', overview_chart([lane]))) >= 2


def test_elements_escape_text_but_not_html():
    inner = element("b", "<&>", css='a"b')
    assert inner == '<b class="a&quot;b">&lt;&amp;&gt;</b>'
    assert element("p", inner, "<") == f"<p>{inner}&lt;</p>"
    assert isinstance(inner, Html)
