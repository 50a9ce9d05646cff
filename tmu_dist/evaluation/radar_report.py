"""The parts of a report that only radar has: scores at thresholds, as tables and as curves.

Deliberately not here: computing the scores (`rain`), the rest of the page (`report`).

Shape letters: T lead time, K thresholds, S scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.figure import Figure

from tmu_dist.evaluation.comparison import Contender, RunEntry, contenders
from tmu_dist.evaluation.page import picture, table
from tmu_dist.evaluation.plots import Curve, Theme, lead_time_curves, scale_curves
from tmu_dist.evaluation.rain import RadarSettings
from tmu_dist.evaluation.result import FLOW, EvaluationResult
from tmu_dist.evaluation.tables import (
    categorical_table,
    ensemble_table,
    fss_table,
    markdown,
    score_table,
    undefined_scores,
)
from tmu_dist.html_page import Html, element


class Chart(NamedTuple):
    """A figure that can be drawn in any theme."""

    name: str
    """Of its file, without suffix."""
    alt: str
    draw: Callable[[Theme], Figure]


def radar_charts(entries: Sequence[RunEntry]) -> list[Chart]:
    """CSI and FSS at the first threshold by lead time, and FSS by scale; none for video."""
    radar = entries[0].result.radar
    if radar is None:
        return []
    settings = radar.settings
    threshold, scale = settings.threshold_label(0), settings.scale_label(_middle(settings))
    draw_csi = partial(_by_lead_time, entries, "csi", f"CSI, {threshold}")
    draw_fss = partial(_by_lead_time, entries, "fss", f"FSS, {threshold}, {scale}")
    return [
        Chart("lead_time_csi", f"CSI at {threshold} against lead time", draw_csi),
        Chart("lead_time_fss", f"FSS at {threshold}, {scale}, against lead time", draw_fss),
        Chart(
            "fss_by_scale",
            f"FSS at {threshold} against the side of the neighbourhood",
            partial(_by_scale, entries, settings),
        ),
    ]


def radar_section(entries: Sequence[RunEntry]) -> list[Html]:
    """Tables and curves of every threshold; nothing for video."""
    radar = entries[0].result.radar
    if radar is None:
        return []
    explanation = (
        "An event is a pixel at or above the threshold. ↓ lower is better, ↑ higher is better, "
        "→ 1 is best near 1; the best value of a column is marked. Means over lead times, if not "
        "said otherwise; how each score is defined stands below."
    )
    parts = [element("h2", "Rain at thresholds"), element("p", explanation), *flow_warning(entries)]
    for k in range(len(radar.settings.thresholds)):
        parts += [
            element("h3", _threshold_heading(entries, k)),
            table(categorical_table(entries, k)),
            element("p", "FSS by side of the neighbourhood:", css="small"),
            table(fss_table(entries, k), caption=undefined_scores(entries, k)),
        ]
    pictures = [picture(chart.draw, alt=chart.alt) for chart in radar_charts(entries)]
    return [*parts, element("div", *pictures, css="charts")]


def radar_markdown(entries: Sequence[RunEntry]) -> str:
    """The tables of the page as Markdown, for reports and logs."""
    result = entries[0].result
    model, data = result.model, result.data
    parts = [
        f"{data.split} split of {data.url}: {data.num_sequences:,} sequences, "
        f"{model.num_input_frames} frames in, {model.num_target_frames} out. Means over lead "
        "times; best values in bold.\n",
        markdown(score_table(entries)),
    ]
    samples = ensemble_table(entries)
    parts += [] if samples is None else ["Samples of stochastic networks:\n", markdown(samples)]
    radar = result.radar
    if radar is not None:
        parts += [f"{_capital(note)}.\n" for note in _flow_notes(entries)]
        for k in range(len(radar.settings.thresholds)):
            parts += [
                f"{_threshold_heading(entries, k)}:\n",
                markdown(categorical_table(entries, k)),
                f"FSS, {radar.settings.threshold_label(k)}, by side of the neighbourhood:\n",
                markdown(fss_table(entries, k)),
            ]
            if note := undefined_scores(entries, k):
                parts.append(f"{note}\n")
    return "\n".join(parts)


def flow_warning(entries: Sequence[RunEntry]) -> list[Html]:
    """Say so where optical flow is missing: the baseline that a nowcast has to beat."""
    notes = _flow_notes(entries)
    return [element("p", element("strong", f"{_capital(note)}.")) for note in notes]


def flow_facts(result: EvaluationResult) -> list[tuple[str, str]]:
    """What optical flow cost, for the head of a page."""
    if result.radar is None or result.radar.flow_ms_per_sequence is None:
        return []
    return [("Optical flow", f"pysteps, {result.radar.flow_ms_per_sequence:.0f} ms per sequence")]


def radar_notes(entries: Sequence[RunEntry]) -> list[str]:
    """What a reader of radar scores should know."""
    if entries[0].result.radar is None:
        return []
    notes = [
        "A forecast that is smoother than the truth is rewarded by MSE and SSIM and punished at "
        "high thresholds: read both, and the frequency bias.",
    ]
    flows = [c.result.definitions[FLOW] for c in contenders(entries) if c.forecast == FLOW]
    return [*notes, *(f"Optical flow: {text}." for text in flows)]


def _flow_notes(entries: Sequence[RunEntry]) -> list[str]:
    """Why no run has optical flow; empty if one has."""
    if any(FLOW in entry.result.overall for entry in entries):
        return []
    radars = [entry.result.radar for entry in entries]
    return list(dict.fromkeys(r.flow_note for r in radars if r is not None and r.flow_note))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _threshold_heading(entries: Sequence[RunEntry], k: int) -> str:
    radar = entries[0].result.radar
    assert radar is not None
    rate = next(iter(radar.forecasts.values())).base_rate_K[k]
    threshold = radar.settings.threshold_label(k)
    return f"{threshold} and more, which {rate:.2%} of the observed pixels reach"


def _middle(settings: RadarSettings) -> int:
    """The scale whose FSS is shown against lead time."""
    return len(settings.scales) // 2


def _by_lead_time(entries: Sequence[RunEntry], name: str, label: str, theme: Theme) -> Figure:
    def curve(rival: Contender) -> Curve:
        radar = rival.result.radar
        assert radar is not None
        values = radar.forecasts[rival.forecast].per_lead_time(name)[:, 0]
        values_T = values[:, _middle(radar.settings)] if name == "fss" else values
        return Curve(
            label=rival.label,
            x=range(1, len(values_T) + 1),
            y=values_T.tolist(),
            series=rival.series,
        )

    curves = [curve(rival) for rival in contenders(entries)]
    return lead_time_curves(curves, metric_label=label, higher_is_better=True, theme=theme)


def _by_scale(entries: Sequence[RunEntry], settings: RadarSettings, theme: Theme) -> Figure:
    curves = []
    for rival in contenders(entries):
        assert rival.result.radar is not None
        values_S = rival.result.radar.forecasts[rival.forecast].mean("fss")[0]
        curves.append(
            Curve(label=rival.label, x=settings.scales, y=values_S.tolist(), series=rival.series)
        )
    km = settings.pixel_km
    size = "" if km is None else f", 1 px = {km:g} km"
    return scale_curves(
        curves,
        title=f"FSS, {settings.threshold_label(0)}, by neighbourhood, higher is better",
        x_label=f"side of the neighbourhood [pixels{size}]",
        theme=theme,
    )
