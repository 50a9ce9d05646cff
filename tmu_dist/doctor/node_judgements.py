"""What follows from the facts of all nodes. Pure: every fault can be judged without having it.

The majority is taken to be right, so that the odd node is named. The same finding on several nodes
is told once.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address

from tmu_dist.data.cache_folder import gib
from tmu_dist.doctor.findings import Finding
from tmu_dist.doctor.nodes import DRIVER, SOURCE, NodeFacts
from tmu_dist.doctor.place_judgements import judge_places
from tmu_dist.doctor.telling import fault, ok, told_once, warning

_MUST_BE_EQUAL = ("torch", "ray", "tmu-dist", SOURCE)
_WARN_SECONDS, _FAULT_SECONDS = 1.0, 30.0
"""Of clocks. Logs are compared by time, stores refuse requests of minutes, and what is leased or
announced in seconds (a spot node's end) comes too late long before."""
_BUSY_SHARE = 0.2
"""Of a GPU's memory that somebody else holds."""


def judge_nodes(
    nodes: Sequence[NodeFacts],
    silent: Mapping[str, str],
    *,
    asking: Mapping[str, str],
    wants_gpu: bool,
) -> list[Finding]:
    """What follows from the facts of all nodes but who may use the cluster (`judge_token`).

    Args:
        nodes: those that answered.
        silent: why others did not, by address.
        asking: versions of the process that asks, and will start the run.
        wants_gpu: the run asks for GPUs, whatever there is.
    """
    return [
        *judge_answers(nodes, silent),
        *judge_versions(nodes, asking),
        *judge_gpus(nodes, wants_gpu=wants_gpu),
        *judge_clocks(nodes),
        *judge_caches(nodes),
        *judge_places(nodes),
    ]


def judge_answers(nodes: Sequence[NodeFacts], silent: Mapping[str, str]) -> list[Finding]:
    """Name the nodes that did not answer."""
    told = [
        fault(
            "nodes",
            f"No answer: {why}",
            "Install the project there (cluster/README.md), or look into Ray's logs on that node; "
            "or take it out of the cluster.",
            address,
        )
        for address, why in silent.items()
    ]
    return told or [ok("nodes", f"{_number(len(nodes))} answered.")]


def judge_versions(nodes: Sequence[NodeFacts], asking: Mapping[str, str]) -> list[Finding]:
    """Name each node whose versions are not those of most nodes, and the command itself."""
    names = list(dict.fromkeys(name for node in nodes for name in node.versions))
    have = {node.address: node.versions for node in nodes} | {"this command": asking}
    usual = {
        name: _usual(value for versions in have.values() if (value := versions.get(name)))
        for name in names
    }
    findings = []
    for address, versions in have.items() if nodes else ():
        odd = {
            name: versions.get(name, "unknown")
            for name in names
            if versions.get(name, "unknown") not in (usual[name], "none")
        }
        if odd:
            told = ", ".join(f"{name} {has}, not {usual[name]}" for name, has in odd.items())
            findings.append(
                Finding(
                    check="versions",
                    status="fault" if set(odd) & set(_MUST_BE_EQUAL) else "warning",
                    where=address,
                    found=f"It differs from most nodes: {told}.",
                    advice=_advice_on_versions(odd),
                )
            )
    if nodes and not findings:
        known = ", ".join(f"{name} {has}" for name, has in usual.items() if has != "none")
        findings.append(ok("versions", f"{known}."))
    return findings


def _advice_on_versions(differing: Mapping[str, str]) -> str:
    if set(differing) == {DRIVER}:
        return "Give all nodes the same image, or install the same NVIDIA driver."
    if SOURCE in differing:
        return (
            "Submit from one checkout (`ray job submit --working-dir .` sends it to every node), "
            "or copy the project to that node again."
        )
    return "Install there with `pip install -c constraints.txt`, as on the other nodes."


def _usual(values: Iterable[str]) -> str:
    """The most common value; "none", as the driver of a node without GPUs, only if all are."""
    counts = Counter(values)
    return max(counts, key=lambda value: (value != "none", counts[value]))


def judge_gpus(nodes: Sequence[NodeFacts], *, wants_gpu: bool) -> list[Finding]:
    """Compare what Ray promises with what torch sees, and tell what does not compute."""
    findings = [finding for node in nodes for finding in _judge_gpus_of(node)]
    seen = [gpu for node in nodes for gpu in node.gpus]
    if wants_gpu and not seen and not findings:
        why = {node.gpu_error for node in nodes}
        findings.append(
            fault(
                "gpus",
                f"launch.device=cuda, but no node has a GPU: {'; '.join(sorted(why))}.",
                "Add nodes with GPUs, or use launch.device=auto or cpu.",
            )
        )
    if findings or not nodes:
        return findings
    if not seen:
        return [Finding(check="gpus", status="skipped", found="None: training runs on CPUs.")]
    kinds = Counter(gpu.name for gpu in seen)
    told = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    return [ok("gpus", f"{told}: all compute.")]


def _judge_gpus_of(node: NodeFacts) -> list[Finding]:
    findings = []
    promised = len(node.gpus) if node.promised_gpus is None else node.promised_gpus
    if promised > len(node.gpus):
        why = f" ({node.gpu_error})" if node.gpu_error else ""
        findings.append(
            fault(
                "gpus",
                f"Ray promises {promised} GPUs, torch sees {len(node.gpus)}{why}.",
                "Install a build of torch for CUDA and a driver that fits it there, or start Ray "
                f"there with --num-gpus={len(node.gpus)}.",
                node.address,
            )
        )
    if promised < len(node.gpus):
        findings.append(
            warning(
                "gpus",
                f"torch sees {len(node.gpus)} GPUs, Ray promises {promised}.",
                f"Start Ray there with --num-gpus={len(node.gpus)} to use all of them.",
                node.address,
            )
        )
    if not node.gpus and node.versions.get(DRIVER, "none") != "none" and not promised:
        findings.append(
            warning(
                "gpus",
                f"There is an NVIDIA driver, but {node.gpu_error}.",
                "Install a build of torch for CUDA there, if GPUs are to be used.",
                node.address,
            )
        )
    for number, gpu in enumerate(node.gpus):
        if gpu.error:
            findings.append(
                fault(
                    "gpus",
                    f"GPU {number} ({gpu.name}) does not compute: {gpu.error}",
                    "Look at nvidia-smi there; restart the node or take it out of the cluster.",
                    node.address,
                )
            )
        elif gpu.free_bytes < (1 - _BUSY_SHARE) * gpu.total_bytes:
            findings.append(
                warning(
                    "gpus",
                    f"GPU {number} ({gpu.name}): {gib(gpu.total_bytes - gpu.free_bytes)} of "
                    f"{gib(gpu.total_bytes)} are in use.",
                    "End what runs there (nvidia-smi names it), or expect less room.",
                    node.address,
                )
            )
    return findings


def judge_clocks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Compare each clock with the median of all, that of who asks (0) among them."""
    offsets = [
        (node, node.clock_offset_seconds) for node in nodes if node.clock_offset_seconds is not None
    ]
    if not offsets:
        return [Finding(check="clock", status="skipped", found="There is one only.")]
    middle = statistics.median([0.0, *(offset for _, offset in offsets)])
    findings, largest = [], 0.0
    for node, offset in offsets:
        off, unsure = offset - middle, node.clock_uncertainty_seconds
        largest = max(largest, abs(off) + unsure)
        if abs(off) - unsure >= _WARN_SECONDS:
            findings.append(
                Finding(
                    check="clock",
                    status="fault" if abs(off) - unsure >= _FAULT_SECONDS else "warning",
                    where=node.address,
                    found=f"Its clock is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'}.",
                    advice="Switch time synchronisation on there (chrony, or timedatectl set-ntp "
                    "true); object stores refuse requests of a wrong time.",
                    numbers={"clock_offset_seconds": off},
                )
            )
    return findings or [ok("clock", f"No clock is more than {largest:.2f} s off.")]


def judge_caches(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Compare what is copied to each node with the room for it."""
    if all(node.cache is None for node in nodes):
        found = "Nothing is copied: what is read is on disks, or is read by ranges."
        return [Finding(check="cache", status="skipped", found=found)] if nodes else []
    findings, least = [], None
    for node in nodes:
        if node.cache is None:
            continue
        needed = sum(place.copied_bytes for place in node.places)
        largest = max((place.largest_bytes for place in node.places), default=0)
        cache, room = node.cache, node.cache.room_bytes
        numbers = {"room_bytes": float(room), "needed_bytes": float(needed)}
        if cache.error or room < largest:
            findings.append(
                fault(
                    "cache",
                    cache.error
                    or f"{cache.folder} has room for {gib(room)}, less than one shard "
                    f"({gib(largest)}).",
                    "Set data.cache_folder, or TMU_DIST_CACHE for `ray start`, to a folder on a "
                    "large disk of that node's own.",
                    node.address,
                    numbers,
                )
            )
        elif room < needed:
            findings.append(
                warning(
                    "cache",
                    f"{cache.folder} has room for {gib(room)} of the {gib(needed)} that are read: "
                    "shards will be fetched again in every epoch.",
                    "Give the node a larger disk, or raise data.cache_gib.",
                    node.address,
                    numbers,
                )
            )
        least = room if least is None else min(least, room)
    text = f"Room for {gib(least or 0)} or more on each node."
    return told_once(findings, nodes) or [ok("cache", text)]


def judge_token(nodes: Sequence[NodeFacts], listens_at: str, *, is_own: bool) -> list[Finding]:
    """Whether anybody who reaches the cluster can run code there.

    Args:
        nodes: of the cluster.
        listens_at: HOST:PORT of its head.
        is_own: this process started it, and it ends with it.
    """
    off = [node.address for node in nodes if node.has_authentication is False]
    if not off:
        return [ok("token", "Every node's Ray asks for one.")] if nodes else []
    if is_own or _is_loopback(listens_at.rpartition(":")[0]):
        found = "Ray asks for none, but it is this machine's own."
        return [ok("token", found)]
    return [
        fault(
            "token",
            f"Ray asks for no token at {', '.join(off)}: who reaches {listens_at} can run any "
            "code there.",
            "Make one (`ray get-auth-token --generate`), copy it to the nodes, and set "
            "RAY_AUTH_MODE=token for every `ray start` and every client; cluster/README.md shows "
            "how.",
        )
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _number(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"
