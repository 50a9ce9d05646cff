"""Stochastic adversarial video prediction: the generator and its two kinds of rollout.

Lee et al. 2018 (arXiv:1804.01523).

Legend: B batch, T time, C channels, Z latent, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.config import SAVPConfig
from tmu_dist.models.build import Layers
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.layer import Guide, LayerStep, RecurrentLayer
from tmu_dist.models.rollout import NOTHING, Predictor, Step
from tmu_dist.models.savp.blocks import (
    Block,
    BlockTable,
    DoublingConv,
    HalvingConv,
    block_table,
    check_halvable,
    with_latent,
)
from tmu_dist.models.savp.cell import NormalisedConvLSTMCell
from tmu_dist.models.savp.latents import LatentPath, LatentState
from tmu_dist.models.savp.transforms import Composition, Flow, ImageKernels, PixelKernels
from tmu_dist.models.shapes import FrameShape, MemoryShape


class SAVPState(NamedTuple):
    """What the network remembers from one step to the next."""

    first_frame_BCHW: Tensor
    latent: LatentState | None
    layers: tuple[CellState, ...]
    """Of every ConvLSTM, from the input to the output."""


class SAVP(Predictor):
    """Moves the last frame's pixels as an encoder and a decoder with ConvLSTMs tell it to.

    A latent of every step says which of the possible futures it is: drawn from the posterior where
    the next frame is known, otherwise from the prior; standard normal numbers choose, and without
    them it is the mean. With `latent_size` 0 the network is deterministic.

    Args:
        frame: shape of the frames; its smaller side chooses the blocks (`blocks.block_table`).
        layers: makes the ConvLSTMs, from the encoder's first to the decoder's last.
        savp: sizes and variants.
    """

    frame_loss = "l1"

    def __init__(self, frame: FrameShape, layers: Layers, *, savp: SAVPConfig) -> None:
        table = block_table(frame)
        encoder = _encoder(frame, table, layers, savp)
        decoder = _decoder(frame, table, layers, savp)
        super().__init__(
            image_channels=frame.channels,
            memory_shapes=[
                _map_shape(frame, block.layer.cell.hidden_channels, block.stride)
                for block in (*encoder, *decoder)
                if block.layer is not None
            ],
        )
        self.noise_size = self.latent_size = savp.latent_size
        self.learns_from_targets = savp.latent_size > 0
        self.latents = (
            LatentPath(
                frame.channels,
                latent_size=savp.latent_size,
                posterior_channels=savp.posterior_channels,
                prior=savp.prior,
            )
            if savp.latent_size
            else None
        )
        self.encoder: Sequence[Block] = nn.ModuleList(encoder)  # type: ignore[assignment]
        self.decoder: Sequence[Block] = nn.ModuleList(decoder)  # type: ignore[assignment]
        encoded_channels = table.encoder[-1].multiple * savp.base_channels
        self.transformation = _transformation(
            savp,
            encoded=_map_shape(frame, encoded_channels, encoder[-1].stride),
            decoded_channels=table.decoder[-1].multiple * savp.base_channels,
        )
        self.composition = Composition(
            table.decoder[-1].multiple * savp.base_channels,
            savp.base_channels,
            frame.channels,
            num_candidates=savp.num_transformed + 2,
        )

    def initial_state(self, frame_BCHW: Tensor, *, num_input_frames: int) -> SAVPState:
        """All-zero states; the first frame is kept.

        Raises:
            ValueError: frames that the blocks cannot halve.
        """
        check_halvable(frame_BCHW.shape[2], frame_BCHW.shape[3], len(self.encoder))
        return SAVPState(
            first_frame_BCHW=frame_BCHW,
            latent=(
                None
                if self.latents is None
                else self.latents.initial_state(frame_BCHW, num_input_frames)
            ),
            layers=tuple(
                block.layer.cell.initial_state(frame_BCHW[..., :: block.stride, :: block.stride])
                for block in (*self.encoder, *self.decoder)
                if block.layer is not None
            ),
        )

    def step(
        self,
        frame_BCHW: Tensor,
        state: SAVPState,
        *,
        target_BCHW: Tensor | None,
        noise_BZ: Tensor | None,
        guide: Guide | None = None,
    ) -> Step:
        """Draw a latent, run encoder and decoder, and mix moved and kept pixels."""
        latent_state, latent_BZ, objectives = None, None, NOTHING
        if self.latents is not None:
            latent_state, divergence_B = self.latents(
                frame_BCHW, state.latent, target_BCHW=target_BCHW, noise_BZ=noise_BZ
            )
            latent_BZ = latent_state.smoothed.hidden_BF
            if divergence_B is not None:
                objectives = {"kl_BT": divergence_B}
        encoded, decoded, steps = self._maps(frame_BCHW, state, latent_BZ, guide)
        moved_BNCHW = self.transformation(frame_BCHW, encoded, decoded)
        kept_BKCHW = torch.stack([frame_BCHW, state.first_frame_BCHW], dim=1)
        prediction = self.composition(decoded, torch.cat([moved_BNCHW, kept_BKCHW], dim=1))
        memories = tuple(step.state for step in steps)
        return Step(
            prediction, SAVPState(state.first_frame_BCHW, latent_state, memories), steps, objectives
        )

    def _maps(
        self,
        frame_BCHW: Tensor,
        state: SAVPState,
        latent_BZ: Tensor | None,
        guide: Guide | None,
    ) -> tuple[Tensor, Tensor, list[LayerStep]]:
        """The encoder's last maps, the decoder's last maps, and the ConvLSTMs' steps."""
        states = iter(state.layers)
        steps: list[LayerStep] = []
        x = torch.cat([frame_BCHW, state.first_frame_BCHW], dim=1)
        encoded = []
        for block in self.encoder:
            x = _through(block, x, latent_BZ, states, steps, guide)
            encoded.append(x)
        for k, block in enumerate(self.decoder):
            if k:
                x = torch.cat([x, encoded[-1 - k]], dim=1)
            x = _through(block, x, latent_BZ, states, steps, guide)
        return encoded[-1], x, steps


