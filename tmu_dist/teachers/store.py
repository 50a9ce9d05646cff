"""Model folders: save, load, find. A folder holds weights.safetensors and card.json.

A checkpoint is such a folder with the training state beside it, and a run points to the one it
selected, so "a teacher" may be named by a teacher folder, a checkpoint or a run, each on a disk or
in a store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from tmu_dist.data.cache import AlteredObjectError, CacheLimitError, NodeCache
from tmu_dist.data.storage import (
    MissingObjectError,
    exists,
    join_url,
    local_path,
    object_size,
    read_bytes,
)
from tmu_dist.files import WriteError
from tmu_dist.folders import write_folder, write_text
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.run_folder import SELECTED_FILE
from tmu_dist.teachers.adapter import StudentFacts, plan_teacher
from tmu_dist.teachers.bank import FrozenTeacher
from tmu_dist.teachers.card import CARD_FILE, TeacherCard, TeacherError
from tmu_dist.teachers.sourced import SourcedPredictor

log = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode, frozen, with its card."""

    model: Predictor
    card: TeacherCard


def model_files(weights: Mapping[str, Tensor], card: TeacherCard) -> dict[str, bytes]:
    """The files of a model folder, by name; the card, which holds the weights' hash, is last."""
    content = save_safetensors(
        {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    )
    card = replace(card, weights_sha256=hashlib.sha256(content).hexdigest())
    return {WEIGHTS_FILE: content, CARD_FILE: card.to_json().encode()}


def write_model(folder: str | Path, model: Predictor, card: TeacherCard) -> None:
    """Write or replace a model folder, whole or not at all.

    Raises:
        WriteError, StorageError: it could not be written.
    """
    write_folder(str(folder), model_files(model.state_dict(), card))


def select_model(run: str, path: str) -> None:
    """Make a run point to the model folder it offers."""
    write_text(run, SELECTED_FILE, json.dumps({"model": path}, indent=2) + "\n")


def locate(source: str) -> str:
    """Resolve a run folder to the model folder it offers; other names stay as they are.

    Raises:
        TeacherError: there is no such folder, or it holds no model.
        StorageError: the store cannot be reached.
    """
    source = source.rstrip("/")
    # The card first: who may read a store but not list it is told "forbidden" of what is not
    # there, and model folders at least should be found by them.
    if exists(source, CARD_FILE):
        return source
    if exists(source, SELECTED_FILE):
        return join_url(source, json.loads(read_bytes(source, SELECTED_FILE))["model"])
    folder = local_path(source)
    if folder is not None and not folder.exists():
        raise TeacherError(
            f"No model at {source!r}: the folder does not exist. Name a teacher folder, a "
            "checkpoint, a run folder or a URL; `python -m tmu_dist.zoo list` shows the zoo."
        )
    raise TeacherError(
        f"No model at {source!r}: the folder has neither {CARD_FILE} (a teacher or checkpoint) "
        f"nor {SELECTED_FILE} (a run that has validated at least once)."
    )


def load_card(source: str) -> TeacherCard:
    """Read a model's card without its weights."""
    where = locate(source)
    return TeacherCard.from_json(_read(where, CARD_FILE), where=where)


def load_weights(
    source: str, *, cache: NodeCache | None = None
) -> tuple[TeacherCard, dict[str, Tensor]]:
    """Read a model's card and weights, and prove the weights whole.

    Args:
        source: run, checkpoint, teacher folder or URL.
        cache: of this node, whose processes then fetch the weights of a URL once; None: each
            process fetches them.

    Raises:
        TeacherError: a missing file, or weights that are not the ones the card describes.
        StorageError: the store cannot be reached.
    """
    where = locate(source)
    card = TeacherCard.from_json(_read(where, CARD_FILE), where=where)
    content = _copied_weights(where, card, cache) or _checked_weights(where, card)
    try:
        return card, load_safetensors(content)
    except SafetensorError as error:
        raise TeacherError(f"{where}/{WEIGHTS_FILE} cannot be read: {error}") from None


def load_model(
    source: str, *, device: torch.device | str = "cpu", cache: NodeCache | None = None
) -> LoadedModel:
    """Rebuild a trained network from a run, checkpoint, teacher folder or URL.

    Args:
        source: of these.
        device: where the network is to be.
        cache: as in `load_weights`.

    Raises:
        TeacherError: it is missing or damaged, or the weights do not fit the architecture.
    """
    card, weights = load_weights(source, cache=cache)
    with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced below
        model = build_network(card)
    load_state(model, weights, where=source)
    return LoadedModel(model.to(device).eval().requires_grad_(False), card)


def build_network(card: TeacherCard) -> Predictor:
    """The network that a card describes, with fresh weights and its sources inside.

    Raises:
        ConfigError, TeacherError: the card contradicts itself.
    """
    network = build_predictor(card.frame, card.model, tmu=card.tmu, num_slots=card.num_slots)
    if not card.sources:
        return network
    student = StudentFacts(frame=card.frame, memories=network.memory_shapes, data=card.data)
    sources = []
    for source_card in card.sources:
        source = build_network(source_card)
        plan = plan_teacher(source_card, source.memory_shapes, student, card.adapter)
        sources.append(FrozenTeacher(source, plan))
    return SourcedPredictor(network, sources, card.art)


def load_state(model: Predictor, weights: dict[str, Tensor], *, where: str) -> None:
    """Copy all weights into a network, refusing anything missing, unknown or of another shape."""
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - weights.keys()]
    wrong += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    wrong += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:5]) + (" ..." if len(wrong) > 5 else "")
        raise TeacherError(
            f"The weights of {where} do not fit this network: {len(wrong)} of {len(own)} tensors "
            f"differ ({shown}). Use the model.* settings of its card."
        )
    model.load_state_dict(weights)


def _read(where: str, file: str) -> bytes:
    try:
        return read_bytes(where, file)
    except MissingObjectError:
        raise TeacherError(f"{where} holds no {file}: it is not a complete model folder.") from None


def _checked_weights(where: str, card: TeacherCard) -> bytes:
    """The weights from where they lie.

    Raises:
        TeacherError: they are missing, or not the ones that the card describes.
    """
    content = _read(where, WEIGHTS_FILE)
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.weights_sha256:
        raise TeacherError(
            f"{where}/{WEIGHTS_FILE} is damaged or was replaced: sha256 {digest[:12]}..., its "
            f"card says {card.weights_sha256[:12]}... ({len(content):,} bytes read). Copy the "
            "folder again from where it came."
        )
    return content


def _copied_weights(where: str, card: TeacherCard, cache: NodeCache | None) -> bytes | None:
    """The weights from the node's whole copy, fetched if need be; None: there can be no such copy.

    What is wrong with the weights themselves is left to be found where they lie.
    """
    if cache is None or local_path(where) is not None:
        return None
    try:
        num_bytes = object_size(where, WEIGHTS_FILE)
        copy = cache.open(where, WEIGHTS_FILE, num_bytes, card.weights_sha256)
    except (MissingObjectError, AlteredObjectError):
        return None
    except (CacheLimitError, WriteError) as error:
        log.warning("%s/%s is not kept on this node: %s", where, WEIGHTS_FILE, error)
        return None
    with os.fdopen(copy, "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() == card.weights_sha256:
        return content
    cache.discard(card.weights_sha256)  # a failing disk, or a crash of the machine
    return None
