"""Places for workers on a Ray cluster: how many there are, waiting for more, who has left some."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_cluster import alive_nodes

import ray  # isort: skip
from ray import ActorID, PlacementGroupID  # isort: skip
from ray.autoscaler.sdk import request_resources  # isort: skip
from ray.exceptions import RayError  # isort: skip
from ray.train import ScalingConfig  # isort: skip
from ray.util.placement_group import PlacementGroup, remove_placement_group  # isort: skip

from tmu_dist.config import ConfigError, LaunchConfig, ScaleConfig

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


def wants_gpu(settings: LaunchConfig) -> bool:
    """Whether workers take a GPU each, on the cluster as it is."""
    if settings.device != "auto":
        return settings.device == "cuda"
    return any(node.get("GPU", 0) >= 1 for node in _resources())


def _resources() -> list[dict[str, float]]:
    """Of each node that is alive."""
    return [node["Resources"] for node in alive_nodes()]


def wait_for_places(scale: ScaleConfig, *, use_gpu: bool) -> None:
    """Have an autoscaler start the nodes that the fewest workers lack, and wait until they come.

    Returns when there is room, or when the patience is over. Ray does not tell whether a cluster
    has an autoscaler at all, so it is the user who says that waiting makes sense.
    """
    fewest = (scale.worker_range or (1, 1))[0]
    bundle = {"CPU": scale.cpus_per_worker or 1, **({"GPU": 1} if use_gpu else {})}
    deadline = time.monotonic() + scale.patience_seconds
    told = None
    try:
        while (have := sum(worker_places(use_gpu, scale.cpus_per_worker)[1])) < fewest:
            if time.monotonic() >= deadline:
                return
            if told is None:
                request_resources(bundles=fewest * [bundle])
            if have != told:
                told = have
                log.info("%d of %d workers have a place: waiting for nodes", have, fewest)
            time.sleep(_LOOK_SECONDS)
    finally:
        if told is not None:
            request_resources(bundles=[])  # the workers themselves keep the nodes from here on


def scaling(scale: ScaleConfig, settings: LaunchConfig) -> ScalingConfig:
    """How many workers, each on how many CPUs, so that they fit on the nodes.

    An autoscaler is asked for nodes for the fewest workers, if there are too few.

    Raises:
        ConfigError: not even the fewest workers fit.
    """
    use_gpu = wants_gpu(settings)
    wait_for_places(scale, use_gpu=use_gpu)
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
            f"{have}. {f'Set scale.num_workers to at most {have}, or add' if have else 'Add'} "
            "nodes; where an autoscaler adds them, say how long to wait for it "
            "(scale.patience_seconds), and launch.device=cuda if they are to have GPUs and none of "
            "the present ones has."
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
