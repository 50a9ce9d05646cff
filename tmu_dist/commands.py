"""What all commands share: a clear error ends a command with one message and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def command_errors() -> Iterator[None]:
    """Turn errors that tell the user what to do into one line on stderr; bugs keep their trace."""
    try:
        yield
    except (ValueError, OSError) as error:
        _leave(str(error))
    except RuntimeError as error:
        # The project's own errors explain themselves; others (torch, Ray) are bugs or accidents
        # whose trace is needed.
        if not type(error).__module__.startswith(("tmu_dist.", "data_prep.")):
            raise
        _leave(str(error))


def _leave(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)
