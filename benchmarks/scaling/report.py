"""The record of a run as tables and figures; also made again from results.json.

What is predicted follows from the facts of the networks in the record; nothing of it was measured
on GPUs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from matplotlib.figure import Figure

from benchmarks.scaling.collectives import Fit, Timing, fit, fitted, held_out
from benchmarks.scaling.model import (
    KINDS,
    Job,
    Kind,
    Network,
    fewer_bytes_than_sharded,
    memory,
    operations,
    reading_break_even,
    traffic,
)
from benchmarks.scaling.simulate import CLUSTERS, Prediction, predict
from tmu_dist.evaluation.plots import Curve, scale_curves

Record: TypeAlias = Mapping[str, Any]

PAPER_TEACHERS = 41
GPUS = (8, 64, 512)
COUNTS = (10, 41, 100, 300, 1000)
SEQUENCES = 8
"""Of a rank in a step."""
SHOWN = ("paper", "radar", "wide")
IN_FULL = ("H100-like", "paper")
"""Shown for all numbers of GPUs, which hardly change anything; the others for one."""
FIGURES = {
    "paper-h100-like": ("paper", "H100-like"),
    "wide-workstations": ("wide", "workstations"),
}
"""Networks and clusters by the file's name."""
_TIE = 1.02
"""A placement that is slower by less is as good, if it comes first."""


def table(record: Record) -> str:
    """Markdown: what is predicted, then what was measured."""
    networks = networks_of(record)
    sections = [_facts(networks), _traffic(networks), _memory(networks)]
    sections += [
        _winners(networks[shown], name, GPUS if (name, shown) == IN_FULL else GPUS[1:2])
        for name in CLUSTERS
        for shown in SHOWN
    ]
    timings = [Timing(**each) for each in record["collectives"]]
    sections += [_collectives(timings), _held(record), _timed(record, timings)]
    return "\n\n".join([*sections, _circumstances(record)]) + "\n"


def networks_of(record: Record) -> dict[str, Network]:
    """The facts of every network, by name."""
    return {name: Network(**facts) for name, facts in record["networks"].items()}


def figure(network: Network, cluster_name: str) -> Figure:
    """Step time of each placement on 64 GPUs over its number of teachers; gaps: it does not fit."""
    cluster, counts = CLUSTERS[cluster_name], (10, 20, 40, 80, 160, 320, 640, 1280)
    curves = []
    for series, kind in enumerate(KINDS):
        ratios = []
        for count in counts:
            job = Job("replicated", count, 64, cluster.ranks_per_node, SEQUENCES, 1)
            arithmetic = sum(operations(network, job)) / cluster.operations_per_second
            ratio = _prediction(network, kind, cluster_name, count, 64).seconds_apart / arithmetic
            ratios.append(ratio if math.isfinite(ratio) else math.nan)
        if any(map(math.isfinite, ratios)):
            curves.append(Curve(label=kind, x=counts, y=ratios, series=series))
    title = f"Step / its arithmetic, nothing overlaps: 64 GPUs, {cluster_name}"
    return scale_curves(curves, title=title, x_label="teachers")


def _prediction(
    network: Network, kind: Kind, cluster_name: str, teachers: int, ranks: int
) -> Prediction:
    return predict(
        network,
        kind,
        CLUSTERS[cluster_name],
        teachers=teachers,
        ranks=ranks,
        sequences=SEQUENCES,
    )


def _facts(networks: Mapping[str, Network]) -> str:
    lines = [
        "A network and its teachers; operations, memories and saved tensors are of one sequence. "
        "Placed teachers send less than sharded ones where a forward pass has fewer sequences than "
        "the last but one column says; reading memories beats running teachers on a rank that "
        "does 40 TFLOP/s if it reads faster than the last.",
        "",
        *_head(
            "network",
            "weights of a teacher [MB]",
            "its memories [MB]",
            "its GFLOP",
            "trained weights, plus for each teacher",
            "saved for the backward pass [MB], plus for each teacher",
            "placed or sharded",
            "read or run [GB/s]",
        ),
    ]
    for name, each in networks.items():
        job = Job("placed", 1, 1, 1, 1, 1)
        lines.append(
            _row(
                f"**{name}**, {each.label}",
                _mega(4 * each.weights),
                _mega(4 * each.memory_numbers),
                f"{each.teacher_operations / 1e9:,.1f}",
                f"{each.student_weights:,} + {each.weights_per_slot:,}",
                f"{_mega(each.saved_bytes)} + {_mega(each.saved_bytes_per_slot)}",
                f"{fewer_bytes_than_sharded(each, job):.2g}",
                f"{reading_break_even(each, job, 40e12) / 1e9:.1f}",
            )
        )
    return "\n".join(lines)


