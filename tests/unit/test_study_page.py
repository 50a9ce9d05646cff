"""A study's page, table and record: every value beside the paper's, claims that fail shown as
failing, and the table of all claims."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

import tmu_dist.study.__main__ as command
from tests.evaluated_runs import PageText
from tests.study_records import SEEDS, as_published, fake_ledger, fake_record
from tmu_dist.ledger.words import in_three_digits
from tmu_dist.study import published
from tmu_dist.study.design import PAGE_FILE, RESULTS_FILE, TABLE_FILE, Study
from tmu_dist.study.overview import marks
from tmu_dist.study.page import as_markdown, write_study
from tmu_dist.study.record import StudyRecord
from tmu_dist.study.studies import STUDIES
from tmu_dist.study.summary import (
    PICTURE_FILE,
    SUMMARY_FILE,
    claims,
    read_records,
    record_name,
    write_summary,
)

TABLE_1 = STUDIES["table1"]
RESULTS = Path(__file__).parents[2] / "docs" / "results"
OURS = {key: 0.9 * mse for key, mse in as_published(TABLE_1).items()} | {"art": 80.0}
"""Nine tenths of the paper's errors; but for ART, which is the best."""


@pytest.fixture(scope="module")
def record() -> StudyRecord:
    return fake_record(TABLE_1, fake_ledger(TABLE_1, OURS))


@pytest.fixture(scope="module")
def page(record: StudyRecord, tmp_path_factory: pytest.TempPathFactory) -> PageText:
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, record)
    return PageText((folder / PAGE_FILE).read_text())


def row(page: PageText, *first: str) -> list[str]:
    return next(cells for cells in page.rows if cells[: len(first)] == list(first))


def test_every_row_stands_beside_the_papers(page: PageText, record: StudyRecord) -> None:
    for each in record.rows:
        values = [each.seeds[seed].scores["mse_per_frame"] for seed in SEEDS]
        mean, theirs = statistics.fmean(values), published.TABLE_1[each.key]["mse_per_frame"]
        cells = row(page, each.label, each.sources)
        assert cells[2] == f"{theirs:.1f}"
        assert cells[3] == f"{mean:.1f} ± {statistics.stdev(values):.1f}"
        assert cells[4] == f"{mean - theirs:+.1f}".replace("-", "−")
        assert cells[8] == f"{theirs / 120.5:.3f}"
        assert cells[-1] == "3"
    assert row(page, "persistence")[3] == "200.0"
    assert page.best == ["ART", "ART"]


@pytest.mark.parametrize(
    ("value", "least", "written"),
    [(131.9, 1, "131.9"), (10.84, 1, "10.8"), (7.632, 1, "7.63"), (0.7814, 3, "0.781"),
     (0.0781, 3, "0.0781"), (-7.632, 1, "-7.63"), (0.0, 1, "0.0"), (math.nan, 1, "nan")],
)  # fmt: skip
def test_values_have_three_digits(value: float, least: int, written: str) -> None:
    assert in_three_digits([value], least) == written


def test_small_errors_are_not_rounded_away(tmp_path: Path) -> None:
    small = dict.fromkeys(OURS, 5.4)
    write_study(tmp_path, fake_record(TABLE_1, fake_ledger(TABLE_1, small)))
    ours = row(PageText((tmp_path / PAGE_FILE).read_text()), "from scratch", "none")[3]
    assert re.fullmatch(r"\d\.\d\d ± \d\.\d\d", ours)


def test_columns_of_numbers_that_the_paper_does_not_give_are_left_out() -> None:
    study = STUDIES["figure4"]
    values = {row.key: 30.0 for row in study.rows}
    text = as_markdown(fake_record(study, fake_ledger(study, values)))
    headings = next(line for line in text.splitlines() if line.startswith("| Row | Sources |"))
    assert "ours" in headings and "paper" not in headings


