"""Networks of one architecture as one, which gives each its own part of the batch.

A network does to every sequence what it does to it alone, so M networks can share all they do but
for their weights: the joined network is a copy of the first one in which modules with weights are
replaced by ones that know those of all (`_joined`). What else a step does is one operation.

Why not `torch.vmap`: autocast has no effect on convolutions inside of it (torch 2.13), neither
compiled modules nor operations written for one set of weights go through it, and where operations
are small it takes as long as nearly two networks.

Legend: M networks, B sequences of each, N all sequences (M * B, network by network), T time, C
channels, D output channels, P hidden channels, Z noise, H, W height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.models.cells.convlstm import ConvLSTMCell
from tmu_dist.models.cells.mim import MemoryCore
from tmu_dist.models.convolution import Convolution
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.norm import MapLayerNorm
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.models.savp.blocks import InstanceNorm
from tmu_dist.models.savp.latents import PairEncoder

Members = tuple[nn.Module, ...]
"""What stands at the same place in every network."""

_ONE_BY_ONE = (
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.GroupNorm,
    InstanceNorm,
    MapLayerNorm,
    PairEncoder,
)
"""Modules from maps or features of sequences to the same; subclasses, too."""
_GROUPED = (nn.Conv2d, Convolution)
"""Convolutions that can be done as one; not their subclasses, which may add to them."""
_WITH_PEEPHOLES = (ConvLSTMCell, MemoryCore)


class JoinedNetworks:
    """Networks of one architecture, run as one.

    Args:
        networks: alike in all but their numbers; `unjoinable` names nothing in them.
        grouped: convolutions are one grouped convolution, for which the weights of a name lie in
            one stack; otherwise they are done one after the other, each by its own network's
            module.

    Weights that are stacked become views of their place there: nothing is held twice, and every
    network can still be run, moved and saved by itself.
    """

    def __init__(self, networks: Sequence[Predictor], *, grouped: bool) -> None:
        self.size = len(networks)
        self._stacks: list[Stack] = []
        self._of_cells: list[tuple[nn.Module, Stack]] = []
        cells: list[tuple[nn.Module, Stack]] = []
        memo: dict[int, Any] = {}
        for members in _with_weights(tuple(networks)):
            if isinstance(members[0], _WITH_PEEPHOLES):
                cells.append((members[0], self._stack(members, "peepholes")))
            else:
                # Copying takes this for the copy of the first, and does not look into that.
                memo[id(members[0])] = self._joined(members, grouped)
        self.network: Predictor = copy.deepcopy(networks[0], memo)
        """Called with N sequences, as each is with its own."""
        for module in networks[0].modules():
            # Copies of layers that are compiled are not.
            if isinstance(module, RecurrentLayer) and module.is_compiled:
                memo[id(module)].compile_step()
        for cell, stack in cells:
            joined: nn.Module = memo[id(cell)]
            del joined.peepholes
            self._of_cells.append((joined, stack))

    def __call__(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor | None,
        noise_BTZ: Tensor | None,
    ) -> Rollout:
        """Unroll all networks over the same frames; arguments as of `Predictor.forward`.

        Returns:
            Of N sequences, the first network's first.
        """
        for stack in self._stacks:
            stack.refresh()
        for cell, stack in self._of_cells:
            # [M, 3, P, h, w] to [3, N, P, h, w]
            own = stack.values.repeat_interleave(len(frames_BTCHW), 0)
            cell.peepholes = own.transpose(0, 1)

        def for_each(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.repeat(self.size, *[1] * (values.ndim - 1))

        rollout: Rollout = self.network(
            for_each(frames_BTCHW),
            num_input_frames=num_input_frames,
            num_frames=num_frames,
            sampling_mask_BT=for_each(sampling_mask_BT),
            noise_BTZ=for_each(noise_BTZ),
        )
        return rollout

    def _stack(self, members: Members, name: str) -> Stack:
        stack = Stack(members, name)
        self._stacks.append(stack)
        return stack

    def _joined(self, members: Members, grouped: bool) -> nn.Module:
        """The module that stands for those of all networks."""
        first = members[0]
        if isinstance(first, MapLayerNorm) and first.affine == "full":
            gain, shift = (self._stack(members, name) for name in ("gain", "shift"))
            return JoinedNorm(first.groups, gain, shift)
        if grouped and isinstance(first, nn.Conv2d) and type(first) in _GROUPED:
            bias = None if first.bias is None else self._stack(members, "bias")
            return GroupedConvolution(first, self._stack(members, "weight"), bias)
        return OneByOne(members)


def unjoinable(network: nn.Module) -> tuple[str, ...]:
    """Names of the classes in a network whose weights cannot be joined; empty: it can be."""
    return tuple(
        sorted(
            {
                type(module).__name__
                for (module,) in _with_weights((network,))
                if not isinstance(module, (*_ONE_BY_ONE, *_WITH_PEEPHOLES))
            }
        )
    )


class Stack:
    """One weight of all networks, [M, ...], of which each network's is a view.

    Args:
        owners: the modules that have it.
        name: of the weight.
    """

    def __init__(self, owners: Members, name: str) -> None:
        self._owners, self._name = owners, name
        self.values = self._stacked()

    def refresh(self) -> None:
        """Stack the weights anew if they were moved, and have left their places."""
        size = self.values.stride(0) * self.values.itemsize
        address, kind = self.values.data_ptr(), (self.values.device, self.values.dtype)
        if any(
            each.data_ptr() != address + m * size or (each.device, each.dtype) != kind
            for m, each in enumerate(self._weights())
        ):
            self.values = self._stacked()

    def _weights(self) -> list[Tensor]:
        return [getattr(owner, self._name) for owner in self._owners]

    def _stacked(self) -> Tensor:
        weights = self._weights()
        like = torch.empty_like(weights[0])  # keeps the memory format
        stack = like.new_empty_strided(
            (len(weights), *like.shape), (like.numel(), *like.stride()), requires_grad=False
        )
        for place, weight in zip(stack.unbind(), weights, strict=True):
            place.copy_(weight.detach())
            weight.data = place
        return stack


class OneByOne(nn.Module):
    """Each network's own module on its part of the sequences."""

    def __init__(self, members: Members) -> None:
        super().__init__()
        self._members = members  # a tuple, so that they stay parts of their own networks only

    @property
    def weight(self) -> Tensor:
        """Without numbers, of which there is more than one: for its dtype."""
        return _without_numbers(self._members[0].weight)

    def forward(self, *values_NC: Tensor) -> Tensor:
        """As of one of them, with more sequences."""
        parts = zip(*(values.chunk(len(self._members)) for values in values_NC), strict=True)
        return torch.cat([member(*part) for member, part in zip(self._members, parts, strict=True)])


