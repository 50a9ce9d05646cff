"""A step of training on a cluster, event by event: what runs when, on which part of the machine.

All ranks are alike, so one is simulated, with four lanes that work side by side, each on one thing
at a time: its processor, its links inside the node, its part of the node's network, its part of the
node's store. A task starts when those before it are done and its lane is free; of several that wait
the one that was issued first.

Of teachers, group traffic goes through the node's links as far as it stays inside the node.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.scaling.model import (
    Job,
    Kind,
    Network,
    all_reduce_bytes,
    memory,
    operations,
    traffic,
)

_FLOAT32 = 4
_BUCKET_BYTES = 25 * 2**20
"""Gradients that DDP sends at once."""
_MOST_BUCKETS = 16
"""More would change nothing here."""
_MOST_PIECES = 40
"""So many parts of the sharded teachers are simulated at most, each of equally many teachers."""
_STEPS = 6
"""Simulated; those in the middle count, which have one before and one after them."""


class Link(NamedTuple):
    """How long messages take."""

    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes a second."""

    def seconds(self, messages: float, size: float) -> float:
        """Of so many messages one after the other, `size` bytes together."""
        return messages * self.latency + size / self.bandwidth


class Cluster(NamedTuple):
    """Equal nodes of equal processors."""

    ranks_per_node: int
    inside: Link
    """Of a rank, to the others of its node."""
    outside: Link
    """Of a node, to all others; its ranks share it."""
    operations_per_second: float
    """That a rank really reaches."""
    memory_bytes: float
    """Of a rank, for what the model counts."""
    read_bytes_per_second: float
    """Of a node, from its disk or store."""


CLUSTERS = {
    "H100-like": Cluster(
        ranks_per_node=8,
        inside=Link(5e-6, 200e9),
        outside=Link(10e-6, 50e9),
        operations_per_second=40e12,
        memory_bytes=80e9,
        read_bytes_per_second=10e9,
    ),
    "workstations": Cluster(
        ranks_per_node=4,
        inside=Link(10e-6, 20e9),
        outside=Link(50e-6, 3e9),
        operations_per_second=10e12,
        memory_bytes=24e9,
        read_bytes_per_second=2e9,
    ),
}
"""Assumed, not measured: NVLink and eight network cards a node; PCI Express and 25 Gbit/s."""


class Task(NamedTuple):
    """Something that takes a lane for some time."""

    lane: str
    seconds: float
    after: tuple[int, ...] = ()
    """Numbers of earlier tasks."""