def _node_job(kind: Kind, **changes: Any) -> Job:
    job = Job(kind, PAPER_TEACHERS, 8, 8, SEQUENCES, SEQUENCES)
    return job._replace(**changes)


def _traffic(networks: Mapping[str, Network]) -> str:
    lines = [
        f"Megabytes that the busiest rank sends (cached: reads) in a step with one update: "
        f"{PAPER_TEACHERS} teachers, 8 ranks that share them, {SEQUENCES} sequences a rank, "
        "float32. Gradients come on top of each.",
        "",
        *_head(
            "network", "gradients", "placed: frames", "placed: memories", "sharded",
            "sharded, one sequence at a time", "cached",
        ),
    ]  # fmt: skip
    for name, each in networks.items():
        placed, sharded, cached = (
            traffic(each, _node_job(kind)) for kind in ("placed", "sharded", "cached")
        )
        one = traffic(each, _node_job("sharded", at_once=1))
        sent = (placed.gradients, placed.frames, placed.told)
        read = (sharded.weights, one.weights, cached.read)
        lines.append(_row(name, *map(_mega, (*sent, *read))))
    return "\n".join(lines)


def _memory(networks: Mapping[str, Network]) -> str:
    lines = [
        "Megabytes of a rank in the same job, one sequence at a time, teachers not ahead.",
        "",
        *_head(
            "network", "student", "for the backward pass", "memories told",
            "teachers replicated", "placed", "placed: on their way", "sharded",
        ),
    ]  # fmt: skip
    for name, each in networks.items():
        by_kind = {kind: memory(each, _node_job(kind, at_once=1, ahead=False)) for kind in KINDS}
        placed = by_kind["placed"]
        always = (placed.student, placed.activations, placed.told)
        teachers = (
            by_kind["replicated"].teachers,
            placed.teachers,
            placed.outgoing,
            by_kind["sharded"].teachers,
        )
        lines.append(_row(name, *map(_mega, (*always, *teachers))))
    return "\n".join(lines)


def _winners(network: Network, cluster_name: str, numbers_of_gpus: Sequence[int]) -> str:
    cluster = CLUSTERS[cluster_name]
    inside, outside = cluster.inside.bandwidth / 1e9, cluster.outside.bandwidth / 1e9
    lines = [
        f"Predicted, {cluster_name} ({cluster.ranks_per_node} GPUs a node, "
        f"{cluster.memory_bytes / 1e9:.0f} GB, {cluster.operations_per_second / 1e12:.0f} TFLOP/s, "
        f"{inside:g} GB/s a GPU inside, {outside:g} GB/s a node outside, reading "
        f"{cluster.read_bytes_per_second / 1e9:g} GB/s a node; all assumed), {network.label}, "
        f"{SEQUENCES} sequences a GPU: seconds of a step with all that may overlap, and with none "
        "of it, the less first; sequences at once.",
        "",
        *_head("teachers", "GPUs", *KINDS, "first choice"),
    ]
    for count in COUNTS:
        for gpus in numbers_of_gpus:
            found = {kind: _prediction(network, kind, cluster_name, count, gpus) for kind in KINDS}
            cells = [_predicted(prediction) for prediction in found.values()]
            lines.append(_row(f"{count:,}", str(gpus), *cells, first_choice(found)))
    return "\n".join(lines)


def first_choice(found: Mapping[Kind, Prediction]) -> str:
    """The simplest placement that is as fast as any, or that none fits."""
    fastest = min(prediction.seconds for prediction in found.values())
    if math.isinf(fastest):
        return "none fits"
    return next(kind for kind in KINDS if found[kind].seconds <= _TIE * fastest)


def _predicted(prediction: Prediction) -> str:
    if prediction.at_once is None:
        return "does not fit"
    low, high = sorted((prediction.seconds, prediction.seconds_apart))
    return f"{low:.3g} - {high:.3g} ({prediction.at_once})"


def _collectives(timings: Sequence[Timing]) -> str:
    lines = [
        "Measured between processes of this machine on gloo, and fitted (latency of a message, "
        "bytes that all ranks together send in a second) on every second size; errors are of the "
        "sizes between, which were not used.",
        "",
        *_head(
            "collective", "ranks", "latency [ms]", "GB/s, all ranks", "sizes used / predicted",
            "error, median", "largest",
        ),
    ]  # fmt: skip
    for (name, ranks), own in _by_collective(timings).items():
        found, errors = fit(fitted(own)), held_out_errors(own)
        lines.append(
            _row(
                name,
                str(ranks),
                f"{1e3 * found.latency:.3g}",
                f"{found.bandwidth / 1e9:.2f}",
                f"{len(fitted(own))} / {len(errors)}",
                f"{statistics.median(errors):.0%}",
                f"{max(errors):.0%}",
            )
        )
    return "\n".join(lines)


