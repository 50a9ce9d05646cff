"""Checkpoints: everything that a run needs to continue as if it had never stopped.

A checkpoint is a model folder (`tmu_dist.teachers.store`) with the training state beside it. It is
written under another name and renamed when it is whole. The weights that the run offers lie in
`models/`, and `selected.json` points to them.

    RUN/checkpoints/step-00000400/   weights.safetensors  card.json  state.pt  config.json
    RUN/models/step-00000200/        weights.safetensors  card.json
    RUN/selected.json
"""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmu_dist.config import RunConfig, from_dict, resume_conflicts, to_json
from tmu_dist.files import atomic_directory
from tmu_dist.models.rollout import Predictor
from tmu_dist.run_folder import CONFIG_FILE
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import load_state, load_weights, select_model, write_model

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"


class ResumeError(ValueError):
    """A checkpoint does not belong to what the command asks for."""


@dataclass(kw_only=True)
class Progress:
    """How far a run is; changes with every step and is saved in every checkpoint."""

    step: int = 0
    consumed: int = 0
    """Position in the data: sequences consumed by all ranks since the run began."""
    seconds: float = 0.0
    """Time spent training, over all starts; without validation and checkpoints."""
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

    folder: Path
    progress: Progress
    optimizer: dict[str, Any]
    rng_by_rank: list[dict[str, Any]]


class CheckpointStore:
    """The checkpoints and offered models of one run folder.

    Args:
        run: the run folder, on a disk that every rank sees.
        identity: hashes that a checkpoint depends on beside the config: data and teachers.
        keep: newest checkpoints to keep.
    """

    def __init__(
        self, run: Path, config: RunConfig, identity: dict[str, Any], *, keep: int
    ) -> None:
        self.run = run
        self.config = config
        self.identity = identity
        self.keep = keep

    def newest(self) -> Path | None:
        """The newest whole checkpoint; half-written ones have other names and are passed over."""
        found = sorted((self.run / "checkpoints").glob("step-*"))
        return found[-1] if found else None

    def save(
        self,
        model: Predictor,
        card: TeacherCard,
        progress: Progress,
        optimizer: torch.optim.Optimizer,
        rng_by_rank: list[dict[str, Any]],
    ) -> Path:
        """Write one checkpoint and remove the oldest beyond `keep`.

        Raises:
            WriteError: the disk is full; older checkpoints are untouched.
        """
        folder = self.run / "checkpoints" / f"step-{progress.step:08d}"
        with atomic_directory(folder) as staging:
            write_model(staging, model, card)
            (staging / CONFIG_FILE).write_text(to_json(self.config))
            state = {
                "progress": asdict(progress),
                "optimizer": optimizer.state_dict(),
                "rng_by_rank": rng_by_rank,
                "identity": self.identity,
            }
            # Through memory: torch's own file writer does not report a full disk as an OSError.
            buffer = io.BytesIO()
            torch.save(state, buffer)
            (staging / STATE_FILE).write_bytes(buffer.getbuffer())
        for old in sorted((self.run / "checkpoints").glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)
        return folder

    def restore(self, folder: Path, model: Predictor) -> SavedState:
        """Load a checkpoint into the model, after checking that it belongs to this run.

        Raises:
            ResumeError: other settings, data or teachers than the checkpoint's, or a damaged one.
            TeacherError: its weights are damaged.
        """
        saved_config = from_dict(json.loads((folder / CONFIG_FILE).read_text()))
        try:
            state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError) as error:
            raise ResumeError(
                f"{folder / STATE_FILE} is damaged ({error}). Remove {folder} to continue from "
                "the checkpoint before it."
            ) from None
        conflicts = resume_conflicts(saved_config, self.config)
        conflicts += [
            f"{name}: the checkpoint has {state['identity'].get(name)!r}, now {value!r}"
            for name, value in self.identity.items()
            if state["identity"].get(name) != value
        ]
        if conflicts:
            raise ResumeError(
                f"{self.run} holds a run with other settings, so it cannot be continued by this "
                f"command: {'; '.join(conflicts)}. Use those settings, or another `output` folder."
            )
        _, weights = load_weights(str(folder))
        load_state(model, weights, where=str(folder))
        return SavedState(
            folder, Progress(**state["progress"]), state["optimizer"], state["rng_by_rank"]
        )

    def offer(self, model: Predictor, card: TeacherCard) -> None:
        """Make these weights the ones that the run offers to evaluation and as a teacher."""
        folder = self._offered(card.step)
        with atomic_directory(folder) as staging:
            write_model(staging, model, card)
        select_model(self.run, folder)

    def offer_again(self, step: int) -> None:
        """Point back to an earlier offered model, as a resumed run's checkpoint knows it."""
        select_model(self.run, self._offered(step))

    def prune_offers(self, current: int | None) -> None:
        """Remove offered models that neither the run nor a kept checkpoint refers to."""
        needed = {current}
        for checkpoint in (self.run / "checkpoints").glob("step-*"):
            state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
            needed.add(state["progress"]["best_step"])
        kept = {self._offered(step) for step in needed if step is not None}
        for folder in (self.run / "models").glob("step-*"):
            if folder not in kept:
                shutil.rmtree(folder)

    def _offered(self, step: int) -> Path:
        return self.run / "models" / f"step-{step:08d}"