class GroupedConvolution(nn.Module):
    """The convolutions of all networks as one, whose groups they are.

    Args:
        like: any of them.
        weight: [M, D, C, h, w].
        bias: [M, D].
    """

    def __init__(self, like: nn.Conv2d, weight: Stack, bias: Stack | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias
        self._stride, self._padding, self._dilation = like.stride, like.padding, like.dilation

    @property
    def weight(self) -> Tensor:
        """As in `OneByOne`."""
        return _without_numbers(self._weight.values[0])

    def forward(self, *maps_NCHW: Tensor) -> Tensor:
        """Convolve one or more maps, as if their channels lay one after the other."""
        weight = self._weight.values
        size = len(weight)
        # Channels lie innermost, as in all maps of a network (`models.stack`).
        maps_BHWMC = [
            maps.permute(0, 2, 3, 1).unflatten(0, (size, -1)).permute(1, 2, 3, 0, 4)
            for maps in maps_NCHW
        ]
        out_BDHW = F.conv2d(
            torch.cat(maps_BHWMC, 4).flatten(3).permute(0, 3, 1, 2),
            weight.flatten(0, 1),
            None if self._bias is None else self._bias.values.flatten(),
            self._stride,
            self._padding,
            self._dilation,
            groups=size,
        )
        out_BHWMD = out_BDHW.permute(0, 2, 3, 1).unflatten(3, (size, -1))
        return out_BHWMD.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


class JoinedNorm(nn.Module):
    """`MapLayerNorm` with gains and shifts for every element, each network's its own.

    Args:
        groups: of channels that are normalised together.
        gain, shift: [M, C, H, W].
    """

    def __init__(self, groups: int, gain: Stack, shift: Stack) -> None:
        super().__init__()
        self._groups, self._gain, self._shift = groups, gain, shift

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps of the same shape."""
        # Channels innermost, as in `GroupedConvolution`.
        gain, shift = (
            each.values.permute(0, 2, 3, 1).contiguous().unsqueeze(1)
            for each in (self._gain, self._shift)
        )
        x_NHWC = F.group_norm(x_NCHW, self._groups).permute(0, 2, 3, 1)
        scaled = torch.addcmul(shift, x_NHWC.unflatten(0, (len(gain), -1)), gain)
        return scaled.flatten(0, 1).permute(0, 3, 1, 2)


def _without_numbers(weight: Any) -> Tensor:
    return torch.empty_like(weight, device="meta")


def _with_weights(members: Members) -> Iterator[Members]:
    """The modules that have weights of their own, and those that are joined as a whole."""
    first = members[0]
    if isinstance(first, _ONE_BY_ONE):
        yield members
        return
    own = [*first.named_parameters(recurse=False), *first.named_buffers(recurse=False)]
    if own:
        yield members
    for children in zip(*(member.children() for member in members), strict=True):
        yield from _with_weights(children)
