"""What a radar file says about itself, before anything is converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.files import is_store
from data_prep.readers import detect_reader, radar_reader
from data_prep.readers.radar import UNITS
from tmu_dist.data.manifest import Grid


def inspect_file(path: Path, reader_name: str, options: Mapping[str, str]) -> list[tuple[str, str]]:
    """Describe a file: its reader, the facts it states, and its first field.

    Args:
        path: a file, or the folder of a Zarr store.
        reader_name: name of a reader, or "auto".
        options: of the reader.

    Returns:
        Rows of (fact, value), in reading order.

    Raises:
        ValueError: no reader for it, or a bad file.
    """
    if path.is_dir() and not is_store(path):
        files = (str(file) for file in sorted(path.rglob("*")) if file.is_file())
        raise ValueError(f"{path} is a folder: name files in it, such as {next(files, 'none')}.")
    name = detect_reader([path]).name if reader_name == "auto" else reader_name
    reader = radar_reader(name, options)
    info = reader.scan(path)
    frames = info.frames
    first_HW = next(iter(reader.fields(path, [frames[0].key])))
    observed = np.isfinite(first_HW)
    unit = UNITS[info.quantity]
    values = first_HW[observed]
    spread = f"{values.min():g} to {values.max():g} {unit}" if values.size else "nothing observed"
    over = "" if info.accumulation_minutes is None else f" over {info.accumulation_minutes:g} min"
    forecasts = sum(frame.lead_minutes > 0 for frame in frames)
    interval = info.interval_minutes
    return [
        ("reader", reader.name),
        ("quantity", f"{info.quantity} [{unit}]{over}"),
        ("fields", f"{len(frames)}" + (f", {forecasts} of them forecasts" if forecasts else "")),
        ("time", f"{frames[0].time:%Y-%m-%d %H:%M:%S} to {frames[-1].time:%Y-%m-%d %H:%M:%S} UTC"),
        ("interval", "not stated" if interval is None else f"{interval:g} min"),
        ("grid", _grid_words(info.grid)),
        ("projection", info.grid.projection or "not stated"),
        ("first field", f"{spread}; {1 - observed.mean():.1%} missing"),
        ("missing", info.missing_rule),
        *(("note", note) for note in info.notes),
        ("provider", reader.source.provider),
        ("licence", reader.source.licence),
    ]


def _grid_words(grid: Grid) -> str:
    size = f"{grid.height} x {grid.width} pixels"
    if grid.unit is None:
        return size
    return f"{size} of {grid.pixel_height:g} x {grid.pixel_width:g} {grid.unit}"
