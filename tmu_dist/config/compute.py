"""How a network's numbers are computed: nothing here changes what they are, but for rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["auto", "on", "off"]
"""auto: on where it is faster on this kind of device (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What makes a step faster or smaller. Results agree within float32's rounding."""

    convolution: Literal["auto", "direct", "winograd"] = "auto"
    """Of a cell's filters: the library's direct convolution, or Winograd's minimal filtering with a
    sixth of the multiplications (3x3 and 5x5 filters, float32 on CPUs, whatever training.precision
    says); auto: by filter, map and channels, as measured."""
    arithmetic: Literal["auto", "plain", "compiled"] = "auto"
    """Of gates and memories between convolutions. plain: one operation after the other; compiled:
    each layer by torch.compile; auto: in one pass by C code on CPUs, plain elsewhere."""
    batch_teachers: Choice = "auto"
    """Run teachers of one architecture as one network with stacked weights. auto: on GPUs that hold
    all teachers, as so many fewer operations are launched; on CPUs it was measured to be slower."""
    cuda_graph: Literal["off", "on"] = "off"
    """CUDA, one rank: record forward and backward pass once and launch them as one graph. Off by
    default: it was not tried on any card yet."""
    recompute: bool = False
    """Keep only each layer's inputs and compute the rest again in the backward pass: far less
    memory for about a third more time."""
