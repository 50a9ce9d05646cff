"""How many bytes tensors hold, operation by operation, while something runs without any numbers.

Inside `Tracing` the real code runs on fake tensors: shapes, views and lifetimes are as they would
be, and autograd keeps what it would keep, but nothing is computed and nothing is allocated. A
storage is counted once, however many tensors look at it, from the operation that makes it until
the last one that needs it is gone.

Deliberately not here: what libraries take inside an operation, what an allocator adds, and layers
that are fused by torch.compile, which keep less.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tmu_dist.models.native import idle

GRADIENTS = "gradients"
"""What a backward pass makes, whatever its operations are for."""
_BLOCK_BYTES = {"cpu": 64, "cuda": 512}
"""Multiples in which allocators hand out memory, by kind of device."""


class Tracing:
    """A context in which tensors are fake, and those of one device counted while they live.

    Args:
        device: that tensors pretend to lie on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.live: Counter[str] = Counter()
        """Bytes by what they are for."""
        self.peak: Mapping[str, int] = {}
        """The same, when they were most since `forget_peak`."""
        self._kind = ""
        self._total = self._most = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._block = _BLOCK_BYTES[device.type]
        self._contexts = ExitStack()

    def __enter__(self) -> Self:
        # Takes a second to load the first time, and nothing else needs it.
        from torch._subclasses.fake_tensor import FakeTensorMode

        with ExitStack() as contexts:
            contexts.enter_context(torch.random.fork_rng(devices=[]))
            contexts.enter_context(idle())
            contexts.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            fake = contexts.enter_context(FakeTensorMode())
            # A tensor that it remembers cannot be moved or converted (`nn.Module.to`).
            converter: Any = fake.fake_tensor_converter
            converter.set_tensor_memo = lambda real, made: None
            if self.device.type != "cpu":
                contexts.enter_context(self.device)
            contexts.enter_context(_WithoutNumbers())
            contexts.enter_context(_Counting(self))
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._contexts.close()

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Storages that are made meanwhile are for this; empty: they are not counted."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def hold(self, kind: str, num_bytes: int) -> None:
        """Count what stays where it is, without a tensor."""
        self.live[kind] += num_bytes
        self._total += num_bytes

    def forget_peak(self) -> None:
        """Look for a new peak from now on."""
        self._most, self.peak = self._total, dict(self.live)

    def see(self, made: Tensor) -> None:
        """Count a tensor's storage, if it is new."""
        storage = made.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        kind, size = self._kind, 0
        if kind and made.device.type == self.device.type:
            size = -(-storage.nbytes() // self._block) * self._block
            if torch._C._current_graph_task_id() != -1:
                kind = GRADIENTS
            self.live[kind] += size
            self._total += size
            if self._total > self._most:
                self._most, self.peak = self._total, dict(self.live)
        self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, kind, size))

    def _gone(self, key: int, kind: str, size: int) -> None:
        del self._seen[key]
        self.live[kind] -= size
        self._total -= size


class _Counting(TorchDispatchMode):
    """Shows a tracing every tensor that is made; whoever asks for a number gets 1, or no."""

    def __init__(self, tracing: Tracing) -> None:
        super().__init__()
        self._tracing = tracing

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation is torch.ops.prim.device.default:  # the most frequent one
            return args[0].fake_device
        if operation is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        if operation is torch.ops.aten.equal.default:
            return True
        result = operation(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self._tracing.see(made)
        return result


class _WithoutNumbers(TorchFunctionMode):
    """Lists of numbers are ones."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.tolist:
            return _ones(args[0].shape, args[0].dtype)
        return function(*args, **(kwargs or {}))


def _ones(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    if not shape:
        return _one(dtype)
    return [_ones(shape[1:], dtype) for _ in range(shape[0])]


def _one(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False  # what asks for exceptions finds none: some ask until there are no more
    return 1.0 if dtype.is_floating_point else 1
