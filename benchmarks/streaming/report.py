"""The record of a run as text: what was wanted, what was measured, and every rate.

All of it is computed from the record, so the table can be made again from results.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Record: TypeAlias = Mapping[str, Any]
Rates: TypeAlias = Mapping[str, Mapping[str, Any]]

_LABELS = {
    "memmap": "numpy memmap, samples stacked",
    "memmap_at_once": "numpy memmap, one selection a batch",
    "memmap_dataloader": "numpy memmap, torch `DataLoader`",
    "zstd_at_offsets": "zstandard at known offsets",
    "webdataset": "webdataset",
    "litdata": "litdata",
    "litdata_chunks": "litdata, shards compressed whole (a)",
    "mosaicml_streaming": "mosaicml-streaming",
    "zarr_samples": "zarr-python, a chunk a sample",
    "zarr_frames": "zarr-python, our Zarr archive",
    "zarr_frames_by_zarrs": "zarr-python with zarrs, our Zarr archive",
    "tars": "**ours, tars**",
    "tars_from_cache": "ours, tars from the node cache",
    "tars_first_pass": "ours, tars, first pass (b)",
    "tars_without_checksums": "ours, tars, checksums off (c)",
    "tars_first_pass_without_checksums": "ours, tars, first pass, checksums off (c)",
    "tars_in_workers": "ours, tars, 2 reading processes, all cores",
    "zarr": "**ours, Zarr archive**",
    "bare_ranges_8": "bare client, ranges, 8 at once",
    "bare_ranges_64": "bare client, ranges, 64 at once",
    "ranges": "**ours, ranges**",
    "bare_objects": "bare client, whole shards, 4 at once",
    "into_cache": "ours, into an empty node cache (d)",
    "ranges_with_faults": "ours, ranges, with faults",
    "into_cache_with_faults": "ours, into an empty node cache, with faults",
}
_NOTES = """\
Ratios are medians of the ratios within a round, not ratios of the medians beside them.

- (a) Decompresses whole shards to disk when it first sees them; the passes measured here read what
  lies there and decode nothing. So does mosaicml-streaming with compressed samples.
- (b) A process verifies the checksum of a local sample when it first reads it; passes over
  uncompressed samples do not repeat that. Compressed samples, and whatever comes by ranges from a
  store, are verified every time.
- (c) With a checksum function that computes nothing, to see what checksums cost.
- (d) Written to disk and verified by sha256 on the way; the bare client throws away what it gets.
"""


class Target(NamedTuple):
    """One line of what was wanted."""

    what: str
    wanted: str
    """In words; empty: measured only."""
    value: Callable[[Record, str], float | None]
    """From record and name of the data; None: not measured."""
    reached: Callable[[float], bool] = lambda value: True
    form: str = "{:.1f} ×"


def table(record: Record) -> str:
    """Return the Markdown of a record."""
    names = list(record["data"])
    lines = _target_lines(record, names)
    for place, measured in record["local"].items():
        name, _, kind = place.rpartition("-")
        stored = "uncompressed" if kind == "raw" else "each sample compressed by zstd"
        lines += ["", f"{record['data'][name]}, {stored}, on the local disk:", ""]
        lines += _rate_lines(measured, (next(iter(measured)), "webdataset"))
    for name in names:
        lines += ["", f"{name}, uncompressed, from an S3 server on this machine:", ""]
        lines += _rate_lines(record["remote"][name], ("bare_ranges_64", "bare_objects"))
    for name in names:
        lines += ["", f"{name}, uncompressed, from S3 that answers 30 % of requests with 503:", ""]
        lines += _rate_lines(record["faulty"][name], ("ranges", "into_cache"))
    return "\n".join([*lines, "", _NOTES, *_circumstances(record), ""])


def _target_lines(record: Record, names: Sequence[str]) -> list[str]:
    lines = [f"| | wanted | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for target in _TARGETS:
        shown = []
        for name in names:
            value = target.value(record, name)
            text = "not measured" if value is None else target.form.format(value)
            shown.append(text if value is None or target.reached(value) else f"{text} (**missed**)")
        lines.append(f"| {target.what} | {target.wanted} | {' | '.join(shown)} |")
    return lines


def _rate_lines(measured: Rates, references: Sequence[str]) -> list[str]:
    heads = " | ".join(f"of {_plain(label)}" for label in references)
    lines = [f"| | samples/s | from - to | {heads} |", "|---|---|---|" + "---|" * len(references)]
    for label, found in measured.items():
        if "rates" in found:
            rates = found["rates"]
            spread = f"{_number(min(rates))} - {_number(max(rates))}"
            cells = [_number(statistics.median(rates)), spread]
            for reference in references:
                ratio = _median_ratio(measured, label, reference)
                cells.append("" if ratio is None else f"{ratio:.2f}")
        else:
            cells = [f"not measured: {found['failed']}", ""] + [""] * len(references)
        lines.append(f"| {_LABELS[label]} | {' | '.join(cells)} |")
    return lines


def _circumstances(record: Record) -> list[str]:
    machine = record["machine"]
    versions = "; ".join(
        f"{environment}: " + ", ".join(f"{name} {version}" for name, version in packages.items())
        for environment, packages in record["versions"].items()
    )
    shares = [
        rate / cpu_rate
        for measured in record["local"].values()
        for found in list(measured.values())[:1]
        if "rates" in found
        for rate, cpu_rate in zip(found["rates"], found["cpu_rates"], strict=True)
    ]
    return [
        f"`{record['command']}`: {record['rounds']} rounds, {record['minutes']} minutes. One core "
        f"of {machine['cores']}, {machine['cpu']}, {machine['system']}, Python "
        f"{machine['python']}; the first contender of a table had "
        f"{min(shares, default=1):.0%} of the core in its worst round. {versions}."
    ]


def _median_ratio(measured: Rates, label: str, to: str) -> float | None:
    """Return the median over the rounds of the ratio of two rates; None: one was not measured."""
    if "rates" not in measured.get(label, {}) or "rates" not in measured.get(to, {}):
        return None
    both = zip(measured[label]["rates"], measured[to]["rates"], strict=True)
    return statistics.median(rate / other for rate, other in both)


def _local(kind: str, label: str, to: str) -> Callable[[Record, str], float | None]:
    return lambda record, name: _median_ratio(record["local"][f"{name}-{kind}"], label, to)


def _cost(kind: str, label: str) -> Callable[[Record, str], float | None]:
    """Return the part of the time that checksums take."""
    without = _local(kind, label, f"{label}_without_checksums")
    return lambda record, name: None if (r := without(record, name)) is None else 1 - r


def _ranges(record: Record, name: str) -> float | None:
    """Return the rate of our range reads as a part of the bare client's, at its best."""
    measured = record["remote"][name]
    found = [_median_ratio(measured, "ranges", f"bare_ranges_{n}") for n in (8, 64)]
    return min((ratio for ratio in found if ratio is not None), default=None)


