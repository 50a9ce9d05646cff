"""The video pixel network around one ConvLSTM (Kalchbrenner et al. 2017).

Legend: B batch, C channels of the frames, D channels of the context (2c), H, W height and width,
L logits of one pixel and channel, P hidden channels, Z noise (C * H * W).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from tmu_dist.config import VPNConfig
from tmu_dist.models.build import Layers
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.cells.convlstm import ConvLSTMCell
from tmu_dist.models.layer import Guide
from tmu_dist.models.rollout import Predictor, Step
from tmu_dist.models.shapes import FrameShape, MemoryShape
from tmu_dist.models.vpn.blocks import CausalConv2d, ResidualMultiplicativeBlock, convolution
from tmu_dist.models.vpn.likelihood import LIKELIHOODS
from tmu_dist.models.vpn.sampler import decode_frame


class FrameEncoder(nn.Sequential):
    """From a frame to 2c maps of its size.

    Args:
        image_channels: channels of the frames.
        channels: channels inside the blocks (c).
        num_blocks: residual multiplicative blocks.
        dilated: their dilations are 1, 2, 4, 8 in turn.
    """

    def __init__(
        self, image_channels: int, channels: int, *, num_blocks: int, dilated: bool
    ) -> None:
        super().__init__(
            convolution(image_channels, 2 * channels, 3),
            *(
                ResidualMultiplicativeBlock(
                    channels, partial(convolution, dilation=2 ** (k % 4) if dilated else 1)
                )
                for k in range(num_blocks)
            ),
        )


class FrameDecoder(nn.Module):
    """Logits of every pixel from the context and the pixels before it.

    "Before" is raster order, and within a pixel the order of its channels. With n layers of 3x3
    filters (n = 1 + 2 num_blocks) the pixel at (row, column) sees, of the rows row - k with
    k <= n, the columns from column - n to column + k, and of its own row the n to the left. What
    lies above but further to the right is the blind spot of stacked masked filters (van den Oord
    et al. 2016, conditional PixelCNN); it is what lets a diagonal be decoded at once (`sampler`).

    Args:
        image_channels: channels of the frames (C).
        channels: channels inside the blocks (c); the context has 2c.
        num_blocks: residual multiplicative blocks.
        num_logits: logits of one pixel and channel.
    """

    def __init__(
        self, image_channels: int, channels: int, *, num_blocks: int, num_logits: int
    ) -> None:
        super().__init__()
        self.image_channels = image_channels
        causal = partial(CausalConv2d, num_colours=image_channels)
        self.pixels = causal(image_channels, 2 * channels, 3, sees_own_colour=False)
        self.blocks = nn.Sequential(
            *(ResidualMultiplicativeBlock(channels, causal) for _ in range(num_blocks))
        )
        self.output = causal(2 * channels, image_channels * num_logits, 1)

    def forward(self, frame_BCHW: Tensor, context_BDHW: Tensor) -> Tensor:
        """Logits [B, C, H, W, L] of all pixels of a frame that is known."""
        h_BDHW = self.blocks(context_BDHW + self.pixels(frame_BCHW))
        return self.output(h_BDHW).unflatten(1, (self.image_channels, -1)).movedim(2, -1)

    def weights(self) -> list[Tensor]:
        """Matrix and bias of each convolution, from the pixels to the logits (`sampler`)."""
        layers = [module for module in self.modules() if isinstance(module, CausalConv2d)]
        return [tensor for layer in layers for tensor in (layer.matrix_DN(), layer.bias)]


class VideoPixelNetwork(Predictor):
    """Encoder, ConvLSTM over time at full resolution, and an autoregressive decoder.

    Where the next frame is known it is decoded in one pass (teacher forcing): the prediction is the
    mean of each pixel given the true pixels before it, and the step returns the negative
    log-likelihood. Where it is not, pixels are decided one after the other, without gradients:
    drawn by noise, or else as means, given the medians of the pixels before.

    Args:
        frame: shape of the frames, with values in [0, 1].
        layers: makes the ConvLSTM.
        hidden_channels: its channels.
        kernel_size: its filter size.
        vpn: further settings.

    Raises:
        ValueError: the blocks have fewer channels than the frames, which cannot then be ordered.
    """

    frame_loss = "likelihood"
    learns_from_targets = True

    def __init__(
        self,
        frame: FrameShape,
        layers: Layers,
        *,
        hidden_channels: int,
        kernel_size: int,
        vpn: VPNConfig,
    ) -> None:
        if vpn.channels < frame.channels:
            raise ValueError(
                f"model.vpn.channels={vpn.channels} is less than the {frame.channels} channels of "
                "the frames: each of them needs at least one channel of its own."
            )
        map_size = (frame.height, frame.width)
        super().__init__(
            image_channels=frame.channels,
            memory_shapes=[MemoryShape(hidden_channels, *map_size)],
        )
        self.noise_size = frame.channels * frame.height * frame.width
        self.likelihood = vpn.likelihood
        width = 2 * vpn.channels
        self.encoder = FrameEncoder(
            frame.channels, vpn.channels, num_blocks=vpn.num_encoder_blocks, dilated=vpn.dilated
        )
        self.memory = layers(
            ConvLSTMCell, width, hidden_channels, map_size=map_size, kernel_size=kernel_size
        )
        self.context = convolution(hidden_channels, width, 1)
        self.decoder = FrameDecoder(
            frame.channels,
            vpn.channels,
            num_blocks=vpn.num_decoder_blocks,
            num_logits=LIKELIHOODS[vpn.likelihood].num_logits,
        )

    def initial_state(self, frame_BCHW: Tensor, *, num_input_frames: int) -> CellState:
        """All-zero state of the ConvLSTM, whose maps have the size of the frames."""
        return self.memory.cell.initial_state(frame_BCHW)

    def step(
        self,
        frame_BCHW: Tensor,
        state: CellState,
        *,
        target_BCHW: Tensor | None,
        noise_BZ: Tensor | None,
        guide: Guide | None = None,
    ) -> Step:
        """Read the frame; decode the next one, by teacher forcing where it is known."""
        layer = self.memory(self.encoder(frame_BCHW), state, Carry(), guide)
        context_BDHW = self.context(layer.output_BPHW)
        if target_BCHW is None:
            prediction = self._decode(context_BDHW.to(frame_BCHW.dtype), noise_BZ)
            return Step(prediction, layer.state, (layer,))
        pixel = LIKELIHOODS[self.likelihood]
        logits_BCHWL = self.decoder(pixel.as_seen(target_BCHW), context_BDHW).to(target_BCHW.dtype)
        return Step(
            pixel.mean(logits_BCHWL),
            layer.state,
            (layer,),
            {"nll_BTCHW": pixel.nll(logits_BCHWL, target_BCHW)},
        )

    @torch.no_grad()
    def _decode(self, context_BDHW: Tensor, noise_BZ: Tensor | None) -> Tensor:
        noise_BCHW = None
        if noise_BZ is not None:
            shape = (self.image_channels, *context_BDHW.shape[2:])
            if noise_BZ.shape[1] != math.prod(shape):
                raise ValueError(
                    f"Noise of {noise_BZ.shape[1]} numbers does not fit frames of {shape} "
                    "(channels, height, width), one for each: use frames of the trained size, or "
                    "no noise."
                )
            noise_BCHW = noise_BZ.unflatten(1, shape)
        return decode_frame(context_BDHW, noise_BCHW, self.decoder.weights(), self.likelihood)
