"""Ray Train around the training loop: start workers, turn them into ranks, restart lost ones.

Checkpoints and logs are the run folder's own, the same as without Ray, so a worker group that is
started again simply continues the run. Ray is told the results, not the weights.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Read by Ray when it is imported: no usage statistics, no second copy of every printed line, and
# a look at the workers twice a second, which is also how soon a lost one is noticed.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from tmu_dist.collectives import Collectives, Ranks, process_group_backend
from tmu_dist.config import ConfigError, RunConfig, from_dict
from tmu_dist.data.loader import ShardError
from tmu_dist.files import WriteError
from tmu_dist.training.loop import NonFiniteLossError, RunResult, train
from tmu_dist.training.progress import LogFollower, ProgressDisplay
from tmu_dist.transfer.base import DeadDistillationError

_PERMANENT = (ValueError, WriteError, DeadDistillationError, NonFiniteLossError)
"""Errors that every rank raises and that starting again would only repeat."""


class WorkerLostError(RuntimeError):
    """Workers failed more often than launch.max_failures allows."""


def train_on_ray(config: RunConfig) -> RunResult:
    """Run `loop.train` on Ray Train workers and show its progress here.

    Joins the cluster of the job or of `RAY_ADDRESS`; otherwise the one running on this machine,
    or starts one for this process.

    Raises:
        ConfigError: the cluster has too few CPUs or GPUs for the workers.
        WorkerLostError: workers failed more than `launch.max_failures` times.
        Everything that `loop.train` raises, under its own name.
    """
    connect()
    run = Path(config.output)
    scaling = _scaling(config)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(config),
        scaling_config=scaling,
        torch_config=TorchConfig(backend=process_group_backend(bool(scaling.use_gpu))),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=str(run / "ray"),
            failure_config=FailureConfig(max_failures=config.launch.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    display = ProgressDisplay(run.name, config.training.num_steps)
    try:
        with LogFollower(run, display):
            outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise WorkerLostError(_explain(error, config)) from error
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def connect() -> None:
    """Join or start Ray, quietly; does nothing when this process already has.

    Raises:
        ConfigError: nothing answers at RAY_ADDRESS (Ray itself would try for minutes).
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(
                f"No Ray cluster answers at RAY_ADDRESS={address} ({error}): start it, correct the "
                "address, or unset RAY_ADDRESS to use or start one on this machine."
            ) from None
    ray.init(log_to_driver=False, logging_level=logging.WARNING)


def train_worker(settings: dict[str, Any]) -> RunResult | Exception:
    """What one Ray Train worker runs.

    An error that would only repeat is returned, not raised, so that Ray does not restart for it.
    """
    context = ray.train.get_context()
    ranks = Ranks(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
    )
    config = from_dict(settings)
    try:
        return train(config, Collectives(ranks), ray.train.torch.get_device())
    except ShardError:
        raise  # one rank's alone, and a copy in a cache or a network may heal
    except _PERMANENT as error:
        return error


def _scaling(config: RunConfig) -> ScalingConfig:
    """How many workers, each on how many CPUs, so that they fit on the nodes as they are."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wants_gpu = config.launch.device != "cpu"
    use_gpu = wants_gpu and (
        config.launch.device == "cuda" or any(node.get("GPU", 0) >= 1 for node in nodes)
    )
    kind = "GPU" if use_gpu else "CPU"
    places = [int(node[kind]) for node in nodes if node.get(kind, 0) >= 1]
    have = sum(places)
    num_workers = config.launch.num_workers or (have if use_gpu else min(2, have))
    if not 1 <= num_workers <= have:
        raise ConfigError(
            f"{num_workers or 'The'} workers need one {kind} each, but this Ray cluster has "
            f"{have}. Set launch.num_workers to at most {have}, or add nodes."
        )
    if config.training.batch_size % num_workers:
        raise ConfigError(
            f"training.batch_size={config.training.batch_size} sequences cannot be split over "
            f"{num_workers} workers: make it a multiple, or set launch.num_workers."
        )
    return ScalingConfig(
        num_workers=num_workers,
        use_gpu=use_gpu,
        resources_per_worker={
            "CPU": cpus_per_worker(
                [int(node.get("CPU", 0)) for node in nodes if node.get(kind, 0) >= 1],
                places,
                num_workers,
            ),
            **({"GPU": 1} if use_gpu else {}),
        },
    )


def cpus_per_worker(cpus: Sequence[int], places: Sequence[int], num_workers: int) -> int:
    """The most CPUs that each of `num_workers` workers can have on nodes with so many CPUs.

    Args:
        cpus: CPUs of each node that can hold workers.
        places: workers that each of these nodes can hold (its GPUs, or its CPUs).
        num_workers: at most the sum of `places`.
    """
    for share in range(max(cpus), 1, -1):
        fitting = sum(min(place, cpu // share) for cpu, place in zip(cpus, places, strict=True))
        if fitting >= num_workers:
            return share
    return 1


def _explain(error: TrainingFailedError, config: RunConfig) -> str:
    reasons = [str(error)]
    if isinstance(error, WorkerGroupError):
        reasons = [
            f"rank {rank}: {type(failure).__name__}: {failure}"
            for rank, failure in error.worker_failures.items()
        ]
    return (
        f"{config.output}: the workers failed and launch.max_failures={config.launch.max_failures} "
        f"restarts did not help. {' | '.join(reasons)} The newest checkpoint is whole: the same "
        "command continues from it."
    )