def held_out_errors(timings: Sequence[Timing]) -> list[float]:
    """Relative errors of predictions for sizes that the fit has not seen."""
    found = fit(fitted(timings))
    return [abs(found.seconds(each) / each.seconds - 1) for each in held_out(timings)]


def _by_collective(timings: Sequence[Timing]) -> dict[tuple[str, int], list[Timing]]:
    groups: dict[tuple[str, int], list[Timing]] = {}
    for timing in timings:
        groups.setdefault((timing.name, timing.ranks), []).append(timing)
    return groups


def _held(record: Record) -> str:
    measured = record["held"]
    network = networks_of(record)[measured["network"]]
    lines = [
        f"Measured, {network.label}: megabytes of teachers on the fullest rank: weights / by how "
        "much the process grew; and the weights in those of replicated, beside the model's.",
        "",
        *_head("ranks", "teachers", "placement", "weights / growth [MB]", "part", "predicted"),
    ]
    for ranks, by_kind in measured["ranks"].items():
        for count in next(iter(by_kind.values())):
            whole = 4 * network.weights * int(count)
            for kind, by_count in by_kind.items():
                weights, grown = (max(column) for column in zip(*by_count[count], strict=True))
                job = Job(kind, int(count), int(ranks), int(ranks), 1, 1)
                resident = memory(network, job).teachers
                if kind == "sharded" and int(ranks) > 1:
                    resident -= 4 * network.weights  # none is gathered while nothing runs
                part = f"{weights / whole:.3f}"
                predicted = f"{min(resident, whole) / whole:.3f}"
                shown = f"{_mega(weights)} / {_mega(grown)}"
                lines.append(_row(ranks, count, kind, shown, part, predicted))
    return "\n".join(lines)


def _timed(record: Record, timings: Sequence[Timing]) -> str:
    measured = record["timed"]
    network = networks_of(record)[measured["network"]]
    ranks, teachers, sequences = (measured[name] for name in ("ranks", "teachers", "sequences"))
    fits = {
        name.partition(" ")[0]: fit(own)
        for (name, count), own in _by_collective(timings).items()
        if count == ranks and not name.endswith("bf16")
    }
    plain = measured["kinds"]["replicated"]["seconds"]
    lines = [
        f"Measured, {network.label}: seconds of a step, {ranks} ranks of one core each, "
        f"{teachers} teachers, {sequences} sequence(s) a rank, {len(plain)} rounds in turn: median "
        "(least - most). Predicted: the median of replicated, its arithmetic scaled by imbalance, "
        "plus what the collectives above would take. Losses of the same step differ by at most "
        f"{measured['losses_differ']:.1g} of their size between placements.",
        "",
        *_head("placement", "s/step", "× replicated, by round", "predicted"),
    ]
    for kind, found in measured["kinds"].items():
        seconds = found["seconds"]
        ratios = [own / other for own, other in zip(seconds, plain, strict=True)]
        job = Job(kind, teachers, ranks, ranks, sequences, sequences)
        predicted = local_seconds(network, job, statistics.median(plain), fits)
        lines.append(
            _row(
                kind,
                f"{statistics.median(seconds):.3g} ({min(seconds):.3g} - {max(seconds):.3g})",
                f"{statistics.median(ratios):.2f}",
                f"{predicted / statistics.median(plain):.2f}",
            )
        )
    return "\n".join(lines)


def local_seconds(
    network: Network, job: Job, replicated_seconds: float, fits: Mapping[str, Fit]
) -> float:
    """A step on this machine, from that of replicated and the fits of its collectives.

    Args:
        network: of which student and teachers.
        job: on as many ranks as the fits are of.
        replicated_seconds: measured.
        fits: by the name of the collective.
    """
    usual = sum(operations(network, job._replace(kind="replicated")))
    sent = traffic(network, job)
    exchanged = 0.0
    for name, per_rank, calls in (
        ("all_gather", sent.frames, job.parts),
        ("all_to_all", sent.told, job.parts * job.busiest),
        ("all_gather", sent.weights, job.parts * job.teachers),
    ):
        if per_rank:
            found = fits[name]
            exchanged += calls * found.latency * (job.group - 1)
            exchanged += job.group * per_rank / found.bandwidth
    return replicated_seconds * sum(operations(network, job)) / usual + exchanged


def _circumstances(record: Record) -> str:
    machine = record["machine"]
    return (
        f"Made by `{record['command']}` in {record['minutes']} minutes on {machine['cpu']}, "
        f"{machine['cores']} cores, torch {record['versions']['torch']}, at revision "
        f"{record['git_revision']}."
    )


def _head(*names: str) -> list[str]:
    return [_row(*names), "|---" * len(names) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _mega(size: float) -> str:
    """Bytes in megabytes (10^6), in three figures."""
    value = size / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
