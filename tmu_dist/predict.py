"""Draw what a trained model predicts for chosen sequences.

    python -m tmu_dist.predict RUN_OR_CHECKPOINT --data URL --samples 0 5 7 [--out FOLDER]

Writes per sample a strip (PNG) and an animation (GIF) of truth, prediction and error; radar in the
colours of its quantity, hatched where nothing was observed.
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
from tmu_dist.evaluation.examples import Example, Frames, predict_example
from tmu_dist.evaluation.pictures import prediction_strip, write_gif
from tmu_dist.evaluation.plots import write_figure
from tmu_dist.evaluation.runner import check_archive_fits
from tmu_dist.files import atomic_file
from tmu_dist.folders import local_folder
from tmu_dist.teachers.store import load_model
from tmu_dist.training.launch import pick_device


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
        arrays: also write inputs, truth and prediction as npz, float32 in the archive's physical
            unit (named in it; of video usually intensity in [0, 1]). Inputs and truth are NaN where
            nothing was observed; predictions are not clipped.
        device: where to predict.
    """
    if not samples:
        raise ValueError("--samples names no sequence: give positions in the split, such as 0 5 7.")
    chosen_device = pick_device(device, local_rank=0)
    loaded = load_model(model, device=chosen_device)
    archive = open_archive(data)
    check_archive_fits(loaded.card, archive.manifest)
    label = loaded.card.name
    address = beside_model(model, f"pictures-{split}") if out is None else out
    console = Console()
    for sample_id in samples:
        example = predict_example(
            {label: loaded}, archive, split, sample_id, device=chosen_device, num_frames=num_frames
        )
        stem = f"{split}-{sample_id:06d}"
        with local_folder(address) as folder:
            write_figure(prediction_strip(example), folder / f"{stem}.png")
            write_gif(folder / f"{stem}.gif", example, label)
            if arrays:
                _write_arrays(folder / f"{stem}.npz", example, label, archive.manifest.units)
        console.print(join_url(address, f"{stem}.*"), markup=False, soft_wrap=True)


def _write_arrays(path: Path, example: Example, label: str, units: Units) -> None:
    """Frames of one sequence in physical units."""

    def physical(numbers_TCHW: Frames) -> Frames:
        return to_physical(numbers_TCHW, units).astype(np.float32)

    with atomic_file(path) as staging:
        np.savez_compressed(
            staging,
            allow_pickle=False,
            inputs_TCHW=physical(example.inputs_TCHW),
            truth_TCHW=physical(example.truth_TCHW),
            prediction_TCHW=physical(example.forecasts_TCHW[label]),
            quantity=np.array(units.quantity),
            unit=np.array(units.unit),
        )


if __name__ == "__main__":
    main()