def test_a_claim_that_fails_is_shown_as_failing(page: PageText, record: StudyRecord) -> None:
    beaten = next(claim for claim in record.claims if claim.key == "beats-others")
    assert beaten.verdict == "opposite"
    cells = row(page, beaten.text)
    assert cells[2] == "DOES NOT HOLD: the opposite does"
    assert cells[3] == "of 12: 10 hold, 2 the opposite"
    assert "Of 6 claims: 5 holding, 1 turned round." in page.text
    pair = row(page, "memory transfer (both) / ART (both)", "beats-others")
    assert pair[3].startswith("−") and pair[-1] == "the opposite"
    order = row(page, "all rows")
    assert "tmu over art" in order[4] and order[-1].startswith("DOES NOT HOLD")


def test_the_page_shows_whether_the_runs_were_long_enough(page: PageText) -> None:
    """Best so far at 750, 1,500, 2,250 and 3,000 iterations of runs validated at 500, 1,500, ..."""
    cells = next(own for own in page.rows if own[2:3] == ["3,000"])
    assert cells[3:] == ["40.0", "30.2", "30.2", "28.5", "3,000, 3,000, 3,000"]


def test_the_page_is_whole(page: PageText) -> None:
    assert not page.open_tags
    assert all(address.startswith("data:") for address in page.addresses)
    for words in (
        "Student's t", "small scale", "80,000 iterations", "Teachers are trained once",
        "MNIST <embedded>", "study-digits-teacher-1", "python -m tmu_dist.study check",
        "--seeds 0 1 2", "abc1234", "torch 2.8", "9.5 M", "no benchmark",
    ):  # fmt: skip
        assert words in page.text, words


def test_the_record_is_read_as_it_was_written(record: StudyRecord, tmp_path: Path) -> None:
    write_study(tmp_path, record)
    again = StudyRecord.load(tmp_path)
    assert again.to_json() == record.to_json()
    assert (tmp_path / TABLE_FILE).read_text() == as_markdown(again)
    assert again.seeds == SEEDS and again.row("tmu").seeds[1].run == "../runs/tmu-seed1"
    tree = json.loads((tmp_path / RESULTS_FILE).read_text())
    del tree["scale"]
    (tmp_path / RESULTS_FILE).write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"not written by this version \(scale: "):
        StudyRecord.load(tmp_path)
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        StudyRecord.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_study_has_a_page(name: str, tmp_path: Path) -> None:
    study = STUDIES[name]
    keys = [row.key for row in study.rows]
    gates = {"mch": 0.6, "fmi": 0.6, "mnist2": 0.4, "kth": 0.4} if name == "table5" else None
    means = {key: 30.0 + number for number, key in enumerate(keys)}
    ledger = fake_ledger(
        study, means, gates=gates, is_radar="csi" in study.scores or name == "table5"
    )
    write_study(tmp_path, fake_record(study, ledger))
    page = PageText((tmp_path / PAGE_FILE).read_text())
    assert not page.open_tags
    text = (tmp_path / TABLE_FILE).read_text()
    for each in study.rows:
        assert any(cells[:2] == [each.label, each.sources] for cells in page.rows)
        assert f"| {each.label} | {each.sources} |" in text
    assert "not run" not in page.text
    assert ("The paper's values and ours" in page.text) == any(row.published for row in study.rows)
    if study.axis is not None:
        xs = sorted({each.x for each in study.rows if each.x is not None})
        heads = [cells for cells in page.rows if cells[1:] == [f"{x:g}" for x in xs]]
        assert len(heads) == len(study.scores)
        alt = f"MSE / frame, lower is better, against {study.axis.label}"
        assert alt in page.source


def test_a_figure_shows_each_point_once(tmp_path: Path) -> None:
    study = STUDIES["figure4"]
    means = {row.key: 30.0 + number for number, row in enumerate(study.rows)}
    write_study(tmp_path, fake_record(study, fake_ledger(study, means)))
    page = PageText((tmp_path / PAGE_FILE).read_text())
    line = next(c for c in page.rows if c[0] == "memory transfer (both)" and len(c) == 7)
    assert [round(float(cell.split()[0])) for cell in line[1:]] == [31, 32, 33, 34, 35, 36]


