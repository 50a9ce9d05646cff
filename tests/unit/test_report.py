"""The comparison page and the terminal table: complete, self-contained, and honest.

Shape letters: N sequences, T lead time.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.evaluated_runs import SETTINGS, N, PageText, T, result, scores
from tmu_dist.evaluation.comparison import (
    RunEntry,
    check_comparable,
    paired_difference,
    read_learning_curve,
)
from tmu_dist.evaluation.examples import Example
from tmu_dist.evaluation.report import write_comparison_page, write_figures
from tmu_dist.evaluation.score_table import Scores, ScoreTable
from tmu_dist.evaluation.tables import format_count, format_score
from tmu_dist.evaluation.terminal import comparison_table, terminal_summary


def write_log(folder: Path, *, last: float = 90.0) -> Path:
    folder.mkdir()
    events = [{"event": "train", "step": 5, "loss/total": 1.0}]
    for step, mse in ((10, 150.0), (20, 120.0), (20, last)):  # step 20 again after a resume
        events.append(
            {"event": "validation", "step": step, "mse_per_frame": mse,
             "persistence_mse_per_frame": 180.0}
        )  # fmt: skip
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "log.jsonl").write_text(text + '{"event": "tra')  # killed while writing
    return folder


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[RunEntry]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        RunEntry(
            label="scratch",
            result=result("scratch", 120.5),
            run_directory=write_log(folder / "scratch"),
            seconds_per_batch=0.35,
        ),
        RunEntry(
            label="TMU, both",
            result=result("tmu", 94.7, teachers=("1 digit", "2 digits")),
            run_directory=write_log(folder / "tmu"),
            seconds_per_batch=0.43,
        ),
    ]


def example() -> Example:
    frames = np.zeros((T, 1, 8, 8))
    return Example(
        sample_id=17,
        inputs_TCHW=frames[:2],
        truth_TCHW=frames,
        forecasts_TCHW={"scratch": frames, "TMU, both": frames},
    )


@pytest.fixture(scope="module")
def page(entries: list[RunEntry], tmp_path_factory: pytest.TempPathFactory) -> PageText:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_comparison_page(path, entries, SETTINGS, examples=[example()])
    return PageText(path.read_text())


def test_page_loads_nothing_from_outside(page: PageText) -> None:
    assert not page.open_tags
    assert page.addresses
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", a) for a in page.addresses)
    text = page.source
    assert "<script" not in text and "@import" not in text and "url(" not in text
    # Learning curve, three metrics by lead time, differences, one example; in two themes each.
    assert len(page.addresses) == 2 * 6


def test_page_serves_dark_mode_phones_and_print(page: PageText) -> None:
    for needed in ("prefers-color-scheme: dark", "width=device-width", "@media print"):
        assert needed in page.source


def test_page_has_the_columns_of_table_1_with_persistence_first(page: PageText) -> None:
    heading, first, *_ = page.rows
    assert heading[1] == "MSE / frame\u00a0↓"
    assert first[0] == "persistence" and first[1] == "200.0"
    assert page.row("scratch")[1] == "120.5"
    tmu = page.row("TMU, both")
    assert tmu[1] == "94.7"
    assert tmu[5:] == ["9.53 M", "3.59 M", "17.7", "9.2", "0.430", "1 digit, 2 digits"]


def test_page_marks_the_best_value_of_each_column(page: PageText) -> None:
    # MSE (lower is better) and SSIM (higher) differ; MAE and PSNR are equal, so all are best.
    assert page.best.count("TMU, both") == 4
    assert page.best.count("scratch") == page.best.count("persistence") == 2


def test_page_marks_persistence_when_it_wins(entries: list[RunEntry], tmp_path: Path) -> None:
    worse = [replace(entries[0], result=result("scratch", 300.0))]
    write_comparison_page(tmp_path / "p.html", worse, SETTINGS)
    found = PageText((tmp_path / "p.html").read_text())
    assert found.best.count("persistence") == 4 and found.best.count("scratch") == 2


def test_page_shows_gates_per_teacher_and_layer(page: PageText) -> None:
    assert page.row("1 digit") == ["1 digit", "0.250", "0.750", "0.500"]
    assert page.row("2 digits") == ["2 digits", "0.500", "0.500", "0.500"]


def test_page_says_what_when_how_and_its_limits(page: PageText) -> None:
    for needed in (
        "Does <memory> transfer & help?",  # escaped on the way in, so it reads as written
        "python -m tmu_dist.demo --output 'a b'",
        "2026-01-02 03:04 UTC",
        "abc1234",
        "0 in every run",
        "40 sequences",
        "A single seed ranks nothing",
        "A note of the caller.",
        "first command\nsecond command",
        "summed over the channels and pixels",
        "Sequence 17",
    ):
        assert needed in page.text


def test_page_gives_the_paired_difference(page: PageText) -> None:
    row = [r for r in page.rows if r[0] == "TMU, both"][1]
    assert row == ["TMU, both", "−25.8", "−25.8 to −25.8", "100%"]


def test_page_refuses_what_cannot_be_compared(entries: list[RunEntry], tmp_path: Path) -> None:
    path, (first, second) = tmp_path / "report.html", entries
    other_data = replace(second.result, data=replace(second.result.data, manifest_hash="0" * 64))
    other_ssim = ScoreTable(ssim_mode="gauss_11").definitions
    other_metric = replace(
        second.result, definitions={**second.result.definitions, "ssim": other_ssim["ssim"]}
    )
    unknown = replace(SETTINGS, reference_label="scrach")
    without_rows = replace(second.result, per_sequence=None)
    for wrong, settings, message in (
        ([], SETTINGS, "at least one"),
        ([first, replace(second, label="scratch")], SETTINGS, "label of its own"),
        ([first, replace(second, result=other_data)], SETTINGS, "their archive differ"),
        ([first, replace(second, result=other_metric)], SETTINGS, "their metrics differ"),
        (entries, unknown, "'scrach' is none of the runs"),
        ([first, replace(second, result=without_rows)], SETTINGS, "no per-sequence scores"),
    ):
        with pytest.raises(ValueError, match=message):
            write_comparison_page(path, wrong, settings)
    assert not path.exists()


def test_paired_difference_agrees_with_the_normal_interval() -> None:
    """For many independent sequences: mean +- 1.96 standard errors."""
    rng = np.random.default_rng(0)
    reference_N1 = rng.normal(100, 20, (400, 1))
    method_N1 = reference_N1 + rng.normal(-1, 4, (400, 1))
    ids = np.arange(400)
    found = paired_difference(Scores(ids, {"m": method_N1}), Scores(ids, {"m": reference_N1}), "m")
    difference = method_N1 - reference_N1
    error = 1.96 * difference.std(ddof=1) / 20
    assert found.mean == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(difference.mean() + error, abs=0.1 * error)
    assert found.fraction_lower == (difference < 0).mean()
    assert found.num_sequences == 400


def test_a_run_does_not_improve_on_itself() -> None:
    found = paired_difference(scores(1.0), scores(1.0), "mse_per_frame")
    assert (found.mean, found.low, found.high, found.fraction_lower) == (0, 0, 0, 0)


def test_paired_difference_needs_the_same_sequences() -> None:
    shifted = Scores(np.arange(1, N + 1), scores(1.0).values_NT)
    with pytest.raises(ValueError, match="same sequences"):
        paired_difference(scores(1.0), shifted, "mse_per_frame")


def test_learning_curve_counts_a_repeated_step_once(tmp_path: Path) -> None:
    curve = read_learning_curve(write_log(tmp_path / "run", last=91.0))
    assert curve.steps == (10, 20)
    assert curve.mse_per_frame == (150.0, 91.0)
    assert curve.persistence_mse_per_frame == 180.0


def test_learning_curve_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no log\.jsonl"):
        read_learning_curve(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "train", "step": 1}\n')
    with pytest.raises(ValueError, match="no validation yet"):
        read_learning_curve(tmp_path)
    log.write_text('{"event": "train", "step": 1}\nnot json\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_learning_curve(tmp_path)


def test_one_run_without_log_or_teachers_still_makes_a_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    lone = RunEntry(label="only", result=result("scratch", 100.0))
    check_comparable([lone])
    write_comparison_page(path, [lone], replace(SETTINGS, repeat_commands=()))
    page = PageText(path.read_text())
    assert "Mean transfer gates" not in page.text
    assert page.row("only")[-2:] == ["–", "none"]
    assert page.text.count(SETTINGS.command) == 2  # in the header and as the way to repeat


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_shows_scores_definitions_gates_and_cost(width: int) -> None:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(terminal_summary(result("tmu", 94.7, teachers=("1 digit", "2 digits"))))
    text = " ".join(captured.get().split())
    for needed in ("mse_per_frame 200.0 94.7", "1 digit 0.250 0.750 0.500", "9,534,208",
                   "17.7 ms per sequence", "summed over the"):  # fmt: skip
        assert needed in text
    assert max(len(line) for line in captured.get().splitlines()) <= width


def test_terminal_compares_runs_in_80_columns(entries: list[RunEntry]) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(comparison_table(entries))
    lines = [line.split() for line in captured.get().splitlines()]
    assert lines[1][-3:] == ["PSNR", "[dB]", "↑"]  # brackets are not markup
    assert ["persistence", "200.0", "0.5", "0.8000", "0.50"] in lines
    assert ["TMU,", "both", "94.7", "0.5", "0.9053", "0.50"] in lines


def test_figures_are_written(tmp_path: Path) -> None:
    paths = write_figures(result("tmu", 94.7), tmp_path / "figures")
    assert [path.name for path in paths] == [
        f"lead_time_{name}.png" for name in ("mse_per_frame", "ssim", "mae_per_frame")
    ]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 400


def test_numbers_are_written_for_people() -> None:
    assert [format_count(n) for n in (850, 84_112, 3_589_376)] == ["850", "84.1 k", "3.59 M"]
    assert format_score("psnr_db", np.inf) == "∞"
    assert format_score("ssim", 0.77712) == "0.7771"
