"""Writing a picture or an array file so that it is whole under its final name or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmu_dist.files import WriteError


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """Yield a path beside `final`, of its suffix, that takes its name when the block ends well.

    Raises:
        WriteError: the disk is full or the folder cannot be written; names the file.
    """
    staging = final.with_name(f".writing-{os.getpid()}-{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        staging.replace(final)
    except OSError as error:
        raise WriteError(
            f"Could not write {final}: {error.strerror or error}. Free space or permissions there, "
            "or choose another folder."
        ) from error
    finally:
        staging.unlink(missing_ok=True)
