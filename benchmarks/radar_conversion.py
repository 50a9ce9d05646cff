"""Radar files to an archive: how fast, beside a plain loop over pysteps importers?

    python benchmarks/radar_conversion.py --data FOLDER [--rounds 3] [--out DIR]

FOLDER holds `knmi`, `mch`, `fmi` and `rmi` with original files (docs/radar.md). Needs the extras
`radar` and `flow`, and `pip install pyproj`, which pysteps' importers use. Both sides read the
same files and write every field once, whole, with one core: the loop an npz a file, as `np.savez`
(float32, not compressed) and as `np.savez_compressed`; this project a Zarr archive, and tars of
sequences that share no frame. The archive's side also checks grids, finds duplicates and gaps,
makes splits and checksums, and counts statistics; the loop does none of that. Rounds alternate; CPU
seconds of the process are compared, and the median of the rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import zarr
from rich.console import Console

from data_prep.pipeline import OutputSettings, WorkSettings, build_archive
from data_prep.radar_plan import RadarPlanSettings
from data_prep.radar_source import RadarSettings, radar_source

SOURCES = {
    "knmi": ("import_knmi_hdf5", "*.h5"),
    "mch": ("import_mch_gif", "20150515/*.gif"),
    "fmi": ("import_fmi_pgm", "20160928/*.gz"),
    "rmi": ("import_odim_hdf5", "20210704_qpe/*.hdf"),
}
"""pysteps importer and files of each source; one event where there are several."""


def pysteps_loop(folder: Path, source: str, save: Callable[..., None], out: Path) -> int:
    """Read every file with the importer and save its field; returns the number of files."""
    from pysteps.io import importers

    name, pattern = SOURCES[source]
    extra = {"mch": ("AQC", "mm", 5.0), "fmi": ()}.get(source, ())
    keywords = {"fmi": {"gzipped": True}, "rmi": {"qty": "RATE"}}.get(source, {})
    files = sorted((folder / source).rglob(pattern))
    for file in files:
        field, _, _ = getattr(importers, name)(str(file), *extra, **keywords)
        save(out / f"{file.stem}.npz", field=np.asarray(field, np.float32))
    return len(files)


def archive(folder: Path, source: str, form: str, out: Path) -> int:
    """Convert the same files; returns the number of frames."""
    settings = RadarSettings(source=str(folder / source), include=(SOURCES[source][1],))
    plan = RadarPlanSettings(frames=10, stride=10, proportions={"train": 1.0})
    output = OutputSettings(format=form)  # type: ignore[arg-type]
    made = radar_source(settings, plan)
    build_archive(made, str(out), output, WorkSettings(workers=1, show_progress=False))
    return len(made.files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/radar-conversion"))
    chosen = parser.parse_args()
    zarr.config.set({"threading.max_workers": 1})
    ways: dict[str, Callable[[str, Path], int]] = {
        "pysteps, npz": lambda s, out: pysteps_loop(chosen.data, s, np.savez, out),
        "pysteps, npz compressed": lambda s, out: pysteps_loop(
            chosen.data, s, np.savez_compressed, out
        ),
        "archive, zarr": lambda s, out: archive(chosen.data, s, "zarr", out),
        "archive, tar": lambda s, out: archive(chosen.data, s, "webdataset", out),
    }
    measured: dict[str, dict[str, list[float]]] = {s: {way: [] for way in ways} for s in SOURCES}
    sizes: dict[str, dict[str, float]] = {s: {} for s in SOURCES}
    for number in range(chosen.rounds + 1):  # round 0 warms up imports and the page cache
        for source in SOURCES:
            for way, run in ways.items():
                with tempfile.TemporaryDirectory() as temporary:
                    started = time.process_time()
                    frames = run(source, Path(temporary))
                    seconds = time.process_time() - started
                    files = [path for path in Path(temporary).rglob("*") if path.is_file()]
                    sizes[source][way] = sum(path.stat().st_size for path in files) / frames
                if number:
                    measured[source][way].append(1e3 * seconds / frames)
    record = {
        "command": f"python benchmarks/radar_conversion.py --data FOLDER --rounds {chosen.rounds}",
        "unit": "CPU milliseconds per field, one core",
        "machine": {"cpu": _cpu(), "python": platform.python_version()},
        "rounds": measured,
        "median": {
            s: {way: statistics.median(values) for way, values in ways_.items()}
            for s, ways_ in measured.items()
        },
        "bytes_per_field": sizes,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    (chosen.out / "table.md").write_text(text)
    Console().print(text)


def table(record: Mapping[str, Any]) -> str:
    """Markdown of the medians, with the ratio of the plain loop to each archive."""
    medians = record["median"]
    ways = list(next(iter(medians.values())))
    lines = [
        "| source | "
        + " | ".join(f"{way} [ms]" for way in ways)
        + " | npz / tar | npz compressed / tar |",
        "|" + "---|" * (len(ways) + 3),
    ]
    for source, row in medians.items():
        tar = row["archive, tar"]
        ratios = " | ".join(f"{row[way] / tar:.1f}" for way in ways if way.startswith("pysteps"))
        numbers = " | ".join(f"{row[way]:.1f}" for way in ways)
        lines.append(f"| {source} | {numbers} | {ratios} |")
    return "\n".join(lines) + "\n"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
