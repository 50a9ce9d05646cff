"""Ray Train's workers as ranks: who they are, on which device, and the group they talk in.

Ray's own trainer for torch does the same. Its module loads torch into the process that controls the
workers, which has no use for it and is waited for, and starts helpers for data sets of Ray that no
run has. Nothing here loads torch outside the workers.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_cluster import PARTING_SECONDS, is_own

import ray  # isort: skip
import ray.train  # isort: skip
from ray.exceptions import GetTimeoutError  # isort: skip
from ray.train.backend import Backend, BackendConfig  # isort: skip
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # isort: skip

from tmu_dist.collectives import Ranks, talk_over

if TYPE_CHECKING:
    import torch


class Trainer(DataParallelTrainer):
    """Ray Train's trainer without what no run needs, since every helper is a process to start.

    Data sets are read by the ranks themselves. A Ray that this process started ends with it, and so
    does whatever a run leaves there, which elsewhere a helper cleans up.
    """

    def _create_default_callbacks(self) -> list[Any]:
        # A Ray that calls this by another name starts its helpers.
        needless = {"DatasetsCallback", *(["PlacementGroupCleanerCallback"] if is_own() else [])}
        found = super()._create_default_callbacks()
        return [each for each in found if type(each).__name__ not in needless]


def start_coordinator() -> None:
    """Start the actor that gives workers their places, beside the one that controls them.

    That one would start it a little later, and wait for it. Ray has no public way to start it, and
    a Ray that lacks this one only takes longer.
    """
    with suppress(ImportError, AttributeError):
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        get_or_create_autoscaling_coordinator()


@dataclass
class RankConfig(BackendConfig):
    """How workers become ranks."""

    communication: str
    """`init_process_group`'s backend."""
    timeout_seconds: float
    """A rank that others wait for this long counts as hung."""

    @property
    def backend_cls(self) -> type[Backend]:
        return RankBackend


class RankBackend(Backend):
    """Makes the process group, over the network interface by which Ray itself reaches each node."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called by Ray in the process that controls the workers, when they have started."""
        address, port = worker_group.execute_single(0, _free_port)
        joining = [
            worker_group.execute_single_async(rank, _join, address, port, backend_config)
            for rank in range(len(worker_group))
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Called by Ray before the workers end. They hang where they wait for a lost one."""
        parting = worker_group.execute_async(_part)
        with suppress(GetTimeoutError):
            ray.get(parting, timeout=float(os.environ.get(PARTING_SECONDS, 30)))


# In the workers


def own_ranks() -> Ranks:
    """This worker's place among those of its group."""
    context = ray.train.get_context()
    return Ranks(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
    )


def own_device() -> torch.device:
    """The GPU that Ray gave this worker, which is made torch's current one; or the CPU."""
    import torch

    if not ray.get_gpu_ids():
        return torch.device("cpu")
    from ray.train.torch import get_device

    torch.cuda.set_device(device := get_device())
    return device


def _free_port() -> tuple[str, int]:
    """Where the ranks can find each other: this worker's address and a port nobody holds."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as free:
        free.bind(("", 0))
        return address, free.getsockname()[1]


def _join(address: str, port: int, config: RankConfig) -> None:
    """Join the group; its variables are those of torchrun."""
    import torch.distributed as dist

    talk_over(ray.util.get_node_ip_address())
    context, ranks = ray.train.get_context(), own_ranks()
    if "nccl" in config.communication and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
        "NODE_RANK": str(context.get_node_rank()),
    }
    dist.init_process_group(
        config.communication,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=config.timeout_seconds),
    )


def _part() -> None:
    """Leave the group."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