def _through(
    block: Block,
    x_BCHW: Tensor,
    latent_BZ: Tensor | None,
    states: Iterator[CellState],
    steps: list[LayerStep],
    guide: Guide | None,
) -> Tensor:
    """A block's output; takes its ConvLSTM's state and notes the step."""
    x_BCHW = block.resample(with_latent(x_BCHW, latent_BZ))
    if block.layer is None:
        return x_BCHW
    step: LayerStep = block.layer(with_latent(x_BCHW, latent_BZ), next(states), Carry(), guide)
    steps.append(step)
    return step.output_BPHW


def _encoder(frame: FrameShape, table: BlockTable, layers: Layers, savp: SAVPConfig) -> list[Block]:
    """Blocks that halve the maps; the first reads this frame and the first one."""
    blocks = []
    channels = 2 * frame.channels
    for k, size in enumerate(table.encoder):
        out = size.multiple * savp.base_channels
        conv = HalvingConv(channels + savp.latent_size, out, kernel_size=5 if k == 0 else 3)
        stride = 2 ** (k + 1)
        layer = _layer(frame, layers, out, stride, savp) if size.is_recurrent else None
        blocks.append(Block(conv, layer, stride))
        channels = out
    return blocks


def _decoder(frame: FrameShape, table: BlockTable, layers: Layers, savp: SAVPConfig) -> list[Block]:
    """Blocks that double the maps; from the second on they also read the mirrored encoder block."""
    blocks = []
    depth = len(table.encoder)
    channels = table.encoder[-1].multiple * savp.base_channels
    for k, size in enumerate(table.decoder):
        out = size.multiple * savp.base_channels
        if k:
            channels += table.encoder[-1 - k].multiple * savp.base_channels
        conv = DoublingConv(channels + savp.latent_size, out, savp.upsample)
        stride = 2 ** (depth - 1 - k)
        layer = _layer(frame, layers, out, stride, savp) if size.is_recurrent else None
        blocks.append(Block(conv, layer, stride))
        channels = out
    return blocks


def _layer(
    frame: FrameShape, layers: Layers, channels: int, stride: int, savp: SAVPConfig
) -> RecurrentLayer:
    map_size = (frame.height // stride, frame.width // stride)
    return layers(NormalisedConvLSTMCell, channels + savp.latent_size, channels, map_size=map_size)


def _map_shape(frame: FrameShape, channels: int, stride: int) -> MemoryShape:
    return MemoryShape(channels, frame.height // stride, frame.width // stride)


def _transformation(savp: SAVPConfig, *, encoded: MemoryShape, decoded_channels: int) -> nn.Module:
    if savp.transformation == "cdna":
        return ImageKernels(encoded, savp.num_transformed)
    kind = Flow if savp.transformation == "flow" else PixelKernels
    return kind(decoded_channels, savp.base_channels, savp.num_transformed)
