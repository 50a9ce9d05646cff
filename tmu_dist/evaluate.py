"""Evaluate a trained model on one split of an archive, beside persistence.

    python -m tmu_dist.evaluate RUN_OR_CHECKPOINT --data URL [--split test] [--out DIR]
    torchrun --nproc-per-node N -m tmu_dist.evaluate ... --launcher torchrun

Prints every score with its definition and writes evaluation.json, per_sequence.npz and figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from tqdm import tqdm

from tmu_dist.collectives import Collectives, joined_ranks
from tmu_dist.commands import command_errors
from tmu_dist.data.loader import SequenceLoader, open_archive
from tmu_dist.evaluation.metrics import SSIMMode
from tmu_dist.evaluation.report import write_figures
from tmu_dist.evaluation.result import EvaluatedData, EvaluationResult
from tmu_dist.evaluation.runner import check_archive_fits, evaluate
from tmu_dist.evaluation.terminal import terminal_summary
from tmu_dist.teachers.store import load_model
from tmu_dist.training.launch import pick_device


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.evaluate`."""
    with command_errors():
        tyro.cli(run, prog="python -m tmu_dist.evaluate", description=__doc__, args=arguments)


def run(
    model: tyro.conf.Positional[str],
    *,
    data: str,
    split: Literal["train", "val", "test"] = "test",
    batch_size: int = 16,
    out: Path | None = None,
    ssim_mode: SSIMMode = "uint8_7x7",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    launcher: Literal["local", "torchrun"] = "local",
) -> None:
    """Evaluate, print and write.

    Args:
        model: run folder, checkpoint, teacher folder or URL.
        data: folder or URL of the archive.
        split: which part of the archive.
        batch_size: sequences of a batch over all ranks; the scores do not depend on it.
        out: folder for the results; by default evaluation-SPLIT in the model's folder.
        ssim_mode: form of SSIM; values of different forms cannot be compared.
        device: where to predict.
        launcher: this process alone, or one of the ranks of a torchrun job.
    """
    folder = beside_model(model, f"evaluation-{split}") if out is None else out
    with joined_ranks(launcher) as collectives:
        chosen_device = pick_device(device, local_rank=collectives.ranks.local_rank)
        result = evaluate_model(
            model,
            data,
            split=split,
            batch_size=batch_size,
            ssim_mode=ssim_mode,
            device=chosen_device,
            collectives=collectives,
        )
        if collectives.ranks.is_main:
            result.save(folder)
            write_figures(result, folder)
            console = Console()
            console.print(terminal_summary(result))
            console.print(f"\nWritten to {folder}", markup=False, soft_wrap=True)


def beside_model(model: str, name: str) -> Path:
    """Where results go when the user does not say: a folder of that name in the model's own.

    Raises:
        ValueError: the model is a URL.
    """
    if "://" in model:
        raise ValueError(f"{model} is a URL: say with --out where the results are to be written.")
    return Path(model) / name


def evaluate_model(
    source: str,
    data_url: str,
    *,
    split: str = "test",
    batch_size: int = 16,
    ssim_mode: SSIMMode = "uint8_7x7",
    device: torch.device | None = None,
    collectives: Collectives | None = None,
) -> EvaluationResult:
    """Load a model, open an archive, and evaluate; every rank gets the whole result.

    Args:
        source: run folder, checkpoint, teacher folder or URL.
        data_url: folder or URL of the archive.
        split: which part of it.
        batch_size: sequences of a batch over all ranks.
        ssim_mode: form of SSIM.
        device: where to predict; None means the CPU.
        collectives: the ranks that share the work; None means this process alone.

    Raises:
        ValueError: a missing model or archive, or two that do not fit each other.
    """
    device, collectives = device or torch.device("cpu"), collectives or Collectives()
    loaded = load_model(source, device=device)
    archive = open_archive(data_url)
    check_archive_fits(loaded.card, archive.manifest)
    loader = SequenceLoader(
        archive,
        split,
        global_batch_size=batch_size,
        rank=collectives.ranks.rank,
        world_size=collectives.ranks.world_size,
    )
    batches = tqdm(
        loader.one_pass(),
        desc=f"{loaded.card.name} on {split}",
        total=loader.steps_per_epoch,
        unit="batch",
        leave=False,
        disable=None if collectives.ranks.is_main else True,  # None: only where a person looks on
    )
    return evaluate(
        loaded,
        batches,
        EvaluatedData(
            url=data_url,
            split=split,
            manifest_hash=archive.manifest.content_hash,
            num_sequences=loader.num_samples,
        ),
        timing_frames_BTCHW=torch.from_numpy(archive.read(split, [0])),
        device=device,
        collectives=collectives,
        ssim_mode=ssim_mode,
    )


if __name__ == "__main__":
    main()
