"""What one node is like: versions, GPUs, cache, and the places of a run as it sees them.

`look_at_node` runs on the node. What follows from the facts of all nodes is in
node_judgements.py.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import time
from dataclasses import dataclass

from tmu_dist.data.cache import node_cache
from tmu_dist.data.cache_folder import CacheFolder, free_bytes
from tmu_dist.doctor.places import PlaceFacts, Wanted, look_at_places
from tmu_dist.provenance import source_hash, versions

_PACKAGES = ("torch", "ray", "numpy", "obstore", "zarr", "webdataset", "zstandard", "tmu-dist")
SOURCE, DRIVER = "source", "driver"
"""Names, beside those of packages, of the hash of the project's files and of NVIDIA's driver."""

_TRIAL_BYTES = 2**20
_SMI_SECONDS = 10
_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """One GPU as torch sees it."""

    name: str
    total_bytes: int
    free_bytes: int
    """Before anything was computed on it."""
    error: str = ""
    """Why it does not compute."""


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """The folder of a node for copies of shards."""

    folder: str
    error: str = ""
    """Why it cannot be used."""
    room_bytes: int = 0
    """What copies may take there, together with those that are there."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node, in plain values."""

    address: str
    host: str
    versions: dict[str, str]
    gpus: tuple[GpuFacts, ...] = ()
    gpu_error: str = ""
    """Why torch sees none, if it says so."""
    cache: CacheFacts | None = None
    """None: nothing is copied."""
    places: tuple[PlaceFacts, ...] = ()
    seconds: float = 0.0
    """How long looking took."""
    promised_gpus: int | None = None
    """By Ray; None: nobody promises any."""
    clock_offset_seconds: float | None = None
    """How much its clock is ahead of the clock of who asks; None: it is the same clock."""
    clock_uncertainty_seconds: float = 0.0
    """How much more or less that may be."""
    has_authentication: bool | None = None
    """Whether its Ray asks for a token; None: it does not say."""


def look_at_node(wanted: Wanted, address: str) -> NodeFacts:
    """Look at the node that this process runs on; takes seconds, and 25 where a store is silent.

    Args:
        wanted: places and cache of the run.
        address: of this node, as findings name it.
    """
    started = time.monotonic()
    gpus, gpu_error = look_at_gpus()
    return NodeFacts(
        address=address,
        host=platform.node(),
        versions=code_versions(),
        gpus=gpus,
        gpu_error=gpu_error,
        cache=look_at_cache(wanted) if wanted.copies else None,
        places=tuple(look_at_places(wanted)),
        seconds=time.monotonic() - started,
    )


def code_versions() -> dict[str, str]:
    """Of Python, of the packages that a run depends on, and of the project's files as imported."""
    found = {"python": platform.python_version(), **versions(_PACKAGES)}
    found[SOURCE] = source_hash()
    found[DRIVER] = driver_version()
    return found


def driver_version() -> str:
    """Of NVIDIA's driver; "none" where there is none."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "none"
    return next(iter(done.stdout.split()), "none")


def look_at_gpus() -> tuple[tuple[GpuFacts, ...], str]:
    """Have every GPU that torch sees multiply a matrix; and why torch sees none."""
    import torch

    try:
        if not torch.cuda.is_available():
            build = torch.version.cuda
            return (), f"torch {torch.__version__} " + (
                f"(CUDA {build}) finds no device" if build else "is built without CUDA"
            )
        return tuple(_look_at_gpu(number) for number in range(torch.cuda.device_count())), ""
    except RuntimeError as error:
        return (), str(error)


def _look_at_gpu(number: int) -> GpuFacts:
    import torch

    name, error = f"cuda:{number}", ""
    free = total = 0
    try:
        name = torch.cuda.get_device_name(number)
        free, total = torch.cuda.mem_get_info(number)
        # Small whole numbers: exact in every precision that a GPU may choose.
        numbers_NN = torch.arange(_SIDE * _SIDE, dtype=torch.float32).reshape(_SIDE, _SIDE) % 3
        product_NN = (numbers_NN.to(f"cuda:{number}") @ numbers_NN.to(f"cuda:{number}")).cpu()
        if not torch.equal(product_NN, numbers_NN @ numbers_NN):
            error = "its product of two matrices is not the CPU's"
    except RuntimeError as problem:
        error = str(problem).partition("\n")[0]
    return GpuFacts(name=name, total_bytes=total, free_bytes=free, error=error)


def look_at_cache(wanted: Wanted) -> CacheFacts:
    """Put a small file into the node's cache as copies of shards are, and remove it again."""
    folder = "of this node"
    try:
        limits = node_cache(wanted.cache_folder, wanted.cache_gib)
        folder = str(limits.folder)
        copies = CacheFolder(limits.folder, limits.limit_bytes)
        name = hashlib.sha256(secrets.token_bytes(8)).hexdigest()
        content = bytes(min(_TRIAL_BYTES, limits.limit_bytes))
        what = "the doctor's trial"
        file, _ = copies.add(name, len(content), what, lambda file: _write(file, content))
        os.close(file)
        copies.remove(name)
        room = min(limits.limit_bytes, free_bytes(limits.folder) + copies.held_bytes())
        return CacheFacts(folder=folder, room_bytes=room)
    except (ValueError, OSError) as error:
        return CacheFacts(folder=folder, error=str(error))


def _write(file: int, content: bytes) -> None:
    os.pwrite(file, content, 0)
