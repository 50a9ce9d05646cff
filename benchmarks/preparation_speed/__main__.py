"""How fast is data prepared, and where does the time go?

    python -m benchmarks.preparation_speed [--kth FOLDER] [--knmi FOLDER] [--workers 1 2]
        [--rounds 3] [--quick]

Each archive is made anew in a process of its own that imports what `python -m data_prep` does:
Moving MNIST (20 frames of 64x64), videos (frames of 128x128) and radar (tiles of 128x128 pixels, 20
frames, overlapping in time), as tars compressed by zstd, radar also as Zarr. FOLDER holds KTH's or
KNMI's original files (docs/video.md, docs/radar.md); without them videos and radar are synthetic,
and the record says so. Timed is the preparation with the start of its worker processes, but not the
first process's imports: it has made the archive once before. MB are of the sequences as a loader
gives them, uncompressed. Manifests have the same hash for any number of processes: it tells every
byte of an archive.

Prints the table and writes results.json and table.md to docs/results/preparation-speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.preparation_speed.build import WAYS, write_clips, write_radar
from benchmarks.preparation_speed.report import table
from benchmarks.provenance import command_line, provenance, publish, record_folder, say

_CHILD = "from benchmarks.preparation_speed.build import main; main()"
_ROOT = Path(__file__).parents[2]


def run(arguments: Sequence[str]) -> Any:
    """What a process of its own finds."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, cwd=_ROOT
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def inputs(folder: Path, kth: Path | None, knmi: Path | None, *, quick: bool) -> dict[str, Any]:
    """By archive: the arguments that say what it is made from, and the same in words."""
    found: dict[str, Any] = {}
    count = 64 if quick else 4000
    found["digits, tar"] = (["--sequences", str(count)], f"{count:,} training sequences, generated")
    if kth is None:
        clips, frames = (2, 45) if quick else (8, 400)
        (folder / "clips").mkdir()
        write_clips(folder / "clips", clips=clips, frames=frames)
        source = ["--source", str(folder / "clips")]
        found["video, tar"] = (source, f"SYNTHETIC, {clips} MPEG-4 clips of {frames} frames")
    else:
        found["video, tar"] = (["--real", "--source", str(kth)], "KTH's own files")
    if knmi is None:
        frames, size = (24, 160) if quick else (92, 700)
        (folder / "radar").mkdir()
        write_radar(folder / "radar", frames=frames, size=size)
        source = ["--source", str(folder / "radar")]
        of_radar = (source, f"SYNTHETIC, {frames} PNG images of {size}x{size}")
    else:
        of_radar = (["--real", "--source", str(knmi)], "KNMI's HDF5 files of 2010-08-26, 765x700")
    found |= {way: of_radar for way in WAYS if way.startswith("radar")}
    return found


def measure(sources: dict[str, Any], workers: Sequence[int], rounds: int) -> dict[str, Any]:
    """By archive: runs by number of processes, and a profile."""
    found: dict[str, Any] = {
        way: {"runs": {str(count): [] for count in workers}, "profile": []} for way in sources
    }
    for number in range(rounds):
        for way, (source, _) in sources.items():
            for count in workers:
                say(f"round {number + 1}: {way}, {count} process(es)")
                runs = found[way]["runs"][str(count)]
                runs.append(run(["--way", way, "--workers", str(count), *source]))
    for way, (source, _) in sources.items():
        say(f"{way}: profile")
        found[way]["profile"] = run(["--way", way, "--workers", "1", *source, "--profile"])
        hashes = {made["hash"] for runs in found[way]["runs"].values() for made in runs}
        if len(hashes) != 1:
            raise SystemExit(f"{way}: archives differ, {sorted(hashes)}.")
    return found


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--kth", type=Path)
    parser.add_argument("--knmi", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="little data, for tests")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = inputs(Path(folder), chosen.kth, chosen.knmi, quick=chosen.quick)
        found = measure(sources, chosen.workers, chosen.rounds)
    record = {
        **provenance("benchmarks.preparation_speed", "cpu", chosen.revision),
        "rounds": chosen.rounds,
        "sources": {way: words for way, (_, words) in sources.items()},
        "ways": found,
    }
    publish(record, table(record), record_folder(chosen, "preparation-speed"))


if __name__ == "__main__":
    main()
