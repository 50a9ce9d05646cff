"""What a recipe is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tmu_dist.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, and how to make the archives and teachers that it names if they are not there."""

    config: RunConfig
    archives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By archive URL: arguments of `python -m data_prep` that write it."""
    teachers: Mapping[str, str] = field(default_factory=dict)
    """By run folder: the recipe that trains this teacher."""