def test_partial_studies_have_a_page(tmp_path: Path) -> None:
    few = {key: OURS[key] for key in ("scratch", "tmu")}
    ledger = fake_ledger(TABLE_1, few, seeds=(4,))
    failed = replace(ledger.arms[7], failures={4: "RuntimeError: <too hot>"})
    arms = (*ledger.arms[:7], failed, *ledger.arms[8:])
    write_study(tmp_path, fake_record(TABLE_1, replace(ledger, arms=arms)))
    page = PageText((tmp_path / PAGE_FILE).read_text())
    assert "art, seed 4: RuntimeError: <too hot>" in page.text
    assert "Not run yet: tmu-scratch, finetune-1" in page.text
    cells = row(page, "memory transfer", "both")
    assert "±" not in cells[3] and cells[-1] == "1"
    assert row(page, "memory transfer", "1 digit")[3] == "–"
    assert "Of 6 claims: 1 undecided, 5 without runs." in page.text


# Two records side by side


def test_two_records_of_a_study_are_set_side_by_side(
    record: StudyRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {key: mse for key, mse in OURS.items() if key not in ("art", "tmu-scratch")}
    again = fake_record(TABLE_1, fake_ledger(TABLE_1, few | {"tmu": 140.0}, seeds=(1, 2, 3)))
    (teacher,) = again.teachers
    other_row = replace(again.row("l2sp-1"), settings={"transfer.l2_sp_alpha": 0.5})
    rows = tuple(other_row if row.key == "l2sp-1" else row for row in again.rows)
    retaught = replace(again, rows=rows, teachers=(replace(teacher, weights_sha256="0" * 64),))
    other_study = fake_record(
        STUDIES["figure4"], fake_ledger(STUDIES["figure4"], {"beta-0.1": 9.0})
    )
    for name, each in (("a", record), ("b", retaught), ("other", other_study)):
        (tmp_path / name).mkdir(exist_ok=True)
        write_study(tmp_path / name, each)
    command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    said = capsys.readouterr().out
    lines = {line.split(" | ")[0]: line for line in said.splitlines()}
    assert lines["| finetune (1 digit)"].endswith("| 0 1 2 | 1 2 3 | 2 | 2 |")
    assert lines["| memory transfer (both)"].endswith("| 0 1 2 | 1 2 3 | 2 | 0 |")
    assert lines["| ART (both)"].endswith("| 0 1 2 | – | 0 | 0 |")
    shared = 2 * len(few)
    assert f"Of {shared} runs that both have (a row with a seed), {shared - 2} have" in said
    assert "Rows with other settings: l2sp-1." in said
    assert "Archives: 1 of 1 that both name are the same." in said
    assert f"Teachers: 0 of 1 that both name are the same; not {teacher.name}." in said
    assert "is better than training from scratch.” holds and DOES NOT HOLD" in said
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path / "a"), str(tmp_path / "other")])
    assert "other of figure4: compare two of one study." in capsys.readouterr().err


# The table of all claims


def save(study: Study, folder: Path, record: StudyRecord) -> None:
    place = folder / record_name(record)
    place.mkdir(parents=True)
    write_study(place, record)


def test_the_summary_has_every_claim_with_its_evidence(record: StudyRecord, tmp_path: Path) -> None:
    save(TABLE_1, tmp_path, record)
    save(TABLE_1, tmp_path, replace(record, scale="paper"))
    sections = claims(read_records(tmp_path)).split("\n## ")
    for study, section in zip(STUDIES.values(), sections, strict=True):
        lines = section.splitlines()
        assert lines[0].removeprefix("## ") == study.title
        rows = [line for claim in study.claims for line in lines if f"| {claim.text} | " in line]
        assert len(rows) == len(study.claims)
        if study is not TABLE_1:
            assert f"\npython -m tmu_dist.study {study.name}\n" in section
            assert all(line.endswith(f" | {claim.where} | not run |")
                       for line, claim in zip(rows, study.claims, strict=True))  # fmt: skip
    longer = {"training.num_steps": 6000}
    save(TABLE_1, tmp_path, replace(record, settings=longer))
    save(TABLE_1, tmp_path, replace(record, settings=longer, weights="last"))
    section = claims(read_records(tmp_path)).split("\n## ")[0]
    tables = section.split("With other settings:")
    assert tables[0].replace(f"{record.command}\n", "", 2).rstrip() == sections[0].rstrip()
    assert tables[1].splitlines()[2] == (
        "| Claim | Where | [small, num_steps=6000](study-table1-num_steps=6000/table.md) | "
        "[small, num_steps=6000, last weights](study-table1-num_steps=6000-last/table.md) |"
    )
    assert tables[1].count(" | undecided") + tables[1].count(" | **") > len(TABLE_1.claims)
    first = sections[0].splitlines()
    assert first.count("python -m tmu_dist.study table1 --seeds 0 1 2") == 2
    assert (
        "| [small](study-table1/table.md) | [paper](study-table1-paper/table.md) |" in sections[0]
    )
    beaten = next(line for line in first if "than finetuning, L2-SP" in line)
    assert beaten.count("**DOES NOT HOLD: the opposite does**; least of 12: tmu over art −") == 2


