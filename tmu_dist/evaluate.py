"""Evaluate a trained model on one split of an archive, beside persistence.

    python -m tmu_dist.evaluate RUN_OR_CHECKPOINT --data URL [--split test] [--out FOLDER]
    torchrun --nproc-per-node N -m tmu_dist.evaluate ... --launcher torchrun

Prints every score with its definition and writes evaluation.json, per_sequence.npz and figures, and
with --keep-predictions the forecasts themselves (predictions.npy). Of
radar: also scores at thresholds, extrapolation along the optical flow as a third forecast, and a
page (report.html) with the tables as text (tables.md). A stochastic network forecasts every
sequence several times: the model's scores are then those of the best sample by SSIM, and say so.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from tqdm import tqdm

from tmu_dist.collectives import Collectives, joined_ranks
from tmu_dist.commands import command_errors
from tmu_dist.config import WindowConfig
from tmu_dist.data.loader import SequenceLoader, open_archive, open_archives
from tmu_dist.data.manifest import Units
from tmu_dist.data.storage import join_url
from tmu_dist.evaluation.baselines import FlowUnavailableError, OpticalFlow
from tmu_dist.evaluation.comparison import RunEntry
from tmu_dist.evaluation.ensemble import Ensemble, choose_ensemble
from tmu_dist.evaluation.examples import evenly_spaced, predict_example
from tmu_dist.evaluation.metrics import SSIMMode
from tmu_dist.evaluation.predictions import PREDICTIONS_NAME, saved_predictions
from tmu_dist.evaluation.rain import radar_settings
from tmu_dist.evaluation.report import (
    PageSettings,
    write_comparison_page,
    write_figures,
    write_markdown_tables,
)
from tmu_dist.evaluation.result import FLOW, EvaluatedData, EvaluationResult
from tmu_dist.evaluation.runner import check_archive_fits, evaluate
from tmu_dist.evaluation.terminal import terminal_summary
from tmu_dist.folders import local_folder
from tmu_dist.provenance import git_revision
from tmu_dist.teachers.store import load_model
from tmu_dist.training.launch import pick_device

_NUM_EXAMPLES = 3
"""Sequences drawn, evenly spread over the split: not chosen by how good they look."""


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
    num_samples: int | None = None,
    seed: int = 0,
    out: str | None = None,
    ssim_mode: SSIMMode = "uint8_7x7",
    flow: Literal["auto", "off"] = "auto",
    thresholds: tuple[float, ...] | None = None,
    fss_scales: tuple[int, ...] | None = None,
    keep_predictions: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    launcher: Literal["local", "torchrun"] = "local",
) -> None:
    """Evaluate, print and write.

    Args:
        model: run folder, checkpoint, teacher folder or URL.
        data: folder or URL of the archive.
        split: which part of the archive.
        batch_size: sequences of a batch over all ranks; the scores do not depend on it.
        num_samples: forecasts of each sequence by a stochastic network, by default 10 (the paper's
            Table 3 takes 100); a deterministic one has only 1.
        seed: of a stochastic network's noise.
        out: folder or URL for the results; by default evaluation-SPLIT in the model's folder.
        ssim_mode: form of SSIM; values of different forms cannot be compared.
        flow: of radar, score optical-flow extrapolation too, where pysteps is installed.
        thresholds: of radar scores, in the archive's unit; by default 20, 30, 40 dBZ, or 0.5, 2,
            5, 10 mm/h of rain.
        fss_scales: sides of the neighbourhoods of the FSS in pixels; by default 1, 2, 4, 8, 16.
        keep_predictions: of a deterministic network, also write every forecast, so that scores can
            be taken again without it (float32, 4 bytes a predicted pixel); by one process.
        device: where to predict.
        launcher: this process alone, or one of the ranks of a torchrun job.
    """
    address = beside_model(model, f"evaluation-{split}") if out is None else out
    with joined_ranks(launcher) as collectives, local_folder(address) as folder:
        chosen_device = pick_device(device, local_rank=collectives.ranks.local_rank)
        result = evaluate_model(
            model,
            data,
            split=split,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=seed,
            ssim_mode=ssim_mode,
            flow=flow,
            thresholds=thresholds,
            fss_scales=fss_scales,
            predictions_to=folder / PREDICTIONS_NAME if keep_predictions else None,
            device=chosen_device,
            collectives=collectives,
        )
        if collectives.ranks.is_main:
            result.save(folder)
            write_figures(result, folder)
            if result.radar is not None:
                command = _command(model, result, flow, thresholds, fss_scales)
                _write_radar_report(result, model, folder, chosen_device, command)
            console = Console()
            console.print(terminal_summary(result))
    if collectives.ranks.is_main:
        console.print(f"\nWritten to {address}", markup=False, soft_wrap=True)


def beside_model(model: str, name: str) -> str:
    """Where results go when the user does not say: a folder of that name in the model's own.

    Raises:
        ValueError: the model is at a URL that can only be read.
    """
    if model.startswith(("http://", "https://")):
        raise ValueError(
            f"{model} can only be read: say with --out where the results are to be written."
        )
    return join_url(model, name)


def evaluate_model(
    source: str,
    data_url: str,
    *,
    split: str = "test",
    batch_size: int = 16,
    num_samples: int | None = None,
    seed: int = 0,
    ssim_mode: SSIMMode = "uint8_7x7",
    flow: Literal["auto", "off"] = "auto",
    thresholds: Sequence[float] | None = None,
    fss_scales: Sequence[int] | None = None,
    predictions_to: Path | None = None,
    device: torch.device | None = None,
    collectives: Collectives | None = None,
) -> EvaluationResult:
    """Load a model, open an archive, and evaluate; every rank gets the whole result.

    Args:
        source: run folder, checkpoint, teacher folder or URL.
        data_url: folder or URL of the archive.
        split: which part of it.
        batch_size: sequences of a batch over all ranks.
        num_samples, seed: as in `choose_ensemble`.
        ssim_mode: form of SSIM.
        flow: of radar, "auto" also scores optical-flow extrapolation where it can.
        thresholds, fss_scales: of radar scores; None means the usual ones (`rain`).
        predictions_to: file for every forecast, as `saved_predictions` writes it; None: no file.
        device: where to predict; None means the CPU.
        collectives: the ranks that share the work; None means this process alone.

    Raises:
        ValueError: a missing model or archive, two that do not fit each other, several samples of
            a deterministic network, or predictions kept of a stochastic one or by several ranks.
    """
    device, collectives = device or torch.device("cpu"), collectives or Collectives()
    loaded = load_model(source, device=device)
    ensemble = choose_ensemble(loaded.model, num_samples, seed)
    if predictions_to is not None:
        _check_predictions_can_be_kept(ensemble, collectives.ranks.world_size)
    (archive,) = open_archives([data_url])
    manifest = archive.manifest
    check_archive_fits(loaded.card, manifest)
    radar = radar_settings(manifest, thresholds, fss_scales)
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
    window = loaded.card.window
    shape_NTCHW = (loader.num_samples, window.num_target_frames, *manifest.sample_shape[1:])
    with (
        nullcontext() if predictions_to is None else saved_predictions(predictions_to, shape_NTCHW)
    ) as keep:
        return evaluate(
            loaded,
            batches,
            EvaluatedData(
                url=data_url,
                split=split,
                manifest_hash=manifest.content_hash,
                num_sequences=loader.num_samples,
            ),
            units=manifest.units,
            timing_frames_BTCHW=torch.from_numpy(archive.read(split, [0])),
            device=device,
            collectives=collectives,
            ssim_mode=ssim_mode,
            radar=radar,
            flow=None
            if radar is None
            else _optical_flow(flow, manifest.units, window, collectives),
            ensemble=ensemble,
            keep=keep,
        )


def _check_predictions_can_be_kept(ensemble: Ensemble | None, world_size: int) -> None:
    if ensemble is not None:
        raise ValueError(
            "Predictions are kept of deterministic networks; this one forecasts every sequence "
            f"{ensemble.num_samples} times. Leave --keep-predictions out."
        )
    if world_size > 1:
        raise ValueError(
            f"Predictions are kept by one process, but {world_size} share this evaluation: use "
            "--launcher local, or leave --keep-predictions out."
        )


def _optical_flow(
    mode: str, units: Units, window: WindowConfig, collectives: Collectives
) -> OpticalFlow | FlowUnavailableError:
    """Optical flow, or why there is none; the same on every rank."""
    found: OpticalFlow | FlowUnavailableError
    if mode == "off":
        return FlowUnavailableError("switched off by --flow off")
    if window.num_input_frames < 2:
        return FlowUnavailableError("motion is seen in two input frames at least, here is one")
    try:
        found = OpticalFlow(units)
    except FlowUnavailableError as error:
        found = error
    reasons = collectives.all_gather_objects(
        str(found) if isinstance(found, FlowUnavailableError) else None
    )
    missing = [reason for reason in reasons if reason is not None]
    return FlowUnavailableError(missing[0]) if missing else found


def _command(
    model: str,
    result: EvaluationResult,
    flow: str,
    thresholds: Sequence[float] | None,
    fss_scales: Sequence[int] | None,
) -> str:
    """The command line that repeats an evaluation."""
    data, ensemble = result.data, result.ensemble
    words = ["python", "-m", "tmu_dist.evaluate", model, "--data", data.url, "--split", data.split]
    if ensemble is not None:
        words += ["--num-samples", str(ensemble.num_samples), "--seed", str(ensemble.seed)]
    words += [] if flow == "auto" else ["--flow", flow]
    for name, values in (("--thresholds", thresholds), ("--fss-scales", fss_scales)):
        words += [] if values is None else [name, *map(str, values)]
    return shlex.join(words)


def _write_radar_report(
    result: EvaluationResult, model: str, folder: Path, device: torch.device, command: str
) -> None:
    """A page about this one evaluation, and its tables as Markdown."""
    data = result.data
    loaded, archive = load_model(model, device=device), open_archive(data.url)
    flow = OpticalFlow(archive.manifest.units) if FLOW in result.overall else None
    examples = [
        predict_example(
            {loaded.card.name: loaded}, archive, data.split, sample, device=device, flow=flow
        )
        for sample in evenly_spaced(data.num_sequences, _NUM_EXAMPLES)
    ]
    settings = PageSettings(
        title=f"{result.model.name} on {archive.manifest.name}",
        summary=(
            f"Forecasts of the {data.split} split by {result.model.name} "
            f"({result.model.method}, step {result.model.step:,}), beside forecasts that need no "
            "training."
        ),
        command=command,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        git_revision=git_revision(),
        reference_label=None,
    )
    entries = [RunEntry(label=result.model.name, result=result)]
    write_comparison_page(folder / "report.html", entries, settings, examples=examples)
    write_markdown_tables(folder / "tables.md", entries)


if __name__ == "__main__":
    main()
