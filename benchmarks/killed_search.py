"""A real search whose driver is killed twice in the middle: is every trial accounted for?

    python -m benchmarks.killed_search [--work FOLDER] [--kills 2] [--out FOLDER] [OPTION ...]

Runs `python tuning/search.py --out WORK/search OPTION ...` (by default every point of the space
`small` with two seeds, Ray Train inside Ray Tune), kills the driver outright (SIGKILL) when a third
and two thirds of the points have ended, waits until its Ray is gone, gives the same command again,
and looks at what is left: the journal, the runs, the processes. Nothing is cleaned up in between.

Writes results.json and table.md to docs/results/killed-search, and what the search itself has to
show to docs/results/search-digits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import command_line, provenance, publish, say
from tmu_dist.run_folder import PROVENANCE_FILE, RESULT_FILE, read_json, read_log
from tmu_dist.verify_resume.comparing import newest_checkpoint
from tmu_dist.workspace import in_workspace
from tuning.journal import Trial, read_trials
from tuning.plan import load_search

ROOT = Path(__file__).parents[1]
COPIED = ("report.html", "results.json", "trials.csv", "best.yaml")
_LOOK_SECONDS = 0.5
_GONE_SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.killed_search`."""
    parser = command_line(__doc__, out=str(ROOT / "docs/results"))
    parser.allow_abbrev = False  # what it does not know is the search's
    parser.add_argument("--work", type=Path)
    parser.add_argument("--kills", type=int, default=2)
    known, words = parser.parse_known_args(arguments)
    work = known.work or Path(tempfile.mkdtemp())
    words = words or ["--sampler", "grid", "--seeds", "0", "1"]
    record = {
        **provenance("benchmarks.killed_search", "cpu", known.revision),
        **kill_and_continue(work / "search", words, known.kills),
    }
    pages = known.out / "search-digits"
    pages.mkdir(parents=True, exist_ok=True)
    workspace = Path(in_workspace("archives")).absolute().parent
    for name in COPIED:
        text = (work / "search" / name).read_text()
        for folder, shown in ((work, "WORK"), (workspace, "WORKSPACE")):
            text = text.replace(str(folder), shown)
        (pages / name).write_text(text)
    publish(record, table(record), known.out / "killed-search")


def kill_and_continue(folder: Path, words: Sequence[str], kills: int) -> dict[str, Any]:
    """Run a search to its end over so many kills, and say what was seen."""
    command = [sys.executable, "tuning/search.py", "--out", str(folder), *words]
    starts = []
    finished_before: dict[int, float] = {}
    for start in range(kills + 1):
        began = time.monotonic()
        before = _ended(folder)
        with (folder.parent / f"start-{start}.log").open("w") as log:
            driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            share = None if start == kills else (start + 1) / (kills + 1)
            _wait(driver, folder, share)
            ray = _descendants(driver.pid)
            driver.send_signal(signal.SIGKILL)  # no effect on one that has ended
            code = driver.wait()
        killed = time.monotonic()
        while left := [pid for pid in ray if _is_alive(pid)]:
            if time.monotonic() - killed > _GONE_SECONDS:
                raise RuntimeError(f"processes of a killed driver are still there: {left}")
            time.sleep(_LOOK_SECONDS)
        trials = read_trials(str(folder))
        starts.append(
            {
                "exit_code": code,
                "seconds": round(killed - began, 1),
                "seconds_until_its_processes_were_gone": round(time.monotonic() - killed, 1),
                "ended_before": len(before),
                "ended": len(_ended(folder)),
                "open": sum(trial.state == "open" for trial in trials),
            }
        )
        say(f"start {start}: {starts[-1]}")
        finished_before |= {
            trial.number: _result_time(folder, trial)
            for trial in trials
            if trial.state == "finished" and trial.number not in finished_before
        }
    return {"options": list(words), "starts": starts, **_account(folder, finished_before)}


def _wait(driver: subprocess.Popen[bytes], folder: Path, share: float | None) -> None:
    """Until a share of the points has an ended trial while others have a checkpoint; None: to its
    end."""
    points = None
    while driver.poll() is None:
        time.sleep(_LOOK_SECONDS)
        trials = read_trials(str(folder))
        if share is None or not trials:
            continue
        if points is None:
            search = load_search(str(folder))
            points = search.options.num_samples or sum(1 for _ in search.space.grid())
        over = {trial.point_number for trial in trials if trial.state != "open"}
        are_far = [
            newest_checkpoint(_folder(folder, trial)) is not None
            for trial in trials
            if trial.state == "open"
        ]
        if len(over) >= share * points and any(are_far):
            return
    if share is not None:
        raise RuntimeError(f"the driver ended by itself, with {driver.returncode}: see {folder}")


def _account(folder: Path, finished_before: dict[int, float]) -> dict[str, Any]:
    """What the whole search has to show for itself."""
    trials = read_trials(str(folder))
    search = load_search(str(folder))
    resumed, again = 0, 0
    for trial in trials:
        events = read_log(_folder(folder, trial))
        resumed += any(event["event"] == "resume" for event in events)
        if trial.number in finished_before:
            again += _result_time(folder, trial) != finished_before[trial.number]
        if trial.state == "finished":
            steps = [e["step"] for e in events if e["event"] == "validation"]
            assert steps == sorted(set(steps)), f"trial {trial.number} logged a step twice"
    return {
        "points": len({trial.point_number for trial in trials}),
        "seeds": list(search.options.seeds),
        "trials": len(trials),
        "states": dict(Counter(trial.state for trial in trials)),
        "continued_from_a_checkpoint": resumed,
        "finished_ones_trained_again": again,
        "starts_of_runs": sum(
            len(read_json(_folder(folder, trial), PROVENANCE_FILE)["starts"]) for trial in trials
        ),
        "processes_left": len([pid for pid in _descendants(os.getpid()) if _is_alive(pid)]),
    }


def table(record: dict[str, Any]) -> str:
    """For people."""
    states = ", ".join(f"{count} {state}" for state, count in record["states"].items())
    rows = [
        f"| {number} | {start['seconds']:.0f} s | {start['exit_code']} | {start['ended']} | "
        f"{start['open']} | {start['seconds_until_its_processes_were_gone']:.0f} s |"
        for number, start in enumerate(record["starts"])
    ]
    return "\n".join(
        [
            "| start | ran | exit code | trials ended so far | open | its processes gone after |",
            "|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"{record['points']} points, {record['trials']} trials: {states}. "
            f"{record['continued_from_a_checkpoint']} went on from a checkpoint, "
            f"{record['finished_ones_trained_again']} finished ones were trained again, "
            f"{record['processes_left']} processes were left.",
            "",
        ]
    )


def _folder(folder: Path, trial: Trial) -> str:
    return str(folder / f"trials/{trial.number:04d}")


def _ended(folder: Path) -> list[Trial]:
    return [trial for trial in read_trials(str(folder)) if trial.state != "open"]


def _result_time(folder: Path, trial: Trial) -> float:
    return (Path(_folder(folder, trial)) / RESULT_FILE).stat().st_mtime


def _descendants(pid: int) -> list[int]:
    """All processes that a process and its children have started."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # gone since
            continue
        parents[int(status.parent.name)] = int(fields[1])
    found, waiting = [], [pid]
    while waiting:
        above = waiting.pop()
        children = [child for child, parent in parents.items() if parent == above]
        found += children
        waiting += children
    return found


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
