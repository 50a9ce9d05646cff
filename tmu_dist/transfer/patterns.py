"""Parameters by name pattern, as of files: `stack.layers.0.*`."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase

from tmu_dist.config import ConfigError


def names_like(pattern: str, names: Collection[str], setting: str) -> list[str]:
    """The names that a pattern matches as a whole; `*` also crosses dots.

    Args:
        pattern: given by the user.
        names: of parameters.
        setting: where the pattern was given.

    Raises:
        ConfigError: it matches none; shows names that look like it.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.0)
        raise ConfigError(
            f"{setting}: no parameter that could be trained is named like {pattern!r}. Of "
            f"{len(names)} parameters, these are nearest: {', '.join(near)}."
        )
    return found
