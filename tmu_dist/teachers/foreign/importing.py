"""From foreign weights to a teacher: a network of ours, and its card, which says their origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tmu_dist.config import ModelConfig, TMUConfig, WindowConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError
from tmu_dist.teachers.foreign.layouts import Layout, Rule, patch_size_of, recognise
from tmu_dist.teachers.foreign.state_dict import read_weights
from tmu_dist.teachers.store import load_state


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A network that another codebase trained."""

    model: Predictor
    card: TeacherCard
    layout: Layout
    """Which says what was left out, too."""


def import_network(
    source: str,
    *,
    name: str,
    frame: FrameShape,
    window: WindowConfig,
    data: DataFacts,
    forget_bias: float | None = None,
) -> Imported:
    """Read a foreign network.

    Args:
        source: file of its weights: a path or a URL.
        name: of the teacher.
        frame: shape of the frames that it was trained on.
        window: input and target frames it was trained with.
        data: the data that it was trained on.
        forget_bias: of C, where the network was made with another than its codebase's.

    Raises:
        TeacherError: the file, its layout, its tensors or the frames do not fit; says which.
        StorageError: the store cannot be reached.
    """
    weights = read_weights(source)
    layout = recognise({key: tuple(tensor.shape) for key, tensor in weights.tensors.items()})
    model = replace(layout.model, patch_size=patch_size_of(layout, frame))
    if forget_bias is not None:
        model = replace(model, forget_bias=forget_bias)
    network = _network(frame, model, layout.rules, weights.tensors, where=source)
    if layout.check is not None:
        layout.check(weights.tensors)
    card = TeacherCard(
        name=name,
        method="imported",
        step=0,
        seed=0,
        frame=frame,
        window=window,
        model=model,
        tmu=TMUConfig(),
        num_slots=0,
        data=data,
        origin=f"{weights.file}: {layout.name}, sha256 {weights.sha256}",
    )
    return Imported(model=network, card=card, layout=layout)


def _network(
    frame: FrameShape,
    model: ModelConfig,
    rules: tuple[Rule, ...],
    tensors: Mapping[str, Tensor],
    *,
    where: str,
) -> Predictor:
    with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced below
        network = build_predictor(frame, model)
    own = network.state_dict()
    converted = {}
    for rule in rules:
        shapes = [f"{name} {tuple(tensors[name].shape)}" for name in rule.theirs]
        wanted = tuple(own[rule.ours].shape)
        try:
            value = rule.convert(tensors, own[rule.ours])
        except (RuntimeError, IndexError):
            value = torch.empty(0)
        if value.shape != wanted:
            raise TeacherError(
                f"{where}: {' and '.join(shapes)} cannot become {rule.ours} {wanted} of "
                f"{model.cell} with {model.num_layers} layers, {model.hidden_channels} hidden "
                f"channels, {model.kernel_size}x{model.kernel_size} filters and patch size "
                f"{model.patch_size}."
            )
        converted[rule.ours] = value
    load_state(network, converted, where=where)
    return network.eval().requires_grad_(False)
