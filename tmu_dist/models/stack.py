"""Networks of stacked cells: the only place that knows how side memories zig-zag through layers.

Legend: B batch, C channels, P hidden channels, H, W height and width, h, w those of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.convolution import Convolution
from tmu_dist.models.layer import Guide, LayerStep, RecurrentLayer
from tmu_dist.models.patches import patchify, unpatchify
from tmu_dist.models.rollout import Predictor, Step
from tmu_dist.models.shapes import MemoryShape


class StackState(NamedTuple):
    """Every layer's state, and the zig-zag memory that enters the lowest layer next."""

    layers: tuple[CellState, ...]
    carry: Carry


class RecurrentStack(nn.Module):
    """K recurrent layers; layer k reads what layer k - 1 puts out at the same time step."""

    def __init__(self, layers: Sequence[RecurrentLayer]) -> None:
        super().__init__()
        self.layers: Sequence[RecurrentLayer] = nn.ModuleList(layers)  # type: ignore[assignment]

    def initial_state(self, x_BCHW: Tensor) -> StackState:
        """All-zero states for inputs like `x`, the lowest layer's input."""
        return StackState(tuple(layer.cell.initial_state(x_BCHW) for layer in self.layers), Carry())

    def forward(
        self,
        x_BCHW: Tensor,
        state: StackState,
        guide: Guide | None = None,
        projected_BQHW: Tensor | None = None,
    ) -> tuple[StackState, list[LayerStep]]:
        """One time step of all layers; the last entry of the list is the top layer.

        Args:
            x_BCHW: the lowest layer's input.
            state: of the step before.
            guide: acts on every layer.
            projected_BQHW: what the lowest cell's `project` gives of the input, if it was known.
        """
        carry = state.carry._replace(projected_BQHW=projected_BQHW)
        steps: list[LayerStep] = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            step = layer(x_BCHW, layer_state, carry, guide)
            x_BCHW, carry = step.output_BPHW, step.carry
            steps.append(step)
        ahead = Carry(zigzag_BPHW=carry.zigzag_BPHW)
        return StackState(tuple(step.state for step in steps), ahead), steps


class PredictorState(NamedTuple):
    """State of a `StackedPredictor`: of its layers, and the patch maps that it still sees."""

    stack: StackState
    earlier_maps: tuple[Tensor, ...]
    projected: tuple[Tensor, ...] = ()
    """Of known frames that are still to be read: what the lowest cell's `project` gives of each."""


class StackedPredictor(Predictor):
    """A stack of cells between patch maps and a 1x1 convolution back to them.

    Args:
        layers: from the input to the output; the lowest reads patch maps.
        map_size: height and width of a patch map.
        patch_size: frame sub-scaling factor k.
        image_channels: channels of the frames.
    """

    def __init__(
        self,
        layers: Sequence[RecurrentLayer],
        *,
        map_size: tuple[int, int],
        patch_size: int,
        image_channels: int,
    ) -> None:
        cells = [layer.cell for layer in layers]
        super().__init__(
            image_channels=image_channels,
            memory_shapes=[
                MemoryShape(cell.hidden_channels, *map_size, cell.window) for cell in cells
            ],
        )
        top = cells[-1]
        self.frame_loss = top.frame_loss
        self.window = top.window
        self.stack = RecurrentStack(layers)
        self.patch_size = patch_size
        out_channels = image_channels * patch_size**2
        self.output: nn.Module = (
            Convolution(top.hidden_channels, out_channels, 1, bias=top.output_bias)
            if self.window == 1
            else nn.Conv3d(
                top.hidden_channels, out_channels, (self.window, 1, 1), bias=top.output_bias
            )
        )

    def initial_state(self, frame_BCHW: Tensor, *, num_input_frames: int) -> PredictorState:
        """All-zero states; before the first frame lie zeros."""
        x_BCHW = self._patches(frame_BCHW)
        earlier = (torch.zeros_like(x_BCHW),) * (self.window - 1)
        return PredictorState(self.stack.initial_state(torch.cat([*earlier, x_BCHW], 2)), earlier)

    def foresee(self, state: PredictorState, known_BTCHW: Tensor) -> PredictorState:
        """The lowest cell's input terms of all known frames, by one convolution."""
        if self.window > 1:
            return state
        maps_NCHW = self._patches(known_BTCHW.flatten(0, 1))
        projected_NQHW = self.stack.layers[0].cell.project(maps_NCHW)
        if projected_NQHW is None:
            return state
        projected_BTQHW = projected_NQHW.unflatten(0, known_BTCHW.shape[:2])
        return state._replace(projected=projected_BTQHW.unbind(1))

    def step(
        self,
        frame_BCHW: Tensor,
        state: PredictorState,
        *,
        target_BCHW: Tensor | None,
        noise_BZ: Tensor | None,
        guide: Guide | None = None,
    ) -> Step:
        """Read the frame (and the ones before it, where cells see a window of time)."""
        maps = (*state.earlier_maps, self._patches(frame_BCHW))
        x_BCHW = maps[0] if len(maps) == 1 else torch.cat(maps, 2)
        projected, *later = state.projected or (None,)
        stack_state, layers = self.stack(x_BCHW, state.stack, guide, projected)
        hidden = layers[-1].output_BPHW
        if self.window == 1:
            output_BCHW = self.output(hidden)
        else:
            output_BCHW = self.output(hidden.unflatten(2, (self.window, -1))).squeeze(2)
        prediction = unpatchify(output_BCHW.unsqueeze(1), self.patch_size).squeeze(1)
        return Step(prediction, PredictorState(stack_state, maps[1:], tuple(later)), layers)

    def _patches(self, frame_BCHW: Tensor) -> Tensor:
        # With channels innermost, as all maps above follow: convolutions on CPUs and on the tensor
        # cores of GPUs read them so.
        maps_BCHW = patchify(frame_BCHW.unsqueeze(1), self.patch_size).squeeze(1)
        return maps_BCHW.contiguous(memory_format=torch.channels_last)
