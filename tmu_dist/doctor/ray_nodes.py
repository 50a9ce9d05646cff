"""Every node of a Ray cluster, looked at by an actor of its own, all at once.

An actor takes no CPUs, so it also comes to nodes that are busy. One that does not answer in time is
given up and told of; none of them outlives the look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_cluster import alive_nodes, connect

import ray  # isort: skip
from ray.exceptions import GetTimeoutError, RayError  # isort: skip
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # isort: skip

from tmu_dist.doctor.nodes import NodeFacts, look_at_node
from tmu_dist.doctor.places import Wanted

_START_SECONDS, _LOOK_SECONDS, _CLOCK_SECONDS = 30.0, 35.0, 5.0
_CLOCK_QUESTIONS = 5


@dataclass(frozen=True, kw_only=True)
class ClusterFacts:
    """The nodes of a cluster."""

    nodes: tuple[NodeFacts, ...]
    silent: Mapping[str, str]
    """Why a node did not answer, by its address."""
    listens_at: str
    """HOST:PORT of the head."""
    is_own: bool
    """Whether this process started it."""


def look_at_nodes(wanted: Wanted, variables: Mapping[str, str]) -> ClusterFacts:
    """Look at every node that is alive.

    Joins the cluster as a run does (`ray_cluster.connect`), which may start one.

    Args:
        wanted: places and cache of the run.
        variables: with which nodes reach its stores.

    Raises:
        ConfigError, RayError, ConnectionError, RuntimeError: the cluster cannot be joined.
    """
    connect(variables)
    nodes = alive_nodes()
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    promised = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
    actors = {name: _start(name, variables) for name in names}
    failures: dict[str, str] = {}
    try:
        started = {name: actor.has_authentication.remote() for name, actor in actors.items()}
        asks_for_token = _gather(started, _START_SECONDS, failures)
        clocks = _of_each(asks_for_token, lambda name: _clock_offset(actors[name]), failures)
        looks = {
            name: actors[name].look.remote(replace(wanted, number=number), names[name])
            for number, name in enumerate(clocks)
        }
        facts = _gather(looks, _LOOK_SECONDS, failures)
    finally:
        for actor in actors.values():
            ray.kill(actor)
    return ClusterFacts(
        nodes=tuple(
            replace(
                of_node,
                promised_gpus=promised[name],
                clock_offset_seconds=clocks[name][0],
                clock_uncertainty_seconds=clocks[name][1],
                has_authentication=asks_for_token[name],
            )
            for name, of_node in facts.items()
        ),
        silent={names[name]: why for name, why in failures.items()},
        listens_at=ray.get_runtime_context().gcs_address,
        is_own=_is_own(),
    )


class _Observer:
    """Lives on the node that it looks at."""

    def has_authentication(self) -> bool | None:
        """Whether Ray asks for a token here; None if this Ray does not say."""
        try:
            from ray._private.authentication.authentication_utils import is_token_auth_enabled
        except ImportError:
            return None
        return is_token_auth_enabled()

    def clock(self) -> float:
        return time.time()

    def look(self, wanted: Wanted, address: str) -> NodeFacts:
        return look_at_node(wanted, address)


def _start(node: str, variables: Mapping[str, str]) -> Any:
    """An observer on a node, which sees its GPUs without taking any."""
    there = {**variables, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    observer = ray.remote(_Observer).options(
        num_cpus=0,
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        runtime_env={"env_vars": there},
    )
    return observer.remote()


def _gather(
    answers: Mapping[str, Any], patience_seconds: float, failures: dict[str, str]
) -> dict[str, Any]:
    """What came of remote calls, by the node; why others did not come goes to `failures`."""
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=patience_seconds)
    return _of_each(answers, lambda name: ray.get(answers[name], timeout=0.1), failures)


def _of_each(
    names: Mapping[str, Any] | Sequence[str],
    ask: Callable[[str], Any],
    failures: dict[str, str],
) -> dict[str, Any]:
    found = {}
    for name in names:
        try:
            found[name] = ask(name)
        except GetTimeoutError:
            failures[name] = "it took too long."
        except RayError as error:
            failures[name] = _reason(error)
    return found


def _reason(error: RayError) -> str:
    """The last line that says something: Ray's messages begin with traces of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _clock_offset(actor: Any) -> tuple[float, float]:
    """How much a node's clock is ahead of this one, and how sure that is: half a round trip."""
    best = (0.0, float("inf"))
    for _ in range(_CLOCK_QUESTIONS):
        asked = time.time()
        there = ray.get(actor.clock.remote(), timeout=_CLOCK_SECONDS)
        half = (time.time() - asked) / 2
        if half < best[1]:
            best = (there - asked - half, half)
    return best


def _is_own() -> bool:
    """Whether this process started the Ray that it is joined to. Ray has no public way to ask."""
    with suppress(ImportError, AttributeError):
        from ray._private.worker import _global_node

        return bool(_global_node.is_head())
    return False
