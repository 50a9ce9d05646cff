"""What a step of memory transfer costs on many ranks: bytes, memory and seconds, by placement.

Pure functions of numbers. Facts about networks come from networks.py, those about links and
processors from whoever asks (collectives.py measures them here, `simulate` assumes those of GPUs).

The assumptions:

- All ranks are alike and have equally many sequences; all teachers are alike. Nobody straggles.
- A message of s bytes takes latency + s / bandwidth. All-reduce is a ring inside every node and one
  across nodes; the others send every part directly to whom it is for.
- Convolutions alone take time, each operation as long as any other. A student's backward pass takes
  twice its forward pass.
- `student_bytes` counts weights, gradient and Adam's two moments in float32.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

Kind = Literal["replicated", "placed", "sharded", "cached"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FLOAT32 = 4
_TRAINED_COPIES = 4
"""Of a student's weights: themselves, the gradient, two moments."""
_PASSES_OF_TRAINING = 3
"""Forward passes that a forward and a backward pass take together."""


class Network(NamedTuple):
    """A student and its kind of teachers; all but weights are of one sequence."""

    label: str
    weights: int
    """Of one teacher."""
    memory_numbers: int
    """What one teacher tells: steps times the sum over layers of channels x height x width."""
    teacher_operations: int
    """Of its forward pass."""
    frame_bytes: int
    """Pixels as they are stored, one byte each."""
    mask_bytes: int
    student_weights: int
    """What is trained, without what is there for a teacher."""
    weights_per_slot: int
    """What is trained for each teacher: distillers, gates, projections."""
    student_operations: int
    """Of its forward pass, without what is there for a teacher."""
    operations_per_slot: int
    saved_bytes: int
    """Float32 tensors that wait for the backward pass, without what is there for a teacher."""
    saved_bytes_per_slot: int

    def trained(self, teachers: int) -> int:
        """Weights of a student of so many teachers."""
        return self.student_weights + teachers * self.weights_per_slot


class Job(NamedTuple):
    """A training run, as one rank sees it."""

    kind: Kind
    teachers: int
    ranks: int
    group: int
    """Ranks that share teachers."""
    sequences: int
    """Of a rank in a step."""
    at_once: int
    """Of them in one forward pass; the gradients of the others are accumulated."""
    passes: int = 1
    """Updates of a step; 2 when every sequence is also learned backwards in time."""
    weight_bytes: int = 4
    """Of a teacher's weight."""
    told_bytes: int = 4
    """Of a number that teachers tell, where it travels or lies in a file."""
    ahead: bool = True
    """Teachers begin the next forward pass' sequences while the student learns the present ones."""

    @property
    def parts(self) -> int:
        """Forward passes of an update."""
        return math.ceil(self.sequences / self.at_once)

    @property
    def busiest(self) -> int:
        """Teachers of the member of a group that has most of them, when they are placed."""
        return math.ceil(self.teachers / self.group)

    @property
    def imbalance(self) -> float:
        """Teacher work of the busiest rank, in that of the mean rank."""
        return self.busiest * self.group / self.teachers if self.kind == "placed" else 1.0


class Traffic(NamedTuple):
    """Bytes that the busiest rank sends in a step; `read` are read, from a disk or a store."""

    gradients: float = 0.0
    """DDP's ring all-reduce."""
    frames: float = 0.0
    """Placed: frames and masks, gathered by all."""
    told: float = 0.0
    """Placed: memories, to the ranks whose sequences they are of."""
    weights: float = 0.0
    """Sharded: of every teacher, gathered for every forward pass."""
    read: float = 0.0
    """Cached: memories."""


class Memory(NamedTuple):
    """Bytes that a rank holds at most."""

    student: float
    """Weights, gradient, moments."""
    activations: float
    """What waits for the backward pass, imitations included."""
    teachers: float
    """Frozen weights."""
    told: float
    """Memories of all teachers for the sequences of a forward pass, in float32; of two passes
    where teachers are ahead."""
    outgoing: float
    """Placed: what one teacher tells the whole group, and its copy that is sent."""

    @property
    def total(self) -> float:
        """Of all."""
        return sum(self)


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Bytes that a rank sends for a ring all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def all_gather_bytes(size: float, ranks: int) -> float:
    """Bytes that a rank sends so that all have its `size` bytes."""
    return (ranks - 1) * size


def all_to_all_bytes(size: float, ranks: int) -> float:
    """Bytes that a rank sends of `size` bytes, of which all get equal parts, itself included."""
    return (ranks - 1) / ranks * size


def traffic(network: Network, job: Job) -> Traffic:
    """What a rank sends in a step."""
    gradients = all_reduce_bytes(_FLOAT32 * network.trained(job.teachers), job.ranks) * job.passes
    shown = job.sequences * job.passes
    told = network.memory_numbers * job.told_bytes * shown
    match job.kind:
        case "replicated":
            return Traffic(gradients)
        case "placed":
            frames = shown * (network.frame_bytes + network.mask_bytes)
            own = job.busiest * job.group * told
            return Traffic(
                gradients,
                frames=all_gather_bytes(frames, job.group),
                told=all_to_all_bytes(own, job.group),
            )
        case "sharded":
            shards = job.teachers * network.weights * job.weight_bytes / job.group
            gathered = all_gather_bytes(shards, job.group)
            return Traffic(gradients, weights=gathered * job.parts * job.passes)
        case "cached":
            return Traffic(gradients, read=job.teachers * told)


def memory(network: Network, job: Job) -> Memory:
    """What a rank holds; buffers of the libraries and of convolutions are not counted."""
    whole = network.weights * job.weight_bytes
    resident = {
        "replicated": job.teachers * whole,
        "placed": job.busiest * whole,
        "sharded": job.teachers * whole / job.group + whole,
        "cached": 0,
    }[job.kind]
    told = network.memory_numbers * _FLOAT32 * job.at_once
    saved = network.saved_bytes + job.teachers * network.saved_bytes_per_slot
    return Memory(
        student=_TRAINED_COPIES * _FLOAT32 * network.trained(job.teachers),
        activations=saved * job.at_once,
        teachers=resident,
        told=told * job.teachers * (2 if job.ahead else 1),
        outgoing=2 * told * job.group if job.kind == "placed" else 0,
    )


def operations(network: Network, job: Job) -> tuple[float, float]:
    """Operations of the busiest rank in a step: of the student, and of teachers."""
    shown = job.sequences * job.passes
    student = network.student_operations + job.teachers * network.operations_per_slot
    taught = 0.0
    if job.kind != "cached":
        taught = job.teachers * job.imbalance * network.teacher_operations
    return _PASSES_OF_TRAINING * student * shown, taught * shown


def fewer_bytes_than_sharded(network: Network, job: Job) -> float:
    """Sequences of a forward pass below which placed teachers send less than sharded ones.

    Both send (g - 1) / g of it: placed what a teacher tells of every sequence, sharded its weights
    once a forward pass. Frames and imbalance are not counted.
    """
    return network.weights * job.weight_bytes / (network.memory_numbers * job.told_bytes)


def reading_break_even(network: Network, job: Job, operations_per_second: float) -> float:
    """Bytes a second that a rank must read at least so that cached beats running the teachers."""
    told = network.memory_numbers * job.told_bytes
    return told * operations_per_second / network.teacher_operations
