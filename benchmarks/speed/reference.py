"""The reference computation: a training step as the authors' released implementation computes one.

Written anew from the equations, in plain eager float32 PyTorch and the manner of that code: one
convolution of [x, h] for all gates of a cell, a loop over time and layers, a distiller and a layer
normalisation of its own for each teacher, teachers one after the other without gradients, the mean
squared error of the frames plus beta times that of the memories, one backward pass, Adam. Nothing
is fused, cast, compiled or kept from one step to the next, and nothing is slowed down.

It shares no code with `tmu_dist.models`, takes the same weights (`weights_of`), and computes the
same loss and gradients (tests/unit/test_speed_benchmarks.py). Not here: other cells than ConvLSTM,
reversed sequences, missing pixels, anything that reads files.

Legend: B batch, T time, C channels of patch maps, P hidden channels, M teachers, H, W map height
and width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dimensions(NamedTuple):
    """Of a network on patch maps."""

    channels: int
    """Of a patch map: k x k x image channels."""
    height: int
    width: int
    num_layers: int = 4
    hidden_channels: int = 64
    kernel_size: int = 5
    peepholes: bool = False
    """Channelwise, as in Eq. 2; the released code has none."""


class Unrolled(NamedTuple):
    """What a network made of its frames."""

    predictions: list[Tensor]
    """By step [B, C, H, W]."""
    memories: list[list[Tensor]]
    """By step and layer [B, P, H, W]."""
    imitations: list[list[list[Tensor]]]
    """By step, layer and teacher [B, P, H, W]; no teachers in a plain network."""


class Cell(nn.Module):
    """A ConvLSTM with room for M teachers (Eqs. 2, 3 and 5); with M = 0, the plain one."""

    def __init__(self, in_channels: int, size: Dimensions, num_teachers: int) -> None:
        super().__init__()
        hidden, kernel = size.hidden_channels, size.kernel_size
        joined = in_channels + hidden
        self.conv = nn.Conv2d(joined, 4 * hidden, kernel, padding=kernel // 2)
        self.peepholes = nn.Parameter(torch.zeros(3, hidden, 1, 1)) if size.peepholes else None
        self.num_teachers = num_teachers
        if num_teachers:
            shape = [hidden, size.height, size.width]
            teachers = range(num_teachers)
            self.distillers = nn.ModuleList(
                nn.Conv2d(hidden, hidden, 1, bias=False) for _ in teachers
            )
            self.distiller_norms = nn.ModuleList(nn.LayerNorm(shape) for _ in teachers)
            self.gate_conv = nn.Conv2d(joined, num_teachers * hidden, 1)
            self.gate_norm = nn.LayerNorm([num_teachers * hidden, size.height, size.width])

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor, mean: bool) -> tuple[Tensor, ...]:
        """One step; `mean` divides Eq. 5 by 1 + M. Returns hidden state, memory, *imitations."""
        joined = torch.cat([x, hidden], dim=1)
        i, f, o, g = torch.chunk(self.conv(joined), 4, dim=1)
        if self.peepholes is not None:
            i = i + self.peepholes[0] * memory
            f = f + self.peepholes[1] * memory
        own = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
        fused, imitations = own, []
        if self.num_teachers:
            gates = torch.sigmoid(self.gate_norm(self.gate_conv(joined)))
            for m, gate in enumerate(torch.chunk(gates, self.num_teachers, dim=1)):
                imitation = self.distiller_norms[m](self.distillers[m](own))
                fused = fused + gate * imitation + (1 - gate) * own
                imitations.append(imitation)
            if mean:
                fused = fused / (1 + self.num_teachers)
        if self.peepholes is not None:
            o = o + self.peepholes[2] * fused
        return torch.sigmoid(o) * torch.tanh(fused), fused, *imitations


class Network(nn.Module):
    """A stack of cells and a 1x1 convolution back to patches.

    Args:
        size: of the network.
        num_teachers: that each cell has room for.
        mean: whether Eq. 5 is divided by 1 + M.
    """

    def __init__(self, size: Dimensions, num_teachers: int = 0, *, mean: bool = False) -> None:
        super().__init__()
        self.size = size
        self.mean = mean
        channels = [size.channels] + [size.hidden_channels] * (size.num_layers - 1)
        self.cells = nn.ModuleList(Cell(each, size, num_teachers) for each in channels)
        self.output = nn.Conv2d(size.hidden_channels, size.channels, 1, bias=False)

    def forward(
        self, maps_BTCHW: Tensor, mask_BT: Tensor | None, num_input_frames: int, num_steps: int
    ) -> Unrolled:
        """Predict so many next maps.

        Args:
            maps_BTCHW: patch maps of the true frames (`patches`).
            mask_BT: which steps after the input frames read the truth; None: none of them.
            num_input_frames: maps that are read as they are.
            num_steps: predictions.
        """
        batch = maps_BTCHW.shape[0]
        shape = (batch, self.size.hidden_channels, self.size.height, self.size.width)
        hidden = [maps_BTCHW.new_zeros(shape) for _ in self.cells]
        memory = [maps_BTCHW.new_zeros(shape) for _ in self.cells]
        found = Unrolled([], [], [])
        for t in range(num_steps):
            if t < num_input_frames:
                x = maps_BTCHW[:, t]
            elif mask_BT is None:
                x = found.predictions[-1]
            else:
                true = mask_BT[:, t - num_input_frames].to(maps_BTCHW.dtype).view(-1, 1, 1, 1)
                x = true * maps_BTCHW[:, t] + (1 - true) * found.predictions[-1]
            imitations = []
            for k, cell in enumerate(self.cells):
                hidden[k], memory[k], *imitated = cell(x, hidden[k], memory[k], self.mean)
                x = hidden[k]
                imitations.append(imitated)
            found.predictions.append(self.output(x))
            found.memories.append(list(memory))
            found.imitations.append(imitations)
        return found


def patches(frames_BTCHW: Tensor, patch_size: int) -> Tensor:
    """Frames to maps of patches; row in patch, column in patch, image channel (fastest)."""
    b, t, c, h, w = frames_BTCHW.shape
    k = patch_size
    split = frames_BTCHW.reshape(b, t, c, h // k, k, w // k, k)
    return split.permute(0, 1, 4, 6, 2, 3, 5).reshape(b, t, k * k * c, h // k, w // k)


def objective(
    student: Network,
    teachers: Sequence[Network],
    maps_BTCHW: Tensor,
    mask_BT: Tensor,
    *,
    num_input_frames: int,
    beta: float,
) -> tuple[Tensor, Unrolled]:
    """Eq. 6 as element means, and the student's rollout.

    Args:
        student: of M teachers.
        teachers: plain networks of the student's size, driven with their own predictions.
        maps_BTCHW: all frames.
        mask_BT: which steps after the input frames read the truth.
        num_input_frames: frames that are always read.
        beta: of the distance of memories.
    """
    num_steps = maps_BTCHW.shape[1] - 1
    with torch.no_grad():
        told = [
            teacher(maps_BTCHW, mask_BT, num_input_frames, num_steps).memories
            for teacher in teachers
        ]
    found = student(maps_BTCHW, mask_BT, num_input_frames, num_steps)
    loss = F.mse_loss(torch.stack(found.predictions, dim=1), maps_BTCHW[:, 1:])
    if teachers:
        distance = sum(
            F.mse_loss(imitation, told[m][t][k])
            for t, layers in enumerate(found.imitations)
            for k, by_teacher in enumerate(layers)
            for m, imitation in enumerate(by_teacher)
        )
        loss = loss + beta * distance / num_steps
    return loss, found


def forecast(network: Network, maps_BTCHW: Tensor, num_target_frames: int) -> Tensor:
    """Continue the maps closed-loop, [B, num_target_frames, C, H, W]."""
    given = maps_BTCHW.shape[1]
    with torch.no_grad():
        found = network(maps_BTCHW, None, given, given + num_target_frames - 1)
    return torch.stack(found.predictions[given - 1 :], dim=1)


_NAME = re.compile(r"stack\.layers\.(\d+)\.([a-z_.]+)\.([a-z]+)")
_PARTS = {
    "cell": "",
    "cell.gates": "conv.",
    "transfer.gates": "gate_conv.",
    "transfer.gate_norm": "gate_norm.",
    "transfer.distillers": "distillers.",
    "transfer.distiller_norm": "distiller_norms.",
}
_LEAVES = {"gain": "weight", "shift": "bias"}


def weights_of(ours: Mapping[str, Tensor], num_teachers: int = 0) -> dict[str, Tensor]:
    """Tensors of a network of `tmu_dist.models` under this one's names: weights, or gradients.

    Raises:
        ValueError: a tensor that this network has not.
    """
    found: dict[str, Tensor] = {}
    for name, value in ours.items():
        match = _NAME.fullmatch(name)
        if name == "output.weight":
            found[name] = value
        elif match is None or match[2] not in _PARTS:
            raise ValueError(
                f"{name} has no place in the reference, which is a ConvLSTM with the TMU's default "
                "settings: build the network so."
            )
        else:
            prefix, leaf = f"cells.{match[1]}.{_PARTS[match[2]]}", _LEAVES.get(match[3], match[3])
            if match[2].startswith("transfer.distiller"):
                parts = value.chunk(num_teachers)
                found |= {f"{prefix}{m}.{leaf}": part for m, part in enumerate(parts)}
            else:
                found[prefix + leaf] = value
    return found


def forward_operations(size: Dimensions, num_teachers: int = 0) -> int:
    """Of one step of one sequence: products of the convolutions, each with its sum two.

    Args:
        size: of the network.
        num_teachers: that it has room for.
    """
    inputs = [size.channels] + [size.hidden_channels] * (size.num_layers - 1)
    output = size.hidden_channels * size.channels
    products = sum(_products(size, each, num_teachers) for each in inputs) + output
    return 2 * size.height * size.width * products


def training_operations(size: Dimensions, num_teachers: int, *, num_steps: int) -> int:
    """Of the objective of one sequence and its gradient, teachers included.

    A gradient takes as much as the pass before it for the weights, and as much again for what was
    convolved; but at the first step the lowest layer reads nothing that has a gradient.
    """
    student = forward_operations(size, num_teachers)
    joined = size.channels + size.hidden_channels
    filters = 4 * size.hidden_channels * size.kernel_size**2 + num_teachers * size.hidden_channels
    first = 2 * size.height * size.width * joined * filters
    teachers = num_teachers * num_steps * forward_operations(size)
    return 3 * num_steps * student - first + teachers


def training_bytes(size: Dimensions, num_teachers: int, *, num_steps: int) -> int:
    """What must be read and written in float32 for it, were all arithmetic between convolutions
    done in one pass: every map once where it is made and once where it is used. Without weights.
    """
    student = 3 * _step_bytes(size, num_teachers)  # the gradient reads and writes twice as much
    return num_steps * (student + num_teachers * _step_bytes(size))


def _step_bytes(size: Dimensions, num_teachers: int = 0) -> int:
    hidden, taught = size.hidden_channels, num_teachers * size.hidden_channels
    channels = 0
    for in_channels in [size.channels] + [hidden] * (size.num_layers - 1):
        joined = in_channels + hidden
        channels += joined + 4 * hidden + (4 + 1 + 2) * hidden  # convolution; gates, c, and c and h
        if num_teachers:
            channels += (hidden + taught) + (joined + taught) + (2 * taught + 2 * hidden)
    return 4 * size.height * size.width * (channels + hidden + size.channels)


def _products(size: Dimensions, in_channels: int, num_teachers: int) -> int:
    """Of one layer's convolutions at one place of a map: gates; transfer gates and distillers."""
    hidden = size.hidden_channels
    joined = in_channels + hidden
    return joined * 4 * hidden * size.kernel_size**2 + num_teachers * hidden * (joined + hidden)
