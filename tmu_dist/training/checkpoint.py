"""Checkpoints: everything that a run needs to continue as if it had never stopped.

A checkpoint is a model folder (`tmu_dist.teachers.store`) with the training state beside it. It is
whole or cannot be seen (`tmu_dist.folders`): training.json, which is written last, is its mark. The
weights that the run offers lie in `models/`, and `selected.json` points to them.

    RUN/checkpoints/step-00000400/   weights.safetensors  card.json
                                     state.pt  config.json  training.json
    RUN/models/step-00000200/        weights.safetensors  card.json
    RUN/selected.json
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmu_dist.config import RunConfig, from_dict, resume_conflicts, to_json
from tmu_dist.data.storage import MissingObjectError, StorageError, join_url, read_bytes
from tmu_dist.folders import keep_folders, list_folders, sweep_unfinished, write_folder
from tmu_dist.models.rollout import Predictor
from tmu_dist.run_folder import CONFIG_FILE, ResumeError
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import (
    CARD_FILE,
    WEIGHTS_FILE,
    load_state,
    load_weights,
    model_files,
    select_model,
)

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
FACTS_FILE = "training.json"
"""The mark of a checkpoint: written last, with the hashes of the state and of the weights."""
_CHECKPOINTS, _MODELS = "checkpoints", "models"


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


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run after one step, as a checkpoint keeps it; its tensors are on the CPU and change no more
    while it is written."""

    weights: Mapping[str, Tensor]
    """The student's state dict."""
    card: TeacherCard
    training_step: dict[str, Any]
    """State of the training step (`TrainingStep.state_dict`)."""
    progress: Progress
    data: dict[str, Any]
    """What the data position depends on (`SequenceLoader.state`)."""
    rng_by_rank: list[dict[str, Any]]
    """Every rank's `rng_state`."""


@dataclass(frozen=True)
class SavedState:
    """A checkpoint as read back."""

    progress: Progress
    data: dict[str, Any]
    """What the data position depends on (`SequenceLoader.state`)."""
    training_step: dict[str, Any]
    """State of the training step: optimisers, and what training has beside the student."""
    rng_by_rank: list[dict[str, Any]]


