"""The record of a run as tables; also made again from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

YARDSTICK = "convlstm"
VARIANTS = ("plain", "tmu")
PARTS = ("train", "test")

Cell: TypeAlias = dict[str, Any]
"""What was measured of one part of one network: `seconds` of every round, `flops` and
`peak_bytes` of one; and why it was `stopped`."""
NOT_MEASURED: Cell = {"seconds": []}


class Stated(NamedTuple):
    """A row of the paper's Table 1, measured on a TITAN RTX."""

    parameters: str
    """At test and in training."""
    train: float
    """Seconds a batch."""
    test: float
    """Seconds a sequence."""


PAPER = {
    "plain": Stated("3.0M / 3.0M", 0.35, 0.0163),
    "tmu": Stated("3.6M / 9.5M", 0.43, 0.0177),
}


def table(record: Mapping[str, Any]) -> str:
    """Markdown: costs of every network; at the paper's size also beside its Table 1."""
    machine = record["machine"]
    lines = [
        f"Size: {record['size']}. {machine['processor']}, {machine['threads']} thread(s) of the "
        f"CPU, torch {record['versions']['torch']}, {record['rounds']} rounds: median (least - "
        "most).",
        "",
        "| network | parameters test / train | GFLOP/sequence, test | GFLOP/step, train "
        "| peak memory of a step [MiB] | s/batch | × ConvLSTM | ms/sequence | × ConvLSTM |",
        "|---" * 9 + "|",
    ]
    for backbone, variants in record["networks"].items():
        for variant, network in variants.items():
            lines.append(_line(record, f"{backbone}, {variant}", network))
    lines += [f"| {name} | not measured: {why} |" for name, why in record["absent"].items()]
    if record["size"] == "paper" and YARDSTICK in record["networks"]:
        lines += ["", *_beside_paper(record)]
    return "\n".join(lines) + "\n"


def _line(record: Mapping[str, Any], label: str, network: Mapping[str, Any]) -> str:
    counts = network["parameters"]
    test, train = (network.get(part, NOT_MEASURED) for part in ("test", "train"))
    columns = [
        label,
        f"{counts['test']:,} / {counts['train']:,}",
        _once(test, "flops", 1e9, ",.1f"),
        _once(train, "flops", 1e9, ",.0f"),
        _once(train, "peak_bytes", 2**20, ",.0f"),
        _spread(train, 1.0, 3),
        _shown(_ratio(record, network, "train")),
        _spread(test, 1e3, 1),
        _shown(_ratio(record, network, "test")),
    ]
    return f"| {' | '.join(columns)} |"


def _beside_paper(record: Mapping[str, Any]) -> list[str]:
    """The paper's Table 1 (one TITAN RTX) and the same rows here."""
    lines = [
        "| ConvLSTM | parameters test / train | s/batch | × plain | ms/sequence | × plain |",
        "|---" * 6 + "|",
    ]
    for variant, stated in PAPER.items():
        lines.append(
            f"| {variant}, Table 1 of the paper, TITAN RTX | {stated.parameters} "
            f"| {stated.train} | {stated.train / PAPER['plain'].train:.2f} "
            f"| {1e3 * stated.test:.1f} | {stated.test / PAPER['plain'].test:.2f} |"
        )
        here = record["networks"][YARDSTICK][variant]
        counts = " / ".join(f"{here['parameters'][part] / 1e6:.1f}M" for part in ("test", "train"))
        train, test = (_shown(_ratio(record, here, part)) for part in PARTS)
        lines.append(
            f"| {variant}, here | {counts} "
            f"| {_spread(here.get('train', NOT_MEASURED), 1.0, 3)} | {train} "
            f"| {_spread(here.get('test', NOT_MEASURED), 1e3, 1)} | {test} |"
        )
    return lines


def _ratio(record: Mapping[str, Any], network: Mapping[str, Any], part: str) -> float | None:
    """Median over rounds of the ratio to the plain ConvLSTM; None where there is no such ratio."""
    yardstick = record["networks"].get(YARDSTICK, {}).get("plain")
    if yardstick is None:
        return None
    own, others = (each.get(part, NOT_MEASURED)["seconds"] for each in (network, yardstick))
    pairs = list(zip(own, others))
    return statistics.median(mine / other for mine, other in pairs) if pairs else None


def _shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _once(cell: Cell, name: str, unit: float, style: str) -> str:
    return format(cell[name] / unit, style) if name in cell else "not measured"


def _spread(cell: Cell, factor: float, decimals: int) -> str:
    values = [factor * seconds for seconds in cell["seconds"]]
    if not values:
        return f"not measured: {cell['stopped']}" if "stopped" in cell else "not measured"
    middle, least, most = (
        f"{value:,.{decimals}f}" for value in (statistics.median(values), min(values), max(values))
    )
    rounds = f", {len(values)} round(s)" if "stopped" in cell else ""
    return f"{middle} ({least} - {most}{rounds})"
