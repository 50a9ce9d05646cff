"""Ray Train around the training loop: start workers, turn them into ranks, restart lost ones.

Checkpoints and logs are the run folder's own, the same as without Ray, so a worker group that is
started again, with as many workers or others, simply continues the run. Ray is told the results,
not the weights.
"""

from __future__ import annotations

import logging
import queue
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_cluster import (
    fault_settings,
    own_log,
    seen_folders,
    watched_nodes,
)

import ray.train  # isort: skip
from ray.exceptions import RayError  # isort: skip
from ray.train import FailureConfig, LoggingConfig  # isort: skip
from ray.train.v2.api.exceptions import TrainingFailedError  # isort: skip

from tmu_dist.collectives import Collectives, process_group_backend
from tmu_dist.config import ConfigError, RunConfig, from_dict
from tmu_dist.data.archive import ShardError
from tmu_dist.data.storage import (
    MissingObjectError,
    StorageError,
    delete,
    exists,
    read_text,
)
from tmu_dist.files import WriteError
from tmu_dist.folders import write_text
from tmu_dist.provenance import command_line
from tmu_dist.run_folder import RunResult
from tmu_dist.training.progress import LogFollower
from tmu_dist.training.rank_log import rank_log
from tmu_dist.training.ray_failures import LossRecord, RestartDisplay, explain
from tmu_dist.training.ray_group import (
    RankConfig,
    Trainer,
    own_device,
    own_ranks,
    start_coordinator,
)
from tmu_dist.training.ray_metrics import RunMetrics
from tmu_dist.training.ray_places import scaling
from tmu_dist.training.run_lock import lock_run
from tmu_dist.training.stopping import (
    ASK_AGAIN_SECONDS,
    STOP_FILE,
    RunStoppedError,
    Signals,
    ask_to_stop,
)

log = logging.getLogger(__name__)

_TRANSIENT = (ShardError, StorageError)
"""Though they are values' errors: a damaged copy of a shard is one rank's alone, and a store may be
back."""

_TOKEN_FILE = "ray/start.txt"
"""By it workers see that they have the same run folder before them as who started them."""
_PATIENCE_SECONDS = 90.0
"""For the lock of an earlier start: after the loss of its node, a shared disk may keep it."""
_LOOK_SECONDS = 0.5
_NOTICE_SECONDS = 1.0
_SETTLE_SECONDS, _MOST_SECONDS = 3.0, 20.0
"""After the time at which a node is taken away; and at most, if it was earlier."""


class WorkerLostError(RuntimeError):
    """Workers failed more often than launch.max_failures allows."""


