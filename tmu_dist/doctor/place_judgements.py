"""What follows from how all nodes see the stores and folders of a run. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from tmu_dist.doctor.findings import Finding
from tmu_dist.doctor.nodes import NodeFacts
from tmu_dist.doctor.places import Place, PlaceFacts, Rate
from tmu_dist.doctor.telling import fault, told_once, warning

_SLOW, _ENOUGH = 5e6, 1e8
"""Bytes per second: always worth a warning; never."""
_ODD_RATE = 4.0
"""Between these, a node that is so many times slower than the median one is named."""
_JUDGED_BYTES = 2**20
"""Less tells of latency, not of a rate."""
_ABOUT_STORES = "cluster/README.md shows what the nodes must be allowed to do in a store"
_RATES: Mapping[str, Callable[[PlaceFacts], Rate | None]] = {
    "read": lambda facts: facts.read,
    "written": lambda facts: facts.write,
}


def judge_places(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Who can read and write the places of the run, and how fast."""
    findings = []
    by_place: dict[Place, dict[str, PlaceFacts]] = {}
    for node in nodes:
        for facts in node.places:
            by_place.setdefault(facts.place, {})[node.address] = facts
    for place, by_node in by_place.items():
        problems = [
            problem
            for address, facts in by_node.items()
            if (problem := _judge_place(address, facts, by_node.values())) is not None
        ]
        findings += told_once(problems, nodes) or _judge_rates(place, by_node)
    return findings


def _judge_place(address: str, facts: PlaceFacts, of_all: Iterable[PlaceFacts]) -> Finding | None:
    place = facts.place
    if not facts.is_there and any(other.is_there and not other.error for other in of_all):
        return fault(
            _check(place),
            f"{place.setting}: this node does not see {place.url} as others do.",
            "Put it on a disk that all nodes have under that path (NFS), or in a store such as "
            "s3://bucket/name.",
            address,
        )
    if facts.is_there and not facts.error:
        return None
    said = facts.error or "what another node wrote there is not seen"
    return fault(_check(place), f"{place.setting}: {said}", _advice_on(facts), address)


def _advice_on(facts: PlaceFacts) -> str:
    place = facts.place
    if place.use == "output":
        return f"Set output to a place that all nodes may write; {_ABOUT_STORES}."
    if not facts.is_there:
        return {
            "archive": f"Correct {place.setting}, or make the archive with `python -m data_prep`.",
            "teacher": f"Correct {place.setting}, or train the teacher first.",
            "memories": "Correct placement.cache, or run `python -m tmu_dist.memories make`.",
        }[place.use]
    return f"Correct {place.setting}, the endpoint, or the rights of the nodes; {_ABOUT_STORES}."


def _judge_rates(place: Place, by_node: Mapping[str, PlaceFacts]) -> list[Finding]:
    """Name slow nodes; without any, tell the slowest rates."""
    findings: list[Finding] = []
    told, numbers = [], {}
    for what, rate_of in _RATES.items():
        rates = {
            address: rate
            for address, facts in by_node.items()
            if (rate := rate_of(facts)) is not None
        }
        if not rates:
            continue
        findings += _judge_rates_of(what, place, rates)
        slowest = min(rates.values(), key=lambda rate: rate.bytes_per_second)
        numbers[f"{what}_bytes_per_second"] = slowest.bytes_per_second
        is_judged = slowest.num_bytes >= _JUDGED_BYTES
        with_rate = f"with {_mb(slowest.bytes_per_second)}" if is_judged else "(too small to time)"
        told.append(f", {what} {with_rate}")
    text = f"{place.setting}: {place.url}{''.join(told)}."
    return findings or [Finding(check=_check(place), status="ok", found=text, numbers=numbers)]


def _judge_rates_of(what: str, place: Place, rates: Mapping[str, Rate]) -> list[Finding]:
    judged = {
        address: rate.bytes_per_second
        for address, rate in rates.items()
        if rate.num_bytes >= _JUDGED_BYTES
    }
    usual = statistics.median(judged.values()) if judged else 0.0
    return [
        warning(
            _check(place),
            f"{place.setting}: {place.url} is {what} with {_mb(rate)} (median node: {_mb(usual)}).",
            "Use a store in the region of the nodes, or look at that node's network and disk.",
            address,
            {f"{what}_bytes_per_second": rate},
        )
        for address, rate in judged.items()
        if rate < _SLOW or (rate < _ENOUGH and rate * _ODD_RATE < usual)
    ]


def _check(place: Place) -> str:
    return "teachers" if place.use == "teacher" else "storage"


def _mb(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s"
