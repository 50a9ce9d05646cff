"""From settings to a network: the one place that turns names into cells and layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from tmu_dist.backbones import BACKBONES
from tmu_dist.config import ConfigError, ModelConfig, TMUConfig
from tmu_dist.models.cells.base import RecurrentCell
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.patches import check_divisible
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.models.stack import StackedPredictor
from tmu_dist.models.tmu import MemoryTransfer

_ALWAYS_USED = ("cell", "norm_affine")


class Layers:
    """Makes a network's layers with a memory, from the input to the output, with TMUs around them.

    A network calls this once for every layer, in order, so that "layer k" means the same in
    settings, memories, teachers and logs.
    """

    def __init__(self, model: ModelConfig, tmu: TMUConfig | None, num_slots: int) -> None:
        self._model = model
        self._tmu = tmu if num_slots else None
        self._num_slots = num_slots
        self._made = 0
        self._waiting: list[tuple[RecurrentLayer, dict[str, partial[MemoryTransfer]]]] = []
        self.used: set[str] = set()
        """Settings that cells were made with."""

    def __call__(
        self,
        kind: type[RecurrentCell],
        in_channels: int,
        hidden_channels: int,
        *,
        map_size: tuple[int, int],
        **settings: Any,
    ) -> RecurrentLayer:
        """The next layer.

        Args:
            kind: class of the cell.
            in_channels, hidden_channels, map_size: of the layer.
            settings: further settings of the cell, instead of those of the same name in `model`.
        """
        tmu = self._tmu
        if tmu is not None and tmu.layers != "all" and self._made not in tmu.layers:
            tmu = None
        number = self._made
        self._made += 1
        self.used |= _parameters(kind) - settings.keys()
        if tmu is not None and tmu.zigzag:
            _check_zigzag(kind, self._model.cell)
        chosen = _settings(kind, self._model) | settings
        if (
            tmu is not None
            and tmu.combination(self._num_slots) == "paper"
            and self._model.forget_bias is None
            and "forget_bias" in _parameters(kind)
            and "forget_bias" not in settings
        ):
            chosen["forget_bias"] = 0.0  # Eq. 5 lets the memory grow (docs/methods.md, 4.3)
        make_cell: Callable[..., RecurrentCell] = kind
        cell = make_cell(in_channels, hidden_channels, map_size=map_size, **chosen)
        layer = RecurrentLayer(cell, number=number)
        if tmu is None:
            return layer
        if cell.window > 1 and tmu.gate_kernel_size > 1:
            raise ConfigError(
                f"transfer.tmu.gate_kernel_size={tmu.gate_kernel_size} does not work with "
                f"model.cell={self._model.cell}, whose maps hold {cell.window} time slices: use 1."
            )
        combine = tmu.combination(self._num_slots)
        make_transfer = partial(
            MemoryTransfer,
            in_channels,
            hidden_channels,
            self._num_slots,
            map_size=(cell.window * map_size[0], map_size[1]),
            gate_kernel_size=tmu.gate_kernel_size,
            gate_norm=tmu.gate_norm,
            norm_affine=self._model.norm_affine,
        )
        # M is fused in every layer at every step, so that by Eq. 5 as printed it soon overflows.
        zigzag_combine = "mean" if tmu.combine == "auto" else combine
        makers = {"transfer": partial(make_transfer, combine=combine)}
        if tmu.zigzag:
            makers["transfer_zigzag"] = partial(make_transfer, combine=zigzag_combine)
        layer.hidden_from = tmu.hidden_from
        self._waiting.append((layer, makers))
        return layer

    def complete(self) -> None:
        """Put the TMUs around the layers, once the network has all else.

        They draw their first weights last, so that under one seed the rest of a TMU network starts
        as the plain network does.

        Raises:
            ConfigError: TMU layers that the network does not have; names those there are.
        """
        chosen = () if self._tmu is None or self._tmu.layers == "all" else self._tmu.layers
        if bad := [k for k in chosen if k >= self._made]:
            raise ConfigError(
                f"transfer.tmu.layers={list(chosen)}: this network has layers 0 to "
                f"{self._made - 1}, not {bad}."
            )
        for layer, makers in self._waiting:
            for name, make in makers.items():
                setattr(layer, name, make())


def build_predictor(
    frame: FrameShape, model: ModelConfig, *, tmu: TMUConfig | None = None, num_slots: int = 0
) -> Predictor:
    """A network with freshly initialised weights (under torch's global seed).

    Args:
        frame: shape of the frames.
        model: architecture.
        tmu: the TMU's settings; needed when `num_slots` > 0.
        num_slots: teachers that each TMU layer has room for (M); 0 builds the plain network.

    Raises:
        ConfigError: a setting that this backbone does not have, or layers that do not exist.
        ValueError: the patch size does not tile the frames, or slots without TMU settings.
    """
    if num_slots and tmu is None:
        raise ValueError(f"A network with {num_slots} teacher slots needs TMU settings.")
    backbone = _backbone(model.cell)
    layers = Layers(model, tmu, num_slots)
    if issubclass(backbone, RecurrentCell):
        network: Predictor = _stack(backbone, frame, model, layers)
    else:
        make_network: Callable[..., Predictor] = backbone
        network = make_network(frame, layers, **_settings(backbone, model))
        layers.used |= _parameters(backbone)
    _refuse_unused(model, layers.used)
    layers.complete()
    return network


def skeleton(
    frame: FrameShape, model: ModelConfig, *, tmu: TMUConfig | None = None, num_slots: int = 0
) -> Predictor:
    """The network without any numbers in its weights: for its facts and shapes."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_predictor(frame, model, tmu=tmu, num_slots=num_slots)


def weight_shapes(
    frame: FrameShape, model: ModelConfig, *, tmu: TMUConfig | None = None, num_slots: int = 0
) -> dict[str, torch.Size]:
    """Shape of every weight; two frames whose networks have the same can share a network."""
    network = skeleton(frame, model, tmu=tmu, num_slots=num_slots)
    return {name: value.shape for name, value in network.state_dict().items()}


def count_parameters(module: nn.Module) -> int:
    """Number of weights, frozen ones included."""
    return sum(p.numel() for p in module.parameters())


def count_trained(module: nn.Module) -> int:
    """Number of weights that an optimiser may change."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _stack(
    kind: type[RecurrentCell], frame: FrameShape, model: ModelConfig, layers: Layers
) -> StackedPredictor:
    check_divisible(frame.height, frame.width, model.patch_size)
    kinds = [kind.of_layer(k) for k in range(model.num_layers)]
    layers.used |= {"num_layers", "hidden_channels", "patch_size"}
    map_size = (frame.height // model.patch_size, frame.width // model.patch_size)
    in_channels = [frame.channels * model.patch_size**2]
    in_channels += [model.hidden_channels] * (model.num_layers - 1)
    return StackedPredictor(
        [
            layers(each, channels, model.hidden_channels, map_size=map_size)
            for each, channels in zip(kinds, in_channels, strict=True)
        ],
        map_size=map_size,
        patch_size=model.patch_size,
        image_channels=frame.channels,
    )


def backbones_with_zigzag() -> list[str]:
    """Names of the backbones whose cells have ST-LSTM's memory M."""
    return [name for name in BACKBONES if getattr(_backbone(name), "has_zigzag", False)]


def _check_zigzag(kind: type[RecurrentCell], cell: str) -> None:
    """Refuse to transfer a memory M that a cell has not."""
    if not kind.has_zigzag:
        raise ConfigError(
            f"transfer.tmu.zigzag=true transfers ST-LSTM's memory M, which model.cell={cell} has "
            f"not: leave it out, or use one of {', '.join(backbones_with_zigzag())}."
        )


def _backbone(name: str) -> type[RecurrentCell] | type[Predictor]:
    module, _, attribute = BACKBONES[name].partition(":")
    found: type[RecurrentCell] | type[Predictor] = getattr(import_module(module), attribute)
    return found


def _parameters(kind: type) -> set[str]:
    """Names of a constructor's keyword-only arguments: the settings that a class takes."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _settings(kind: type, model: ModelConfig) -> dict[str, Any]:
    """The settings of a class that are said in the config; None leaves the class its default."""
    names = _parameters(kind) & {entry.name for entry in fields(model)}
    said = {name: getattr(model, name) for name in names}
    return {name: value for name, value in said.items() if value is not None}


def _refuse_unused(model: ModelConfig, used: set[str]) -> None:
    for entry in fields(model):
        value = getattr(model, entry.name)
        if entry.name in {*used, *_ALWAYS_USED} or value == getattr(ModelConfig(), entry.name):
            continue
        names = sorted({each.name for each in fields(model)} & used)
        raise ConfigError(
            f"model.{entry.name}={value!r} has no effect with model.cell={model.cell}: leave it "
            f"out. Settings of this backbone: {', '.join(names)}."
        )
