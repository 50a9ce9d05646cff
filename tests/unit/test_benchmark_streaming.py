"""The report of the streaming benchmark: what it says of rates, misses and what is absent."""

from __future__ import annotations

from typing import Any

from benchmarks.streaming.__main__ import FAULTY, LOCAL, REMOTE
from benchmarks.streaming.report import table


def found(*rates: float, order: int = 1) -> dict[str, Any]:
    return {"rates": list(rates), "cpu_rates": list(rates), "sum": 7, "order": order, "samples": 8}


def record() -> dict[str, Any]:
    """A run of two rounds of one data set in which everything reads 100 samples/s."""
    faulty = [f"{label}{suffix}" for label in FAULTY for suffix in ("", "_with_faults")]
    return {
        "command": "python -m benchmarks.streaming",
        "rounds": 2,
        "minutes": 1.0,
        "machine": {"cpu": "C", "cores": 2, "system": "S", "python": "3"},
        "versions": {"tmu-dist": {"numpy": "2"}},
        "data": {"digits": "small digits"},
        "local": {f"digits-{k}": {c: found(100, 100) for c in LOCAL[k]} for k in LOCAL},
        "remote": {"digits": {label: found(100, 100) for label in REMOTE}},
        "faulty": {"digits": {label: found(100, 100) for label in faulty}},
        "order_seconds": [1.0, 2.0],
    }


def line(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return found


def test_every_contender_has_a_line_with_its_rate_and_spread() -> None:
    run = record()
    run["local"]["digits-raw"]["memmap_dataloader"] = found(1000, 3000)
    text = table(run)
    shown = line(text, "numpy memmap, torch `DataLoader`")
    assert shown.endswith("| 2,000 | 1,000 - 3,000 | 20.00 | 20.00 |")
    per_place = [*LOCAL.values(), REMOTE, [*FAULTY, *FAULTY]]
    assert text.count("| 100 - 100 |") == sum(map(len, per_place)) - 1


def test_a_ratio_is_the_median_of_the_rounds_and_says_when_it_misses() -> None:
    run = record()
    # The machine was half as fast in round 2, for both.
    run["local"]["digits-raw"] |= {"tars": found(90, 45), "memmap": found(100, 50)}
    assert "| ≥ 85 % | 90% |" in line(table(run), "ours / numpy memmap, samples stacked")
    run["local"]["digits-raw"]["tars"] = found(80, 40)
    assert "| 80% (**missed**) |" in line(table(run), "ours / numpy memmap, samples stacked")


def test_checksums_cost_a_part_of_the_time() -> None:
    run = record()
    run["local"]["digits-raw"]["tars_without_checksums"] = found(125, 125)
    assert "| 20% (**missed**) |" in line(table(run), "checksums, later passes")


def test_our_ranges_are_held_against_the_faster_bare_client() -> None:
    run = record()
    run["remote"]["digits"]["bare_ranges_8"] = found(200, 200)
    assert "| 50% (**missed**) |" in line(table(run), "S3: our ranges / bare client's")


def test_another_order_under_faults_is_told() -> None:
    run = record()
    run["faulty"]["digits"]["ranges_with_faults"] = found(100, 100, order=2)
    assert "| 2 (**missed**) |" in line(table(run), "... different orders or samples")


def test_what_was_not_measured_says_why() -> None:
    run = record()
    run["local"]["digits-raw"]["litdata"] = {"failed": "no --peer litdata=PYTHON"}
    text = table(run)
    assert "| litdata | not measured: no --peer litdata=PYTHON |" in text
    assert line(text, "ours / litdata").endswith("| not measured |")
