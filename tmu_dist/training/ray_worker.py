"""Ray Train around the training loop: start workers, turn them into ranks, restart lost ones.

Checkpoints and logs are the run folder's own, the same as without Ray, so a worker group that is
started again simply continues the run. Ray is told the results, not the weights.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

# Read by Ray when it is imported: no usage statistics, no second copy of every printed line, and
# a look at the workers twice a second, which is also how soon a lost one is noticed. A variable
# that a submitted job's environment has may be among those that `connect` passes on.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from tmu_dist.collectives import Collectives, Ranks, process_group_backend
from tmu_dist.config import ConfigError, LaunchConfig, RunConfig, from_dict
from tmu_dist.data.loader import ShardError
from tmu_dist.data.manifest import MANIFEST_PATH
from tmu_dist.data.storage import (
    MissingObjectError,
    StorageError,
    exists,
    local_path,
    read_bytes,
)
from tmu_dist.files import WriteError
from tmu_dist.run_folder import CONFIG_FILE
from tmu_dist.teachers.store import CARD_FILE
from tmu_dist.training.loop import NonFiniteLossError, RunResult, train
from tmu_dist.training.progress import LogFollower, ProgressDisplay
from tmu_dist.transfer.base import DeadDistillationError

_PERMANENT = (ValueError, WriteError, DeadDistillationError, NonFiniteLossError)
"""Errors that every rank raises and that starting again would only repeat."""

_STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")
"""First parts of the names of variables that say how to reach a store, and who asks."""


class WorkerLostError(RuntimeError):
    """Workers failed more often than launch.max_failures allows."""


def train_on_ray(config: RunConfig) -> RunResult:
    """Run `loop.train` on Ray Train workers and show its progress here.

    Joins the cluster of the job or of `RAY_ADDRESS`; otherwise the one running on this machine,
    or starts one for this process.

    Raises:
        ConfigError: the cluster has too few CPUs or GPUs for the workers, or Ray cannot use the
            store of the run folder.
        StorageError: a store that cannot be reached from here.
        WorkerLostError: workers failed more than `launch.max_failures` times.
        Everything that `loop.train` raises, under its own name.
    """
    name = PurePosixPath(config.output).name
    storage_path = _ray_storage(config.output)
    variables = reach_stores(config)
    connect(variables)
    scaling = _scaling(config)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(config),
        scaling_config=scaling,
        torch_config=TorchConfig(backend=process_group_backend(bool(scaling.use_gpu))),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            worker_runtime_env={"env_vars": variables},
            failure_config=FailureConfig(max_failures=config.launch.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    display = ProgressDisplay(name, config.training.num_steps)
    try:
        with LogFollower(config.output, display):
            outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise WorkerLostError(_explain(error, config)) from error
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def reach_stores(config: RunConfig) -> dict[str, str]:
    """Variables with which workers reach the stores that a run uses; none if it uses disks only.

    Each store is asked once from here, so that a wrong address or missing rights are not found by
    workers that start again and again.
    """
    known_files = {config.output: CONFIG_FILE}
    known_files |= dict.fromkeys((config.data.url, *config.data.mix_with), MANIFEST_PATH)
    known_files |= dict.fromkeys(config.transfer.teachers, CARD_FILE)
    remote = {url: file for url, file in known_files.items() if local_path(url) is None}
    for url, file in remote.items():
        if not exists(url, file):
            with suppress(MissingObjectError):  # the workers know better what that means
                read_bytes(url, file)  # says whether there is a bucket at all
    return {k: v for k, v in os.environ.items() if remote and k.startswith(_STORE_VARIABLES)}


def _ray_storage(output: str) -> str:
    """Where Ray keeps its own files of a run.

    Raises:
        ConfigError: Ray reads its own way from stores, and not from this one.
    """
    if local_path(output) is None and not output.startswith(("s3://", "gs://")):
        raise ConfigError(
            f"output={output!r}: with Ray, a run folder is on a disk that all workers see, or at "
            "s3:// or gs://. Use one of these, or launch.launcher=local or torchrun."
        )
    return f"{output}/ray"


def connect(variables: dict[str, str]) -> None:
    """Join or start Ray, quietly; does nothing when this process already has.

    Args:
        variables: for the environment of everything that this process starts there.

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
    ray.init(
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": variables},
    )


def train_worker(settings: dict[str, Any]) -> RunResult | Exception:
    """What one Ray Train worker runs.

    An error that would only repeat is returned, not raised, so that Ray does not restart for it.
    A store that was out of reach may be back, and a damaged copy of a shard is one rank's alone.
    """
    context = ray.train.get_context()
    ranks = Ranks(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
    )
    config = from_dict(settings)
    try:
        return train(config, Collectives(ranks), ray.train.torch.get_device())
    except MissingObjectError as error:
        return error
    except (ShardError, StorageError):
        raise
    except _PERMANENT as error:
        return error


def wants_gpu(settings: LaunchConfig) -> bool:
    """Whether workers take a GPU each, on the cluster as it is."""
    if settings.device != "auto":
        return settings.device == "cuda"
    return any(node.get("GPU", 0) >= 1 for node in _nodes())


def _nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _scaling(config: RunConfig) -> ScalingConfig:
    """How many workers, each on how many CPUs, so that they fit on the nodes as they are."""
    nodes, use_gpu = _nodes(), wants_gpu(config.launch)
    kind = "GPU" if use_gpu else "CPU"
    places = [int(node[kind]) for node in nodes if node.get(kind, 0) >= 1]
    have = sum(places)
    default = have if use_gpu else min(2, have)
    num_workers, _ = config.scale.worker_range or (default, default)
    if not 1 <= num_workers <= have:
        raise ConfigError(
            f"{num_workers or 'The'} workers need one {kind} each, but this Ray cluster has "
            f"{have}. Set scale.num_workers to at most {have}, or add nodes."
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
