"""Files that are either whole under their final name or not there at all.

Everything is written beside its final name, forced to the disk, and renamed, which a disk and an
NFS server do at once and for good. What a killed process leaves lies under hidden names, which no
reader looks at; `sweep` removes it. Clients of NFS see the new name when they next ask the server,
by default within a minute; what they have open stays what it was.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PROCESS = secrets.token_hex(4)  # process numbers are those of one machine, or of one container
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>writing|retired)-(?P<writer>\d+-[0-9a-f]+)(\.\w+)?")


class WriteError(OSError):
    """Something could not be written; nothing was left under the final name."""


@contextmanager
def atomic_directory(
    final: Path, before_rename: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield an empty folder beside `final` that takes its place when the block ends well.

    An existing `final` is replaced. On any failure the half-written folder is removed and `final`
    stays as it was.

    Args:
        final: the folder to be.
        before_rename: called when all of it is on the disk; what it raises keeps `final` as it was.

    Raises:
        WriteError: the disk is full or the folder cannot be written; names it and the remedy.
    """
    staging = final.with_name(f".{final.name}.writing-{_writer()}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        _flush_to_disk(staging)
        before_rename()
        if final.exists():
            # A folder cannot be renamed over a full one. Losing the race here leaves the old
            # content under its retired name, from which `sweep` brings it back.
            retired = final.with_name(f".{final.name}.retired-{_writer()}")
            final.rename(retired)
            staging.rename(final)
            shutil.rmtree(retired)
        else:
            staging.rename(final)
        for folder in (final.parent, final.parent.parent):  # either may be new
            _flush_to_disk(folder)
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
    staging = final.with_name(f".{final.stem}.writing-{_writer()}{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        _flush_to_disk(staging)
        staging.replace(final)
        _flush_to_disk(final.parent)
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


def sweep(parent: Path, name: str | None = None) -> None:
    """Remove what other processes left half written in a folder, and finish what they replaced.

    None of them may still be allowed to write there: one that does will fail.

    Args:
        parent: the folder.
        name: look only at what was to have this name.

    Raises:
        WriteError: something cannot be removed.
    """
    try:
        found = [(path, _HIDDEN.fullmatch(path.name)) for path in sorted(parent.glob(".*"))]
        for path, parts in found:
            if parts is None or parts["writer"] == _writer():
                continue
            if name not in (None, parts["name"]):
                continue
            final = path.with_name(parts["name"])
            if parts["kind"] == "retired" and not final.exists():
                path.rename(final)  # its writer died before the new one had its name
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise WriteError(f"Could not clean up {parent}: {error.strerror or error}.") from error


def _writer() -> str:
    """This process, in the names of what it has not finished."""
    return f"{os.getpid()}-{_PROCESS}"


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