class CheckpointStore:
    """The checkpoints and offered models of one run folder.

    Args:
        run: the run folder, on a disk that every rank sees or in a store.
        teacher_hashes: sha256 of the weights of every teacher, in order.
        keep: newest checkpoints to keep.
    """

    def __init__(
        self, run: str, config: RunConfig, teacher_hashes: Sequence[str], *, keep: int
    ) -> None:
        self.run = run
        self.config = config
        self.teacher_hashes = list(teacher_hashes)
        self.keep = keep

    def newest(self) -> str | None:
        """Address of the newest whole checkpoint, if there is one.

        First sweeps away what killed processes left half written; this one alone may write now.
        """
        self._sweep()
        found = self._all()
        return join_url(self.run, found[-1]) if found else None

    def save(self, snapshot: Snapshot, before_change: Callable[[], None] = lambda: None) -> None:
        """Write one checkpoint, and remove the oldest beyond `keep` and offers nobody needs.

        Args:
            snapshot: of the run.
            before_change: as in `write_folder`.

        Raises:
            WriteError: the disk is full; older checkpoints are untouched.
            StorageError: the store is out of reach; older checkpoints are untouched.
            Whatever `before_change` raises.
        """
        self._sweep()  # or a full disk stays full of what could not be written
        # Through memory: torch's own file writer does not report a full disk as an OSError.
        buffer = io.BytesIO()
        state = {"training_step": snapshot.training_step, "rng_by_rank": snapshot.rng_by_rank}
        torch.save(state, buffer)
        network = model_files(snapshot.weights, snapshot.card)
        facts = {
            "progress": asdict(snapshot.progress),
            "data": snapshot.data,
            "teachers": self.teacher_hashes,
            "state_sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
            "weights_sha256": json.loads(network[CARD_FILE])["weights_sha256"],
        }
        files: dict[str, bytes | memoryview] = {
            **network,
            STATE_FILE: buffer.getbuffer(),
            CONFIG_FILE: to_json(self.config).encode(),
            FACTS_FILE: (json.dumps(facts, indent=2) + "\n").encode(),
        }
        folder = checkpoint_of(self.run, snapshot.progress.step)
        write_folder(folder, files, before_change)
        self._prune(snapshot.progress)

    def restore(self, folder: str, model: Predictor) -> SavedState:
        """Load a checkpoint into the model, after checking that it belongs to this run.

        Raises:
            ResumeError: other settings or teachers than the checkpoint's, or a damaged one.
            TeacherError: its weights are damaged.
            StorageError: the store cannot be reached.
        """
        facts = _read_json(folder, FACTS_FILE)
        conflicts = resume_conflicts(from_dict(_read_json(folder, CONFIG_FILE)), self.config)
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
        content = _read(folder, STATE_FILE)
        if hashlib.sha256(content).hexdigest() != facts["state_sha256"]:
            raise _damaged(folder, STATE_FILE)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        saved_card, weights = load_weights(folder)
        if facts.get("weights_sha256", saved_card.weights_sha256) != saved_card.weights_sha256:
            raise _damaged(folder, WEIGHTS_FILE)  # whole, but of another checkpoint
        load_state(model, weights, where=folder)
        return SavedState(progress, facts["data"], state["training_step"], state["rng_by_rank"])

    def offer(
        self,
        weights: Mapping[str, Tensor],
        card: TeacherCard,
        before_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Make these weights the ones that the run offers to evaluation and as a teacher.

        Args:
            weights: the student's state dict, on the CPU.
            card: describes it.
            before_change: as in `write_folder`.

        Raises:
            WriteError, StorageError: they could not be written; what was offered still is.
            Whatever `before_change` raises.
        """
        path = _step_folder(_MODELS, card.step)
        write_folder(join_url(self.run, path), model_files(weights, card), before_change)
        before_change()
        select_model(self.run, path)

    def offer_again(self, step: int) -> None:
        """Point back to an earlier offered model, as a resumed run's checkpoint knows it."""
        select_model(self.run, _step_folder(_MODELS, step))

    def _prune(self, progress: Progress) -> None:
        """Remove old checkpoints, and offered models that neither they nor the run refer to."""
        try:
            kept = self._all()[-self.keep :]
            keep_folders(self.run, _CHECKPOINTS, FACTS_FILE, kept)
            needed = {progress.offered_step}
            for path in kept:
                facts = _read_json(join_url(self.run, path), FACTS_FILE)
                needed.add(facts["progress"]["offered_step"])
            models = [_step_folder(_MODELS, step) for step in needed if step is not None]
            keep_folders(self.run, _MODELS, CARD_FILE, models)
        except StorageError as error:  # the checkpoint is whole, and the next one sweeps again
            log.warning("Old checkpoints and models stay for now: %s", error)

    def _sweep(self) -> None:
        for kind in (_CHECKPOINTS, _MODELS):
            sweep_unfinished(self.run, kind)

    def _all(self) -> list[str]:
        return list_folders(self.run, _CHECKPOINTS, FACTS_FILE)


def checkpoint_of(run: str, step: int) -> str:
    """Address of the checkpoint that a run has of a step, if it keeps one."""
    return join_url(run, _step_folder(_CHECKPOINTS, step))


def _step_folder(kind: str, step: int) -> str:
    return f"{kind}/step-{step:08d}"


def _read(folder: str, file: str) -> bytes:
    try:
        return read_bytes(folder, file)
    except MissingObjectError:
        raise _damaged(folder, file) from None


def _read_json(folder: str, file: str) -> Any:
    try:
        return json.loads(_read(folder, file))
    except ResumeError:
        raise
    except ValueError:
        raise _damaged(folder, file) from None


def _damaged(folder: str, file: str) -> ResumeError:
    return ResumeError(
        f"{join_url(folder, file)} is damaged or missing. Remove {folder} to continue from the "
        "checkpoint before it."
    )
