"""What the trials of a search found, read from the logs of their runs.

Numbers are never copied, so the report of a search cannot contradict its runs. Everything here is
of the validation split.

Legend: L TMU layers, M teachers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from tmu_dist.config import ModelConfig, RunConfig, TransferConfig, WindowConfig, with_overrides
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import ManifestError
from tmu_dist.data.storage import StorageError, exists
from tmu_dist.evaluation.training_operations import TrainingOperations, training_operations
from tmu_dist.ledger.arms import short_names
from tmu_dist.models.shapes import FrameShape
from tmu_dist.run_folder import RESULT_FILE, Event, read_log
from tmu_dist.teachers.card import TeacherCard, TeacherError, frame_shape
from tmu_dist.teachers.store import load_card
from tuning.journal import Trial
from tuning.plan import Search, Stage

log = logging.getLogger(__name__)

OperationsOf = Callable[[RunConfig, int], float | None]
"""Operations of so many iterations of a run; None where they cannot be told."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial told at one level of its fidelity."""

    level: float
    """Iterations; or the fraction of the data, where that is the fidelity."""
    error: float
    """Of the weights that the run offers at that time: those of the lowest squared error so far,
    unless training.select=final."""
    step: int
    seconds: float
    """Of training so far, over all runs of the trial."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial, with what it found so far."""

    trial: Trial
    folder: str
    """Of its last run."""
    reports: tuple[Report, ...]
    sources: tuple[str, ...]
    """Short names of the teachers that its student uses."""
    method: str
    fraction: float
    """Of the target data that its last run learns from."""
    num_steps: int
    """Iterations that its last run is to have."""
    gates: tuple[float, ...]
    """Mean transfer gate of each of its sources over TMU layers, at the last look; none without."""
    operations: float | None = None
    """Of training so far: convolutions and matrix products, forwards and backwards."""

    @property
    def error(self) -> float | None:
        """At its highest level; None before the first validation."""
        return self.reports[-1].error if self.reports else None

    @property
    def is_whole(self) -> bool:
        """Whether it was trained to its end."""
        return self.trial.state == "finished"


def read_records(search: Search, trials: Iterable[Trial]) -> tuple[TrialRecord, ...]:
    """What trials found so far, with the operations that it took.

    Raises:
        ValueError: a run's log is damaged.
        StorageError: the store cannot be reached.
    """
    operations_of = Operations()
    return tuple(read_record(search, trial, operations_of) for trial in trials)


def read_record(
    search: Search, trial: Trial, operations_of: OperationsOf | None = None
) -> TrialRecord:
    """What one trial found so far; without operations unless it is said how they are counted.

    Raises:
        ValueError: a run's log is damaged.
        StorageError: the store cannot be reached.
    """
    stages = search.stages(trial.number, trial.point, trial.seed)
    logs = [read_log(stage.config.output) for stage in stages]
    last = max((place for place, events in enumerate(logs) if events), default=0)
    config = stages[last].config
    operations = [
        None if operations_of is None else operations_of(stage.config, _steps(events))
        for stage, events in zip(stages, logs)
    ]
    return TrialRecord(
        trial=trial,
        folder=config.output,
        reports=_reports(stages, logs, search.options.error),
        sources=_sources(search, config),
        method=config.transfer.method,
        fraction=config.data.fraction,
        num_steps=config.training.num_steps,
        gates=_gates(logs[last]),
        operations=None if None in operations else sum(filter(None, operations)),
    )


def outcome_of(
    search: Search, trial: Trial, operations_of: OperationsOf
) -> tuple[float, float, float | None] | None:
    """Level, error and cost of an ended trial, for the agenda; None if it found nothing."""
    cost = search.options.cost
    record = read_record(search, trial, operations_of if cost == "operations" else None)
    if not record.reports:
        return None
    last = record.reports[-1]
    costs = {"operations": record.operations, "teachers": float(len(record.sources))}
    return last.level, last.error, costs.get(cost or "")


