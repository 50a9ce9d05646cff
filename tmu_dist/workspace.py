"""Where runs and archives go that are given no whole path: the workspace.

It is $TMU_DIST_HOME, a path or URL, or the current folder. A Ray job starts in a copy of its
working directory that the cluster deletes after it; what is left there is lost, and other nodes
never see it. So in a job it is $TMU_DIST_HOME or ~/tmu_dist, and relative paths start there.
"""

from __future__ import annotations

import os
from pathlib import Path

WORKSPACE = "TMU_DIST_HOME"
"""The variable that names it."""


def in_workspace(path: str) -> str:
    """Where recipes put something."""
    home = os.environ.get(WORKSPACE)
    if not home and is_in_job():
        home = str(Path.home() / "tmu_dist")
    return f"{home.rstrip('/')}/{path}" if home else path


def located(address: str) -> str:
    """The path or URL that a user's address means: itself, but for relative paths in a Ray job."""
    if address.startswith("/") or "://" in address:  # first: every storage operation asks
        return address
    if not is_in_job() or Path(address).expanduser().is_absolute():
        return address
    return in_workspace(address)


def is_in_job() -> bool:
    """Whether the current folder is the copy of a working directory that Ray made for a job."""
    return "runtime_resources" in Path.cwd().parts
