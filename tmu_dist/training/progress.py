"""Progress of a run in the terminal: a bar where there is a terminal, plain lines elsewhere.

The display reads events of the run's log, so it works the same in the process that trains and,
by following log.jsonl, in the driver of a Ray run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from tmu_dist.run_folder import LOG_FILE, Event

_SECONDS_BETWEEN_LINES = 10.0
_POLL_SECONDS = 0.5


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
        elif kind == "validation":
            self._say(
                f"step {event['step']}: validation MSE/frame {event['mse_per_frame']:.2f} "
                f"(persistence {event['persistence_mse_per_frame']:.2f})"
            )
        elif kind == "liveness":
            gates = "; ".join(
                " ".join(f"{gate:.2f}" for gate in layer) for layer in event["gate_means"]
            )
            correlations = "; ".join(
                " ".join(f"{c:.2f}" for c in layer) for layer in event["memory_correlation"]
            )
            self._say(
                f"step {event['step']}: distillation alive: gradient norm "
                f"{event['distillation_gradient_norm']:.3g} (prediction "
                f"{event['prediction_gradient_norm']:.3g}), gates [{gates}], "
                f"memory correlation [{correlations}] (layers; teachers)"
            )
        elif kind == "resume":
            self._say(f"continues at step {event['step']}")

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
    """Shows a run's log while other processes write it. Use as a context manager.

    A restarted run puts a shorter log in the old one's place, cut back to its checkpoint; what the
    two have in common is not shown again.
    """

    def __init__(self, run: Path, display: ProgressDisplay) -> None:
        self._path = run / LOG_FILE
        self._display = display
        self._seen: list[str] = []
        self._file: TextIO | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> LogFollower:
        if self._path.is_file():  # what an earlier start logged was shown then
            self._seen = self._path.read_text().splitlines(keepends=True)
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
        if self._file is not None:
            self._file.close()
        self._display.close()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._show_new()

    def _show_new(self) -> None:
        if not self._path.is_file():
            return
        if self._file is None or not os.path.samestat(
            os.fstat(self._file.fileno()), self._path.stat()
        ):
            self._reopen()
        for line in self._whole_lines():
            self._seen.append(line)
            self._display(json.loads(line))

    def _reopen(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._path.open()
        before, self._seen = self._seen, []
        for old in before:
            position = self._file.tell()
            if self._file.readline() != old:
                self._file.seek(position)
                return
            self._seen.append(old)

    def _whole_lines(self) -> Iterator[str]:
        """New lines; one that is still being written is left for the next time."""
        assert self._file is not None
        while True:
            position = self._file.tell()
            line = self._file.readline()
            if not line.endswith("\n"):
                self._file.seek(position)
                return
            yield line
