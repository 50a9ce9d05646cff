"""Benchmarks of scores, loaders and data preparation: they compare what is the same, and say so.

The tables are made of the records alone (tests/test_results.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import loader_share
from benchmarks.evaluation_speed import measure as evaluation
from benchmarks.evaluation_speed import report as evaluation_report
from benchmarks.preparation_speed import build
from benchmarks.preparation_speed import report as preparation_report
from tmu_dist.data.archive import open_archive

MACHINE = {"cpu": "C", "processor": "P", "cores": 2, "threads": 2}


@pytest.mark.parametrize("name", evaluation.QUICK_CASES)
def test_plain_scores_are_the_projects_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written without its modules, so that either would show an error of the other."""
    monkeypatch.setattr(evaluation, "seconds_of", lambda run: 1.0)
    found = evaluation.compare(evaluation.QUICK_CASES[name], rounds=1)
    assert len(found) == (6 if evaluation.QUICK_CASES[name].is_radar else 5)
    for score, row in found.items():
        assert row["difference"] < 1e-12, score


def test_the_fields_have_the_rain_that_is_said() -> None:
    dbz = 70 * evaluation.fields(3, 10, 256)
    parts = [(dbz >= threshold).mean() for threshold in evaluation.RADAR.thresholds]
    np.testing.assert_allclose(parts, [0.30, 0.09, 0.02], atol=0.02)
    assert evaluation.observed_disc(1, 256).mean() == pytest.approx(0.75, abs=0.01)


def test_a_share_is_of_forecast_and_scores() -> None:
    score = {"frames": 10, "difference": 1e-16, "plain": [1.0, 2.0], "now": [0.1, 0.5]}
    row = {"sequences": 4, "frames": 80, "forecast": [3.0, 3.0]}
    row |= {"plain": [1.0, 1.0], "now": [0.1, 0.1]}
    case = {"size": 64, "missing": True, "scores": {"SSIM": score}, "evaluation": row}
    text = evaluation_report.table({"machine": MACHINE, "rounds": 2, "cases": {"radar": case}})
    assert "| radar, 64x64, masked | SSIM | 8 (5 - 10) | 60 (20 - 100) | 7.0 (4.0 - 10.0) |" in text
    assert "| 10.0 (10.0 - 10.0) | 25% | 3% |" in text


def test_every_form_of_the_archive_holds_the_same_sequences(tmp_path: Path) -> None:
    urls = loader_share.write_archives(tmp_path, loader_share.QUICK_SIZES["small"])
    assert list(urls) == list(loader_share.FORMS)
    for split in ("train", "val"):
        read = [open_archive(url).read(split, range(8)) for url in urls.values()]
        for other in read[1:]:
            np.testing.assert_array_equal(other, read[0])


def test_a_loaders_share_is_of_all_steps() -> None:
    runs = [{"first_wait": 0.5, "seconds": (1.0, 3.0), "waited": (0.01, 0.03)}]
    row = {"0": {"runs": runs, "alone": [0.002]}}
    record = {"machine": MACHINE, "rounds": 1, "sizes": {"small": {"tar": row}}}
    line = loader_share.table(record).splitlines()[-1]
    assert line == (
        "| small | tar | 0 | 2.000 (1.000 - 3.000) | 20.00 (10.00 - 30.00) | 1.00% | 0.50 "
        "| 2.00 (2.00 - 2.00) |"
    )


def options(**changes: Any) -> argparse.Namespace:
    given = {"workers": 1, "real": False, "sequences": 8, "source": ""}
    return argparse.Namespace(**given | changes)


@pytest.mark.parametrize("way", build.WAYS)
def test_every_archive_can_be_prepared_from_generated_files(way: str, tmp_path: Path) -> None:
    source = tmp_path / "files"
    source.mkdir()
    if way.startswith("video"):
        pytest.importorskip("av")
        build.write_clips(source, clips=2, frames=45)
    elif way.startswith("radar"):
        build.write_radar(source, frames=24, size=160)
    arguments = options(way=way, source=str(source))
    made = build.measure(arguments, str(tmp_path / "one"))
    frame_bytes = 20 * (64 * 64 if way.startswith("digits") else 128 * 128)
    assert made["bytes"] == made["sequences"] * frame_bytes > 0
    again = build.measure(arguments, str(tmp_path / "two"))
    assert again["hash"] == made["hash"]


def test_rates_are_of_wall_time() -> None:
    run = {"seconds": 2.0, "cpu_seconds": 3.0, "sequences": 100, "bytes": 4e6, "hash": "a" * 64}
    row = {"runs": {"1": [run]}, "profile": [["f", 0.5]]}
    record = {"machine": MACHINE, "rounds": 1, "sources": {"digits, tar": "few"}}
    text = preparation_report.table(record | {"ways": {"digits, tar": row}})
    assert "| digits, tar | 1 | 50 (50 - 50) | 2 (2 - 2) | 30.00 (30.00 - 30.00) | aaaa" in text
    assert "- digits: few" in text and "`f` 50%" in text


def test_an_evaluation_is_measured_with_its_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "seconds_of", lambda run, least=0.0: 1.0)
    found = evaluation.evaluate(evaluation.QUICK_CASES["radar"], "cpu", rounds=2)
    assert found["frames"] == 2 * 2 * evaluation.LEAD_TIMES
    assert [len(found[way]) for way in ("forecast", "plain", "now")] == [2, 2, 2]
