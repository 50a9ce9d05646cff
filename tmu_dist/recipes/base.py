"""What a recipe is, and where recipes put things."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tmu_dist.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, and how to make the archives and teachers that it names if they are not there."""

    config: RunConfig
    archives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By archive URL: arguments of `python -m data_prep` that write it."""
    teachers: Mapping[str, str] = field(default_factory=dict)
    """By run folder: the recipe that trains this teacher."""


def workspace() -> Path:
    """Where recipes put archives and runs: $TMU_DIST_HOME, or this folder.

    A Ray job starts in a temporary copy of its working directory that the cluster deletes, so
    there it is ~/tmu_dist.
    """
    if home := os.environ.get("TMU_DIST_HOME"):
        return Path(home)
    if "runtime_resources" in Path.cwd().parts:
        return Path.home() / "tmu_dist"
    return Path()
