"""One merge of attentive recurrent transfer: a student's state looks at source networks' states.

Cui et al., ICLR 2019 ("ART"), with every matrix of the paper's equations as a convolution, and
attention by itself at every place of the map.

Legend: B batch, T time steps that can be seen, M sources, N positions (every step of every
source), C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class SourceStates(NamedTuple):
    """States of all sources, and what attention compares a student's state with."""

    states_BTMPHW: Tensor
    keys_BTMPHW: Tensor

    def until(self, step: int, window: int | None) -> SourceStates:
        """What is seen at a step (from 0): it, and those before it that the window reaches."""
        seen = slice(0 if window is None else max(0, step + 1 - window), step + 1)
        return SourceStates(self.states_BTMPHW[:, seen], self.keys_BTMPHW[:, seen])


class Merged(NamedTuple):
    """A merged state, and how much of it is new."""

    state_BPHW: Tensor
    update_BPHW: Tensor
    """The gate z in [0, 1]; where it is 0, the state is the student's own."""


class StateMerge(nn.Module):
    """Merges one state of one layer (its H or its C) with the sources' states of that layer.

    No convolution has a bias, so nothing can be learned that neither input nor states tell. The
    paper's dropout on the aligned gate is left out: no module draws random numbers as it runs.

    Args:
        in_channels: of the layer's input.
        hidden_channels: of the state, and of the sources' states.
        num_sources: M.
        kernel_size: of the merge; attention is 1x1.
        gate: whether a gate chooses between the aligned and the attended state; without, it is
            the attended one.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_sources: int,
        *,
        kernel_size: int,
        gate: bool,
    ) -> None:
        super().__init__()
        width = hidden_channels

        def conv(channels: int, out_channels: int, size: int = kernel_size) -> nn.Conv2d:
            return nn.Conv2d(channels, out_channels, size, padding=size // 2, bias=False)

        self.query = conv(width, width, 1)
        self.key = conv(width, width, 1)
        self.score = conv(width, 1, 1)
        self.gate = conv(2 * width, width) if gate else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
        # A softmax over one source is 1 whatever its logit; without the gate nothing is aligned.
        has_choice = gate and num_sources > 1
        self.source_logits = nn.Parameter(torch.zeros(num_sources)) if has_choice else None
        self.of_input = conv(in_channels, 3 * width)
        self.of_state = conv(width, 2 * width)
        self.of_reset_state = conv(width, width)
        self.of_source = conv(width, 3 * width)

    def remember(self, states_BTMPHW: Tensor) -> SourceStates:
        """Prepare what the sources said, once for all steps: the keys Ua S."""
        keys_NPHW = self.key(states_BTMPHW.flatten(0, 2))
        return SourceStates(states_BTMPHW, keys_NPHW.unflatten(0, states_BTMPHW.shape[:3]))

    def forward(self, x_BCHW: Tensor, state_BPHW: Tensor, seen: SourceStates) -> Merged:
        """Merge the student's previous state s with the sources' states up to now.

        With R what is transferred: r = s(Wr x + Ur s + Cr R), z = s(Wz x + Uz s + Cz R),
        n = tanh(W x + U (r . s) + Cn R); merged is (1 - z) . s + z . n.

        Args:
            x_BCHW: the layer's input.
            state_BPHW: the student's state.
            seen: the sources' states of the steps that may be seen, this one last.
        """
        source_BPHW = self.transferred(state_BPHW, seen)
        of_input = self.of_input(x_BCHW).chunk(3, 1)
        of_state = self.of_state(state_BPHW).chunk(2, 1)
        of_source = self.of_source(source_BPHW).chunk(3, 1)
        reset = torch.sigmoid(of_input[0] + of_state[0] + of_source[0])
        update = torch.sigmoid(of_input[1] + of_state[1] + of_source[1])
        of_reset_state = self.of_reset_state(reset * state_BPHW)
        new = torch.tanh(of_input[2] + of_reset_state + of_source[2])
        merged = (1 - update) * state_BPHW + update * new
        # Lying as the state did, so that cells round as they do without a merge.
        lies = torch.contiguous_format if state_BPHW.is_contiguous() else torch.channels_last
        return Merged(merged.contiguous(memory_format=lies), update)

    def transferred(self, state_BPHW: Tensor, seen: SourceStates) -> Tensor:
        """R: u = s(Uo A + Co Pc) mixes (1 - u) . A + u . Pc, or Pc alone where there is no gate."""
        attended = self.attend(state_BPHW, seen)
        if self.gate is None:
            return attended
        aligned = self.align(seen)
        choice = torch.sigmoid(self.gate(torch.cat([aligned, attended], 1)))
        return (1 - choice) * aligned + choice * attended

    def attend(self, state_BPHW: Tensor, seen: SourceStates) -> Tensor:
        """Pc = sum_j alpha_j S_j, alpha the softmax over all positions of v . tanh(Wa s + Ua S)."""
        keys_BNPHW = seen.keys_BTMPHW.flatten(1, 2)
        compared_BNPHW = torch.tanh(self.query(state_BPHW).unsqueeze(1) + keys_BNPHW)
        scores = self.score(compared_BNPHW.flatten(0, 1))
        weights_BN1HW = scores.unflatten(0, keys_BNPHW.shape[:2]).softmax(1)
        return (weights_BN1HW * seen.states_BTMPHW.flatten(1, 2)).sum(1)

    def align(self, seen: SourceStates) -> Tensor:
        """A = sum_m softmax(q)_m S_t^m: the sources' states of this step."""
        now_BMPHW = seen.states_BTMPHW[:, -1]
        if self.source_logits is None:
            return now_BMPHW.squeeze(1)
        return torch.einsum("m,bmphw->bphw", self.source_logits.softmax(0), now_BMPHW)
