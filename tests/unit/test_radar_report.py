"""Reports of radar: baselines, thresholds, and what is undefined, on page, terminal and file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.evaluated_runs import SETTINGS, PageText, radar_result, radar_scores
from tmu_dist.evaluation.comparison import RunEntry, check_comparable
from tmu_dist.evaluation.report import write_comparison_page, write_figures, write_markdown_tables
from tmu_dist.evaluation.tables import (
    categorical_table,
    format_radar_score,
    format_score,
    undefined_scores,
)
from tmu_dist.evaluation.terminal import comparison_table, terminal_summary


@pytest.fixture(scope="module")
def radar_entries() -> list[RunEntry]:
    return [
        RunEntry(label="scratch", result=radar_result("scratch", hits=60)),
        RunEntry(label="TMU", result=radar_result("tmu", hits=75)),
    ]


@pytest.fixture(scope="module")
def radar_page(radar_entries: list[RunEntry], tmp_path_factory: pytest.TempPathFactory) -> PageText:
    return write_page(radar_entries, tmp_path_factory.mktemp("radar"))


def write_page(entries: list[RunEntry], tmp_path: Path) -> PageText:
    path = tmp_path / "radar.html"
    write_comparison_page(path, entries, replace(SETTINGS, reference_label=None))
    return PageText(path.read_text())


def test_radar_page_shows_all_baselines_beside_every_run(radar_page: PageText) -> None:
    page = radar_page
    assert [row[0] for row in page.rows[1:5]] == ["persistence", "optical flow", "scratch", "TMU"]
    assert page.rows[0][1:8] == [
        "MSE / frame\u00a0↓", "MAE / frame\u00a0↓", "SSIM\u00a0↑", "PSNR [dB]\u00a0↑",
        "MSE [dBZ²]\u00a0↓", "MAE [dBZ]\u00a0↓", "CSI, 20 dBZ\u00a0↑",
    ]  # fmt: skip
    csi = f"{75 / 125:.3f}"
    assert page.row("TMU")[5:8] == ["12.35", "1.500", csi]
    assert page.row("optical flow")[10] == "12.3"  # milliseconds
    assert "20 dBZ and more, which 10.00% of the observed pixels reach" in page.text
    by_threshold = [row for row in page.rows if row[0] == "TMU"]
    assert by_threshold[1] == ["TMU", csi, "0.750", "0.250", "0.722", "1.000", csi]
    assert by_threshold[2] == ["TMU", "0.750", "0.875"]  # FSS at 1 and 8 pixels
    assert "Optical flow: optical-flow extrapolation by pysteps" in page.text
    assert "not computed" not in page.text
    # MSE, MAE and SSIM, and CSI and FSS by lead time, FSS by scale; in two themes each.
    assert len(page.addresses) == 2 * 6


def test_radar_page_shows_what_is_undefined(radar_page: PageText) -> None:
    """Nothing reaches 60 dBZ: no score is 0 or best, each is a dash, and the page says why."""
    at_60_dbz = [row for row in radar_page.rows if row[0] == "TMU"][3:]
    assert at_60_dbz == [["TMU", *"––––––"], ["TMU", "–", "–"]]
    assert (
        "Undefined (0 / 0) and left out, in lead times: CSI, POD, FAR, HSS, Bias, FSS at 3 (of "
        "every forecast)."
    ) in radar_page.text


def test_what_is_undefined_is_said_of_each_forecast() -> None:
    """The model forecasts nothing at all, so only its FAR is undefined at the first threshold."""
    own = radar_result("a", hits=75)
    assert own.radar is not None
    dry = radar_scores(75)
    dry.counts_TKX[:, 0] = 0, 100, 0, 900
    radar = replace(own.radar, forecasts={**own.radar.forecasts, "model": dry})
    entries = [RunEntry(label="a", result=replace(own, radar=radar))]
    note = "Undefined (0 / 0) and left out, in lead times: FAR at 3 (of a)."
    assert undefined_scores(entries, 0) == note
    assert undefined_scores([RunEntry(label="a", result=own)], 0) == ""


def test_best_means_something_else_for_every_score(tmp_path: Path) -> None:
    entries = [RunEntry(label="a", result=radar_result("a", hits=75))]
    table = categorical_table(entries, 0)
    arrows = {heading.split("\u00a0")[0]: heading[-1] for heading in table.headings[1:]}
    assert arrows == {
        "CSI": "↑", "POD": "↑", "FAR": "↓", "HSS": "↑", "Bias": "1", "CSI, pooled": "↑"
    }  # fmt: skip
    for row in table.rows:
        assert [cell.is_best for cell in row.cells] == [row.name == "a"] * 4 + [
            True,
            row.name == "a",
        ]


def test_the_best_bias_is_the_one_nearest_to_1() -> None:
    own = radar_result("a", hits=75)
    assert own.radar is not None
    rare, frequent = radar_scores(70), radar_scores(70)
    rare.counts_TKX[:, 0] = 60, 40, 20, 880  # 0.8
    frequent.counts_TKX[:, 0] = 60, 40, 50, 850  # 1.1
    forecasts = {
        **own.radar.forecasts,
        "model": frequent,
        "persistence": rare,
        "optical_flow": rare,
    }
    entry = RunEntry(label="a", result=replace(own, radar=replace(own.radar, forecasts=forecasts)))
    biases = [row.cells[4] for row in categorical_table([entry], 0).rows]
    assert [cell.text for cell in biases] == ["0.800", "0.800", "1.100"]
    assert [cell.is_best for cell in biases] == [False, False, True]


def test_radar_page_names_a_missing_baseline(tmp_path: Path) -> None:
    lone = [RunEntry(label="a", result=radar_result("a", hits=75, flow=False))]
    page = write_page(lone, tmp_path)
    assert page.text.count("Optical flow not computed: pip install 'tmu-dist[flow]'.") == 2
    assert "optical flow" not in {row[0] for row in page.rows}


def test_optical_flow_of_one_run_serves_all(tmp_path: Path) -> None:
    entries = [
        RunEntry(label="without", result=radar_result("without", hits=60, flow=False)),
        RunEntry(label="with", result=radar_result("with", hits=75)),
    ]
    page = write_page(entries, tmp_path)
    assert page.row("optical flow")[7] == f"{70 / 130:.3f}"
    assert "not computed" not in page.text


def test_runs_of_other_thresholds_are_not_compared(radar_entries: list[RunEntry]) -> None:
    radar = radar_entries[1].result.radar
    assert radar is not None
    other = replace(radar, settings=replace(radar.settings, thresholds=(25.0, 60.0)))
    changed = replace(radar_entries[1], result=replace(radar_entries[1].result, radar=other))
    with pytest.raises(ValueError, match="their thresholds and scales differ"):
        check_comparable([radar_entries[0], changed])


@pytest.mark.parametrize("flow", [True, False])
def test_terminal_shows_radar_in_80_columns(flow: bool) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_summary(radar_result("tmu", hits=75, flow=flow)))
    text = " ".join(captured.get().split())
    assert ("optical flow 0.538 0.700" in text) == flow
    assert ("Optical flow not computed: pip install 'tmu-dist[flow]'" in text) != flow
    for needed in ("At 20 dBZ and more (10.00% of the observed pixels)", "model 0.600 0.750",
                   "1 px 8 px", "(2 km) ↑ (16 km) ↑", "mse_physical 12.35"):  # fmt: skip
        assert needed in text
    assert max(len(line) for line in captured.get().splitlines()) <= 80
    assert "…" not in text


def test_terminal_compares_radar_runs_in_80_columns(radar_entries: list[RunEntry]) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(comparison_table(radar_entries))
    lines = [line.split() for line in captured.get().splitlines()]
    assert ["TMU", "94.7", "1.500", "0.9053", "0.600"] in lines


def test_markdown_tables_have_the_numbers_of_the_page(
    radar_entries: list[RunEntry], tmp_path: Path
) -> None:
    write_markdown_tables(tmp_path / "tables.md", radar_entries)
    text = (tmp_path / "tables.md").read_text()
    assert "| TMU | **0.600** | **0.750** | **0.250** | **0.722** | **1.000** | **0.600** |" in text
    assert "| optical flow | 0.700 | 0.850 |" in text
    assert "| 8 px (16 km)\u00a0↑ |" in text
    lone = [RunEntry(label="a", result=radar_result("a", hits=75, flow=False))]
    write_markdown_tables(tmp_path / "lone.md", lone)
    assert "Optical flow not computed: pip install" in (tmp_path / "lone.md").read_text()


def test_radar_figures_are_written_beside_the_others(tmp_path: Path) -> None:
    paths = write_figures(radar_result("tmu", hits=75), tmp_path)
    assert {path.name for path in paths} == {
        "lead_time_mse_per_frame.png", "lead_time_ssim.png", "lead_time_mae_per_frame.png",
        "lead_time_csi.png", "lead_time_fss.png", "fss_by_scale.png",
    }  # fmt: skip
    assert all(path.is_file() for path in paths)


def test_undefined_numbers_are_written_as_such() -> None:
    assert format_score("mse_mean", np.nan) == format_radar_score(np.nan) == "–"
    assert format_radar_score(-0.0312) == "−0.031"
