"""Draw what a trained model predicts for chosen sequences.

    python -m tmu_dist.predict RUN_OR_CHECKPOINT --data URL --samples 0 5 7 [--out FOLDER]

Writes per sequence a strip (PNG) and an animation (GIF) of truth, prediction and error; radar in
the colours of its quantity, hatched where nothing was observed. A stochastic network predicts
several times: a row each, and an animation of the first.

Shape letters: D forecasts of a stochastic network, T time, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from tmu_dist.commands import command_errors
from tmu_dist.data.loader import open_archive
from tmu_dist.data.manifest import Units
from tmu_dist.data.storage import join_url
from tmu_dist.data.transforms import to_physical
from tmu_dist.evaluate import beside_model
from tmu_dist.evaluation.ensemble import choose_ensemble
from tmu_dist.evaluation.examples import Example, Frames, predict_example
from tmu_dist.evaluation.pictures import prediction_strip, write_gif
from tmu_dist.evaluation.plots import write_figure
from tmu_dist.evaluation.runner import check_archive_fits
from tmu_dist.files import atomic_file
from tmu_dist.folders import local_folder
from tmu_dist.teachers.store import load_model
from tmu_dist.training.launch import pick_device

_NUM_ROWS = 3
"""Forecasts of a stochastic network that a picture shows."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.predict`."""
    with command_errors():
        tyro.cli(run, prog="python -m tmu_dist.predict", description=__doc__, args=arguments)


def run(
    model: tyro.conf.Positional[str],
    *,
    data: str,
    samples: tuple[int, ...],
    out: str | None = None,
    split: Literal["train", "val", "test"] = "test",
    num_frames: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    arrays: tyro.conf.FlagCreatePairsOff[bool] = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Predict and draw.

    Args:
        model: run folder, checkpoint, teacher folder or URL.
        data: folder or URL of the archive.
        samples: positions of the sequences in the split.
        out: folder or URL for the pictures; by default pictures-SPLIT in the model's folder.
        split: which part of the archive.
        num_frames: inputs and predictions together, of any length; by default the model's window.
        num_samples: forecasts of each sequence by a stochastic network, by default 3; a
            deterministic one has only 1.
        seed: of a stochastic network's noise; the n-th forecast is the one that `evaluate` scores.
        arrays: also write inputs, truth and prediction as npz, float32 in the archive's physical
            unit (named in it; of video usually intensity in [0, 1]). Inputs and truth are NaN where
            nothing was observed; predictions are not clipped. Of a stochastic network, predictions
            have one more axis, of the forecasts (prediction_DTCHW).
        device: where to predict.
    """
    if not samples:
        raise ValueError("--samples names no sequence: give positions in the split, such as 0 5 7.")
    chosen_device = pick_device(device, local_rank=0)
    loaded = load_model(model, device=chosen_device)
    ensemble = choose_ensemble(loaded.model, num_samples, seed, default=_NUM_ROWS)
    archive = open_archive(data)
    check_archive_fits(loaded.card, archive.manifest)
    label = loaded.card.name
    address = beside_model(model, f"pictures-{split}") if out is None else out
    console = Console()
    for sample_id in samples:
        example = predict_example(
            {label: loaded},
            archive,
            split,
            sample_id,
            device=chosen_device,
            num_frames=num_frames,
            ensemble=ensemble,
        )
        stem = f"{split}-{sample_id:06d}"
        with local_folder(address) as folder:
            write_figure(prediction_strip(example), folder / f"{stem}.png")
            write_gif(folder / f"{stem}.gif", example, next(iter(example.forecasts_TCHW)))
            if arrays:
                units, is_stochastic = archive.manifest.units, ensemble is not None
                _write_arrays(folder / f"{stem}.npz", example, units, is_stochastic=is_stochastic)
        console.print(join_url(address, f"{stem}.*"), markup=False, soft_wrap=True)


def _write_arrays(path: Path, example: Example, units: Units, *, is_stochastic: bool) -> None:
    """Frames of one sequence in physical units."""

    def physical(numbers_TCHW: Frames) -> Frames:
        return to_physical(numbers_TCHW, units).astype(np.float32)

    forecasts = [physical(forecast_TCHW) for forecast_TCHW in example.forecasts_TCHW.values()]
    predictions = (
        {"prediction_DTCHW": np.stack(forecasts)}
        if is_stochastic
        else {"prediction_TCHW": forecasts[0]}
    )
    with atomic_file(path) as staging:
        np.savez_compressed(
            staging,
            allow_pickle=False,
            inputs_TCHW=physical(example.inputs_TCHW),
            truth_TCHW=physical(example.truth_TCHW),
            **predictions,
            quantity=np.array(units.quantity),
            unit=np.array(units.unit),
        )


if __name__ == "__main__":
    main()
