"""In which numbers a computation runs: half precision by autocast, TensorFloat-32 on cards.

In half precision convolutions and matrix products read and write 16-bit numbers. What lies between
them takes the wider of its arguments, so what is multiplied by a float32 memory is float32 again;
networks see to it that memories and predictions are. Weights and losses are float32 anyway.

Deliberately not here: loss scaling, which float16's gradients need (`training.scaling`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from tmu_dist.config import ConfigError, Precision

HALVES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bf16": torch.bfloat16, "fp16": torch.float16}
)
"""Number formats of the precisions of 16 bits."""


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that would have no effect.

    Raises:
        ConfigError: TensorFloat-32 on something else than a card.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            "training.precision=tf32 is how CUDA cards multiply float32 numbers, and this process "
            f"computes on {device.type}: use fp32 or bf16 here."
        )


def autocast(
    precision: Precision, device: torch.device, *, keeps_weights: bool = True
) -> torch.autocast:
    """Half precision, or float32 for what is not of 16 bits.

    Args:
        precision: the wanted one.
        device: where the computation runs.
        keeps_weights: a weight is rounded once until the end of the context, not at every use.
    """
    half = HALVES.get(precision)
    return torch.autocast(
        device.type,
        dtype=half or torch.bfloat16,
        enabled=half is not None,
        cache_enabled=None if keeps_weights else False,
    )


@contextmanager
def float32_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """How a card multiplies float32 numbers, for all threads and until the end of the context.

    With "fp32" in full, with "tf32" in TensorFloat-32, which rounds factors to 11 bits. In half
    precision convolutions that stay float32 do so, too: that is finer than bfloat16 and has
    float32's range. (PyTorch's own default is that for all precisions.)
    """
    if device.type != "cuda":
        yield
        return
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    conv.fp32_precision = "ieee" if precision == "fp32" else "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Everything that a precision means for a forward pass.

    Raises:
        ConfigError: as `check_precision`.
    """
    check_precision(precision, device)
    with float32_products(precision, device), autocast(precision, device):
        yield


def widened(values: Tensor) -> Tensor:
    """At least float32."""
    return values.float() if values.dtype.itemsize < 4 else values
