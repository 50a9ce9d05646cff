"""A Ray cluster, as training sees it: joining it, what of it workers take, who comes and goes.

Importing this sets the variables that Ray reads when it is imported, so it comes before ray.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

# No usage statistics, no second copy of every printed line, no pages about a loss of which one line
# is told here, and a look at the workers twice a second, which is also how soon a lost one is
# noticed. What the user's environment says wins. A variable that a submitted job's environment has
# may be among those that `connect` passes on.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "worker died or was killed|node with node id|Raylet is terminated"
)
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")

import ray
from ray import ActorID, PlacementGroupID
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.util.placement_group import PlacementGroup, remove_placement_group

from tmu_dist.config import ConfigError, FaultConfig, LaunchConfig, RunConfig, ScaleConfig
from tmu_dist.data.manifest import MANIFEST_PATH
from tmu_dist.data.storage import MissingObjectError, exists, local_path, read_bytes
from tmu_dist.run_folder import CONFIG_FILE, SELECTED_FILE
from tmu_dist.teachers.store import CARD_FILE

log = logging.getLogger(__name__)

_STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")
"""First parts of the names of variables that say how to reach a store, and who asks."""
_CONTROLLER_VARIABLES = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2"}
"""Of what restarts lost workers: those left over get so many seconds to part before they are
ended. They hang in an exchange with the lost one, so longer is time lost."""
_WATCH_SECONDS = 1.0


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
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {**settings, **variables}},
    )


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
    return {k: v for k, v in os.environ.items() if remote and k.startswith(_STORE_VARIABLES)}


@contextmanager
def fault_settings(faults: FaultConfig) -> Iterator[None]:
    """What Ray Train reads in this process when it starts workers; the environment wins."""
    wanted = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(faults.start_timeout_seconds),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(faults.collective_timeout_seconds),
    }
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
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _renew_places() -> None:
    """Have Ray Train count the places for workers now; by itself it does every 20 seconds.

    Until then it tries to start workers on nodes that are lost. Ray has no public way to ask for
    it, and a Ray that lacks this one only counts later.
    """
    with suppress(ValueError, AttributeError, TypeError):
        counter = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(counter.get_reserved_resources.remote("", recompute=True), timeout=10)


def free_places_of_the_lost() -> None:
    """Give back what Ray Train workers still hold whose driver, an actor of this job, died.

    Ray Train leaves that to an actor that asks the dashboard, which need not run, and does not
    answer where several Rays share a machine. Ray has no public way to ask who made a placement
    group, and a Ray that lacks this one frees nothing here.
    """
    with suppress(ImportError, AttributeError, RayError):
        from ray._private.state import state
        from ray.core.generated.gcs_pb2 import PlacementGroupTableData

        job = ray.get_runtime_context().get_job_id()
        for row in state._connect_and_get_accessor().get_placement_group_table():
            group = PlacementGroupTableData.FromString(row)
            if (
                group.creator_actor_dead
                and not ActorID(group.creator_actor_id).is_nil()  # else it is Tune's, made here
                and group.creator_job_id.hex() == job
                and group.state != PlacementGroupTableData.REMOVED
            ):
                remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def wants_gpu(settings: LaunchConfig) -> bool:
    """Whether workers take a GPU each, on the cluster as it is."""
    if settings.device != "auto":
        return settings.device == "cuda"
    return any(node.get("GPU", 0) >= 1 for node in _resources())


def _resources() -> list[dict[str, float]]:
    """Of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def scaling(scale: ScaleConfig, settings: LaunchConfig) -> ScalingConfig:
    """How many workers, each on how many CPUs, so that they fit on the nodes as they are.

    Raises:
        ConfigError: not even the fewest workers fit.
    """
    use_gpu = wants_gpu(settings)
    cpus, places = worker_places(use_gpu, scale.cpus_per_worker)
    have = sum(places)
    default = have if use_gpu else min(2, have)
    fewest, most = scale.worker_range or (default, default)
    if not 1 <= fewest <= have:
        need = "one GPU" if use_gpu else "one CPU"
        if scale.cpus_per_worker is not None:
            need = f"{scale.cpus_per_worker} CPUs" + (" and one GPU" if use_gpu else "")
        raise ConfigError(
            f"{fewest or 'The'} workers need {need} each, but this Ray cluster has room for "
            f"{have}. Set scale.num_workers to at most {have}, or add nodes."
        )
    share = scale.cpus_per_worker or cpus_per_worker(cpus, places, fewest, most)
    return ScalingConfig(
        num_workers=fewest if fewest == most else (fewest, most),
        elastic_resize_monitor_interval_s=scale.resize_seconds,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": share, **({"GPU": 1} if use_gpu else {})},
    )


def worker_places(use_gpu: bool, share: int | None) -> tuple[list[int], list[int]]:
    """CPUs of each node that can hold workers, and how many workers it can hold.

    Args:
        use_gpu: workers take a GPU each.
        share: CPUs that each takes; None: they take what there is.
    """
    kind = "GPU" if use_gpu else "CPU"
    nodes = [node for node in _resources() if node.get(kind, 0) >= 1]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    places = [
        int(node[kind]) if share is None else min(int(node[kind]), cpu // share)
        for node, cpu in zip(nodes, cpus)
    ]
    return cpus, places


def cpus_per_worker(cpus: Sequence[int], places: Sequence[int], fewest: int, most: int) -> int:
    """The most CPUs that each worker can have, on nodes with so many CPUs.

    As many workers as there are places for must fit, up to `most`; and where their number may
    change, `fewest` of them still when any one node is lost, if its loss leaves room for them.

    Args:
        cpus: CPUs of each node that can hold workers.
        places: workers that each of these nodes can hold (its GPUs, or its CPUs).
        fewest: workers; at most the sum of `places`.
        most: workers; the same as `fewest` if their number is fixed.
    """

    def room(share: int, lost: int | None = None) -> int:
        return sum(
            min(place, cpu // share)
            for node, (place, cpu) in enumerate(zip(places, cpus, strict=True))
            if node != lost
        )

    wanted = min(most, sum(places))
    left = [node for node in range(len(cpus)) if fewest < most and room(1, lost=node) >= fewest]
    for share in range(max(cpus), 1, -1):
        if room(share) >= wanted and all(room(share, lost=node) >= fewest for node in left):
            return share
    return 1
