"""How long does it take from the command to the end of the first training step?

    python -m benchmarks.startup [--launchers local ray] [--starts 5] [--disk warm|cold]

An archive of digits and two small teachers are made in a temporary folder. Then a student is
trained for one step with them, again and again, by the real command in a new process: on Ray, the
command starts a Ray of its own. When each stage ends is written down by the processes themselves
(`marks.py`); on Ray, stages are of the command first, then of the slower rank.

One start of each launcher before the others is not counted: it may compile Python's files. Python
may keep the compiled ones, as it does by itself (PYTHONDONTWRITEBYTECODE is not passed on). With
--disk cold the system is made to forget the files of Python and its libraries before each start, as
far as no other process uses them.

No Ray may run on the machine. Prints the table and writes results.json and table.md to
docs/results/startup. Takes less than five minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.provenance import command_line, provenance, publish, say
from benchmarks.small_run import prepare_student
from benchmarks.startup import marks
from benchmarks.startup.report import STAGES, table
from tmu_dist.config import to_json
from tmu_dist.provenance import versions

ROOT = Path(__file__).parents[2]
_NOT_PASSED_ON = ("PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS")
_TIMEOUT_SECONDS = 600.0


def words(launcher: str, file: Path) -> list[str]:
    """The command, as it is given to Python."""
    module = ["-m", "tmu_dist.train", "--recipe", "digits-scratch"]
    return [*module, "--config", str(file), "--launcher", launcher]


def start(launcher: str, file: Path) -> dict[str, float]:
    """Give the command once and wait until it ends; seconds from then to every mark.

    Args:
        launcher: of the run.
        file: with its settings; its run folder is removed first.

    Raises:
        RuntimeError: it failed, or did not come to a mark; says what it said.
    """
    folder = file.parent
    shutil.rmtree(folder / "student", ignore_errors=True)
    marked = folder / "marks.txt"
    marked.unlink(missing_ok=True)
    customized = folder / "python"
    customized.mkdir(exist_ok=True)
    shutil.copy(marks.__file__, customized / "sitecustomize.py")
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_PASSED_ON}
    environment |= {"PYTHONPATH": str(customized), marks.FILE: str(marked)}
    started = time.time()
    done = subprocess.run(
        [sys.executable, *words(launcher, file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
    )
    found = read_marks(marked.read_text() if marked.exists() else "", started)
    missing = STAGES[launcher].keys() - found.keys()
    if done.returncode or missing:
        raise RuntimeError(
            f"The command ended with code {done.returncode} and did not come to "
            f"{sorted(missing)}; it said: {done.stderr}"
        )
    return found


def read_marks(text: str, started: float) -> dict[str, float]:
    """Seconds from a moment to when the command, or else the slowest rank, first came to each mark.

    Args:
        text: lines that `marks.mark` wrote.
        started: the moment, as `time.time`.
    """
    lines = [line.split(" ", 2) for line in text.splitlines()]
    done: dict[str, float] = {}
    for seconds, process, name in lines:
        if name == "ends Run.advance":
            done.setdefault(process, float(seconds))
    looked_at = {lines[0][1] if lines else "", max(done, key=done.__getitem__, default="")}
    found: dict[str, float] = {}
    for seconds, process, name in lines:
        if process in looked_at:
            found.setdefault(name, float(seconds) - started)
    return found


def forget_files() -> None:
    """Have the system drop what it keeps in memory of files of Python and its libraries."""
    for place in {sys.prefix, sys.base_prefix}:
        for path in Path(place).rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(launchers: list[str], number: int, *, is_cold: bool) -> dict[str, Any]:
    """Start again and again, the launchers in turn.

    Returns:
        `starts`: marks by launcher; `loads`: of the machine before each.
    """
    starts: dict[str, list[Mapping[str, float]]] = {launcher: [] for launcher in launchers}
    loads = []
    with tempfile.TemporaryDirectory(prefix="startup-") as work:
        student = prepare_student(Path(work), hidden_channels=32, num_steps=1)
        file = Path(work, "student.yaml")
        file.write_text(to_json(student))  # JSON is YAML, too
        for launcher in launchers:
            say(f"{launcher}: not counted")
            start(launcher, file)
        for turn in range(number):
            for launcher in launchers:
                if is_cold:
                    forget_files()
                loads.append(_load())
                starts[launcher].append(found := start(launcher, file))
                say(f"{turn + 1} of {number}, {launcher}: {found['ends Run.advance']:.1f} s")
    return {"starts": starts, "loads": loads}


def _load() -> float:
    """Processors that others use, in the half second from now."""
    before = _busy_seconds()
    time.sleep(0.5)
    return round((_busy_seconds() - before) / 0.5, 2)


def _busy_seconds() -> float:
    """That all processors have worked since the machine started."""
    first, *_ = Path("/proc/stat").read_text().splitlines()
    user, nice, system, _idle, _waiting, *rest = map(int, first.split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = command_line(__doc__, out="docs/results/startup")
    parser.add_argument("--launchers", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--starts", type=int, default=5, help="of each launcher")
    parser.add_argument("--disk", choices=("warm", "cold"), default="warm")
    chosen = parser.parse_args()
    found = measure(chosen.launchers, chosen.starts, is_cold=chosen.disk == "cold")
    commands = {each: " ".join(words(each, Path("student.yaml"))) for each in chosen.launchers}
    record = {
        **provenance("benchmarks.startup", "cpu", chosen.revision),
        "versions": versions(("tmu-dist", "torch", "ray", "numpy")),
        "disk": chosen.disk,
        "commands": {launcher: f"python {text}" for launcher, text in commands.items()},
        **found,
    }
    publish(record, table(record), chosen.out)


if __name__ == "__main__":
    main()
