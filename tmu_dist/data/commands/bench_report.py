"""What a measurement of the loader says: a table, a record, and advice in words.

Not here: measuring (bench.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tmu_dist.data.commands.bench import BenchResult
from tmu_dist.data.commands.bench_readers import Measurement, Way

_AS_FAST = 0.95
"""What has this share of another rate is taken to be as fast: runs differ by so much."""
_BY_STORAGE = 0.8
"""From this share of the bare storage's rate on, the storage is called the limit."""
_IN_WORDS: dict[Way, str] = {
    "whole shards": "whole shards",
    "in place": "in place",
    "cache": "through copies on this node",
    "range": "by byte ranges",
}


def bench_record(result: BenchResult) -> dict[str, Any]:
    """Return everything as JSON values, derived numbers and advice included."""
    record = dataclasses.asdict(result)
    for values, measured in zip(record["measurements"], result.measurements, strict=True):
        rate = measured.samples_per_second
        values["rounds"] = [turn._asdict() for turn in measured.rounds]
        values["samples_per_second"] = rate
        values["stored_bytes_per_second"] = result.stored_bytes_per_second(measured)
        values["cpu_ms_per_sample"] = measured.cpu_ms_per_sample
        if measured.num_workers is not None:
            bare = result.best_bare(measured.way).samples_per_second
            values["decoded_bytes_per_second"] = rate * result.decoded_bytes_per_sample
            values["share_of_bare"] = rate / bare
    return record | {"advice": advice(result)}


def bench_summary(result: BenchResult) -> Group:
    """Show what was measured, the numbers side by side, and what follows."""
    settings = result.settings
    cores = "1 core" if result.num_cores == 1 else f"{result.num_cores} cores"
    title = Text.assemble(
        (settings.url, "bold"),
        f": {result.part_samples:,} of {result.num_samples:,} samples of {settings.split} in "
        f"{result.part_shards:,} shards, {result.part_bytes / 1e6:,.0f} MB; a sample has "
        f"{result.stored_bytes_per_sample / 1e3:,.1f} kB stored and "
        f"{result.decoded_bytes_per_sample / 1e3:,.1f} kB decoded. Batches of "
        f"{settings.batch_size}, {cores}.",
    )
    notes = Text(
        "Rates are medians of rounds that take turns. The first pass finds the page cache as it "
        "was; all that follows on local files finds it warm. Of bare: of the fastest bare reading "
        "in the same way. CPU: of this process, for a sample. First batch: of a new loader, start "
        "of its processes included.",
        style="dim",
    )
    lines = [Text(line) for line in advice(result)]
    return Group(title, Text(), _table(result), notes, Text(), *lines)


