"""The predictor and the only loop over time: warm-up, sampling mask, free run, memory taps.

Legend: B batch, T time, K layers, L TMU layers, M teachers, C channels, P hidden channels,
H, W height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.models.patches import patchify, unpatchify
from tmu_dist.models.stack import RecurrentStack
from tmu_dist.models.tmu import LayerStep


class Diagnostics(NamedTuple):
    """Means that tell what the gates do; each over channels and pixels."""

    transfer_gates_BTLM: Tensor | None
    """Transfer gates a of every TMU layer and teacher (paper, Table 5); None without TMU layers."""
    forget_gates_BTK: Tensor
    memory_rms_BTK: Tensor
    """Root mean square of each layer's memory; Eq. 5 lets it grow with M and time."""


class Rollout(NamedTuple):
    """A network unrolled over num_frames - 1 steps (T); step t reads frame t, predicts t + 1."""

    predictions_BTCHW: Tensor
    """Predictions of frames 2..num_frames in pixel space, unbounded floats around [0, 1]."""
    inputs_BTCHW: Tensor
    """What the network saw at each step: true frames, or its own predictions where masked out."""
    memories: tuple[Tensor, ...]
    """Per layer, the memory C of every step, [B, T, P, h, w]."""
    imitations: dict[int, Tensor]
    """Per TMU layer (by layer number), imitations of the teachers' memories [B, T, M, P, h, w]."""
    diagnostics: Diagnostics | None = None


class Predictor(nn.Module):
    """Frames in, the next frame out, at every step (models_spec A3).

    Args:
        stack: the recurrent layers; the lowest reads patch maps, the top has `hidden_channels`.
        patch_size: frame sub-scaling factor k.
        image_channels: channels of the frames.
        hidden_channels: channels of the top layer's hidden state.
    """

    def __init__(
        self, stack: RecurrentStack, *, patch_size: int, image_channels: int, hidden_channels: int
    ) -> None:
        super().__init__()
        self.stack = stack
        self.patch_size = patch_size
        self.image_channels = image_channels
        self.output = nn.Conv2d(
            hidden_channels, image_channels * patch_size**2, kernel_size=1, bias=False
        )

    def forward(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor | None = None,
        diagnostics: bool = False,
    ) -> Rollout:
        """Unroll over `num_frames` frames.

        Args:
            frames_BTCHW: true frames in [0, 1]: at least the input frames, and all but the last
                one where a sampling mask is given.
            num_input_frames: frames that are always read as they are.
            num_frames: input and predicted frames together; may exceed the frames given.
            sampling_mask_BT: bool [B, num_frames - num_input_frames - 1]; True lets the network
                read the true frame at that step (scheduled sampling), False its own prediction.
                Without a mask the network runs closed-loop on its own predictions.
            diagnostics: also return gate and memory statistics (costs a little time).

        Raises:
            ValueError: too few frames, wrong number of channels, or a mask of another shape.
        """
        self._check(frames_BTCHW, num_input_frames, num_frames, sampling_mask_BT)
        maps = patchify(frames_BTCHW, self.patch_size)
        state = self.stack.initial_state(maps[:, 0])
        predictions: list[Tensor] = []
        inputs: list[Tensor] = []
        steps: list[list[LayerStep]] = []
        for t in range(num_frames - 1):
            x = self._input(t, maps, predictions, num_input_frames, sampling_mask_BT)
            state, layer_steps = self.stack(x, state)
            # Predictions feed back as inputs, so they stay float32 even under autocast.
            predictions.append(self.output(state.layers[-1].hidden_BPHW).to(maps.dtype))
            inputs.append(x)
            steps.append(layer_steps)
        return Rollout(
            unpatchify(torch.stack(predictions, dim=1), self.patch_size),
            unpatchify(torch.stack(inputs, dim=1), self.patch_size),
            memories=tuple(_over_time([s.state.memory_BPHW for s in k]) for k in zip(*steps)),
            imitations=_imitations(steps),
            diagnostics=_diagnose(steps) if diagnostics else None,
        )

    @torch.no_grad()
    def predict(self, input_frames_BTCHW: Tensor, num_target_frames: int) -> Tensor:
        """Continue the given frames closed-loop by any number of frames.

        Returns:
            Predicted frames [B, num_target_frames, C, H, W].
        """
        given = input_frames_BTCHW.shape[1]
        rollout = self(
            input_frames_BTCHW, num_input_frames=given, num_frames=given + num_target_frames
        )
        return rollout.predictions_BTCHW[:, given - 1 :]

    def _input(
        self,
        t: int,
        maps_BTCHW: Tensor,
        predictions: list[Tensor],
        num_input_frames: int,
        sampling_mask_BT: Tensor | None,
    ) -> Tensor:
        if t < num_input_frames:
            return maps_BTCHW[:, t]
        if sampling_mask_BT is None:
            return predictions[-1]
        sees_truth = sampling_mask_BT[:, t - num_input_frames, None, None, None]
        return torch.where(sees_truth, maps_BTCHW[:, t], predictions[-1])

    def _check(
        self, frames_BTCHW: Tensor, num_input_frames: int, num_frames: int, mask_BT: Tensor | None
    ) -> None:
        batch, given, channels = frames_BTCHW.shape[:3]
        if channels != self.image_channels:
            raise ValueError(
                f"This network was built for frames with {self.image_channels} channel(s), "
                f"got {channels} (frames {tuple(frames_BTCHW.shape)})."
            )
        if not 1 <= num_input_frames < num_frames:
            raise ValueError(
                f"num_input_frames={num_input_frames} must be at least 1 and less than "
                f"num_frames={num_frames}."
            )
        needed = num_input_frames if mask_BT is None else num_frames - 1
        if given < needed:
            raise ValueError(
                f"{needed} true frames are needed ({num_input_frames} inputs"
                f"{'' if mask_BT is None else ' and a sampling mask'}), got {given}."
            )
        shape = (batch, num_frames - num_input_frames - 1)
        if mask_BT is not None and tuple(mask_BT.shape) != shape:
            raise ValueError(
                f"sampling_mask_BT must have shape {shape} (batch, predicted frames fed back), "
                f"got {tuple(mask_BT.shape)}."
            )


def _over_time(maps: list[Tensor]) -> Tensor:
    return torch.stack(maps, dim=1)


def _imitations(steps: list[list[LayerStep]]) -> dict[int, Tensor]:
    return {
        k: _over_time([s.imitations_BMPHW for s in over_time if s.imitations_BMPHW is not None])
        for k, over_time in enumerate(zip(*steps))
        if over_time[0].imitations_BMPHW is not None
    }


@torch.no_grad()
def _diagnose(steps: list[list[LayerStep]]) -> Diagnostics:
    def mean_per_layer(tensors: list[list[Tensor]]) -> Tensor:
        """Stack [time][layer] tensors of shape [B, ..., P, H, W] and average the last three."""
        means = [torch.stack([x.float().mean((-3, -2, -1)) for x in row], 1) for row in tensors]
        return torch.stack(means, 1)

    gates = [[s.gates_BMPHW for s in row if s.gates_BMPHW is not None] for row in steps]
    return Diagnostics(
        transfer_gates_BTLM=mean_per_layer(gates) if gates[0] else None,
        forget_gates_BTK=mean_per_layer([[s.forget_BPHW for s in row] for row in steps]),
        memory_rms_BTK=mean_per_layer(
            [[s.state.memory_BPHW.float().square() for s in row] for row in steps]
        ).sqrt(),
    )
