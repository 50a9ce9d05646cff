"""What benchmarks share: options, where a record was made, and how it is told and written."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tmu_dist.provenance import git_revision, versions


def command_line(
    about: str | None,
    *,
    out: str | None = None,
    sizes: Iterable[str] = (),
    size: str = "paper",
    takes_device: bool = False,
) -> argparse.ArgumentParser:
    """The options that benchmarks share; their own are added to it.

    Args:
        about: what --help says: the module's docstring.
        out: folder of the record, if nothing else is said.
        sizes: that --size takes; without, there is no --size.
        size: the default.
        takes_device: whether there is --device.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if sizes:
        parser.add_argument("--size", choices=tuple(sizes), default=size)
    if takes_device:
        parser.add_argument("--device", type=_device, choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--revision", help="of this code, where git cannot tell")
    folder = None if out is None else Path(out)
    parser.add_argument("--out", type=Path, default=folder, help="of results.json and table.md")
    return parser


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device here")
    return name


def provenance(module: str, device: str, revision: str | None) -> dict[str, Any]:
    """Where a record comes from.

    Args:
        module: of the benchmark, which was called with this process' arguments.
        device: "cpu" or "cuda".
        revision: of this code; None: what git tells.
    """
    return {
        "command": f"python -m {module} {shlex.join(_without_folder(sys.argv[1:]))}",
        "git_revision": revision or git_revision(),
        "device": device,
        "machine": _machine(device),
        "versions": versions(("tmu-dist", "torch", "numpy")),
    }


def _machine(device: str) -> dict[str, Any]:
    """Processor, cores, system and, of "cuda", its libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    facts = {
        "processor": cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if device == "cuda":
        facts |= {
            "processor": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return facts


def _without_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments as they would be on another machine."""
    folders = ("--out", "--work", "--kth", "--knmi")
    return ["FOLDER" if b in folders else a for b, a in itertools.pairwise(["", *arguments])]


def median_and_range(values: Sequence[float], decimals: int) -> str:
    """Such as 2.01 (1.94 - 2.04); nothing of no values."""
    if not values:
        return ""
    shown = (statistics.median(values), min(values), max(values))
    middle, least, most = (f"{value:,.{decimals}f}" for value in shown)
    return f"{middle} ({least} - {most})"


def publish(record: Mapping[str, Any], table: str, out: Path | None) -> None:
    """Print the table, and write results.json and table.md if there is a folder for them."""
    print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "table.md").write_text(table)


def record_folder(chosen: argparse.Namespace, default: str) -> Path | None:
    """Where a record goes: to --out, or to its place among the results, but not what is --quick.

    Args:
        chosen: the options.
        default: its folder in docs/results.
    """
    if chosen.out is None and not chosen.quick:
        return Path("docs/results", default)
    out: Path | None = chosen.out
    return out


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
