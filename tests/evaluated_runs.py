"""Evaluations with known numbers, and a reader of pages, for tests of reports.

Shape letters: N sequences, T lead time, K thresholds, S scales.
"""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np

from tests.synthetic_radar import DBZ
from tmu_dist.evaluation.baselines import FLOW_DEFINITION
from tmu_dist.evaluation.metrics import METRIC_NAMES, PHYSICAL_METRIC_NAMES
from tmu_dist.evaluation.radar_result import RadarResult
from tmu_dist.evaluation.rain import RadarScores, RadarSettings, radar_definitions
from tmu_dist.evaluation.report import PageSettings
from tmu_dist.evaluation.result import (
    GATES_DEFINITION,
    RUNTIME_DEFINITIONS,
    EvaluatedData,
    EvaluatedModel,
    EvaluationResult,
    ParameterCounts,
    Runtime,
    TransferGates,
)
from tmu_dist.evaluation.score_table import Scores, ScoreTable

N, T = 40, 3
SETTINGS = PageSettings(
    title="Does <memory> transfer & help?",
    summary="A summary.",
    command="python -m tmu_dist.demo --output 'a b'",
    created="2026-01-02 03:04 UTC",
    git_revision="abc1234",
    notes=("A note of the caller.",),
    repeat_commands=("first command", "second command"),
)


def scores(mse: float, spread: float = 1.0) -> Scores:
    """MSE per frame that differs between sequences in a known way, and an SSIM that fits it."""
    sequence_N1 = np.linspace(-spread, spread, N)[:, None]
    values = {name: np.full((N, T), 0.5) for name in METRIC_NAMES}
    values["mse_per_frame"] = mse + sequence_N1 + np.arange(T) - 1.0
    values["ssim"] = np.full((N, T), 1 - mse / 1000)
    return Scores(np.arange(N), values)


def result(name: str, mse: float, *, teachers: tuple[str, ...] = ()) -> EvaluationResult:
    forecasts = {"model": scores(mse), "persistence": scores(200.0)}
    gates = TransferGates(
        teachers=teachers, layers=(0, 1), means_LM=((0.25, 0.5), (0.75, 0.5))
    ) if teachers else None  # fmt: skip
    return EvaluationResult(
        model=EvaluatedModel(
            name=name, method=name, teachers=teachers, seed=0, step=10,
            num_input_frames=2, num_target_frames=T,
        ),
        data=EvaluatedData(url="archive", split="test", manifest_hash="f" * 64, num_sequences=N),
        definitions=ScoreTable().definitions | RUNTIME_DEFINITIONS | {"gates": GATES_DEFINITION},
        overall={key: value.overall() for key, value in forecasts.items()},
        per_lead_time={
            key: {m: tuple(v.tolist()) for m, v in value.per_lead_time().items()}
            for key, value in forecasts.items()
        },
        gates=gates,
        parameters=ParameterCounts(train=9_534_208, test=3_589_376),
        runtime=Runtime(
            ms_per_sequence_batch_1=17.71, ms_per_sequence_batch_8=9.25,
            seconds_per_evaluation_batch=0.5, evaluation_batch_size=16, device="cpu, 1 threads",
        ),
        per_sequence=forecasts,
    )  # fmt: skip


def radar_scores(hits: int) -> RadarScores:
    """Counts of 1000 pixels at each lead time and threshold; none reach the second threshold."""
    counts_TKX = np.zeros((T, 2, 4), np.int64)
    counts_TKX[:, 0] = hits, 100 - hits, 100 - hits, 800 + hits
    counts_TKX[:, 1, 3] = 1000
    sums_TKSX = np.zeros((T, 2, 2, 3))
    sums_TKSX[:, 0] = [[100, hits, 100], [100, 0.5 * (100 + hits), 100]]
    return RadarScores(counts_TKX, sums_TKSX)


def radar_result(name: str, *, hits: int, flow: bool = True, **changes: Any) -> EvaluationResult:
    """An evaluation of radar: persistence has 40 hits, optical flow (if computed) 70."""
    video = result(name, 94.7)
    forecasts = {"model": radar_scores(hits), "persistence": radar_scores(40)}
    errors = {"model": scores(94.7), "persistence": scores(200.0)}
    if flow:
        forecasts["optical_flow"], errors["optical_flow"] = radar_scores(70), scores(80.0)
    physical = {"mse_physical": 12.345, "mae_physical": 1.5}
    settings = RadarSettings(
        unit="dBZ", thresholds=(20.0, 60.0), scales=(1, 8), numbers=(0.2, 0.6), pixel_km=2.0
    )
    return replace(
        video,
        overall={key: value.overall() | physical for key, value in errors.items()},
        per_lead_time={
            key: {m: tuple(v.tolist()) for m, v in value.per_lead_time().items()}
            for key, value in errors.items()
        },
        definitions={
            **ScoreTable((*METRIC_NAMES, *PHYSICAL_METRIC_NAMES), units=DBZ).definitions,
            **RUNTIME_DEFINITIONS,
            **radar_definitions(settings),
            **({"optical_flow": FLOW_DEFINITION} if flow else {}),
        },
        radar=RadarResult(
            settings=settings,
            forecasts=forecasts,
            flow_note=None if flow else "optical flow not computed: pip install 'tmu-dist[flow]'",
            flow_ms_per_sequence=12.3 if flow else None,
        ),
        **changes,
    )


class PageText(HTMLParser):
    """Visible text, table rows, and every address that the page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.source = page
        self.addresses: list[str] = []
        self.open_tags: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href") and v]
        if tag not in ("meta", "img", "source"):
            self.open_tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            if ("class", "best") in attrs:
                self.best.append(self.rows[-1][0])

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open_tags:
            self.words.append(data)
        if {"th", "td"} & set(self.open_tags):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0] == name)
