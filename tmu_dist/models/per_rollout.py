"""What is computed from a module's parameters once, and used at every time step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class PerRollout(Generic[Value]):
    """Keeps a value while the parameters that it was made from stay the same.

    Copies of it, and those sent to other processes, are empty: values may be parts of a graph.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], list[Tensor], Value] | None = None

    def get(self, parameters: Sequence[Tensor], make: Callable[[], Value]) -> Value:
        """The value; `make` makes it where it is not there or the parameters have changed."""
        learns = torch.is_grad_enabled() and any(each.requires_grad for each in parameters)
        key = (learns, *((each._version, each.data_ptr()) for each in parameters))
        if self._kept is None or self._kept[0] != key:
            # Parameters are held, so that no other ones can come to lie at their addresses.
            self._kept = key, [each.detach() for each in parameters], make()
        return self._kept[2]

    def forget(self) -> None:
        """Make it anew next time: not every optimiser leaves a trace of its updates."""
        self._kept = None

    def __reduce__(self) -> tuple[type[PerRollout[Value]], tuple[()]]:
        return PerRollout, ()


def begin_rollout(network: nn.Module) -> None:
    """Let its modules compute anew what they keep for a rollout, unless they are frozen."""
    for module in network.modules():
        if any(each.requires_grad for each in module.parameters(recurse=False)):
            for kept in vars(module).values():
                if isinstance(kept, PerRollout):
                    kept.forget()
