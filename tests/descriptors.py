"""The files that processes have open, as Linux tells it while they go on opening and closing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def opened_by(process: int) -> set[str]:
    """Names of the files that a process has open; none if it has ended."""
    found = set()
    with suppress(OSError):  # ended, or another user's
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                found.add(str(descriptor.readlink()))
    return found


def others_with_open(file: str) -> list[int]:
    """Ids of the processes, this one left out, that have a file open."""
    processes = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [each for each in processes if each != os.getpid() and file in opened_by(each)]
