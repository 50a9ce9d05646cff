"""cluster/slurm.sh with stand-ins for Ray and Slurm: status, signals, requeue, token, cleaning up.

tests/hosts/test_slurm.py runs it with the real ones.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import pytest

_ROOT = Path(__file__).parents[2]
_ADDRESS = "127.0.0.7"
_STAND_INS = {
    "ray": f"""
        import os, socket, sys, time
        if os.environ.get("RAY_FAILS"):
            sys.exit(1)
        with open("{{home}}/called", "a") as file:
            print(os.getpid(), "ray", os.environ["RAY_AUTH_MODE"], *sys.argv[1:], file=file)
        if "--head" in sys.argv:
            socket.create_server(("{_ADDRESS}", 6379)).accept()
        time.sleep(1000)
    """,
    "srun": """
        import os, sys
        words = [word for word in sys.argv[1:] if not word.startswith("--")]
        os.environ["SLURM_CPUS_ON_NODE"] = "4"
        with open("{home}/called", "a") as file:
            print(os.getpid(), "srun", *sys.argv[1:4], file=file)
        os.execvp(words[0], words)
    """,
    "scontrol": """
        import os, sys
        with open("{home}/called", "a") as file:
            print(os.getpid(), "scontrol", *sys.argv[1:], file=file)
    """,
    "python": """
        import os, sys, time
        if sys.argv[1] != "-":
            os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
        while open("{home}/called").read().count("ray token start") < int(sys.argv[2]):
            time.sleep(0.02)  # as the script asks Ray whether its machines are there
    """,
}


class Job:
    """The script as Slurm starts it on the first of two machines; `home` is the user's."""

    def __init__(self, home: Path, *command: str, **variables: str) -> None:
        self._home = home
        self._process = subprocess.Popen(
            ["bash", str(_ROOT / "cluster" / "slurm.sh"), *command],
            cwd=_ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "HEAD_ADDRESS": _ADDRESS,
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_CPUS_ON_NODE": "2",
                "SLURMD_NODENAME": "first",
                **variables,
            },
        )

    def signal(self, number: int) -> None:
        """Send it a signal once its command runs, which makes a file `ready` in its home."""
        deadline = time.monotonic() + 60
        while not (self._home / "ready").exists():
            assert self._process.poll() is None and time.monotonic() < deadline, self.called
            time.sleep(0.02)
        self._process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """Its exit status, and what it said."""
        said, _ = self._process.communicate(timeout=60)
        return self._process.returncode, said

    @property
    def called(self) -> dict[str, int]:
        """What was called of the stand-ins, and each one's process."""
        lines = (self._home / "called").read_text().splitlines()
        return {line.partition(" ")[2]: int(line.partition(" ")[0]) for line in lines}

    def end(self) -> None:
        """Kill it and what it left."""
        self._process.kill()
        with suppress(FileNotFoundError):
            for number in self.called.values():
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's home; the stand-ins are in the environment there."""
    for name, program in _STAND_INS.items():
        file = tmp_path / "tmu-dist-venv" / "bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!{sys.executable}\n{dedent(program.format(home=tmp_path))}")
        file.chmod(0o755)
    return tmp_path


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Put jobs in here to have them ended."""
    made: list[Job] = []
    yield made
    for job in made:
        job.end()


def token(home: Path) -> list[Path]:
    return list(home.glob(".tmu-dist-token-*"))


def test_the_commands_status_is_the_jobs_and_nothing_is_left(home: Path, jobs: list[Job]) -> None:
    look = 'stat -c %a "$RAY_AUTH_TOKEN_PATH"; wc -c < "$RAY_AUTH_TOKEN_PATH"; echo $RAY_ADDRESS'
    jobs.append(job := Job(home, "bash", "-c", f"{look}; exit 7"))
    assert job.wait() == (7, f"600\n64\n{_ADDRESS}:6379\n")
    assert not token(home)
    assert job.called.keys() == {
        f"ray token start --head --block --node-ip-address={_ADDRESS} --port=6379 --num-cpus=2 "
        "--dashboard-host=127.0.0.1",
        "srun --nodes=1 --ntasks=1 --exclude=first",
        f"ray token start --block --address={_ADDRESS}:6379 --num-cpus=4",
    }
    for number in job.called.values():
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


@pytest.mark.parametrize(
    ("number", "status", "is_queued_again"),
    [
        (signal.SIGUSR1, 143, True),  # its time is over
        (signal.SIGUSR1, 1, False),  # and it failed to save what it had
        (signal.SIGTERM, 143, False),  # the user ended it
    ],
)
def test_signals_reach_the_command(
    home: Path, jobs: list[Job], number: int, status: int, is_queued_again: bool
) -> None:
    command = f"trap 'sleep 0.1; exit {status}' TERM; touch {shlex.quote(str(home))}/ready; "
    jobs.append(job := Job(home, "bash", "-c", command + "while true; do sleep 0.05; done"))
    job.signal(number)
    assert job.wait()[0] == status
    assert ("scontrol requeue 7" in job.called) == is_queued_again
    assert not token(home)


def test_a_head_that_does_not_start_ends_the_job(home: Path, jobs: list[Job]) -> None:
    jobs.append(job := Job(home, "true", RAY_FAILS="1"))
    assert job.wait()[0] not in (0, None)
    assert not token(home)


def test_a_job_needs_a_command(home: Path, jobs: list[Job]) -> None:
    jobs.append(job := Job(home))
    status, said = job.wait()
    assert status == 2 and "python -m tmu_dist.train" in said
