"""Files that are either whole under their final name or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteError(OSError):
    """Something could not be written; nothing was left under the final name."""


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final` that takes its place when the block ends well.

    An existing `final` is replaced. On any failure the half-written folder is removed and `final`
    stays as it was.

    Raises:
        WriteError: the disk is full or the folder cannot be written; names it and the remedy.
    """
    staging = final.with_name(f".{final.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        _flush_to_disk(staging)
        if final.exists():
            # A folder cannot be renamed over a full one. Losing the race here leaves the old
            # content under its retired name, never a mixture.
            retired = final.with_name(f".{final.name}.retired-{os.getpid()}")
            final.rename(retired)
            staging.rename(final)
            shutil.rmtree(retired)
        else:
            staging.rename(final)
        _flush_to_disk(final.parent)
    except OSError as error:
        raise WriteError(
            f"Could not write {final}: {error.strerror or error}. Nothing was left under that "
            f"name, and what was there before is untouched. {_remedy(final)}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Yield a path beside `final`, of its suffix, that takes its name when the block ends well.

    Raises:
        WriteError: as in `atomic_directory`.
    """
    staging = final.with_name(f".writing-{os.getpid()}-{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        _flush_to_disk(staging)
        staging.replace(final)
    except OSError as error:
        raise WriteError(
            f"Could not write {final}: {error.strerror or error}. {_remedy(final)}"
        ) from error
    finally:
        if staging.exists():
            staging.unlink()


def atomic_write_text(final: Path, text: str) -> None:
    """Write a text file beside its final name and rename it.

    Raises:
        WriteError: as in `atomic_directory`.
    """
    with atomic_file(final) as staging:
        staging.write_text(text)


def _remedy(path: Path) -> str:
    parent = next(p for p in path.absolute().parents if p.exists())
    free_mib = shutil.disk_usage(parent).free / 2**20
    return f"{free_mib:,.0f} MiB are free there: free space, or choose another folder."


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
