"""Progress of a run in the terminal: a bar where there is a terminal, plain lines elsewhere.

The display reads events of the run's log, so it works the same in the process that trains and,
by following log.jsonl, in the driver of a Ray run.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from tmu_dist.data.storage import StorageError, local_path, object_size
from tmu_dist.run_folder import LOG_FILE, Event, read_log_lines

_SECONDS_BETWEEN_LINES = 10.0
_POLL_SECONDS = 0.5
_POLL_STORE_SECONDS = 3.0
_SHOWN_TEACHERS = 8
"""Numbers of a layer that are shown one by one."""
_IN_LIVENESS = {
    "gate_means": "gates",
    "memory_correlation": "memory correlation",
    "zigzag_correlation": "correlation of M",
    "feature_correlation": "feature correlation",
    "response_correlation": "response correlation",
    "own_shares": "own shares",
    "merge_means": "merge gates",
}
"""Fields of a liveness that are shown, and what they are called."""


class Listener(Protocol):
    """What is told every event of a run's log."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """There are no more."""
        ...


class ProgressDisplay:
    """Shows speed, share of time spent waiting for data, time left, and every validation."""

    def __init__(self, label: str, num_steps: int, stream: TextIO | None = None) -> None:
        self.label = label
        self.num_steps = num_steps
        self.stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = None
        self._last_line = 0.0

    def __call__(self, event: Event) -> None:
        """Show one event of the run's log."""
        kind = event["event"]
        if kind == "train":
            self._show_training(event)
        elif kind in _SENTENCES:
            self._say(_SENTENCES[kind](event))

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()

    def _show_training(self, event: Event) -> None:
        now, step = time.monotonic(), event["step"]
        if self._first is None:
            self._first = (step, now)
        detail = (
            f"loss {event['loss/total']:.4f}, {event['samples_per_second']:.1f} sequences/s, "
            f"data wait {event['data_wait_fraction']:.0%}"
        )
        if self.stream.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=self.num_steps,
                    initial=step,
                    desc=self.label,
                    unit="step",
                    file=self.stream,
                )
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(detail)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self.num_steps:
            self._last_line = now
            self._say(f"step {step}/{self.num_steps}: {detail}{self._time_left(step, now)}")

    def _time_left(self, step: int, now: float) -> str:
        assert self._first is not None
        first_step, started = self._first
        if step == first_step:
            return ""
        seconds = (now - started) / (step - first_step) * (self.num_steps - step)
        return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"

    def _say(self, text: str) -> None:
        line = f"{self.label}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        else:
            self.stream.write(line + "\n")
            self.stream.flush()


class LogFollower:
    """Tells listeners a run's log while other processes write it. Use as a context manager.

    A restarted run puts a shorter log in the old one's place, cut back to its checkpoint; what the
    two have in common is not told again.
    """

    def __init__(self, run: str | Path, *listeners: Listener) -> None:
        self._run = str(run)
        self._pause = _POLL_SECONDS if local_path(self._run) is not None else _POLL_STORE_SECONDS
        self._listeners = listeners
        self._seen: list[str] = []
        self._size = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> LogFollower:
        self._seen = read_log_lines(self._run)  # what an earlier start logged was told then
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._show_new()
        for listener in self._listeners:
            listener.close()

    def _follow(self) -> None:
        while not self._stop.wait(self._pause):
            self._show_new()

    def _show_new(self) -> None:
        """Tell the lines that were not there before; one still being written waits."""
        try:
            size = object_size(self._run, LOG_FILE)
            lines = read_log_lines(self._run) if size != self._size else self._seen
        except StorageError:  # not there yet, or out of reach: the next look may see more
            return
        self._size = size
        common = 0
        for old, new in zip(self._seen, lines):
            if old != new:
                break
            common += 1
        self._seen = lines
        for line in lines[common:]:
            for listener in self._listeners:
                listener(json.loads(line))


def _validation(event: Event) -> str:
    return (
        f"step {event['step']}: validation MSE/frame {event['mse_per_frame']:.2f} "
        f"(persistence {event['persistence_mse_per_frame']:.2f})"
    )


def _liveness(event: Event) -> str:
    found = [
        f", {label} {_brief(event[name])}"
        for name, label in _IN_LIVENESS.items()
        if event.get(name)
    ]
    return (
        f"step {event['step']}: teaching alive: gradient norm "
        f"{event['teaching_gradient_norm']:.3g} (prediction "
        f"{event['prediction_gradient_norm']:.3g})" + "".join(found)
    )


def _start(event: Event) -> str:
    matched, random = event["matched"], event["random"]
    return (
        f"starts from {event['source']}: {len(matched)} tensors match"
        + (f", {len(random)} start at random: {_listed(random)}" if random else "")
        + (f"; unused of the source: {_listed(event['unused'])}" if event["unused"] else "")
    )


def _resume(event: Event) -> str:
    ranks = event.get("world_size", 1)
    return f"continues at step {event['step']}" + (f" with {ranks} ranks" if ranks > 1 else "")


def _placement(event: Event) -> str:
    held = event["resident_bytes"]
    text = f"teachers are {event['kind']}: at most {_mib(max(held))} of weights a rank"
    return text + (f" in a group of {len(held)}" if len(held) > 1 else "")


def _memory(event: Event) -> str:
    parts = sorted(event["parts"].items(), key=lambda part: -part[1])
    most = ", ".join(f"{name} {_mib(size)}" for name, size in parts[:3])
    room = f" of {_mib(event['total_bytes'])}" if "total_bytes" in event else ""
    return f"predicted peak memory of a rank: {_mib(event['peak_bytes'])}{room} ({most}, ...)"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "validation": _validation,
    "liveness": _liveness,
    "start": _start,
    "resume": _resume,
    "placement": _placement,
    "memory": _memory,
    "checkpoint_failed": lambda event: f"step {event['step']}: {event['reason']}",
    "stop": lambda event: f"step {event['step']}: asked to stop ({event['reason']})",
}
"""What is said of events that happen now and then."""


def _brief(values: Sequence[Any]) -> str:
    """Numbers by layer, or by layer and teacher; of many teachers the least and the most."""
    layers = []
    for layer in values:
        numbers = layer if isinstance(layer, list) else [layer]
        if len(numbers) > _SHOWN_TEACHERS:
            layers.append(f"{min(numbers):.2f} to {max(numbers):.2f}")
        else:
            layers.append(" ".join(f"{number:.2f}" for number in numbers))
    return f"[{'; '.join(layers)}]"


def _listed(names: Collection[str], most: int = 5) -> str:
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")
