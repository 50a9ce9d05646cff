"""How a search is doing, read from its folder while it runs or after it died. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmu_dist.data.storage import changed_at
from tmu_dist.run_folder import LOG_FILE, read_log
from tmu_dist.training.run_lock import holder
from tuning.findings import PointFinding, find
from tuning.journal import State, Trial, missing_seeds, read_trials
from tuning.plan import Search, load_search
from tuning.records import TrialRecord, read_record

_STALE_SECONDS = 300.0
"""Longer than most validations take, and than the log of a run in a store is behind."""
_READERS = 16


@dataclass(frozen=True, kw_only=True)
class OpenTrial:
    """A trial that has not ended."""

    number: int
    label: str
    seed: int
    fraction: float
    """Of the target data, of the run that it is at."""
    step: int | None
    """None: it has not begun."""
    num_steps: int
    error: float | None
    """At its last validation."""
    silent_seconds: float | None
    """Since its log last grew; None: it has not begun."""

    @property
    def is_stale(self) -> bool:
        """Whether it has said nothing for so long that something may be wrong."""
        return self.silent_seconds is not None and self.silent_seconds > _STALE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a search is doing."""

    search: Search
    driver: str | None
    """The process that runs it; None: none does."""
    counts: Mapping[State, int]
    """Trials by how they are."""
    open_trials: tuple[OpenTrial, ...]
    to_come: int | None
    """Trials that have not begun, as far as it is known: a scheduler decides of further seeds."""
    best: PointFinding | None
    """None: no point is whole yet."""
    seconds_left: float | None
    """If further trials take as long as those that have ended, as many at once as now; None while
    no driver is at work or none has ended."""


def status(folder: str) -> None:
    """Print how the search in a folder is doing.

    Raises:
        ConfigError: there is none.
        ValueError: a file of it is damaged.
        StorageError: the store cannot be reached.
    """
    Console().print(terminal_status(read_status(load_search(folder))))


def read_status(search: Search) -> Status:
    """Look at a search's journal, its runs' logs, and whether its driver is alive.

    Raises:
        ValueError, StorageError: as in `status`.
    """
    trials = read_trials(search.folder)
    with ThreadPoolExecutor(_READERS) as pool:  # a store takes its time for each
        driver = pool.submit(holder, search.folder)
        records = tuple(pool.map(partial(read_record, search), trials))
        still_open = [record for record in records if record.trial.state == "open"]
        open_trials = tuple(pool.map(partial(_open_trial, search), still_open))
    findings = find(search, records)
    to_come = _to_come(search, trials)
    is_run = driver.result() is not None
    return Status(
        search=search,
        driver=driver.result(),
        counts={state: findings.counts.get(state, 0) for state in _WORDS},
        open_trials=open_trials,
        to_come=to_come,
        best=findings.ranked[0] if findings.ranked else None,
        seconds_left=_seconds_left(records, open_trials, to_come) if is_run else None,
    )


def _open_trial(search: Search, record: TrialRecord) -> OpenTrial:
    events = read_log(record.folder)
    return OpenTrial(
        number=record.trial.number,
        label=search.space.label(record.trial.point),
        seed=record.trial.seed,
        fraction=record.fraction,
        step=max(event["step"] for event in events) if events else None,
        num_steps=record.num_steps,
        error=record.error,
        silent_seconds=max(0.0, time.time() - changed_at(record.folder, LOG_FILE))
        if events
        else None,
    )


def _to_come(search: Search, trials: Sequence[Trial]) -> int | None:
    options = search.options
    points = (
        options.num_samples if options.sampler != "grid" else sum(1 for _ in search.space.grid())
    )
    if points is None:
        return None
    of_points: dict[int, list[Trial]] = {number: [] for number in range(points)}
    for trial in trials:
        of_points.setdefault(trial.point_number, []).append(trial)
    has_scheduler = options.scheduler != "none"
    return sum(
        len(missing_seeds(of_point, options.seeds, has_scheduler=has_scheduler))
        for of_point in of_points.values()
    )


def _seconds_left(
    records: Sequence[TrialRecord], open_trials: Sequence[OpenTrial], to_come: int | None
) -> float | None:
    def spent(record: TrialRecord) -> float:
        return record.reports[-1].seconds if record.reports else 0.0

    ended = [spent(each) for each in records if each.trial.state != "open" and each.reports]
    at_once = sum(trial.step is not None for trial in open_trials)
    if not ended or not at_once or to_come is None:
        return None
    usual = fmean(ended)
    rest = [max(0.0, usual - spent(each)) for each in records if each.trial.state == "open"]
    return (to_come * usual + sum(rest)) / at_once


# As text for a terminal

_WORDS: Mapping[State, str] = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "open": "open",
}


def terminal_status(found: Status) -> Group:
    """What `status` prints."""
    search = found.search
    counts = [f"{found.counts[state]} {word}" for state, word in _WORDS.items()]
    counts += [] if found.to_come is None else [f"{found.to_come} to come"]
    parts: list[RenderableType] = [
        Text.assemble((search.name, "bold"), f" ({search.folder})"),
        _driver(found),
        Text(f"Trials: {', '.join(counts)}."),
    ]
    if found.open_trials:
        parts += [Text(), _table(found), Text()]
    parts.append(_best(found))
    if found.seconds_left is not None:
        parts.append(
            Text(
                f"About {_duration(found.seconds_left)} left, if further trials take as long as "
                "those that have ended."
            )
        )
    return Group(*parts)


def _driver(found: Status) -> Text:
    if found.driver is not None:
        return Text(f"{found.driver} runs it.")
    if found.counts["open"] or found.to_come:
        return Text(f"Nobody runs it. To continue: {found.search.command}", style="yellow")
    return Text("It is over.")


def _table(found: Status) -> Table:
    by_fraction = bool(found.search.options.fractions)
    error = found.search.options.error
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("trial", justify="right")
    table.add_column("settings")
    for name in ("seed", *(["fraction"] if by_fraction else []), "step", error):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last heard of")
    for trial in found.open_trials:
        heard, style = _heard(trial, is_run=found.driver is not None)
        table.add_row(
            str(trial.number),
            Text(trial.label),
            str(trial.seed),
            *([f"{trial.fraction:g}"] if by_fraction else []),
            f"{trial.step or 0:,} of {trial.num_steps:,}",
            "" if trial.error is None else f"{trial.error:.6g}",
            Text(heard, style=style),
        )
    return table


def _heard(trial: OpenTrial, *, is_run: bool) -> tuple[str, str]:
    """When a trial was last heard of, and in which style that is said."""
    if trial.silent_seconds is None:
        return "not begun", "dim"
    ago = f"{_duration(trial.silent_seconds)} ago"
    return (f"{ago}: stale", "yellow") if is_run and trial.is_stale else (ago, "")


def _best(found: Status) -> Text:
    best = found.best
    if best is None or best.error is None:
        return Text("No point is whole yet: its trials must be finished, one for each seed.")
    deviation = best.error.deviation
    spread = "" if deviation is None else f" ± {deviation:.3g} over {len(best.error.by_seed)} seeds"
    return Text.assemble(
        "Best so far: ",
        (best.label, "bold"),
        f", validation {found.search.options.error} {best.error.mean:.6g}{spread}.",
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