def _table(result: BenchResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("read")
    table.add_column("by")
    headings = (
        "samples/s",
        "least-most",
        "MB/s stored",
        "decoded",
        "of bare",
        "CPU ms",
        "1st batch",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for measured in result.measurements:
        rate, cpu = measured.samples_per_second, measured.cpu_ms_per_sample
        decoded = of_bare = first = ""
        if measured.num_workers is not None:
            bare = result.best_bare(measured.way).samples_per_second
            decoded = _number(rate * result.decoded_bytes_per_sample / 1e6)
            of_bare, first = f"{rate / bare:.0%}", f"{measured.first_batch_seconds:.2f} s"
        table.add_row(
            measured.way + (", empty" if measured.is_cold else ""),
            measured.what,
            _number(rate),
            f"{_number(min(measured.rates))}-{_number(max(measured.rates))}",
            _number(result.stored_bytes_per_second(measured) / 1e6),
            decoded,
            of_bare,
            "" if cpu is None else f"{cpu:.3g}",
            first,
        )
    return table


def advice(result: BenchResult) -> list[str]:
    """Say in words what follows from the numbers."""
    lines = [_about_storage(result, way) for way in result.ways]
    way = max(result.ways, key=lambda way: _fastest(result.loaders(way)).samples_per_second)
    if len(result.ways) > 1:
        lines.append(f"The loader is fastest {_IN_WORDS[way]}.")
    setting = "" if way == "in place" else f"data.reading={way} and "
    loaders, bare = result.loaders(way), result.best_bare(way)
    for alone in (each for each in loaders if each.num_workers == 0):
        lines += _about_decoding(alone, bare)
        lines.append(
            f"With {setting}data.num_workers=0 the loader reaches {_rate(alone, bare)}; each "
            f"training step of {result.settings.batch_size} samples spends "
            f"{_step_ms(result, alone)} on reading."
        )
    if any(each.num_workers for each in loaders):
        lines += _about_processes(result, setting, loaders, bare)
    lines += _about_first_epoch(result, way)
    return lines


def _about_storage(result: BenchResult, way: Way) -> str:
    bare = result.best_bare(way)
    megabytes = result.stored_bytes_per_second(bare) / 1e6
    return (
        f"The bare storage, read {_IN_WORDS[way]} ({bare.what}), gives "
        f"{_number(bare.samples_per_second)} samples/s, {_number(megabytes)} MB/s."
    )


def _about_decoding(alone: Measurement, bare: Measurement) -> list[str]:
    """Compare processor times, which waiting for the storage is no part of."""
    if alone.cpu_ms_per_sample is None or bare.cpu_ms_per_sample is None:
        return []
    decoding_ms = alone.cpu_ms_per_sample - bare.cpu_ms_per_sample
    share = decoding_ms / alone.cpu_ms_per_sample
    if share < 1 - _AS_FAST:
        return ["Checking and decoding cost next to no processor time."]
    return [
        f"One core can check and decode {_number(1e3 / decoding_ms)} samples/s: {share:.0%} of the "
        "loader's processor time, the rest is reading."
    ]


def _about_processes(
    result: BenchResult, setting: str, loaders: Sequence[Measurement], bare: Measurement
) -> list[str]:
    """Say which number of reading processes is enough, and what limits them."""
    alone = [each.samples_per_second for each in loaders if not each.num_workers]
    beside = [each for each in loaders if each.num_workers]
    best = _fastest(beside).samples_per_second
    enough = next(each for each in beside if each.samples_per_second >= _AS_FAST * best)
    lines = [
        f"With {setting}data.num_workers={enough.num_workers} it reaches {_rate(enough, bare)} "
        f"beside training: a step that takes less than {_step_ms(result, enough)} waits for data. "
        "Ranks of one machine share its cores and its way to the storage."
    ]
    if alone and best <= alone[0]:
        lines.append(
            "Leave data.num_workers at 0: handing batches over costs more than reading them here."
        )
    elif best >= _BY_STORAGE * bare.samples_per_second:
        lines.append("The storage is the limit.")
    elif enough is not beside[-1]:
        lines.append("More reading processes do not make it faster.")
    elif result.num_cores > (beside[-1].num_workers or 0):
        lines.append("More reading processes than these may make it faster.")
    else:
        lines.append(f"The limit is this machine's processor ({result.num_cores} cores).")
    return lines


def _about_first_epoch(result: BenchResult, way: Way) -> list[str]:
    """Say what is slower before copies are made, or before the page cache is warm."""
    fastest = _fastest(result.loaders(way)).samples_per_second
    lines = []
    for cold in (each for each in result.measurements if each.is_cold):
        lines.append(
            f"While copies are made, it reaches {_number(cold.samples_per_second)} samples/s, with "
            f"the first batch after {cold.first_batch_seconds:.2g} s."
        )
        if result.cache_limit_bytes and result.num_bytes > result.cache_limit_bytes:
            lines.append(
                f"That is so in every epoch: the shards have {result.num_bytes / 2**30:,.1f} GiB "
                f"and the cache may hold {result.cache_limit_bytes / 2**30:,.1f}."
            )
    first_pass = result.measurements[0].samples_per_second
    if result.settings.is_local and first_pass < fastest:
        lines.append(
            f"The first pass over the shards gave {_number(first_pass)} samples/s: what does not "
            "fit in memory comes no faster from this disk."
        )
    return lines


def _number(value: float) -> str:
    """Return three digits, or the whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _step_ms(result: BenchResult, measured: Measurement) -> str:
    return f"{1e3 * result.settings.batch_size / measured.samples_per_second:,.3g} ms"


def _rate(loader: Measurement, bare: Measurement) -> str:
    share = loader.samples_per_second / bare.samples_per_second
    return f"{_number(loader.samples_per_second)} samples/s ({share:.0%} of the bare storage)"


def _fastest(measurements: Sequence[Measurement]) -> Measurement:
    return max(measurements, key=lambda each: each.samples_per_second)
