"""The processes of a run on this machine, started so that each rank can be killed by its number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tmu_dist.collectives import torchrun_here
from tmu_dist.config import RunConfig, to_json, with_overrides


class DrillError(RuntimeError):
    """A run did not do what a drill needs; so the drill has shown nothing."""


class Job:
    """The processes of one start of a run: its ranks, or the command that has Ray start them.

    Args:
        words: of the command line.
        environments: variables of each process, beside this one's.
        output: file for what they say.
    """

    def __init__(
        self, words: Sequence[str], environments: Sequence[Mapping[str, str]], output: Path
    ) -> None:
        self._output = output
        with output.open("w") as file:
            self._processes = [
                subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | dict(more))
                for more in environments
            ]

    @property
    def is_over(self) -> bool:
        """Whether all processes have ended."""
        return all(process.poll() is not None for process in self._processes)

    def wait(
        self,
        seconds: float,
        until: Callable[[], bool] = lambda: False,
        look_every: float = 0.01,
    ) -> None:
        """Return when all processes have ended, or something has happened.

        Raises:
            DrillError: neither, after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not self.is_over and not until():
            if time.monotonic() > deadline:
                raise DrillError(f"No end after {seconds:.0f} s (--timeout):\n{self.said()}")
            time.sleep(look_every)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank: these processes, or the workers of Ray.

        SIGTERM is for Ray's command, as schedulers would send it, not for its workers.
        """
        alive = [process.pid for process in self._processes if process.poll() is None]
        if number == signal.SIGKILL:
            workers = [pid for pid in _descendants(alive) if "RayTrainWorker" in _title(pid)]
            alive = workers or alive
        for pid in alive:
            os.kill(pid, number)

    def said(self) -> str:
        """The end of what the processes said."""
        return self._output.read_text()[-4000:]

    def close(self) -> None:
        """End what still runs; Ray's command takes its workers with it."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _descendants(ancestors: Sequence[int]) -> list[int]:
    """Process ids of all children, their children, and so on; of Linux only."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            facts = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(facts[1])
    found, newest = [], set(ancestors)
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest}
        found += sorted(newest)
    return found


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@contextmanager
def started_job(config: RunConfig, run: str, size: int) -> Iterator[Job]:
    """Processes that train in a run folder on so many ranks; what still runs is ended."""
    config = with_overrides(config, {"output": run})
    environments: list[dict[str, str]] = [{"RAY_ADDRESS": "local"}]  # a Ray of its own
    if config.launch.launcher == "ray":
        config = with_overrides(config, {"scale.num_workers": size})
    else:
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environments = [rank | threads for rank in torchrun_here(size)]
    with tempfile.TemporaryDirectory(prefix="tmu-dist-") as scratch:
        settings = Path(scratch, "config.yaml")
        settings.write_text(to_json(config))  # JSON is YAML
        words = [sys.executable, "-m", "tmu_dist.train", "--config", str(settings)]
        words += ["--launcher", config.launch.launcher]
        job = Job(words, environments, Path(scratch, "output.txt"))
        try:
            yield job
        finally:
            job.close()
