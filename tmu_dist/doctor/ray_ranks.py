"""The look of ranks.py on Ray Train workers, as many and where those of the run would be.

They start as training starts them (training/ray_worker.py), with a process group over the same
interface and Ray's own files in a folder beside the run's, which goes away again. Nothing is tried
twice. What ranks see comes through a queue, so that it is known of those, too, that hang or die.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_cluster import (
    connect,
    fault_settings,
    reach_stores,
    store_variables,
)

import ray.train  # isort: skip
from ray.exceptions import RayError  # isort: skip
from ray.train import FailureConfig, LoggingConfig  # isort: skip
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError  # isort: skip
from ray.util.queue import Queue  # isort: skip

from tmu_dist.collectives import Collectives, process_group_backend
from tmu_dist.config import FaultConfig, RunConfig, from_dict
from tmu_dist.data.storage import StorageError, delete_many, list_paths, local_path
from tmu_dist.doctor.rank_facts import RankFacts, RanksSeen
from tmu_dist.doctor.ranks import introduce, look_at_rank
from tmu_dist.training.ray_failures import told_failure
from tmu_dist.training.ray_group import RankBackend, RankConfig, Trainer, own_device, own_ranks
from tmu_dist.training.ray_places import scaling

_PATIENCE_SECONDS = 60
"""That ranks wait for each other. Longer than the slowest of them may take to load teachers or to
copy its first shards; a broken network costs as much."""
_NAMES_ERROR = re.compile(r"[\w.]+(Error|Exception)\b.*:")
_MOST_TOLD = 600
_FAULTS = FaultConfig(collective_timeout_seconds=_PATIENCE_SECONDS, start_timeout_seconds=30.0)


def look_at_ranks_on_ray(config: RunConfig, *, inputs_ready: bool = True) -> RanksSeen:
    """Look from every rank of a run on Ray.

    Nothing is raised for what goes wrong: that is what is looked for.

    Args:
        config: the run, with absolute paths.
        inputs_ready: False: archive or teachers are not there yet; only the exchange is tried.
    """
    try:
        variables = reach_stores(config) if inputs_ready else store_variables([config.output])
        connect(variables)
        workers = scaling(config.scale, config.launch)
    except (ValueError, StorageError, RayError) as error:
        return RanksSeen(error=str(error))
    told = Queue(actor_options={"num_cpus": 0})
    error_text = ""
    with _folder(config.output) as folder, fault_settings(_FAULTS):
        trainer = Trainer(
            _look,
            train_loop_config={
                "config": asdict(config),
                "inputs_ready": inputs_ready,
                "told": told,
            },
            scaling_config=workers,
            backend_config=_LookConfig(
                communication=process_group_backend(bool(workers.use_gpu)),
                timeout_seconds=_PATIENCE_SECONDS,
                told=told,
            ),
            run_config=ray.train.RunConfig(
                name="look",
                storage_path=folder,
                worker_runtime_env={"env_vars": variables},
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # nothing is hidden: it is what was looked for
            error_text = _reason(error)
    seen = RanksSeen(ranks=_heard(told), error=error_text)
    told.shutdown(force=True)
    return seen


@dataclass
class _LookConfig(RankConfig):
    """The run's process group; each rank says who it is before it is made."""

    told: Queue | None = None

    @property
    def backend_cls(self) -> type:
        return _LookBackend


class _LookBackend(RankBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called by Ray before the group is made."""
        worker_group.execute(_introduce, backend_config.told)
        super().on_start(worker_group, backend_config)


def _heard(told: Queue) -> tuple[RankFacts, ...]:
    """The last that was heard of each rank."""
    newest: dict[int, RankFacts] = {}
    with suppress(RayError):  # the node that kept the queue is gone
        for facts in told.get_nowait_batch(told.qsize()):
            newest[facts.rank] = facts
    return tuple(newest[rank] for rank in sorted(newest))


def _reason(error: Exception) -> str:
    """In one line: Ray tells the whole trace of whoever failed."""
    if isinstance(error, WorkerGroupError):
        return told_failure(error.worker_failures)
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    named = [line for line in lines if _NAMES_ERROR.match(line)]
    return (named or lines or [type(cause).__name__])[-1][:_MOST_TOLD]


@contextmanager
def _folder(output: str) -> Iterator[str]:
    """A place for Ray's own files where those of the run would be; gone afterwards."""
    name = f".doctor-{secrets.token_hex(4)}"
    try:
        yield f"{output}/{name}"
    finally:
        with suppress(StorageError):
            delete_many(output, list_paths(output, name))
        if (folder := local_path(output)) is not None:
            for empty in sorted((folder / name).rglob("*"), reverse=True):
                with suppress(OSError):
                    empty.rmdir()
            for each in (folder / name, folder):
                with suppress(OSError):  # a run lies there
                    each.rmdir()


# In the workers


def _introduce(told: Queue) -> None:
    """Say who this rank is, while nothing has been tried yet."""
    told.put(introduce(own_ranks(), own_device(), ray.util.get_node_ip_address()))


def _look(settings: dict[str, Any]) -> None:
    """What one Ray Train worker runs.

    Raises:
        RuntimeError: a step failed here, and the others may wait for this rank; Ray ends them.
    """
    facts = look_at_rank(
        from_dict(settings["config"]),
        Collectives(own_ranks()),
        own_device(),
        settings["inputs_ready"],
        node=ray.util.get_node_ip_address(),
        tell=settings["told"].put,
    )
    if "step" in facts.failures:
        raise RuntimeError(facts.failures["step"].text)
