"""A network that reads frozen source networks while it runs, in training and ever after.

Attentive recurrent transfer (Cui et al., ICLR 2019): before every step of a layer its states are
merged with the sources' (`models.attention`). The sources are part of the network.

Legend: B batch, T time, M sources, C channels, P hidden channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tmu_dist.config import ARTConfig, ConfigError
from tmu_dist.models.attention import SourceStates, StateMerge
from tmu_dist.models.cells.base import CellState
from tmu_dist.models.layer import Guide, RecurrentLayer
from tmu_dist.models.rollout import Predictor, Rollout, StateName, Step
from tmu_dist.teachers.bank import FrozenTeacher, Teaching


class SourcedPredictor(Predictor):
    """A network whose layers merge frozen sources' states into their own before every step.

    Args:
        network: the student, a plain network.
        sources: what it reads, layer by layer on its own maps, with as many channels. They belong
            to it from now on: it asks them for what it merges and shows them no targets.
        art: settings of the merges.

    Raises:
        ConfigError: merges with a neighbourhood for maps that hold slices of time.
    """

    def __init__(
        self, network: Predictor, sources: Sequence[FrozenTeacher], art: ARTConfig
    ) -> None:
        super().__init__(image_channels=network.image_channels, memory_shapes=network.memory_shapes)
        slices = max(shape.slices for shape in network.memory_shapes)
        if slices > 1 and art.kernel_size > 1:
            raise ConfigError(
                f"transfer.art.kernel_size={art.kernel_size} does not work with a model.cell whose "
                f"maps hold {slices} time slices (e3d_lstm, e3d_openstl): use 1."
            )
        self.frame_loss = network.frame_loss
        self.learns_from_targets = network.learns_from_targets
        self.noise_size, self.latent_size = network.noise_size, network.latent_size
        self.window = art.window
        self.network = network
        self.sources: Sequence[FrozenTeacher] = nn.ModuleList(sources)  # type: ignore[assignment]
        names: tuple[StateName, ...] = ("hidden", "memory")
        if art.states == "hidden":
            names = ("hidden",)
        for source in self.sources:
            source.wanted = names
            source.hide_targets()
        self.groups = (
            [tuple(range(len(sources)))]
            if art.sources == "joint"
            else [(m,) for m in range(len(sources))]
        )
        layers = [module for module in network.modules() if isinstance(module, RecurrentLayer)]
        self.merges: Sequence[Mapping[StateName, Sequence[StateMerge]]] = nn.ModuleList(  # type: ignore[assignment]
            nn.ModuleDict(
                {
                    name: nn.ModuleList(_merge(layer, len(group), art) for group in self.groups)
                    for name in names
                }
            )
            for layer in sorted(layers, key=lambda layer: layer.number)
        )

    def initial_state(self, frame_BCHW: Tensor, *, num_input_frames: int) -> Any:
        """The student's own."""
        return self.network.initial_state(frame_BCHW, num_input_frames=num_input_frames)

    def foresee(self, state: Any, known_BTCHW: Tensor) -> Any:
        """The student's own."""
        return self.network.foresee(state, known_BTCHW)

    def step(
        self,
        frame_BCHW: Tensor,
        state: Any,
        *,
        target_BCHW: Tensor | None,
        noise_BZ: Tensor | None,
        guide: Guide | None = None,
    ) -> Step:
        """The student's own step, with what the guide merges into its states."""
        return self.network.step(
            frame_BCHW, state, target_BCHW=target_BCHW, noise_BZ=noise_BZ, guide=guide
        )

    def _unroll(self, frames_BTCHW: Tensor, *, num_frames: int, **how: Any) -> Rollout:
        """Unroll the sources, then the student with a guide that has read them.

        A source sees what the student sees, but its own predictions where frames are hidden or
        unknown; so no step knows more than the frames that were read up to it.
        """
        if how.pop("guides") is not None:
            raise ValueError("A network with sources guides itself: leave guides out.")
        reading = ("num_input_frames", "sampling_mask_BT", "noise_BTZ")
        teachings = [
            source(frames_BTCHW, num_frames=num_frames, **{name: how[name] for name in reading})
            for source in self.sources
        ]
        remembered = [
            {
                name: [
                    merge.remember(_together([teachings[m] for m in group], name, k))
                    for merge, group in zip(chain, self.groups, strict=True)
                ]
                for name, chain in merges.items()
            }
            for k, merges in enumerate(self.merges)
        ]
        guides = [
            MergingGuide(self.merges, remembered, step=t, window=self.window)
            for t in range(num_frames - 1)
        ]
        return super()._unroll(frames_BTCHW, num_frames=num_frames, guides=guides, **how)


class MergingGuide(Guide):
    """Merges what the sources remember up to one step into every layer's states.

    Args:
        merges: by layer and state, to be done one after the other.
        remembered: the states that each of them reads, of all steps.
        step: from 0.
        window: latest steps that are seen; None: all.
    """

    def __init__(
        self,
        merges: Sequence[Mapping[StateName, Sequence[StateMerge]]],
        remembered: Sequence[Mapping[StateName, Sequence[SourceStates]]],
        *,
        step: int,
        window: int | None,
    ) -> None:
        self.merges = merges
        self.remembered = remembered
        self.step = step
        self.window = window

    def enter(self, layer: int, x_BCHW: Tensor, state: CellState) -> CellState:
        for name, chain in self.merges[layer].items():
            field = f"{name}_BPHW"
            merged_BPHW = getattr(state, field)
            for merge, states in zip(chain, self.remembered[layer][name], strict=True):
                seen = states.until(self.step, self.window)
                merged_BPHW = merge(x_BCHW, merged_BPHW, seen).state_BPHW
            state = state._replace(**{field: merged_BPHW})
        return state


def _merge(layer: RecurrentLayer, num_sources: int, art: ARTConfig) -> StateMerge:
    cell = layer.cell
    return StateMerge(
        cell.in_channels,
        cell.hidden_channels,
        num_sources,
        kernel_size=art.kernel_size,
        gate=art.gate,
    )


def _together(teachings: Sequence[Teaching], name: StateName, layer: int) -> Tensor:
    """A layer's states of several sources, [B, T, M, P, h, w]."""
    return torch.stack([teaching.states[name][layer] for teaching in teachings], dim=2)