def train_on_ray(config: RunConfig, variables: Mapping[str, str]) -> RunResult:
    """Run `loop.train` on Ray Train workers and show its progress here.

    SIGTERM or Ctrl-C stops the run after a checkpoint; a second
    one ends this process, and its workers with it, at once.

    Args:
        config: the run.
        variables: of the workers, as `ray_cluster.connect_for` gives them, which comes first.

    Raises:
        ConfigError: the cluster has too few CPUs or GPUs for the workers, or a node does not see a
            folder of the run.
        ResumeError: another command trains in the run folder.
        WorkerLostError: workers failed more than `launch.max_failures` times.
        Everything that `loop.train` raises, under its own name.
    """
    start_coordinator()
    workers = scaling(config.scale, config.launch)
    lock = lock_run(config.output, patience_seconds=_PATIENCE_SECONDS)
    try:
        write_text(config.output, _TOKEN_FILE, token := secrets.token_hex(8))
        trainer = Trainer(
            train_worker,
            train_loop_config={
                "config": asdict(config),
                "token": token,
                "folders": seen_folders(config),
                "command": command_line(),
            },
            scaling_config=workers,
            backend_config=RankConfig(
                communication=process_group_backend(bool(workers.use_gpu)),
                timeout_seconds=config.faults.collective_timeout_seconds,
            ),
            run_config=ray.train.RunConfig(
                name=PurePosixPath(config.output).name,
                storage_path=f"{config.output}/ray",
                worker_runtime_env={"env_vars": variables},
                failure_config=FailureConfig(max_failures=config.launch.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
                callbacks=[LossRecord(config.output)],
            ),
        )
        with (
            fault_settings(config.faults),
            watched_nodes(),
            LogFollower(
                config.output,
                RestartDisplay(config),
                RunMetrics(config.output, config.training.num_steps),
            ),
        ):
            outcome = _fit(trainer, config)
    finally:
        lock.close()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _fit(trainer: Trainer, config: RunConfig) -> RunResult | Exception:
    """Run the workers to their end, in another thread: signals are for this one.

    Ray's own answer to Ctrl-C, which it gives in a main thread only, ends workers without a
    checkpoint.
    """
    ends: queue.SimpleQueue[RunResult | Exception] = queue.SimpleQueue()

    def fit() -> None:
        try:
            ends.put(trainer.fit().return_value)
        except TrainingFailedError as error:
            lost = WorkerLostError(explain(error, config))
            lost.__cause__ = error
            ends.put(lost)
        except Exception as error:  # nothing is hidden: the caller raises it
            ends.put(error)

    asked: list[str] = []

    def hear(name: str) -> None:
        asked.append(name)
        run = PurePosixPath(config.output).name
        log.warning("%s: %s: stops after a checkpoint; once more ends it now", run, name)

    thread = threading.Thread(target=fit, daemon=True)
    with closing(Signals((signal.SIGTERM, signal.SIGINT), hear)):
        thread.start()
        while thread.is_alive():
            thread.join(ASK_AGAIN_SECONDS if asked else _LOOK_SECONDS)
            if asked:
                ask_to_stop(config.output, asked[0])
    if asked:
        with suppress(StorageError):  # the next start removes it, too
            delete(config.output, STOP_FILE)
    return ends.get_nowait()


def would_only_repeat(error: Exception) -> bool:
    """Whether a run that is started again after an error ends with the same one, on every rank."""
    from tmu_dist.training.loop import NonFiniteLossError
    from tmu_dist.transfer.base import DeadDistillationError

    if isinstance(error, MissingObjectError):
        return True
    permanent = (ValueError, WriteError, DeadDistillationError, NonFiniteLossError, RunStoppedError)
    return isinstance(error, permanent) and not isinstance(error, _TRANSIENT)


# In the workers


def train_worker(settings: dict[str, Any]) -> RunResult | Exception:
    """What one Ray Train worker runs.

    An error that would only repeat is returned, not raised, so that Ray does not restart for it.
    A store that was out of reach may be back, and a damaged copy of a shard is one rank's alone.

    Args:
        settings: the run's `config` as plain values, the `token` in the run folder, `folders` on
            disks that a file shows to be there, as who started the run sees them, and the `command`
            that did.
    """
    from tmu_dist.training.loop import train

    logging.getLogger("tmu_dist").setLevel(logging.INFO)
    ranks = own_ranks()
    config = from_dict(settings["config"])
    collectives = Collectives(ranks)
    notice = _PreemptionNotice(ranks.rank)
    try:
        collectives.on_all(
            lambda: _check_folders(config.output, settings["token"], settings["folders"])
        )
        with rank_log(config.output, ranks, f"Ray's own log of it is {own_log()} there"):
            return train(
                config,
                collectives,
                own_device(),
                notice=notice,
                is_locked=True,
                command=settings["command"],
            )
    except Exception as error:
        if would_only_repeat(error):
            return error
        if isinstance(error, RuntimeError):
            notice.wait_for_loss()
        raise


def _check_folders(run: str, token: str, folders: Mapping[str, str]) -> None:
    """Make sure that this node sees the disks that the node of the command sees.

    Raises:
        ConfigError: it does not; names node and folder.
    """
    is_seen = exists(run, _TOKEN_FILE) and read_text(run, _TOKEN_FILE) == token
    missing = [folder for folder, file in folders.items() if not exists(folder, file)]
    if is_seen and not missing:
        return
    lacks = missing[0] if is_seen else f"the run folder {run}"
    raise ConfigError(
        f"Node {ray.util.get_node_ip_address()} does not see {lacks} as the node does where the "
        "command runs. Put it on a disk that all nodes have under that path (NFS), or in a store "
        "such as s3://bucket/name."
    )


class _PreemptionNotice:
    """Says once, after some step, that nodes of this run will be taken away.

    Ray tells it in a call that waits for all workers, so another thread makes it, every second.
    Only rank 0 tells it on.
    """

    def __init__(self, rank: int) -> None:
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._is_main = rank == 0
        self._deadline: float | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def __call__(self) -> str | None:
        return None if self._news.empty() else self._news.get()

    def wait_for_loss(self) -> None:
        """After a failed exchange: if a node was about to be taken away, let Ray find that out.

        Otherwise it would count what was announced as a failure of the run.
        """
        if self._deadline is not None:
            left = self._deadline + _SETTLE_SECONDS - time.time()
            time.sleep(min(max(left, 0), _MOST_SECONDS))

    def _listen(self) -> None:
        known = None
        with suppress(RayError):  # the worker group is being ended
            while True:
                info = ray.train.get_preemption_info()
                if info is not None and info != known:
                    self._deadline = (info.deadline_ms or 1000 * time.time()) / 1000
                    if self._is_main:
                        self._news.put(_told_preemption(info.preempted_ranks, info.deadline_ms))
                known = info
                time.sleep(_NOTICE_SECONDS)


def _told_preemption(ranks: list[int], deadline_ms: int | None) -> str:
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    when = "soon" if deadline_ms is None else f"in {deadline_ms / 1000 - time.time():.0f} s"
    return f"the node of {who} will be taken away {when}"
