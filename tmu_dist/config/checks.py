"""How a config refuses."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` unless a condition holds."""
    if not condition:
        raise ConfigError(message)
