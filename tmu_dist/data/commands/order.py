"""Who will read what in an epoch, worked out from manifests alone; no shard is touched.

Not here: the order itself (order.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmu_dist.data.archive import Archive
from tmu_dist.data.cache import cache_gib_for
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.data.order import ORDER_VERSION, global_batches, rank_slice
from tmu_dist.data.prefetch import working_set

_SHOWN = 16
"""Ranks and nodes in a table, samples in a cell; the report has all."""
_PATHS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ArchiveUse:
    """One archive's part of an epoch."""

    url: str
    first_id: int
    """Of its samples; ids of several archives are counted on from one to the next."""
    num_samples: int
    num_consumed: int
    """Samples of it in the whole epoch, those of a second pass counted again."""
    num_shards: int
    num_bytes: int
    """Of its shards."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step; the lists have an entry for each rank, and in it one for each sample."""

    position: int
    """Samples consumed before it since the run began."""
    num_samples: int
    """Real samples over all ranks."""
    sample_ids: list[list[int]]
    weights: list[list[float]]
    """0 for repeats that only fill up the last step."""


@dataclass(frozen=True, kw_only=True)
class ShardUse:
    """When a shard is used; positions are samples consumed since the run began."""

    archive: int
    path: str
    num_bytes: int
    first: int
    """Where the first step that needs it starts."""
    last: int
    """Where the last step that needs it starts."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank, or all ranks of a node together, read from a position to the epoch's end."""

    ranks: list[int]
    num_bytes: int
    """Of whole shards; reading by ranges fetches the ranks' own samples of them only."""
    working_set_bytes: int
    """Most that is in use at once: what a cache of these ranks must hold at least."""
    shards: list[ShardUse]
    """By first use."""


@dataclass(frozen=True, kw_only=True)
class OrderReport:
    """Who reads what in one epoch, from a position on."""

    split: str
    seed: int
    order_version: int
    epoch: int
    start: int
    """The position: samples consumed since the run began."""
    samples_per_epoch: int
    num_samples: int
    """From the position to the epoch's end."""
    num_steps: int
    num_repeats: int
    """Of weight 0 in the last step."""
    global_batch_size: int
    world_size: int
    archives: list[ArchiveUse]
    first_steps: list[Step]
    ranks: list[Share]
    nodes: list[Share]