def progress_of(config: RunConfig, events: Sequence[Event], error_name: str) -> list[Report]:
    """What a run told at each validation so far, by iterations.

    Args:
        config: of the run.
        events: its log.
        error_name: an error that runs validate by.
    """
    reports: list[Report] = []
    lowest = float("inf")
    for event in events:
        if event["event"] != "validation":
            continue
        # Which weights a run offers is decided by this error, whichever one is asked for.
        is_offered = config.training.select == "final" or event["mse_per_frame"] < lowest
        lowest = min(lowest, event["mse_per_frame"])
        error = event[error_name] if is_offered else reports[-1].error
        step, seconds = event["step"], event["seconds"]
        reports.append(Report(level=step, error=error, step=step, seconds=seconds))
    return reports


def source_names(search: Search) -> tuple[str, ...]:
    """Short names of all teachers that a search may choose from, in their order."""
    return short_names(_teachers(search))


class Operations:
    """Counts what training takes: each kind of run once, from its archive's and teachers' cards."""

    def __init__(self) -> None:
        self._frames: dict[str, FrameShape] = {}
        self._cards: dict[str, TeacherCard] = {}
        self._counts: dict[_Kind, TrainingOperations] = {}

    def __call__(self, config: RunConfig, steps: int) -> float | None:
        """Of a run up to an iteration; None if archive or teachers are gone."""
        kind = _Kind.of(config)
        try:
            if kind not in self._counts:
                self._counts[kind] = training_operations(
                    config, self._frame(config.data.url), self._teachers(config)
                )
        except (ManifestError, TeacherError, StorageError) as error:
            log.warning("The operations of %s cannot be counted: %s", config.output, error)
            return None
        return float(self._counts[kind].until(steps) * config.training.batch_size)

    def _frame(self, url: str) -> FrameShape:
        if url not in self._frames:
            self._frames[url] = frame_shape(open_archive(url).manifest)
        return self._frames[url]

    def _teachers(self, config: RunConfig) -> list[TeacherCard]:
        for address in config.transfer.teachers:
            if address not in self._cards:
                self._cards[address] = load_card(address)
        return [self._cards[address] for address in config.transfer.teachers]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What the operations of a sequence depend on; not how much a loss weighs, unless that is 0."""

    url: str
    model: ModelConfig
    window: WindowConfig
    transfer: TransferConfig
    reverse_input: str
    num_steps: int
    """Knowledge Flow lays its phases out over them."""

    @classmethod
    def of(cls, config: RunConfig) -> _Kind:
        transfer, training = config.transfer, config.training
        if transfer.beta:
            transfer = replace(transfer, beta=TransferConfig.beta)
        return cls(
            url=config.data.url,
            model=config.model,
            window=config.window,
            transfer=transfer,
            reverse_input=training.reverse_input,
            num_steps=training.num_steps,
        )


def _reports(
    stages: Sequence[Stage], logs: Sequence[Sequence[Event]], error_name: str
) -> tuple[Report, ...]:
    """Every validation of a run; of runs on fractions one report each, once it is finished."""
    reports: list[Report] = []
    seconds = 0.0
    for stage, events in zip(stages, logs):
        told = progress_of(stage.config, events, error_name)
        if stage.fraction is None:
            return tuple(told)
        if not (told and exists(stage.config.output, RESULT_FILE)):
            break
        seconds += told[-1].seconds
        reports.append(replace(told[-1], level=stage.fraction, seconds=seconds))
    return tuple(reports)


def _sources(search: Search, config: RunConfig) -> tuple[str, ...]:
    """The run's teachers by the names that they have among all of the search's."""
    names = dict(zip(_teachers(search), source_names(search)))
    own = short_names(config.transfer.teachers)
    return tuple(names.get(each, name) for each, name in zip(config.transfer.teachers, own))


def _teachers(search: Search) -> tuple[str, ...]:
    return with_overrides(search.base, search.space.settings).transfer.teachers


def _gates(events: Sequence[Event]) -> tuple[float, ...]:
    """By teacher, the mean over layers when they were last looked at."""
    looks = [event["gate_means"] for event in events if "gate_means" in event]
    return tuple(fmean(by_layer) for by_layer in zip(*looks[-1])) if looks else ()


def _steps(events: Sequence[Event]) -> int:
    return max((event["step"] for event in events), default=0)
