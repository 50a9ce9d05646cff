"""A Ray cluster, as training sees it: joining it, who comes and goes.

Importing this sets the variables that Ray reads when it is imported, so it comes before ray.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

# No usage statistics, no second copy of every printed line, no pages about a loss of which one line
# is told here, and a look at the workers twice a second, which is also how soon a lost one is
# noticed. What the user's environment says wins. A variable that a submitted job's environment has
# may be among those that `connect` passes on.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "worker died or was killed|node with node id|Raylet is terminated"
)
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")

import ray
from ray.exceptions import RayError

from tmu_dist.config import ConfigError, FaultConfig, RunConfig
from tmu_dist.data.manifest import MANIFEST_PATH
from tmu_dist.data.storage import MissingObjectError, exists, local_path, read_bytes
from tmu_dist.run_folder import CONFIG_FILE, SELECTED_FILE
from tmu_dist.teachers.card import CARD_FILE

log = logging.getLogger(__name__)

_STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")
"""First parts of the names of variables that say how to reach a store, and who asks."""
NODES_KNOW_STORES = "TMU_DIST_NODES_KNOW_STORES"
"""Set to 1 in the environment of `ray start` where every node has these variables, or rights of its
own (a role, a service account)."""
PARTING_SECONDS = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
"""Ray's name of how long those left over from lost workers may take to part before they are
ended."""
_CONTROLLER_VARIABLES = {PARTING_SECONDS: "2"}
"""Of what restarts lost workers: they hang in an exchange with the lost one, so longer is time
lost."""
_WATCH_SECONDS = 1.0
_is_own = False


def connect(variables: Mapping[str, str]) -> None:
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
    settings = {name: os.environ.get(name, value) for name, value in _CONTROLLER_VARIABLES.items()}
    ray.init(
        include_dashboard=False,  # of a Ray that is started here, which nothing asks for its pages
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {**settings, **variables}},
    )
    global _is_own
    with suppress(AttributeError):  # Ray has no public way to ask
        _is_own = ray._private.worker._global_node.is_head()


def connect_for(config: RunConfig) -> dict[str, str]:
    """Join or start Ray for a run; returns the variables that its workers need.

    Joins the cluster of the job or of `RAY_ADDRESS`; otherwise the one running on this machine, or
    starts one for this process.

    Raises:
        ConfigError: as `connect`, or Ray cannot use the store of the run folder.
        StorageError: a store that cannot be reached from here.
    """
    _check_store(config.output)
    connect(variables := reach_stores(config))
    return variables


def _check_store(output: str) -> None:
    """Raise a ConfigError if Ray, which reads its own way from stores, cannot use this one."""
    if local_path(output) is None and not output.startswith(("s3://", "gs://")):
        raise ConfigError(
            f"output={output!r}: with Ray, a run folder is on a disk that all workers see, or at "
            "s3:// or gs://. Use one of these, or launch.launcher=local or torchrun."
        )


def is_own() -> bool:
    """Whether `connect` started the Ray of this process: one machine, and it ends with it."""
    return _is_own


def seen_folders(config: RunConfig) -> dict[str, str]:
    """Folders on disks that a run reads and this process sees, each with a file that is in it."""
    folders = (config.data.url, *config.data.mix_with, *config.transfer.teachers)
    return {
        folder: mark
        for folder in folders
        for mark in (MANIFEST_PATH, CARD_FILE, SELECTED_FILE)
        if local_path(folder) is not None and exists(folder, mark)
    }


def reach_stores(config: RunConfig) -> dict[str, str]:
    """Variables with which workers reach the stores that a run uses; none if it uses disks only.

    Each store is asked once from here, so that a wrong address or missing rights are not found by
    workers that start again and again.
    """
    known_files = {config.output: CONFIG_FILE}
    if config.placement.cache is not None:
        known_files[config.placement.cache] = CONFIG_FILE  # any name: it asks for the bucket
    known_files |= dict.fromkeys((config.data.url, *config.data.mix_with), MANIFEST_PATH)
    known_files |= dict.fromkeys(config.transfer.teachers, CARD_FILE)
    remote = {url: file for url, file in known_files.items() if local_path(url) is None}
    for url, file in remote.items():
        if not exists(url, file):
            with suppress(MissingObjectError):  # the workers know better what that means
                read_bytes(url, file)  # says whether there is a bucket at all
    return store_variables(remote)


def store_variables(urls: Iterable[str]) -> dict[str, str]:
    """Variables of this process that say how to reach stores; none if all the URLs are disks'.

    None either where the nodes have their own (`NODES_KNOW_STORES`): what is passed on can be read
    in Ray's dashboard, keys too.
    """
    if os.environ.get(NODES_KNOW_STORES) == "1" or all(local_path(url) for url in urls):
        return {}
    return {k: v for k, v in os.environ.items() if k.startswith(_STORE_VARIABLES)}


@contextmanager
def fault_settings(faults: FaultConfig) -> Iterator[None]:
    """What Ray Train reads in this process when it starts workers; the environment wins."""
    wanted = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(faults.start_timeout_seconds),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(faults.collective_timeout_seconds),
    }
    if is_own():  # nobody announces that this machine will be taken away
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def watched_nodes() -> Iterator[None]:
    """Tell of nodes that come and go while the block runs, the user and Ray Train."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch_nodes, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)  # a question to a head that is gone may stay without an answer


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray says of each node that is there, by address: Ray's own order is any."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return sorted(alive, key=lambda node: (_natural(node["NodeManagerAddress"]), node["NodeID"]))


def _natural(address: str) -> list[tuple[int, str]]:
    """What sorts 10.0.0.9 before 10.0.0.10."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", address)]


def _watch_nodes(ended: threading.Event) -> None:
    known = _addresses()
    while not ended.wait(_WATCH_SECONDS):
        try:
            now = _addresses()
            if now == known:
                continue
            for node in known.keys() - now.keys():
                log.warning("node %s lost, %d left", known[node], len(now))
            for node in now.keys() - known.keys():
                log.warning("node %s joined, %d now", now[node], len(now))
            known = now
            _renew_places()
        except RayError as error:
            log.debug("%s", error)


def _addresses() -> dict[str, str]:
    """Addresses of the nodes that are alive, by their names in Ray."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in alive_nodes()}


def _renew_places() -> None:
    """Have Ray Train count the places for workers now; by itself it does every 20 seconds.

    Until then it tries to start workers on nodes that are lost. Ray has no public way to ask for
    it, and a Ray that lacks this one only counts later.
    """
    with suppress(ValueError, AttributeError, TypeError):
        counter = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(counter.get_reserved_resources.remote("", recompute=True), timeout=10)


def own_log() -> str:
    """Where Ray keeps the output of this worker, on its node; Ray has no public way to ask."""
    with suppress(AttributeError):
        return str(ray._private.worker.global_worker.get_err_file_path()) or "unknown"
    return "unknown"


def cluster_state() -> dict[str, Any]:
    """What Ray knows of the cluster: nodes, lost ones too, what is taken, by which groups.

    Asks the cluster of this process, or that of RAY_ADDRESS; starts none.

    Raises:
        ConnectionError, ConfigError: there is none, or it does not answer.
    """
    if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
        raise ConnectionError("This process is in no Ray cluster.")
    connect({})
    return {
        "version": ray.__version__,
        "resources": ray.cluster_resources(),
        "free": ray.available_resources(),
        "nodes": ray.nodes(),
        "placement_groups": ray.util.placement_group_table(),
    }