def order_report(
    loader: SequenceLoader,
    archives: Sequence[Archive],
    split: str,
    *,
    seed: int,
    start: int,
    world_size: int,
    num_nodes: int = 1,
    num_steps: int = 5,
) -> OrderReport:
    """Say who reads what from a position to the end of its epoch.

    Args:
        loader: of any rank.
        archives, split, seed, world_size: what it was made of.
        start: samples consumed since the run began.
        num_nodes: the ranks lie on them in blocks of equal size.
        num_steps: how many steps to list sample by sample.

    Raises:
        ValueError: an argument out of range.
    """
    if start < 0 or num_steps < 0:
        raise ValueError(f"--start and --steps must be at least 0, got {start} and {num_steps}.")
    if num_nodes < 1 or world_size % num_nodes:
        raise ValueError(
            f"{world_size} ranks cannot be dealt evenly to {num_nodes} nodes: choose a divisor of "
            f"{world_size} for --nodes."
        )
    epoch, in_epoch = divmod(start, loader.num_samples)
    left = loader.num_samples - in_epoch
    per_node = world_size // num_nodes
    ranks = [_share(loader, archives, start, range(k, k + 1)) for k in range(world_size)]
    nodes = [
        _share(loader, archives, start, range(first, first + per_node))
        for first in range(0, world_size, per_node)
    ]
    return OrderReport(
        split=split,
        seed=seed,
        order_version=ORDER_VERSION,
        epoch=epoch,
        start=start,
        samples_per_epoch=loader.num_samples,
        num_samples=left,
        num_steps=-(-left // loader.global_batch_size),
        num_repeats=-left % loader.global_batch_size,
        global_batch_size=loader.global_batch_size,
        world_size=world_size,
        archives=_archive_uses(loader, archives, split, epoch),
        first_steps=_first_steps(loader, start, world_size, num_steps),
        ranks=ranks,
        nodes=nodes,
    )


def _archive_uses(
    loader: SequenceLoader, archives: Sequence[Archive], split: str, epoch: int
) -> list[ArchiveUse]:
    ends = list(itertools.accumulate(each.manifest.num_samples(split) for each in archives))
    owners = np.searchsorted(ends, loader.epoch(epoch).ids, side="right")
    counts = np.bincount(owners, minlength=len(ends)).tolist()
    uses = []
    for archive, end, count in zip(archives, ends, counts, strict=True):
        shards, num_samples = archive.manifest.shards(split), archive.manifest.num_samples(split)
        uses.append(
            ArchiveUse(
                url=archive.url,
                first_id=end - num_samples,
                num_samples=num_samples,
                num_consumed=count,
                num_shards=len(shards),
                num_bytes=sum(shard.num_bytes for shard in shards),
            )
        )
    return uses


def _first_steps(loader: SequenceLoader, start: int, world_size: int, num_steps: int) -> list[Step]:
    """List some steps; fewer where the epoch ends before."""
    if not num_steps:
        return []
    epoch, in_epoch = divmod(start, loader.num_samples)
    steps = global_batches(loader.epoch(epoch), in_epoch, num_steps, loader.global_batch_size)
    steps = rank_slice(steps, range(world_size), world_size)
    by_rank = len(steps.ids), world_size, -1
    listed = zip(
        steps.ids.reshape(by_rank).tolist(),
        steps.weights.reshape(by_rank).tolist(),
        steps.counts.tolist(),
        strict=True,
    )
    return [
        Step(
            position=start + number * loader.global_batch_size,
            num_samples=count,
            sample_ids=ids,
            weights=weights,
        )
        for number, (ids, weights, count) in enumerate(listed)
    ]


def _share(loader: SequenceLoader, archives: Sequence[Archive], start: int, ranks: range) -> Share:
    epoch, in_epoch = divmod(start, loader.num_samples)
    uses = loader.uses(epoch, ranks, in_epoch)
    numbers = {id(archive): number for number, archive in enumerate(archives)}
    before = epoch * loader.num_samples
    shards = []
    for number, first, last in zip(*(column.tolist() for column in uses), strict=True):
        archive, shard = loader.shard(number)
        shards.append(
            ShardUse(
                archive=numbers[id(archive)],
                path=shard.path,
                num_bytes=shard.num_bytes,
                first=before + first,
                last=before + last,
            )
        )
    sizes = np.array([shard.num_bytes for shard in shards])
    return Share(
        ranks=list(ranks),
        num_bytes=int(sizes.sum()),
        working_set_bytes=working_set(sizes, uses.first, uses.last),
        shards=shards,
    )


def order_summary(report: OrderReport) -> Group:
    """Show an order in tables, and what it asks of a cache."""
    title = Text.assemble(
        (f"Epoch {report.epoch} of {report.split}", "bold"),
        f", seed {report.seed}: {_counted(report.samples_per_epoch, 'sample')}. From "
        f"position {report.start:,} on, {_counted(report.num_samples, 'sample')} in "
        f"{_counted(report.num_steps, 'step')} of {report.global_batch_size} over "
        f"{_counted(report.world_size, 'rank')} on {_counted(len(report.nodes), 'node')}",
        f"; {_counted(report.num_repeats, 'repeat')} of weight 0 fill up the last step."
        if report.num_repeats
        else ".",
    )
    parts: list[RenderableType] = [title, _archives_table(report)]
    if report.first_steps:
        parts.append(_steps_table(report))
    if report.world_size > len(report.nodes):
        parts.append(_shares_table(report, "rank"))
    parts.append(_shares_table(report, "node"))
    needed = max(node.working_set_bytes for node in report.nodes)
    read = sum(node.num_bytes for node in report.nodes)
    stored = sum(archive.num_bytes for archive in report.archives)
    parts.append(
        Text(
            f"Read through a cache (data.reading=cache), each node must be able to hold "
            f"{_size(needed)} (data.cache_gib={cache_gib_for(needed):g}), better "
            "some more: epochs differ, and the next shards are copied ahead. The nodes together "
            f"then copy {_size(read)} until the epoch's end, if they have nothing yet; the shards "
            f"of this split have {_size(stored)}."
        )
    )
    return Group(*(line for part in parts for line in (part, Text())))


def _archives_table(report: OrderReport) -> Table:
    rows = [
        [
            archive.url,
            f"{archive.first_id}-{archive.first_id + archive.num_samples - 1}",
            f"{archive.num_consumed:,}",
            f"{archive.num_shards:,}",
            _size(archive.num_bytes),
        ]
        for archive in report.archives
    ]
    return _table("Archives", ["", "sample ids", "in this epoch", "shards", "size"], "lrrrr", rows)


def _steps_table(report: OrderReport) -> Table:
    """One row for each step and rank; repeats in brackets."""
    rows = []
    for step in report.first_steps:
        ranks = zip(step.sample_ids, step.weights, strict=True)
        for rank, (ids, weights) in enumerate(itertools.islice(ranks, _SHOWN)):
            texts = [
                str(sample) if weight else f"({sample})"
                for sample, weight in zip(ids[:_SHOWN], weights, strict=False)
            ]
            if len(ids) > _SHOWN:
                texts.append(f"... {len(ids) - _SHOWN} more")
            rows.append(["" if rank else f"{step.position:,}", str(rank), " ".join(texts)])
    return _table("First steps", ["from position", "rank", "sample ids"], "rrl", rows)


def _shares_table(report: OrderReport, kind: Literal["rank", "node"]) -> Table:
    shares = report.ranks if kind == "rank" else report.nodes
    rows = []
    for number, share in enumerate(shares[:_SHOWN]):
        first = [shard.path for shard in share.shards[:_PATHS_SHOWN]]
        more = ", ..." if len(share.shards) > _PATHS_SHOWN else ""
        rows.append(
            [
                str(number),
                f"{len(share.shards):,}",
                _size(share.num_bytes),
                _size(share.working_set_bytes),
                ", ".join(first) + more,
            ]
        )
    left_out = len(shares) - len(rows)
    title = f"Each {kind}" + (f" ({left_out} more in --json)" if left_out else "")
    return _table(title, [kind, "shards", "size", "at once", "first shards"], "rrrrl", rows)


def _table(title: str, headings: Sequence[str], sides: str, rows: Sequence[Sequence[str]]) -> Table:
    """Return a table; `sides` has l or r for each column."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, side in zip(headings, sides, strict=True):
        table.add_column(
            heading,
            justify="left" if side == "l" else "right",
            header_style="dim",
            no_wrap=side == "r",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.2f} GiB"
