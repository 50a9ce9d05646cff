"""The commands of data preparation: `python -m data_prep --help`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from data_prep.pipeline import OutputSettings, WorkSettings, build_archive
from data_prep.radar_plan import RadarPlanSettings
from data_prep.radar_source import RadarSettings
from data_prep.source import Source
from data_prep.video_source import VideoSource
from tmu_dist.commands import reader_may_leave
from tmu_dist.data.manifest import SPLITS, Manifest

# Commands import their own modules: a generating process imports this file again.
app = tyro.extras.SubcommandApp()
console = Console(soft_wrap=True, highlight=False)


@app.command
def moving_mnist(
    config: Annotated[MovingMNISTConfig, tyro.conf.arg(name="")],
    *,
    out: str,
    workers: int | None = None,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Write a Moving MNIST archive with train, val and test splits.

    Args:
        out: folder or URL of the archive (s3://, gs://, az://, ...).
        workers: processes; one per core when left out. The bytes do not depend on it.
        overwrite: replace whatever archive is there, also a damaged one.
    """
    manifest = write_moving_mnist(config, out, workers=workers, overwrite=overwrite)
    _announce(out, manifest)


@app.command
def radar(
    settings: Annotated[RadarSettings, tyro.conf.arg(name="")],
    plan: Annotated[RadarPlanSettings, tyro.conf.arg(name="")],
    output: Annotated[OutputSettings, tyro.conf.arg(name="")],
    work: Annotated[WorkSettings, tyro.conf.arg(name="")],
    *,
    out: str,
) -> None:
    """Convert radar files (HDF5, NetCDF, GRIB2, RADOLAN, GIF, PGM, GeoTIFF, npz, Zarr, images).

    Args:
        out: folder or URL of the archive (s3://, gs://, az://, ...).
    """
    from data_prep.radar_source import radar_source

    source = radar_source(settings, plan)
    console.print(source.summary(), markup=False)
    _build(source, out, output, work)


@app.command
def video(
    source: Annotated[VideoSource, tyro.conf.arg(name="")],
    output: Annotated[OutputSettings, tyro.conf.arg(name="")],
    work: Annotated[WorkSettings, tyro.conf.arg(name="")],
    *,
    out: str,
) -> None:
    """Convert videos: KTH, Weizmann, Human3.6M, or any folder of clips or of frame images.

    Args:
        out: folder or URL of the archive (s3://, gs://, az://, ...).
    """
    _build(source, out, output, work)


@app.command
def inspect(
    paths: tyro.conf.Positional[tuple[Path, ...]],
    *,
    reader: str = "auto",
    option: tuple[str, ...] = (),
) -> None:
    """Say what radar files hold: reader, quantity, times, grid, missing data.

    Args:
        paths: files, or folders of Zarr stores.
        reader: name of the format; auto finds it out.
        option: options of the reader, each KEY=VALUE.
    """
    from rich.table import Table

    from data_prep.inspection import inspect_file
    from data_prep.radar_source import reader_options

    if not paths:
        raise ValueError("Name one or more files to look at.")
    for path in paths:
        table = Table(title=str(path), title_justify="left", show_header=False, box=None)
        for fact, value in inspect_file(path, reader, reader_options(option)):
            table.add_row(fact, value)
        console.print(table, markup=False)


@app.command
def verify(url: tyro.conf.Positional[str]) -> None:
    """Prove an archive whole, or name everything that is broken in it (exit code 1).

    Args:
        url: folder or URL of the archive.
    """
    from data_prep.verify import verify_archive

    problems = verify_archive(url)
    for problem in problems:
        console.print(str(problem), markup=False)
    if problems:
        raise ValueError(f"{url} is broken: {len(problems)} problems, listed above.")
    console.print(f"{url} is whole.", markup=False)


@app.command
def audit(urls: tyro.conf.Positional[tuple[str, ...]]) -> None:
    """Look for leaks: frames that two splits share, or that look almost the same (exit code 1).

    Args:
        urls: folders or URLs of archives; several are compared with each other, too.
    """
    from data_prep.audit import audit_archives

    result = audit_archives(urls, show_progress=True)
    console.print(str(result), markup=False)
    if result.leaks:
        raise ValueError(
            "The splits share frames, or frames that look alike: identical frames and common times "
            "are leaks; look at similar ones before you call them so."
        )


@app.command
def show(
    url: tyro.conf.Positional[str],
    *,
    out: Path | None = None,
    split: str = "train",
    num: int = 8,
) -> None:
    """Draw a contact sheet (PNG) and an animation (GIF) of some samples.

    Args:
        url: folder or URL of the archive.
        out: folder for the pictures; pictures/NAME when left out.
        split: train, val or test.
        num: how many samples, spread evenly over the split.
    """
    from data_prep.show import draw_archive

    folder = out or Path("pictures") / _last_part(url)
    for path in draw_archive(url, folder, split=split, num=num):
        console.print(path, markup=False)


@app.command
def report(url: tyro.conf.Positional[str], *, out: Path | None = None) -> None:
    """Write a one-page report (HTML): examples, values, splits, time coverage, licence.

    Args:
        url: folder or URL of the archive.
        out: the page; pictures/NAME.html when left out.
    """
    from data_prep.report import write_report

    page = out or Path("pictures") / f"{_last_part(url)}.html"
    console.print(write_report(url, page), markup=False)


def _build(source: Source, out: str, output: OutputSettings, work: WorkSettings) -> None:
    manifest = build_archive(source, out, output, work)
    _announce(out, manifest)
    console.print(
        f"Prove it: python -m data_prep verify {out}   look at it: python -m data_prep report "
        f"{out}",
        markup=False,
    )


def _announce(out: str, manifest: Manifest) -> None:
    counts = ", ".join(
        f"{manifest.num_samples(split):,} {split}" for split in SPLITS if split in manifest.splits
    )
    console.print(f"{out}: {counts} sequences; manifest {manifest.content_hash[:12]}", markup=False)


def _last_part(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; arguments None takes the command line's."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with reader_may_leave():
            app.cli(prog="python -m data_prep", description=__doc__, args=arguments)
    except ValueError as error:  # each of them says what to do; a traceback would hide it
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
