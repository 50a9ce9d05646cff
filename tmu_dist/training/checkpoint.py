"""Checkpoints: everything that a run needs to continue as if it had never stopped.

A checkpoint is a model folder (`tmu_dist.teachers.store`) with the training state beside it. It is
written under another name and renamed when it is whole. The weights that the run offers lie in
`models/`, and `selected.json` points to them.

    RUN/checkpoints/step-00000400/   weights.safetensors  card.json
                                     state.pt  training.json  config.json
    RUN/models/step-00000200/        weights.safetensors  card.json
    RUN/selected.json
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tmu_dist.config import RunConfig, from_dict, resume_conflicts, to_json
from tmu_dist.files import atomic_directory
from tmu_dist.models.rollout import Predictor
from tmu_dist.run_folder import CONFIG_FILE
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import load_state, load_weights, select_model, write_model

STATE_FILE = "state.pt"
FACTS_FILE = "training.json"


class ResumeError(ValueError):
    """A checkpoint does not belong to what the command asks for."""


def lock_run(run: Path, *, patience_seconds: float = 10.0) -> IO[str]:
    """Make this process the only one that trains in a run folder, until the file is closed.

    A process that was just killed, or is about to end, gets a moment to let go.

    Raises:
        ResumeError: another process is training there.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / ".lock").open("w")
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                raise ResumeError(
                    f"Another process is training in {run}: wait for it, or use another `output` "
                    "folder."
                ) from None
            time.sleep(0.2)


@dataclass(kw_only=True)
class Progress:
    """How far a run is; changes with every step and is saved in every checkpoint."""

    step: int = 0
    consumed: int = 0
    """Position in the data: sequences consumed by all ranks since the run began."""
    seconds: float = 0.0
    """Time spent training, over all starts; without validation and checkpoints."""
    offered_step: int | None = None
    """Step of the weights that the run offers; None before the first validation."""
    best_step: int | None = None
    best_mse_per_frame: float | None = None


def rng_state() -> dict[str, Any]:
    """This rank's random generators, as plain bytes and numbers."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, words, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": [state.numpy().tobytes() for state in cuda],
        "numpy": [kind, np.asarray(keys).tobytes(), *rest],
        "python": [version, list(words), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue the random generators where `rng_state` left them."""

    def tensor(content: bytes) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([tensor(content) for content in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


@dataclass(frozen=True)
class SavedState:
    """A checkpoint as read back."""

    progress: Progress
    data: dict[str, Any]
    """What the data position depends on (`SequenceLoader.state`)."""
    optimizer: dict[str, Any]
    rng_by_rank: list[dict[str, Any]]


class CheckpointStore:
    """The checkpoints and offered models of one run folder.

    Args:
        run: the run folder, on a disk that every rank sees.
        teacher_hashes: sha256 of the weights of every teacher, in order.
        keep: newest checkpoints to keep.
    """

    def __init__(
        self, run: Path, config: RunConfig, teacher_hashes: Sequence[str], *, keep: int
    ) -> None:
        self.run = run
        self.config = config
        self.teacher_hashes = list(teacher_hashes)
        self.keep = keep

    def newest(self) -> Path | None:
        """The newest whole checkpoint; half-written ones have other names and are passed over."""
        found = self._all()
        return found[-1] if found else None

    def save(
        self,
        model: Predictor,
        card: TeacherCard,
        optimizer: torch.optim.Optimizer,
        *,
        progress: Progress,
        data: dict[str, Any],
        rng_by_rank: list[dict[str, Any]],
    ) -> None:
        """Write one checkpoint, and remove the oldest beyond `keep` and offers nobody needs.

        Args:
            model: the student.
            card: describes it.
            optimizer: its state is saved.
            progress: how far the run is.
            data: what the data position depends on (`SequenceLoader.state`).
            rng_by_rank: every rank's `rng_state`.

        Raises:
            WriteError: the disk is full; older checkpoints are untouched.
        """
        # Through memory: torch's own file writer does not report a full disk as an OSError.
        buffer = io.BytesIO()
        state = {"optimizer": optimizer.state_dict(), "rng_by_rank": rng_by_rank}
        torch.save(state, buffer)
        facts = {
            "progress": asdict(progress),
            "data": data,
            "teachers": self.teacher_hashes,
            "state_sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
        }
        with atomic_directory(self._folder("checkpoints", progress.step)) as staging:
            write_model(staging, model, card)
            (staging / STATE_FILE).write_bytes(buffer.getbuffer())
            (staging / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
            (staging / CONFIG_FILE).write_text(to_json(self.config))
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)
        self._prune_offers(progress)

    def restore(self, folder: Path, model: Predictor) -> SavedState:
        """Load a checkpoint into the model, after checking that it belongs to this run.

        Raises:
            ResumeError: other settings or teachers than the checkpoint's, or a damaged one.
            TeacherError: its weights are damaged.
        """
        facts = self._read(folder, FACTS_FILE)
        conflicts = resume_conflicts(from_dict(self._read(folder, CONFIG_FILE)), self.config)
        if facts["teachers"] != self.teacher_hashes:
            conflicts.append(
                f"teachers: the checkpoint has {facts['teachers']}, now {self.teacher_hashes}"
            )
        if conflicts:
            raise ResumeError(
                f"{self.run} holds a run with other settings, so it cannot be continued by this "
                f"command: {'; '.join(conflicts)}. Use those settings, or another `output` folder."
            )
        progress = Progress(**facts["progress"])
        if progress.step > self.config.training.num_steps:
            raise ResumeError(
                f"{self.run} has been trained for {progress.step} steps, more than the "
                f"training.num_steps={self.config.training.num_steps} asked for: use another "
                "`output` folder."
            )
        content = (folder / STATE_FILE).read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["state_sha256"]:
            raise _damaged(folder, STATE_FILE)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _, weights = load_weights(str(folder))
        load_state(model, weights, where=str(folder))
        return SavedState(progress, facts["data"], state["optimizer"], state["rng_by_rank"])

    def offer(self, model: Predictor, card: TeacherCard) -> None:
        """Make these weights the ones that the run offers to evaluation and as a teacher."""
        folder = self._folder("models", card.step)
        with atomic_directory(folder) as staging:
            write_model(staging, model, card)
        select_model(self.run, folder)

    def offer_again(self, step: int) -> None:
        """Point back to an earlier offered model, as a resumed run's checkpoint knows it."""
        select_model(self.run, self._folder("models", step))

    def _prune_offers(self, progress: Progress) -> None:
        """Remove offered models that neither the run nor a kept checkpoint refers to."""
        needed = {progress.offered_step}
        for checkpoint in self._all():
            needed.add(self._read(checkpoint, FACTS_FILE)["progress"]["offered_step"])
        kept = {self._folder("models", step) for step in needed if step is not None}
        for folder in (self.run / "models").glob("step-*"):
            if folder not in kept:
                shutil.rmtree(folder)

    def _all(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("step-*"))

    def _folder(self, kind: str, step: int) -> Path:
        return self.run / kind / f"step-{step:08d}"

    def _read(self, folder: Path, file: str) -> Any:
        try:
            return json.loads((folder / file).read_text())
        except (OSError, ValueError):
            raise _damaged(folder, file) from None


def _damaged(folder: Path, file: str) -> ResumeError:
    return ResumeError(
        f"{folder / file} is damaged or missing. Remove {folder} to continue from the checkpoint "
        "before it."
    )
