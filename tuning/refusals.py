"""How a space file refuses: errors that say where, and what would have been right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tmu_dist.config import ConfigError
from tmu_dist.config.checks import nearest, require


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say where an error is: begin its message with that."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def refuse_unknown(what: str, written: Mapping[Any, Any], known: Iterable[str]) -> None:
    """Raise `ConfigError` if something is written that is not known."""
    names = list(known)
    for name in written:
        require(
            name in names,
            f"Unknown {what} {name!r}.{nearest(str(name), names)} Known here: {', '.join(names)}.",
        )


def as_type(hint: Any, value: Any, what: str) -> Any:
    """A value as a field of that type takes it, by the rules of the config's own fields."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reasons = "; ".join(dict.fromkeys(each["msg"] for each in error.errors()))
        raise ConfigError(f"{what}: {reasons}, got {value!r}.") from None
