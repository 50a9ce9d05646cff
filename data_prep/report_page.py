"""What the page about an archive says: header, terms, splits, examples, values, times, losses.

A section whose data the archive does not have says so in a line.

Shape letters: T time, C channels, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.panels import MapView, join_facts, strided, view_of
from data_prep.report_charts import colour_bar, histogram_chart
from data_prep.report_coverage import coverage_parts, scrolled_chart
from data_prep.report_html import (
    absent,
    details,
    facts_list,
    number_text,
    picture,
    section,
    split_name,
    table,
)
from data_prep.report_losses import loss_parts
from data_prep.show import Example
from tmu_dist.colours import colour_scale
from tmu_dist.data.manifest import SPLITS, Grid, Manifest, Shard
from tmu_dist.html_page import Html, bullet_list, element

_EXAMPLE_TILE_PX, _EXAMPLE_HATCH_PX = 200, 12
"""Twice as many pixels as the page shows of ten frames in a row."""
_FORMATS = {"webdataset": "WebDataset tars", "zarr": "Zarr v3 store"}


@dataclass(frozen=True, kw_only=True)
class PageData:
    """All that the page is made from."""

    url: str
    manifest: Manifest
    statistics: Mapping[str, Any]
    """Content of statistics.json; empty where the archive has none."""
    report: Mapping[str, Any]
    """Content of report.json; empty where the archive has none."""
    examples: Mapping[str, Iterable[Example]]
    """A few sequences of each split, read when they are drawn."""
    wet_fractions: Mapping[str, float]
    """Mean over some sequences of each split, where their records have it."""


def page_parts(data: PageData) -> list[Html]:
    """The page from top to bottom."""
    return [
        *_header(data),
        *_splits(data),
        *_examples(data),
        *_values(data),
        *coverage_parts(data.manifest, section(data.report, "plan")),
        *loss_parts(data.report),
        *_settings(data),
    ]


def _header(data: PageData) -> list[Html]:
    manifest = data.manifest
    units = manifest.units
    minutes = manifest.frame_interval_minutes
    total = sum(manifest.num_samples(split) for split in manifest.splits)
    colours = "" if manifest.channels == 1 else f", {manifest.channels} channels"
    lead = (
        f"{total:,} sequences of {manifest.num_frames} frames of {manifest.height} × "
        f"{manifest.width} pixels{colours}"
        + ("" if minutes is None else f", every {minutes:g} minutes")
        + f": {colour_scale(units).label}."
    )
    return [
        element("h1", manifest.name),
        element("p", lead, css="lead"),
        *_terms(manifest),
        facts_list([*_storage_facts(data), *_value_facts(data), *_origin_facts(data)]),
    ]


def _terms(manifest: Manifest) -> list[Html]:
    card = manifest.source
    if card is None:
        return [absent("Source and terms", "the archive has no source card")]
    lines = [
        element("p", element("strong", "Terms of use: "), card.licence),
        element("p", f"{card.name}, {card.provider}"),
    ]
    if card.citation:
        lines.append(element("p", f"Citation: {card.citation}", css="small"))
    return [element("div", *lines, css="terms")]


def _storage_facts(data: PageData) -> list[tuple[str, str]]:
    manifest = data.manifest
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    stored = [*shards, *manifest.objects]
    total = sum(one.num_bytes for one in stored)
    compression = "uncompressed" if manifest.compression == "none" else manifest.compression
    return [
        ("Archive", data.url),
        ("Format", f"{_FORMATS[manifest.format]}, {manifest.dtype}, {compression}"),
        ("Size", f"{_bytes_text(total)} in {len(stored):,} objects ({len(shards):,} shards)"),
        ("Content hash", manifest.content_hash),
    ]


def _value_facts(data: PageData) -> list[tuple[str, str]]:
    manifest, notes = data.manifest, section(data.report, "facts")
    units = manifest.units
    ends = sorted((units.offset, units.offset + units.scale * units.max_code))
    unit = "" if units.unit == "1" else f" {units.unit}"
    span = f"{ends[0]:g} to {ends[1]:g}{unit}, in steps of {abs(units.scale):.3g}"
    missing = (
        "every pixel counts as observed"
        if units.missing_code is None
        else f"stored as {units.missing_code}"
    )
    rule = notes.get("missing_rule")
    if isinstance(rule, str) and rule and rule != "every pixel of a frame counts as observed":
        missing += f". In the original files: {rule}"
    return [
        ("Stored range", f"{span} (codes 0 to {units.max_code})"),
        ("Missing pixels", missing),
        ("Conversion", _conversion_text(notes.get("conversion"))),
        *_grid_facts(manifest.grid),
    ]


def _grid_facts(grid: Grid | None) -> list[tuple[str, str]]:
    if grid is None:
        return []
    text = f"{grid.height} × {grid.width} pixels"
    if grid.unit is not None and grid.pixel_width is not None and grid.pixel_height is not None:
        if grid.unit == "m":
            text += f" of {grid.pixel_height / 1000:.4g} × {grid.pixel_width / 1000:.4g} km"
        else:
            text += f" of {grid.pixel_height:.4g}° × {grid.pixel_width:.4g}° (north by east)"
    return [("Grid", text), ("Projection", grid.projection or "")]


def _origin_facts(data: PageData) -> list[tuple[str, str]]:
    notes = section(data.report, "facts")
    files = data.report.get("files")
    return [
        ("Reader", str(notes.get("reader") or "")),
        ("Original files", f"{files:,}" if isinstance(files, int) else ""),
        ("Notes of the reader", " ".join(str(note) for note in notes.get("notes") or [])),
    ]


def _conversion_text(conversion: Any) -> str:
    """Name the steps from what was read to what is stored."""
    if isinstance(conversion, str):
        return conversion
    if not isinstance(conversion, list):
        return ""
    if not conversion:
        return "none: stored in the quantity that was read"
    texts = []
    for step in conversion:
        numbers = ", ".join(
            f"{name} = {value:g}"
            for name, value in sorted(step.items())
            if isinstance(value, int | float)
        )
        what = f"{step.get('from', '?')} to {step.get('to', '?')}".replace("_", " ")
        texts.append(f"{what}: {step.get('formula', step.get('step', ''))} ({numbers})")
    return "; ".join(texts)


def _splits(data: PageData) -> list[Html]:
    manifest = data.manifest
    table_of = section(data.report, "plan", "splits")
    columns: dict[str, list[str]] = {
        name: [] for name in ("sequences", "frames", "events", "groups", "clips", "first", "last")
    }
    present = [split for split in SPLITS if split in manifest.splits]
    for split in present:
        row = section(table_of, split)
        groups = section(row, "groups").get("number")
        columns["sequences"].append(f"{manifest.num_samples(split):,}")
        columns["frames"].append(number_text(row.get("frames_in_sequences")))
        columns["events"].append(number_text(row.get("events")))
        columns["groups"].append(number_text(groups))
        columns["clips"].append(number_text(row.get("clips")))
        columns["first"].append(_time_text(row.get("first")))
        columns["last"].append(_time_text(row.get("last")))
    if data.wet_fractions:
        columns["wet"] = [
            f"{100 * data.wet_fractions[split]:.3g} %" if split in data.wet_fractions else ""
            for split in present
        ]
    columns["bytes"] = [_split_bytes(manifest, split) for split in present]
    named = {
        "sequences": "Sequences", "frames": "Different frames", "events": "Events",
        "groups": "Groups", "clips": "Clips", "first": "First (UTC)", "last": "Last (UTC)",
        "wet": "Wet pixels", "bytes": "Size",
    }  # fmt: skip
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [
        [split_name(split), *(cells[i] for cells in shown.values())]
        for i, split in enumerate(present)
    ]
    parts = [element("h2", "Splits"), table(["Split", *(named[name] for name in shown)], rows)]
    if data.wet_fractions:
        text = "Wet pixels: mean over at most 50 sequences of the split, of what was observed."
        parts.append(element("p", text, css="small"))
    if rule := section(data.report, "plan").get("split_rule"):
        parts.append(element("p", f"Split {rule}."))
    said = section(data.report, "facts").get("notes") or []  # in the header
    notes = [note for note in section(data.report, "plan").get("notes") or [] if note not in said]
    if notes:
        parts.append(bullet_list([str(note) for note in notes]))
    if manifest.full_train_samples is not None:
        number = f"{manifest.full_train_samples:,}"
        parts.append(element("p", f"A data fraction of 100 % is {number} training sequences."))
    return parts


def _examples(data: PageData) -> list[Html]:
    heading = element("h2", "Example sequences")
    if data.manifest.channels not in (1, 3):
        why = f"frames of {data.manifest.channels} channels are no pictures"
        return [heading, absent("Examples", why)]
    view = view_of(data.manifest, hatch_px=_EXAMPLE_HATCH_PX)
    times = strided(data.manifest.num_frames, 10)
    size = view.tile_size(_EXAMPLE_TILE_PX)
    parts = [heading]
    step = -(-data.manifest.num_frames // 10)
    note = "" if step == 1 else f"One frame in {step} is shown. "
    if isinstance(view, MapView):
        shows_missing = data.manifest.units.missing_code is not None
        note += "Times are UTC. " + view.extent_text()
        bar = colour_bar(view.scale, shows_missing=shows_missing)
        parts.append(element("div", bar, css="colour-bar"))
    if note:
        parts.insert(1, element("p", note.strip(), css="small"))
    for split, examples in data.examples.items():
        for example in examples:
            labels = view.time_labels(example.meta)
            figures = []
            for t in times:
                image = view.tile(example.frames_TCHW[t], size)
                if (palette := view.palette()) is not None:
                    image = image.quantize(palette=palette, dither=0)  # type: ignore[arg-type]
                alt = f"{split} sequence {example.sample_id}, {labels[t]}"
                caption = element("figcaption", labels[t])
                figures.append(element("figure", caption, picture(image, alt=alt)))
            title = join_facts([f"sequence {example.sample_id}", _example_text(example.meta)])
            parts.append(element("p", split_name(split), "  ·  ", title, css="strip-title"))
            strip = element(
                "div",
                *figures,
                css="strip outlined" if view.has_border else "strip",
                style=f"grid-template-columns: repeat({len(times)}, minmax(0, 1fr))",
            )
            parts.append(element("div", strip, css="strips"))
    return parts


def _example_text(meta: Mapping[str, Any]) -> str:
    """Which sequence it is: date, clip or group, wet fraction."""
    wet = meta.get("wet_fraction")
    return join_facts(
        [
            _time_text(meta.get("start")),
            str(meta.get("series") or meta.get("clip") or meta.get("group") or ""),
            f"{100 * wet:.3g} % wet" if isinstance(wet, float) else "",
        ]
    )


def _values(data: PageData) -> list[Html]:
    heading = element("h2", "Values")
    statistics = data.statistics
    if not section(statistics, "histogram") or not statistics.get("count"):
        return [heading, absent("Histogram", "the archive has no statistics.json with values")]
    units = data.manifest.units
    total = statistics["count"] + statistics.get("missing", 0)
    unit = "" if units.unit == "1" else f" {units.unit}"
    threshold, wet = statistics.get("wet_threshold"), statistics.get("wet_fraction")
    facts = [
        ("Pixels observed", f"{statistics['count']:,}"),
        ("Missing", f"{100 * statistics.get('missing', 0) / total:.3g} %"),
        *(
            (name.capitalize(), f"{statistics[name]:.4g}{unit}")
            for name in ("mean", "std", "min", "max")
            if isinstance(statistics.get(name), int | float)
        ),
    ]
    if wet is not None and threshold is not None:
        facts.append((f"At least {threshold:.3g}{unit}", f"{100 * wet:.3g} %"))
    chart = histogram_chart(statistics, units, colour_scale(units))
    return [
        heading,
        element(
            "p",
            "Of the training split only, every frame counted once. Percent of the observed "
            "pixels, on a logarithmic axis.",
            css="small",
        ),
        element("div", scrolled_chart(chart), facts_list(facts), css="beside"),
    ]


def _settings(data: PageData) -> list[Html]:
    text = json.dumps(data.manifest.created_by, indent=2, sort_keys=True)
    return [
        element("h2", "How it was made, and how to check it"),
        element("pre", f"python -m data_prep verify {data.url}"),
        details("The exact settings (created_by of the manifest)", element("pre", text)),
    ]


def _split_bytes(manifest: Manifest, split: str) -> str:
    shards: Sequence[Any] = manifest.shards(split)
    num_bytes = sum(shard.num_bytes for shard in shards)
    kind = "tar" if isinstance(shards[0], Shard) else "shard"
    plural = "" if len(shards) == 1 else "s"
    return f"{_bytes_text(num_bytes)}, {len(shards):,} {kind}{plural}"


def _bytes_text(num_bytes: int) -> str:
    number = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def _time_text(value: Any) -> str:
    """An ISO time without seconds and zone."""
    return value[:16].replace("T", " ") if isinstance(value, str) else ""