def _slower(label: str) -> Callable[[Record, str], float | None]:
    """Return how many times as long a pass takes with faults."""
    return lambda record, name: _median_ratio(record["faulty"][name], label, f"{label}_with_faults")


def _orders(record: Record, name: str) -> float | None:
    """Return how many different sequences of samples arrived, with and without faults."""
    measured = record["faulty"][name].values()
    return len({(found.get("sum"), found.get("order")) for found in measured})


def _order_seconds(record: Record, name: str) -> float:
    return statistics.median(record["order_seconds"])


def _at_least(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit


def _at_most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


_PERCENT = "{:.0%}"
_TARGETS = (
    Target(
        "ours / numpy memmap, samples stacked",
        "≥ 85 %",
        _local("raw", "tars", "memmap"),
        _at_least(0.85),
        _PERCENT,
    ),
    Target(
        "ours / numpy memmap, one selection a batch",
        "",
        _local("raw", "tars", "memmap_at_once"),
        form=_PERCENT,
    ),
    Target("ours / webdataset", "≥ 5 ×", _local("raw", "tars", "webdataset"), _at_least(5)),
    Target("ours / litdata", "≥ 1 ×", _local("raw", "tars", "litdata"), _at_least(1)),
    Target(
        "ours / mosaicml-streaming",
        "≥ 1 ×",
        _local("raw", "tars", "mosaicml_streaming"),
        _at_least(1),
    ),
    Target(
        "compressed: ours / zstandard alone",
        "",
        _local("zstd", "tars", "zstd_at_offsets"),
        form=_PERCENT,
    ),
    Target("compressed: ours / webdataset", "", _local("zstd", "tars", "webdataset")),
    Target("compressed: ours / litdata", "≥ 1 ×", _local("zstd", "tars", "litdata"), _at_least(1)),
    Target(
        "compressed: ours / mosaicml-streaming (a)",
        "",
        _local("zstd", "tars", "mosaicml_streaming"),
    ),
    Target(
        "checksums, first pass: part of the time",
        "≤ 10 %",
        _cost("raw", "tars_first_pass"),
        _at_most(0.1),
        _PERCENT,
    ),
    Target("checksums, later passes", "≤ 10 %", _cost("raw", "tars"), _at_most(0.1), _PERCENT),
    Target("checksums, compressed", "≤ 10 %", _cost("zstd", "tars"), _at_most(0.1), _PERCENT),
    Target("S3: our ranges / bare client's", "≥ 80 %", _ranges, _at_least(0.8), _PERCENT),
    Target("S3, 30 % of answers 503: time of ranges", "≤ 2 ×", _slower("ranges"), _at_most(2)),
    Target("... time into the node cache", "≤ 2 ×", _slower("into_cache"), _at_most(2)),
    Target("... different orders or samples", "1", _orders, _at_most(1), "{:.0f}"),
    Target("order of 10 million samples", "< 3 s", _order_seconds, _at_most(3), "{:.1f} s"),
)


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _plain(label: str) -> str:
    return _LABELS[label].replace("*", "").partition(" (")[0]