def finish_times(tasks: Sequence[Task]) -> list[float]:
    """When each task is done, in seconds, in the order in which they were issued."""
    waits_for = [len(set(task.after)) for task in tasks]
    then: dict[int, list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        for before in set(task.after):
            then[before].append(number)
    ready: dict[str, list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        if not task.after:
            heapq.heappush(ready[task.lane], number)
    done = [math.nan] * len(tasks)
    running: list[tuple[float, int]] = []
    busy: set[str] = set()
    now = 0.0
    while True:
        for lane in [lane for lane, waiting in ready.items() if waiting and lane not in busy]:
            number = heapq.heappop(ready[lane])
            busy.add(lane)
            heapq.heappush(running, (now + tasks[number].seconds, number))
        if not running:
            return done
        now, number = heapq.heappop(running)
        done[number] = now
        busy.remove(tasks[number].lane)
        for follower in then[number]:
            waits_for[follower] -= 1
            if waits_for[follower] == 0:
                heapq.heappush(ready[tasks[follower].lane], follower)


def step_seconds(network: Network, job: Job, cluster: Cluster) -> float:
    """Seconds of a step in the long run.

    With `job.ahead`, gradients are also exchanged while others are still computed, as DDP does;
    without, everything happens one after the other.

    Args:
        network: of which student and teachers.
        job: on how many ranks, with which placement.
        cluster: what a rank and its links can do.
    """
    issue = _Issue(network, job, cluster)
    ends = issue.steps(_STEPS)
    done = finish_times(issue.tasks)
    return (done[ends[-2]] - done[ends[1]]) / (_STEPS - 3)


class _Issue:
    """Writes down the tasks of a rank in the order in which it issues them."""

    def __init__(self, network: Network, job: Job, cluster: Cluster) -> None:
        self.job, self.cluster, self.ahead = job, cluster, job.ahead
        self.tasks: list[Task] = []
        forward_passes = job.parts * job.passes
        student, taught = operations(network, job)
        self.student_seconds = student / cluster.operations_per_second / forward_passes
        self.teacher_seconds = taught / cluster.operations_per_second / forward_passes
        sent = traffic(network, job)
        self.frames, self.told, self.weights, self.read = (
            part / forward_passes for part in sent[1:]
        )
        self.gradient_bytes = _FLOAT32 * network.trained(job.teachers)

    def steps(self, count: int) -> list[int]:
        """So many steps; returns the number of the last task of each."""
        total = count * self.job.passes * self.job.parts
        ends: list[int] = []
        students: list[int] = []
        told = self._teach(())
        for number in range(total):
            present = told
            if self.ahead and number + 1 < total:
                # Not before the student has let go of the memories before these.
                told = self._teach(tuple(students[-1:]))
            is_last = (number + 1) % self.job.parts == 0
            students.append(self._student((present, *students[-1:]), is_last))
            if not self.ahead and number + 1 < total:
                told = self._teach((students[-1],))
            if (number + 1) % (self.job.parts * self.job.passes) == 0:
                ends.append(students[-1])
        return ends

    def _add(self, lane: str, seconds: float, *after: int) -> int:
        self.tasks.append(Task(lane, seconds, after))
        return len(self.tasks) - 1

    def _group_task(self, size: float, *after: int, calls: float = 1) -> int:
        """So many exchanges in a group, of which a rank sends `size` bytes together."""
        job, cluster = self.job, self.cluster
        local = min(job.group, cluster.ranks_per_node)
        share = (local - 1) / max(job.group - 1, 1)
        near = cluster.inside.seconds(calls * (local - 1), size * share)
        done = self._add("inside", near, *after)
        if job.group == local:
            return done
        bandwidth = cluster.outside.bandwidth / cluster.ranks_per_node
        link = cluster.outside._replace(bandwidth=bandwidth)
        messages = calls * (job.group - local)
        far = self._add("outside", link.seconds(messages, size * (1 - share)), *after)
        return self._add("nothing", 0.0, done, far)

    def _teach(self, after: tuple[int, ...]) -> int:
        """What teachers tell of the sequences of a forward pass; the task that ends it."""
        match self.job.kind:
            case "replicated":
                return self._add("processor", self.teacher_seconds, *after)
            case "placed":
                frames = self._group_task(self.frames, *after)
                taught = self._add("processor", self.teacher_seconds, frames)
                return self._group_task(self.told, taught, calls=self.job.busiest)
            case "sharded":
                pieces = min(self.job.teachers, _MOST_PIECES)
                size, calls = self.weights / pieces, self.job.teachers / pieces
                done = after
                for _ in range(pieces):
                    # The next ones' weights are gathered while these run.
                    gathered = self._group_task(size, *after, calls=calls)
                    seconds = self.teacher_seconds / pieces
                    done = (self._add("processor", seconds, gathered, *done),)
                    if not self.ahead:
                        after = done
                return done[0]
            case "cached":
                speed = self.cluster.read_bytes_per_second / self.cluster.ranks_per_node
                return self._add("store", self.read / speed, *after)

    def _student(self, after: tuple[int, ...], is_last: bool) -> int:
        """Forward, backward and, at the end of an update, the exchange of gradients."""
        forward = self._add("processor", self.student_seconds / 3, *after)
        seconds = self.student_seconds * 2 / 3
        if not is_last:
            return self._add("processor", seconds, forward)
        buckets = 1
        if self.ahead:
            buckets = min(math.ceil(self.gradient_bytes / _BUCKET_BYTES), _MOST_BUCKETS)
        exchanged, backward = [], forward
        for _ in range(buckets):
            backward = self._add("processor", seconds / buckets, backward)
            exchanged.append(self._all_reduce(self.gradient_bytes / buckets, backward))
        return self._add("nothing", 0.0, *exchanged)

    def _all_reduce(self, size: float, after: int) -> int:
        """A ring inside every node, and one across nodes for each rank's part."""
        cluster = self.cluster
        local = min(self.job.ranks, cluster.ranks_per_node)
        nodes = math.ceil(self.job.ranks / local)
        done = self._add(
            "inside",
            cluster.inside.seconds(2 * (local - 1), all_reduce_bytes(size, local)),
            after,
        )
        if nodes == 1:
            return done
        far = all_reduce_bytes(size, nodes)  # of all ranks of the node together
        return self._add("outside", cluster.outside.seconds(2 * (nodes - 1), far), done)


class Prediction(NamedTuple):
    """One placement of one job."""

    at_once: int | None
    """Most sequences of a forward pass that fit into memory; None: not even one does."""
    seconds: float
    """Of a step, with all that may overlap; infinite where it does not fit."""
    seconds_apart: float
    """With nothing that overlaps."""


def predict(
    network: Network, kind: Kind, cluster: Cluster, *, teachers: int, ranks: int, sequences: int
) -> Prediction:
    """The step of a placement whose groups are the nodes, in the largest parts that fit."""
    group = min(ranks, cluster.ranks_per_node)
    for at_once in range(sequences, 0, -1):
        job = Job(kind, teachers, ranks, group, sequences, at_once)
        if sequences % at_once == 0 and memory(network, job).total <= cluster.memory_bytes:
            apart = step_seconds(network, job._replace(ahead=False), cluster)
            return Prediction(at_once, step_seconds(network, job, cluster), apart)
    return Prediction(None, math.inf, math.inf)
