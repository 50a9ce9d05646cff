"""How a config refuses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` unless a condition holds."""
    if not condition:
        raise ConfigError(message)


def nearest(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """A hint at the name that was probably meant, after the prefix; empty if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {prefix + near[0]!r}?" if near else ""
