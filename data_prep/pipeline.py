"""From a source of sequences to a finished archive: plan, convert in parallel, write, finalise.

    1. convert   each job (a few original files) becomes blocks of converted frames under .parts/
    2. plan      splits, windows and filters, from the facts about all frames; pure, in this process
    3. write     each shard is put together from the frames that it needs
    4. finalise  statistics, report and, last of all, the manifest, which removes .parts/

Every piece of 1 and 3 leaves a record under .parts/ when it is whole. A run that was killed finds
the records and does the rest; what a piece holds depends on its number alone, so the bytes are the
same for any number of workers and any interruption.

Not here: how pieces are run (workers.py), how frames are kept in between (staging.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from data_prep.report import compose_report
from data_prep.shards import StagedFrames, Written, write_tars, write_zarr
from data_prep.source import BadFile, Job, Plan, Source
from data_prep.staging import StagedJob, Staging
from data_prep.statistics import statistics_record
from data_prep.workers import Launcher, check_workers, run_pieces
from data_prep.writers.objects import (
    PARTS_PREFIX,
    prepare_archive,
    without_default_compression,
    write_manifest,
    write_object,
)
from tmu_dist.data import storage
from tmu_dist.data.manifest import REPORT_PATH, STATISTICS_PATH, Compression, Manifest

PIPELINE_VERSION = 1
"""Raise it with any change that gives other bytes for the same source and settings."""

logger = logging.getLogger(__name__)


class BadFilesError(ValueError):
    """Files that could not be converted, where that was to stop the work."""


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """How the archive is stored."""

    format: Literal["webdataset", "zarr"] = "webdataset"
    """webdataset: tars of sequences, for training; zarr: every frame once, with coordinates, for
    random access and analysis (training can read it, too)."""
    compression: Compression = "zstd"
    """webdataset: of the frames; zstd takes little space, none is read fastest."""
    samples_per_shard: int | None = None
    """webdataset: sequences in each tar; about 64 MiB of them when left out."""
    frames_per_shard: int | None = None
    """zarr: frames in each shard object; about 128 MiB before compression when left out."""
    full_train_samples: int | None = None
    """Training sequences that count as 100 % of the data; all of them when left out."""

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "frames_per_shard", "full_train_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.format == "zarr" and self.compression != "zstd":
            raise ValueError(
                f"compression={self.compression} is for tars; Zarr archives are compressed with "
                "zstd: leave it out, or use format=webdataset."
            )

    def to_record(self) -> dict[str, Any]:
        """Return the settings as they are part of what determines an archive's content."""
        return without_default_compression(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class WorkSettings:
    """How the work is done; none of it changes a byte of the archive."""

    launcher: Launcher = "local"
    """local: processes of this machine; ray: tasks on a Ray cluster, which must see the files."""
    workers: int | None = None
    """Pieces at a time; one per core when left out."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """A file that cannot be read: end with an error that names it, or leave it out and say so in
    the archive's report."""
    overwrite: bool = False
    """Replace whatever archive is there."""
    show_progress: bool = True

    def __post_init__(self) -> None:
        check_workers(self.workers)


def build_archive(
    source: Source, out_url: str, output: OutputSettings, work: WorkSettings
) -> Manifest:
    """Make an archive, or finish one that was begun; does nothing when it is already there.

    Args:
        source: what to convert.
        out_url: folder or URL of the archive; with several machines, one that all of them see.
        output: format and sizes.
        work: processes and what to do about bad files.

    Returns:
        The archive's manifest.

    Raises:
        ArchiveExistsError: the place holds an archive of other arguments.
        BadFilesError: names the files, with `on_bad_file="stop"`.
        StorageError: the place cannot be written.
        ValueError: what the source raises: nothing to convert, nothing left, leaking splits.
    """
    builder = _Builder(source, out_url, output, work)
    if finished := builder.prepare():
        logger.info("%s already holds exactly this archive; nothing to do.", out_url)
        return finished
    jobs = builder.convert()
    records = [record for job in jobs for record in job.records]
    plan = source.plan(records)
    written = builder.write(plan, jobs)
    return builder.finalise(plan, jobs, written)


class _Builder:
    """One archive in the making."""

    def __init__(
        self, source: Source, out_url: str, output: OutputSettings, work: WorkSettings
    ) -> None:
        if storage.is_process_local(out_url):
            if work.launcher != "local" or work.workers not in (None, 1):
                raise ValueError(
                    f"{out_url} exists in this process only: use launcher local and workers 1."
                )
            work = dataclasses.replace(work, workers=1)
        self.source = source
        self.url = out_url
        self.output = output
        self.work = work
        self.jobs = source.jobs()
        self.files = [source.describe_files(job) for job in self.jobs]
        self.num_files = len({name for files in self.files for name, _ in files})
        settings = source.settings()
        common = {"pipeline_version": PIPELINE_VERSION, "output": output.to_record()}
        created_by = common | {"source": settings, "files_sha256": _hash(self.files)}
        self.created_by = json.loads(json.dumps(created_by))  # as a manifest gives it back
        # Frames do not depend on the plan, and a repaired file costs its own job again, not all:
        # neither is part of the key under which converted frames are found again.
        conversion = {name: value for name, value in settings.items() if name != "plan"}
        key = _hash([PIPELINE_VERSION, conversion])[:16]
        self.staging = Staging(out_url, f"{PARTS_PREFIX}{key}")

    def prepare(self) -> Manifest | None:
        """Return the manifest where the archive is finished; remove what other builds left."""
        return prepare_archive(
            self.url,
            self.created_by,
            overwrite=self.work.overwrite,
            parts=self.staging.prefix,
        )

    def convert(self) -> list[StagedJob]:
        """Stage 1: every job, the finished ones from their records."""
        pieces = [
            _Conversion(self.source, self.staging, f"job-{number:06d}", job, files)
            for number, (job, files) in enumerate(zip(self.jobs, self.files, strict=True))
        ]
        done: dict[int, StagedJob] = {}
        bad: list[BadFile] = []
        for number, job in self._run(_convert, pieces, "reading"):
            done[number] = job
            bad.extend(file for file in job.bad if not file.by_design)
            if bad and self.work.on_bad_file == "stop":
                raise BadFilesError(_bad_files_message(bad, self.num_files))
        for file in bad:
            logger.warning("Left out %s: %s", file.file, file.reason)
        by_design = [file for job in done.values() for file in job.bad if file.by_design]
        if by_design:
            first = min(by_design)
            logger.info(
                "Left out on purpose, in whole or in part: %d files, such as %s: %s",
                len(by_design),
                first.file,
                first.reason,
            )
        return [done[number] for number in range(len(pieces))]

    def write(self, plan: Plan, jobs: Sequence[StagedJob]) -> Written:
        """Stage 3: every shard; the finished ones from their records.

        Raises:
            ValueError: 100 % of a training split that there is not.
        """
        if self.output.full_train_samples and all(s.split != "train" for s in plan.sequences):
            raise ValueError(
                "full_train_samples says how many training sequences are 100 %, but no sequence "
                "trains: leave it out."
            )
        frames = StagedFrames(jobs)
        sequences = [dataclasses.asdict(sequence) for sequence in plan.sequences]
        plan_key = _hash([sequences, self.output.to_record()])[:16]
        self.staging.keep_shards_of(plan_key)
        if self.output.format == "zarr":
            return write_zarr(
                plan,
                frames,
                self.staging,
                plan_key,
                self.source.facts(plan),
                self.output.frames_per_shard or frames.frames_per_shard(),
                self._run_writing,
            )
        return write_tars(
            plan,
            frames,
            self.staging,
            plan_key,
            self.output.samples_per_shard,
            self.output.compression,
            self._run_writing,
        )

    def finalise(self, plan: Plan, jobs: Sequence[StagedJob], written: Written) -> Manifest:
        """Stage 4: statistics, report, manifest."""
        facts = self.source.facts(plan)
        bad = [file for job in jobs for file in job.bad]
        statistics = statistics_record(written.histogram, facts.units, self.source.wet_threshold())
        report = compose_report(facts=facts, plan=plan, bad_files=bad, num_files=self.num_files)
        objects = [
            write_object(self.url, STATISTICS_PATH, _json(statistics)),
            write_object(self.url, REPORT_PATH, _json(report)),
            *written.objects,
        ]
        manifest = Manifest(
            name=facts.name,
            num_frames=plan.num_frames,
            channels=facts.channels,
            height=plan.height,
            width=plan.width,
            units=facts.units,
            frame_interval_minutes=facts.frame_interval_minutes,
            format=self.output.format,
            splits=written.splits,
            compression=self.output.compression,
            objects=tuple(sorted(objects, key=lambda stored: stored.path)),
            grid=facts.grid,
            source=facts.source,
            full_train_samples=self.output.full_train_samples,
            created_by=self.created_by,
            dtype=facts.dtype,  # type: ignore[arg-type]
        )
        write_manifest(self.url, manifest)
        return manifest

    def _run(
        self, function: Callable[[Any], Any], pieces: Sequence[Any], what: str
    ) -> Iterator[tuple[int, Any]]:
        """Run pieces with the work settings, under a progress bar."""
        results = run_pieces(
            function, pieces, launcher=self.work.launcher, workers=self.work.workers
        )
        show = self.work.show_progress
        yield from tqdm(results, desc=what, total=len(pieces), unit=" pieces", disable=not show)

    def _run_writing(
        self, function: Callable[[Any], Any], pieces: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        return self._run(function, pieces, "writing")


class _Conversion(NamedTuple):
    """One job of stage 1."""

    source: Source
    staging: Staging
    name: str
    job: Job
    files: list[tuple[str, int]]
    """Name and size: what a finished job must have been made from."""


def _convert(piece: _Conversion) -> StagedJob:
    """Read and stage the files of one job, unless its record says that it is done."""
    done = piece.staging.read_job(piece.name, piece.files)
    # A bad file may have been repaired meanwhile.
    if done is not None and all(file.by_design for file in done.bad):
        return done
    return piece.staging.write_job(piece.name, piece.files, piece.source.convert(piece.job))


def _bad_files_message(bad: Sequence[BadFile], total: int) -> str:
    shown = "; ".join(f"{file.file}: {file.reason}" for file in bad[:5])
    more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
    return (
        f"{len(bad)} of {total} files, so far, cannot be converted: {shown}{more}. Repair or "
        "remove them and run the same command again (what is done stays done), or leave them out "
        "with --on-bad-file skip."
    )


def _json(record: object) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _hash(record: object) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
