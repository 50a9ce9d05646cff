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
from tmu_dist.data.manifest import SPLITS

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
    counts = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in SPLITS)
    console.print(f"{out}: {counts} sequences; manifest {manifest.content_hash[:12]}", markup=False)


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

    folder = out or Path("pictures") / url.rstrip("/").rpartition("/")[2]
    for path in draw_archive(url, folder, split=split, num=num):
        console.print(path, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; arguments None takes the command line's."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        app.cli(prog="python -m data_prep", description=__doc__, args=arguments)
    except ValueError as error:  # each of them says what to do; a traceback would hide it
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
