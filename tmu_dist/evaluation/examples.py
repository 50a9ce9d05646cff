"""Single sequences and what models and baselines make of them, as arrays.

Deliberately not here: drawing them (`pictures`), scoring a split (`runner`).

Shape letters: B batch, D draws, T time, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tmu_dist.data.archive import Archive
from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import to_unit_interval
from tmu_dist.evaluation.baselines import OpticalFlow
from tmu_dist.evaluation.ensemble import Ensemble
from tmu_dist.evaluation.result import FLOW, FORECAST_LABELS
from tmu_dist.teachers.store import LoadedModel

Frames = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence and what models made of it; all frames nominally in [0, 1].

    Inputs and truth are NaN where nothing was observed.
    """

    sample_id: int
    inputs_TCHW: Frames
    truth_TCHW: Frames
    """True target frames; fewer than forecast where the forecast runs beyond the archive."""
    forecasts_TCHW: Mapping[str, Frames]
    """By label of the model, and number of the sample where it is stochastic; at least one, all of
    one length."""
    units: Units | None = None
    """What the numbers mean; radar is drawn in the colours of its quantity."""

    def __post_init__(self) -> None:
        lengths = {len(frames) for frames in self.forecasts_TCHW.values()}
        if len(lengths) != 1:
            raise ValueError(
                f"An example needs forecasts of one length, got {sorted(lengths)} frames of "
                f"{list(self.forecasts_TCHW)}."
            )

    @property
    def num_target_frames(self) -> int:
        """Length of the forecasts."""
        return len(next(iter(self.forecasts_TCHW.values())))


def predict_example(
    models: Mapping[str, LoadedModel],
    archive: Archive,
    split: str,
    sample_id: int,
    *,
    device: torch.device,
    num_frames: int | None = None,
    flow: OpticalFlow | None = None,
    ensemble: Ensemble | None = None,
) -> Example:
    """Let models continue one sequence, closed-loop.

    Args:
        models: by label, on `device`; all watch equally many input frames.
        archive: where the sequence lies.
        split: "train", "val" or "test".
        sample_id: position in the split.
        device: where to predict.
        num_frames: input and predicted frames together, of any length; None: the models' window.
        flow: also show what optical flow makes of it, as "optical flow".
        ensemble: forecasts that stochastic models make, labelled "MODEL, sample 1" and so on; None
            means one with seed 0.

    Raises:
        ValueError: no such sample, models with different windows, sequences shorter than the
            input, or a `num_frames` that leaves nothing to predict.
    """
    windows = {loaded.card.window for loaded in models.values()}
    if len(windows) != 1:
        raise ValueError(
            f"Models of one example must have one window, got {sorted(map(str, windows))}."
        )
    window = windows.pop()
    num_inputs = window.num_input_frames
    total = window.num_frames if num_frames is None else num_frames
    if archive.manifest.num_frames < num_inputs:
        raise ValueError(
            f"The model watches {num_inputs} frames before it predicts, but the archive's "
            f"sequences have {archive.manifest.num_frames}: use an archive with longer ones."
        )
    units = archive.manifest.units
    stored_BTCHW = torch.from_numpy(archive.read(split, [sample_id]))
    frames_BTCHW, observed_BTCHW = to_unit_interval(stored_BTCHW[:, :total], units)
    inputs_BTCHW = frames_BTCHW[:, :num_inputs]
    forecasts: dict[str, Frames] = {}
    for label, loaded in models.items():
        labels, noise_DTZ = [label], None
        if loaded.model.noise_size:
            drawn = ensemble or Ensemble(num_samples=1)
            draws_D = torch.arange(drawn.num_samples)
            labels = [f"{label}, sample {draw + 1}" for draw in draws_D.tolist()]
            noise_DTZ = drawn.noise(
                torch.full_like(draws_D, sample_id),
                draws_D,
                num_steps=total - 1,
                noise_size=loaded.model.noise_size,
            ).to(device)
        copies_DTCHW = inputs_BTCHW.to(device).expand(len(labels), -1, -1, -1, -1)
        predicted_DTCHW = loaded.model.predict(
            copies_DTCHW, total - num_inputs, noise_BTZ=noise_DTZ
        )
        forecasts |= zip(labels, predicted_DTCHW.cpu().numpy(), strict=True)
    if flow is not None:
        masks_BTCHW = None if observed_BTCHW is None else observed_BTCHW[:, :num_inputs]
        extrapolated_BTCHW = flow.forecast(inputs_BTCHW, masks_BTCHW, total - num_inputs)
        forecasts[FORECAST_LABELS[FLOW]] = extrapolated_BTCHW[0].numpy()
    if observed_BTCHW is not None:
        frames_BTCHW = frames_BTCHW.masked_fill(~observed_BTCHW, torch.nan)
    return Example(
        sample_id=sample_id,
        inputs_TCHW=frames_BTCHW[0, :num_inputs].numpy(),
        truth_TCHW=frames_BTCHW[0, num_inputs:].numpy(),
        forecasts_TCHW=forecasts,
        units=units,
    )


def evenly_spaced(count: int, most: int) -> list[int]:
    """All of 0..count-1, or `most` of them evenly spaced with both ends."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))
