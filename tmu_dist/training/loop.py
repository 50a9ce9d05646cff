"""THE training loop. It knows steps, schedules and checkpoints; it does not know Ray, and it never
asks which transfer method it is training.

A run is a pure function of its config, data and teachers: initial weights come from the seed, the
data position is one number, sampling masks are drawn per (seed, step, sequence). So a run that is
killed and continued ends with the same weights, bit for bit, on the same kind of device.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain, islice, pairwise

import torch

from tmu_dist.collectives import Collectives
from tmu_dist.config import RunConfig, to_json
from tmu_dist.data.loader import Batch, open_archives
from tmu_dist.data.transforms import check_long_enough, window_frames
from tmu_dist.evaluation.metrics import ERROR_METRIC_NAMES
from tmu_dist.evaluation.runner import score_predictor
from tmu_dist.folders import write_text
from tmu_dist.models.arrange import arrange
from tmu_dist.models.build import count_trained
from tmu_dist.provenance import command_line
from tmu_dist.run_folder import CONFIG_FILE, RESULT_FILE, Event, RunResult
from tmu_dist.teachers.card import DataFacts, frame_shape
from tmu_dist.training.build import build_step
from tmu_dist.training.checkpoint import CheckpointStore, Progress, rng_state, set_rng_state
from tmu_dist.training.checkpoint_writer import CheckpointWriter
from tmu_dist.training.memory import TrainingMemory, memory_at_most, training_memory
from tmu_dist.training.memory_room import MemoryMeter, check_fits, room_of
from tmu_dist.training.parts import check_same_teachers, open_loaders, untrained_card
from tmu_dist.training.run_lock import RunLock, claim_run, lock_run
from tmu_dist.training.run_log import RunLog, write_provenance
from tmu_dist.training.scaling import SMALLEST_SCALE
from tmu_dist.training.schedules import sampling_mask, sampling_probability, sequence_noise
from tmu_dist.training.stopping import Request, Requests, RunStoppedError
from tmu_dist.transfer.base import Liveness, TrainingBatch
from tmu_dist.transfer.prepare import prepare_transfer


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def train(
    config: RunConfig,
    collectives: Collectives,
    device: torch.device,
    *,
    listener: Callable[[Event], None] | None = None,
    notice: Callable[[], str | None] | None = None,
    is_locked: bool = False,
    command: str | None = None,
) -> RunResult:
    """Train until `training.num_steps`, starting from the newest checkpoint of the run folder.

    Every rank calls this with the same config.

    Args:
        config: the run.
        collectives: the ranks.
        device: of this rank.
        listener: sees rank 0's log events.
        notice: as in `Requests`.
        is_locked: the launcher keeps other commands out of the run folder; without, rank 0 does.
        command: that started the run, if it is not this process's own.

    Raises:
        RunStoppedError: the run was asked to stop; it can be continued.
        ConfigError, ManifestError, TeacherError, ResumeError: nothing was trained; says why.
        ValueError: the data do not fit, or nothing of the validation split is observed.
        DeadDistillationError, NonFiniteLossError, WriteError, StorageError: training stopped; the
            newest checkpoint is whole.
    """
    run = Run(config, collectives, device)
    schedule = config.schedule
    try:
        run.start(listener, notice, is_locked=is_locked, command=command)
        for batch, following in run.batches():
            run.advance(batch, following)
            request = run.heard()
            if run.is_due(schedule.validate_every):
                run.validate()
            if run.is_due(schedule.checkpoint_every) or request is not None:
                run.save()
            if request is not None and request.kind == "stop" and not run.is_over:
                run.stop(request)
        if run.progress.best_step is None:  # shortened to a checkpoint before any validation
            run.validate()
            run.save()
        return run.finish()
    finally:
        run.close()


class Run:
    """One run's parts, assembled, and the things that happen to it."""

    def __init__(self, config: RunConfig, collectives: Collectives, device: torch.device) -> None:
        self.config = config
        self.collectives = collectives
        self.device = device
        self.folder = config.output
        self.meter = MemoryMeter(device)
        self._room = room_of(device, len(collectives.ranks.on_node))
        # Whatever goes wrong on one rank alone, such as an unreachable store, ends all of them.
        self.group = collectives.group(config.placement.group)
        check_same_teachers(collectives.on_all(self._prepare_parts))
        self.progress = Progress()
        self._log: RunLog | None = None
        self._lock: RunLock | None = None
        self._requests: Requests | None = None
        self.training_step = build_step(
            config, self.transfer.method, self.student, self.trainee, device, collectives
        )
        self._probe: TrainingBatch | None = None
        self._following: TrainingBatch | None = None
        self._interval = _Interval()

    @property
    def is_over(self) -> bool:
        """Whether the last step is done."""
        return self.progress.step >= self.config.training.num_steps

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this one."""
        return self.is_over or self.progress.step % every == 0

    def _prepare_parts(self) -> list[str]:
        """Open the data, load the teachers, build the student; no collectives.

        Returns:
            sha256 of the weights of every teacher, in order.
        """
        config = self.config
        archives = open_archives(
            [config.data.url, *config.data.mix_with],
            reading=config.data.reading,
            cache_folder=config.data.cache_folder,
            cache_gib=config.data.cache_gib,
        )
        archive = archives[0]
        manifest = archive.manifest
        check_long_enough(manifest.num_frames, config.window)
        if missing := [split for split in ("train", "val") if split not in manifest.splits]:
            raise ValueError(
                f"{config.data.url} has no {' and no '.join(missing)} split, and training needs "
                "both: it learns from train and selects weights on val. Prepare the archive with "
                "both (of radar, --val or --split-by say how)."
            )
        self.units = manifest.units
        self.loader, self.validation_loader = open_loaders(
            archives,
            config.data,
            config.training,
            self.collectives.ranks,
            pin_memory=self.device.type == "cuda",
        )
        data = DataFacts.of(manifest)
        frame = frame_shape(manifest)
        self.transfer = prepare_transfer(config, frame, data, self.device, self.group)
        torch.manual_seed(config.training.seed)
        student, self.start_report = self.transfer.build_student()
        arrange(student, config.compute)
        self.student = student.to(self.device)
        trainee = self.transfer.method.trainee(self.student)
        self.trainee = trainee.to(self.device)
        beside = count_trained(self.trainee) - count_trained(self.student)
        self.card = untrained_card(config, frame, data, self.transfer, beside)
        self._check_memory()
        teacher_hashes = [card.weights_sha256 for card in self.transfer.teachers]
        self.checkpoints = CheckpointStore(
            self.folder,
            config,
            teacher_hashes,
            keep=config.schedule.keep_checkpoints,
        )
        self.writer = CheckpointWriter(
            self.checkpoints,
            self._before_checkpoint,
            max_failed=config.faults.max_failed_checkpoints,
        )
        return teacher_hashes

    @cached_property
    def memory(self) -> TrainingMemory:
        """What this rank will take, as it is predicted; no collectives."""
        ranks = self.collectives.ranks
        with self.meter.paused():
            return training_memory(
                self.config,
                self.card.frame,
                self.transfer.teachers,
                device=self.device,
                world_size=ranks.world_size,
                group=self.group,
                has_missing=self.units.missing_code is not None,
            )

    @property
    def _is_memory_known(self) -> bool:
        """Whether the prediction was needed; it takes seconds."""
        return "memory" in vars(self)

    def _check_memory(self) -> None:
        """Look whether this rank has the memory that it will take, where that is in question.

        Raises:
            ConfigError: there is clearly not as much.
        """
        world_size = self.collectives.ranks.world_size
        teachers = len(self.transfer.teachers)
        at_most = memory_at_most(self.config, self.card.frame, teachers, world_size)
        if self._room is not None and at_most > self._room.free_bytes:
            check_fits(self.memory, self._room, self.config, world_size)

    def batches(self) -> Iterator[tuple[Batch, Batch | None]]:
        """The batches that are left, each with the one after it."""
        steps = self.config.training.num_steps - self.progress.step
        left = islice(self.loader.stream(start=self.progress.consumed), max(steps, 0))
        for batch, following in pairwise(chain(left, [None])):
            assert batch is not None
            yield batch, following

    def advance(self, batch: Batch, following: Batch | None = None) -> None:
        """One iteration on one batch.

        Args:
            batch: of this iteration.
            following: of the next one, if there is one: teachers may begin with it now.
        """
        started = time.perf_counter()
        waited = started - self._interval.ready
        step = self.progress.step + 1
        training_batch = self._following or self.prepare(batch, step)
        self._following = None if following is None else self.prepare(following, step + 1)
        if self._probe is None:
            self._probe = training_batch
            self._check_liveness(is_first=step == 1)
            started = time.perf_counter()
        terms = self.training_step(training_batch, self._following)
        self._probe = training_batch
        self.progress.step = step
        schedule = self.config.schedule
        due = (schedule.log_every, schedule.validate_every, schedule.checkpoint_every)
        if is_due := any(map(self.is_due, due)):
            terms.read()  # a card is behind: its work counts as training, too

        now = time.perf_counter()
        self.progress.consumed = batch.consumed
        self.progress.seconds += waited + now - started
        self._interval.add(batch.global_count, waited, waited + now - started)
        if is_due:
            self._log_training(terms.read(), show=step % schedule.log_every == 0)
        self._interval.ready = time.perf_counter()

    def validate(self) -> None:
        """Score closed-loop on the validation split, check that distillation is alive, select."""
        self._check_liveness()
        scores = score_predictor(
            self.student,
            self.validation_loader.one_pass(),
            window=self.config.window,
            units=self.units,
            device=self.device,
            collectives=self.collectives,
            metrics=ERROR_METRIC_NAMES,
            max_samples=self.config.data.max_validation_samples,
        )
        overall = scores.model.overall()
        progress, mse = self.progress, overall["mse_per_frame"]
        if math.isnan(mse):
            raise ValueError(
                f"No pixel of the target frames is observed in the validation split of "
                f"{self.config.data.url}, so no weights can be selected: validate on more of it "
                "(data.max_validation_samples), or prepare it with more observed sequences."
            )
        self._write(
            "validation",
            **overall,
            persistence_mse_per_frame=scores.persistence.overall()["mse_per_frame"],
            seconds=progress.seconds,
        )
        self.card = replace(self.card, step=self.progress.step, scores=overall)
        improved = progress.best_mse_per_frame is None or mse < progress.best_mse_per_frame
        if improved:
            progress.best_step, progress.best_mse_per_frame = progress.step, mse
        if improved or self.config.training.select == "final":
            progress.offered_step = progress.step
            self.collectives.on_main(lambda: self.writer.offer(self.student, self.card))
        self._interval.ready = time.perf_counter()

    def save(self) -> None:
        """Take a snapshot, which is written beside the following steps.

        Raises:
            WriteError, StorageError: too many in a row could not be written; older ones are whole.
            ResumeError: another process has taken over the run; nothing is written.
            NonFiniteLossError: the last update ruined the weights; nothing is written.
        """
        rng_by_rank = self.collectives.all_gather_objects(rng_state())

        def write() -> None:
            if not self._is_whole():
                raise self._ruined("The weights are")
            self.writer.save(
                self.student,
                replace(self.card, step=self.progress.step),
                self.training_step.state_dict(),
                progress=self.progress,
                data=self.loader.state(),
                rng_by_rank=rng_by_rank,
            )
            self._log_failures()

        self.collectives.on_main(write)
        self._interval.ready = time.perf_counter()

    def heard(self) -> Request | None:
        """What the run is asked for from outside."""
        assert self._requests is not None
        return self._requests.heard()

    def stop(self, request: Request) -> None:
        """End before the last step, when the checkpoint is written.

        Raises:
            RunStoppedError: always.
        """
        self._write("stop", reason=request.reason)
        self.collectives.on_main(self.writer.finish)
        raise RunStoppedError(
            f"{self.folder} was stopped after step {self.progress.step} of "
            f"{self.config.training.num_steps} ({request.reason}). Its checkpoint is whole: the "
            "same command continues from it."
        )

    def finish(self) -> RunResult:
        """Write result.json beside the run."""
        progress = self.progress
        assert progress.best_step is not None and progress.best_mse_per_frame is not None
        result = RunResult(
            run=self.folder,
            steps=progress.step,
            seconds=progress.seconds,
            seconds_per_batch=progress.seconds / progress.step,
            best_step=progress.best_step,
            best_mse_per_frame=progress.best_mse_per_frame,
            predicted_peak_bytes=self.memory.peak_bytes if self._is_memory_known else None,
            measured_peak_bytes=self.meter.peak_bytes(),
        )
        text = json.dumps(asdict(result), indent=2) + "\n"

        def write() -> None:
            assert self._log is not None and self._lock is not None
            self.writer.finish()
            self._log_failures()
            self._log.flush()
            self._lock.check()
            write_text(self.folder, RESULT_FILE, text)

        self.collectives.on_main(write)
        return result

    def start(
        self,
        listener: Callable[[Event], None] | None = None,
        notice: Callable[[], str | None] | None = None,
        *,
        is_locked: bool = False,
        command: str | None = None,
    ) -> None:
        """Keep others out of the run folder, restore its newest checkpoint, and open the log."""

        def take_folder() -> str | None:
            self._lock = (claim_run if is_locked else lock_run)(self.folder)
            return self.checkpoints.newest()

        def open_log() -> None:
            assert self._lock is not None
            self._log = RunLog(
                self.folder,
                resume_step=self.progress.step,
                listener=listener,
                before_put=self._lock.check,
            )
            write_text(self.folder, CONFIG_FILE, to_json(self.config))
            write_provenance(
                self.folder,
                command or command_line(),
                from_step=self.progress.step,
                world_size=self.collectives.ranks.world_size,
                device=str(self.device),
                threads=torch.get_num_threads(),
                manifest_hash=self.card.data.manifest_hash,
                teachers={card.name: card.weights_sha256 for card in self.transfer.teachers},
            )

        newest = self.collectives.on_main(take_folder)
        if newest is not None:
            self.collectives.on_all(lambda: self._restore(newest))
        self.collectives.on_main(open_log)
        self._requests = Requests(self.folder, self.collectives, notice)
        if self.progress.step:
            self._write("resume", world_size=self.collectives.ranks.world_size)
        elif self.start_report is not None:
            self._write("start", **asdict(self.start_report))
        if (placement := self.transfer.placement) is not None:
            self._write("placement", **asdict(placement), group=list(self.group.ranks))
        if self._is_memory_known:
            room = {} if self._room is None else asdict(self._room)
            parts = self.memory.parts
            self._write("memory", peak_bytes=self.memory.peak_bytes, parts=parts, **room)
        self._interval.ready = time.perf_counter()

    def close(self) -> None:
        """Flush the log and let others continue the run."""
        with ExitStack() as parts:  # all of them, whatever goes wrong with one
            # The last first: what is being written still needs the log, and the lock.
            for part in (self._requests, self._lock, self._log, self.writer):
                if part is not None:
                    parts.callback(part.close)

    def _restore(self, checkpoint: str) -> None:
        """Continue from a checkpoint; no collectives."""
        saved = self.checkpoints.restore(checkpoint, self.student)
        self.loader.check_state(saved.data)
        self.training_step.load_state_dict(saved.training_step)
        self.progress = saved.progress
        rank = self.collectives.ranks.rank
        if rank < len(saved.rng_by_rank):
            set_rng_state(saved.rng_by_rank[rank])
        if self.collectives.ranks.is_main and saved.progress.offered_step is not None:
            # The run may have offered something newer before it was killed.
            self.checkpoints.offer_again(saved.progress.offered_step)

    def _before_checkpoint(self) -> None:
        assert self._lock is not None and self._log is not None
        self._lock.check()
        self._log.flush()  # a run that continues from there needs the log up to there

    def _log_failures(self) -> None:
        assert self._log is not None
        for failure in self.writer.failures():
            self._log.write("checkpoint_failed", self.progress.step, reason=failure)

    def prepare(self, batch: Batch, step: int) -> TrainingBatch:
        """Frames to the device and to [0, 1], masks, and weights that average globally."""
        window = self.config.window
        codes_BTCHW = batch.frames_BTCHW.to(self.device, non_blocking=True)
        frames_BTCHW, observed_BTCHW = window_frames(codes_BTCHW, window, self.units)
        mask = sampling_mask(
            sampling_probability(step, self.config.training),
            batch.sample_ids_B,
            window.num_target_frames - 1,
            seed=self.config.training.seed,
            step=step,
        )
        noise = sequence_noise(
            batch.sample_ids_B,
            window.num_frames - 1,
            self.student.latent_size,  # targets are known in training
            seed=self.config.training.seed,
            step=step,
        )
        # Data-parallel training averages gradients over ranks, hence the world size.
        scale = self.collectives.ranks.world_size / batch.global_count
        return TrainingBatch(
            frames_BTCHW=frames_BTCHW,
            observed_BTCHW=observed_BTCHW,
            sampling_mask_BT=mask.to(self.device, non_blocking=True),
            weights_B=(batch.weights_B * scale).to(self.device, non_blocking=True),
            noise_BTZ=None if noise is None else noise.to(self.device, non_blocking=True),
            step=step,
            sample_ids_B=batch.sample_ids_B,
        )

    def _check_liveness(self, *, is_first: bool = False) -> None:
        """Look whether knowledge flows; before the first update, the student begins on it, too."""
        if self._probe is None:
            return
        # Teachers may lie on other ranks, so all ranks look at the same sequences.
        probe = self.collectives.broadcast_object(self._probe.on("cpu")).on(self.device)
        rows = probe.rows(slice(self.config.scale.sequences_at_once))

        def look() -> Liveness | None:
            if is_first:
                self.training_step.begin(rows)
            return self.training_step.look(rows)

        report = self.collectives.together(look)
        if report is not None:
            self._write("liveness", **asdict(report))

    def _log_training(self, terms: dict[str, float], *, show: bool) -> None:
        """Average the terms over ranks, stop on nonsense, and log.

        In float16 an update is skipped where numbers overflow, which harms no weight.
        """
        by_rank = self.collectives.all_gather_objects(terms)
        means = {name: sum(r[name] for r in by_rank) / len(by_rank) for name in terms}
        facts = self.training_step.facts()
        if facts.get("loss_scale", 1.0) < SMALLEST_SCALE:
            raise self._ruined("Gradients in float16 are, however small the loss is made,")
        if not all(math.isfinite(value) for value in means.values()):
            if not (facts and self._is_whole()):
                raise self._ruined(f"The loss is ({means})")
            self._write("overflow", **facts)
            return
        if show:
            probability = sampling_probability(self.progress.step, self.config.training)
            speed = self._interval.speed()
            self._write("train", **means, sampling_probability=probability, **speed, **facts)
            self._interval.reset()

    def _is_whole(self) -> bool:
        """Whether all weights are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.student.parameters())

    def _ruined(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{what} not finite at step {self.progress.step}. The newest checkpoint in "
            f"{self.folder}/checkpoints is from before. Start again in another `output` folder "
            "with training.grad_clip_norm=1.0, a smaller training.learning_rate, "
            "transfer.tmu.combine=mean (with many teachers the memory of Eq. 5 can grow; "
            "training.precision=fp16 ends at 65,504, bf16 does not), or, with model.cell=predrnn "
            "or mim on frames that can be empty, model.bias=true."
        )

    def _write(self, event: str, **values: object) -> None:
        """Log on rank 0; a full disk there ends all ranks."""

        def write() -> None:
            assert self._log is not None
            self._log.write(event, self.progress.step, **values)

        self.collectives.on_main(write)


class _Interval:
    """Sequences and seconds since the last log line."""

    def __init__(self) -> None:
        self.ready = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.samples, self.waited, self.seconds = 0, 0.0, 0.0

    def add(self, samples: int, waited: float, seconds: float) -> None:
        self.samples += samples
        self.waited += waited
        self.seconds += seconds

    def speed(self) -> dict[str, float]:
        return {
            "samples_per_second": self.samples / self.seconds,
            "data_wait_fraction": self.waited / self.seconds,
        }
