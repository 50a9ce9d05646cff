"""Files of weights as other codebases write them, read without running anything that is in them."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from tmu_dist.data.storage import MissingObjectError, read_bytes
from tmu_dist.teachers.card import TeacherError

SAFETENSORS_SUFFIX = ".safetensors"
WRAPPERS = ("net_param", "state_dict")
"""Keys under which checkpoints keep the network: predrnn-pytorch's, and OpenSTL's."""
PREFIXES = ("module.", "model.")
"""What wrappers of a network put before all its names."""


@dataclass(frozen=True)
class ForeignWeights:
    """A network's tensors by the names of the codebase that made them, as float32."""

    file: str
    sha256: str
    """Of the whole file."""
    tensors: Mapping[str, Tensor]


def read_weights(source: str) -> ForeignWeights:
    """Read a file of torch.save or safetensors from a disk or a store.

    Raises:
        TeacherError: no such file, not such a file, Python objects in it, or no finite numbers.
        StorageError: the store cannot be reached.
    """
    folder, slash, file = source.rpartition("/")
    missing = TeacherError(f"There is no file {source!r}: name a file of weights.")
    if not file:
        raise missing
    try:
        content = read_bytes(folder or slash or ".", file)
    except MissingObjectError:
        raise missing from None
    is_safe = PurePosixPath(file).suffix == SAFETENSORS_SUFFIX
    found = _read_safetensors(content, source) if is_safe else _read_pickled(content, source)
    tensors = _without_prefixes(_unwrapped(found, source))
    if bad := sorted(n for n, t in tensors.items() if not torch.isfinite(t).all()):
        raise TeacherError(f"{source}: {_few(bad)} hold(s) numbers that are not finite.")
    return ForeignWeights(
        file,
        hashlib.sha256(content).hexdigest(),
        {name: tensor.float() for name, tensor in tensors.items()},
    )


def _read_safetensors(content: bytes, source: str) -> Any:
    try:
        return load_safetensors(content)
    except SafetensorError as error:
        raise TeacherError(f"{source} is not a safetensors file: {error}") from None


def _read_pickled(content: bytes, source: str) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        if culprit is None:
            raise TeacherError(f"{source} is not a whole file of torch.save.") from None
        raise TeacherError(
            f"{source} holds Python objects ({culprit[1]}) beside tensors. Reading them could run "
            "any code, so only tensors are read. Where you trust the file, keep the tensors "
            "alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')."
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError):
        raise TeacherError(f"{source} is not a whole file of torch.save.") from None


def _unwrapped(found: Any, source: str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint."""
    if isinstance(found, Mapping):
        inside = [found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        found = inside[0] if inside else found
    if not isinstance(found, Mapping) or not found:
        raise TeacherError(
            f"{source} holds {type(found).__name__}, not tensors by name, be it bare or under one "
            f"of the keys {', '.join(WRAPPERS)}."
        )
    others = [
        str(name)
        for name, value in found.items()
        if not (isinstance(value, Tensor) and value.is_floating_point())
    ]
    if others:
        raise TeacherError(
            f"{source} holds entries that are no tensors of floats ({_few(others)}). Save the "
            "network's state dict alone, or under the key 'state_dict'."
        )
    return dict(found)


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:  # in either order
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
