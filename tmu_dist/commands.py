"""What all commands share: a clear error ends a command with one message and its exit code."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_OURS = ("tmu_dist", "data_prep", "tuning")


@contextmanager
def command_errors() -> Iterator[None]:
    """Turn errors that tell the user what to do into one line on stderr.

    These are the project's own errors, wherever they come from, and values that the project's own
    code refuses. Everything else is a bug or an accident whose trace is needed. The exit code is 2,
    unless the error has an `exit_code` of its own.
    """
    try:
        with reader_may_leave():
            yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not is_explained(error):
            raise
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(getattr(error, "exit_code", 2)) from None


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End quietly where nobody reads on what is printed, as in `COMMAND --help | head`.

    What went wrong otherwise is still told.
    """
    try:
        try:
            yield
        except SystemExit as leaving:  # as after --help
            if not leaving.code:
                sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout):
            raise
        # Python writes what is left when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _nobody_reads(stream: TextIO) -> bool:
    """Whether it is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def is_explained(error: BaseException) -> bool:
    """Whether an error's message tells the user all: no trace is needed."""
    return isinstance(error, (ValueError, OSError, RuntimeError)) and (
        _is_ours(type(error).__module__) or _is_ours(_raised_in(error))
    )


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in _OURS


def _raised_in(error: BaseException) -> str:
    """Name of the module whose code raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