def test_stand_ins_for_data_are_said(record: StudyRecord, tmp_path: Path) -> None:
    assert "stand" not in as_markdown(record).split("##")[0]
    (archive,) = record.archives
    on_clips = replace(record, archives=(replace(archive, original="other clips (target)"),))
    assert "Other clips stand in for" in as_markdown(on_clips).split("##")[0]
    save(TABLE_1, tmp_path, on_clips)
    heading = "| [small](study-table1/table.md), other clips standing in |"
    assert heading in claims(read_records(tmp_path))


def test_words_below_the_summary_stay(record: StudyRecord, tmp_path: Path) -> None:
    file = write_summary(tmp_path)
    assert file == tmp_path / SUMMARY_FILE
    file.write_text(file.read_text() + "\nMore records: see below.\n")
    save(TABLE_1, tmp_path, record)
    text = write_summary(tmp_path).read_text()
    assert text.endswith("\nMore records: see below.\n") and "DOES NOT HOLD" in text
    assert text == write_summary(tmp_path).read_text()


def test_the_picture_has_every_row_that_the_paper_gives_an_error_of(
    record: StudyRecord, tmp_path: Path
) -> None:
    """Ours are nine tenths of the paper's errors, so parts of scratch are the paper's."""
    shown = {mark.label: mark for mark in marks(record)}
    assert list(shown) == [row.name for row in record.rows if row.key != "scratch"]
    for row in record.rows:
        if row.key not in ("scratch", "art"):
            mark = shown[row.name]
            assert mark.paper == pytest.approx(published.TABLE_1[row.key]["mse_per_frame"] / 120.5)
            assert mark.ours == pytest.approx(mark.paper, abs=0.02)
            assert 0 < mark.deviation < 0.02
    rows = tuple(replace(row, seeds={}) if row.key == "art" else row for row in record.rows)
    save(TABLE_1, tmp_path, replace(record, rows=rows))
    assert f"]({PICTURE_FILE})" in write_summary(tmp_path).read_text()
    drawn = (tmp_path / PICTURE_FILE).read_text()
    assert "finetune (2 digits)" in drawn and "ART" not in drawn
    assert "last iteration" not in drawn

    alone = tmp_path / "alone"
    save(TABLE_1, alone, replace(record, weights="last"))
    assert PICTURE_FILE not in write_summary(alone).read_text()

    overfitted = fake_record(TABLE_1, fake_ledger(TABLE_1, OURS | {"finetune-2": 120.5}))
    save(TABLE_1, tmp_path, replace(overfitted, weights="last"))
    both = marks(record, overfitted)
    assert [mark.label for mark in both] == list(shown)
    assert next(mark.last for mark in both if mark.label == "finetune (2 digits)") == (
        pytest.approx(1 / 0.9, abs=0.02)
    )
    text = write_summary(tmp_path).read_text()
    assert "[small, last weights](study-table1-last/table.md)" in text
    assert "last iteration" in (tmp_path / PICTURE_FILE).read_text()


def test_the_committed_summary_is_of_the_committed_records() -> None:
    records = read_records(RESULTS)
    assert claims(records) in (RESULTS / SUMMARY_FILE).read_text()
    drawn = (RESULTS / PICTURE_FILE).read_text()
    assert all(mark.label in drawn for each in records for mark in marks(each))


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("study-*")), ids=lambda folder: folder.name)
def test_committed_tables_are_made_from_their_records(folder: Path) -> None:
    assert (folder / TABLE_FILE).read_text() == as_markdown(StudyRecord.load(folder))
