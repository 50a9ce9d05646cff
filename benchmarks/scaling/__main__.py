"""What does training with many teachers on many ranks cost, and which placement of them is best?

    python -m benchmarks.scaling
    python -m benchmarks.scaling --quick

A cost model (model.py) of networks that are counted without numbers (networks.py), played
through event by event on assumed clusters (simulate.py), and held against what this machine can
measure: collectives between 2 to 8 processes (collectives.py), memory and step time of placements
(placements.py). docs/scaling.md says what comes out. Writes results.json, table.md and figures; a
full run needs about five minutes, 8 GB of memory and a machine with nothing else to do.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import command_line, provenance, publish, record_folder, say
from benchmarks.scaling import collectives, placements
from benchmarks.scaling.networks import SIZES, measure
from benchmarks.scaling.report import FIGURES, PAPER_TEACHERS, figure, networks_of, table
from tmu_dist.evaluation.plots import svg_text


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks: a smoke test")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    started = time.monotonic()
    record = {
        **provenance("benchmarks.scaling", "cpu", chosen.revision),
        **measurements("tiny" if chosen.quick else "paper", chosen.quick, chosen.rounds),
    }
    record["minutes"] = round((time.monotonic() - started) / 60, 1)
    write(record, record_folder(chosen, "scaling"))


def measurements(network: str, quick: bool, rounds: int) -> dict[str, Any]:
    """Everything that the record says, but where it was made."""
    say("networks, of tensors without numbers")
    names = [name for name in SIZES if quick or name != "tiny"]
    networks = {name: measure(SIZES[name]) for name in names}
    found: list[collectives.Timing] = []
    for ranks in (2, 3) if quick else (2, 3, 4, 6, 8):
        say(f"collectives of {ranks} ranks")
        sizes = collectives.SIZES[:4] if quick else collectives.SIZES
        found += collectives.measure(ranks, sizes, 3 if quick else 15)
    return {
        "networks": {name: each._asdict() for name, each in networks.items()},
        "collectives": [timing._asdict() for timing in found],
        "held": held(network, quick),
        "timed": timed(network, quick, rounds),
    }


def held(network: str, quick: bool) -> dict[str, Any]:
    """Memory of the teachers of every placement."""
    counts = (2, 3) if quick else (2, 8, 16, PAPER_TEACHERS)
    by_ranks = {}
    for ranks in (1, 2) if quick else (1, 2, 4):
        say(f"memory of teachers on {ranks} ranks")
        by_ranks[str(ranks)] = placements.held(network, placements.MEASURED, counts, ranks)
    return {"network": network, "ranks": by_ranks}


def timed(network: str, quick: bool, rounds: int) -> dict[str, Any]:
    """Steps of every placement beside each other."""
    setting = {"teachers": 3 if quick else 5, "ranks": 2, "sequences": 1 if quick else 2}
    say(f"steps of {setting}")
    kinds = placements.timed(network, placements.MEASURED, rounds=rounds, **setting)
    return {
        "network": network,
        **setting,
        "losses_differ": placements.losses_differ(kinds),
        "kinds": {kind: each._asdict() for kind, each in kinds.items()},
    }


def write(record: dict[str, Any], out: Path | None) -> None:
    """The record, its tables and its figures; without a folder they are printed only."""
    publish(record, table(record), out)
    if out is None:
        return
    networks = networks_of(record)
    for name, (network, cluster) in FIGURES.items():
        (out / f"{name}.svg").write_text(svg_text(figure(networks[network], cluster)))


if __name__ == "__main__":
    main()
