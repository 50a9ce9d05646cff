"""Options that the questions of speed share, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.provenance import command_line, provenance, publish, record_folder
from benchmarks.speed.measure import Floors
from benchmarks.speed.work import SETTINGS, SIZES, Work, with_peephole


class Effort(NamedTuple):
    """How long is measured, and on what."""

    device: str
    rounds: int
    seconds: float
    """Of a turn in a round, at least."""
    measures_memory: bool


def options(
    about: str | None, *, sizes: tuple[str, ...] = ("small", "paper"), rounds: int | None = 5
) -> argparse.ArgumentParser:
    """The options that the questions share; their own are added to it.

    Args:
        about: what --help says: the module's docstring.
        sizes: that are measured, if nothing else is said.
        rounds: that are measured, if nothing else is said; None: nothing goes in rounds.
    """
    parser = command_line(about, takes_device=True)
    parser.add_argument("--sizes", choices=("small", "paper"), nargs="+", default=list(sizes))
    parser.add_argument(
        "--peephole", choices=("channel", "none"), default="channel", help="none: the released code"
    )
    parser.add_argument("--settings", choices=tuple(SETTINGS), nargs="+")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--seconds", type=float, default=2.0, help="of a turn, at least")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny network, one round")
    return parser


def use_threads(chosen: argparse.Namespace) -> None:
    """As many as the options say."""
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)


def effort(chosen: argparse.Namespace) -> Effort:
    """What the options say of it; sets the number of threads."""
    use_threads(chosen)
    if chosen.quick:
        return Effort(chosen.device, rounds=1, seconds=0.0, measures_memory=False)
    return Effort(chosen.device, chosen.rounds, chosen.seconds, measures_memory=True)


def works(chosen: argparse.Namespace) -> list[Work]:
    """What the options say is computed; --quick: something tiny."""
    sizes = ["tiny"] if chosen.quick else chosen.sizes
    return [with_peephole(SIZES[size], chosen.peephole) for size in sizes]


def record_of(
    question: str,
    chosen: argparse.Namespace,
    done: Effort,
    floors: Floors,
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """What goes to results.json.

    Args:
        question: the module's name.
        chosen: the options.
        done: how long was measured.
        floors: as they were in the same run.
        found: what the question found.
    """
    return {
        **provenance(f"benchmarks.speed.{question}", chosen.device, chosen.revision),
        "rounds": done.rounds,
        "floors": floors.record(),
        **found,
    }


def write(question: str, chosen: argparse.Namespace, record: Mapping[str, Any], text: str) -> None:
    """Print the table; write it and the record to --out or docs/results/speed-QUESTION[-cuda].

    What is --quick goes nowhere by itself.
    """
    default = f"speed-{question}" if chosen.device == "cpu" else f"speed-{question}-{chosen.device}"
    publish(record, text, record_folder(chosen, default))
