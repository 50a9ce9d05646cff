"""Running a predictor closed-loop over a split, and scoring it beside the baselines.

`score_predictor` is the pass itself, also used for validation inside a training run; `evaluate`
adds what a finished evaluation reports: radar scores, parameters, runtime, the facts of model and
data.

Deliberately not here: opening runs and archives (the commands), files and figures (`report`).

Shape letters: B batch, T time, C channels, H height, W width, L TMU layers, M teachers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tmu_dist.collectives import Collectives
from tmu_dist.config import WindowConfig
from tmu_dist.data.loader import Batch
from tmu_dist.data.manifest import Manifest, Units
from tmu_dist.data.transforms import Window, window_frames
from tmu_dist.evaluation.baselines import (
    FLOW_DEFINITION,
    FlowUnavailableError,
    OpticalFlow,
    persistence,
)
from tmu_dist.evaluation.metrics import METRIC_NAMES, PHYSICAL_METRIC_NAMES, SSIMMode
from tmu_dist.evaluation.pass_tables import ForecastScores, ForecastTable, PassTables
from tmu_dist.evaluation.radar_result import RadarResult
from tmu_dist.evaluation.rain import RadarSettings, RadarTable, radar_definitions
from tmu_dist.evaluation.result import (
    FLOW,
    GATES_DEFINITION,
    MODEL,
    PERSISTENCE,
    RUNTIME_DEFINITIONS,
    EvaluatedData,
    EvaluatedModel,
    EvaluationResult,
    ParameterCounts,
    Runtime,
    TransferGates,
)
from tmu_dist.evaluation.score_table import SampleRows, Scores, ScoreTable
from tmu_dist.evaluation.timing import describe_device, latency_ms, predicting
from tmu_dist.models.build import count_parameters
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.teachers.card import TeacherCard, same_scale
from tmu_dist.teachers.store import LoadedModel


class PassScores(NamedTuple):
    """What one pass over a split found; equal on every rank except for the times it took."""

    forecasts: dict[str, ForecastScores]
    """The model and the baselines."""
    definitions: dict[str, str]
    gates: TransferGates | None
    """None for a network without TMU layers; teachers are numbered, not named."""
    batch_size: int
    """Sequences of one batch of this rank."""
    seconds_per_batch: float
    """Without optical flow."""
    flow_ms_per_sequence: float | None

    @property
    def model(self) -> Scores:
        """Errors of the model."""
        return self.forecasts[MODEL].scores

    @property
    def persistence(self) -> Scores:
        """Errors of persistence."""
        return self.forecasts[PERSISTENCE].scores


def score_predictor(
    model: Predictor,
    batches: Iterable[Batch],
    *,
    window: WindowConfig,
    units: Units,
    device: torch.device,
    collectives: Collectives | None = None,
    metrics: Sequence[str] = METRIC_NAMES,
    ssim_mode: SSIMMode = "uint8_7x7",
    max_samples: int | None = None,
    radar: RadarSettings | None = None,
    flow: OpticalFlow | None = None,
) -> PassScores:
    """Predict closed-loop and score, each rank its slice; every rank gets the merged result.

    The model is given the input frames only, so no target frame can leak into a forecast. It is
    left in the mode (training or evaluation) in which it came.

    Args:
        model: the bare predictor on `device`, not its wrapper for data-parallel training.
        batches: `SequenceLoader.one_pass()`: each sample once, in natural order.
        window: input and target frames; longer sequences are cut.
        units: what the stored numbers mean, and which of them means "not observed".
        device: where to predict; scores are computed on the CPU in float64.
        collectives: the ranks that share the pass; None means one process.
        metrics: names from `METRIC_NAMES`; validation takes `ERROR_METRIC_NAMES`.
        ssim_mode: which form of SSIM `ssim` means.
        max_samples: score only the first so many samples of the split.
        radar: also score at these thresholds.
        flow: also score extrapolation along the optical flow, which takes its time.

    Raises:
        ValueError: sequences shorter than the window, or a prediction that is not finite.
    """

    def new_tables() -> PassTables:
        return PassTables(
            {
                name: ForecastTable(
                    ScoreTable(metrics, ssim_mode=ssim_mode, units=units),
                    None if radar is None else RadarTable(radar),
                )
                for name in (MODEL, PERSISTENCE, *(() if flow is None else (FLOW,)))
            }
        )

    tables, flow_time = new_tables(), _FlowTime()
    started = time.perf_counter()

    def score_own_slice() -> PassTables:
        with predicting(model):
            for batch in batches:
                whole = window_frames(batch.frames_BTCHW, window, units)
                inputs, truth = _split(whole, window.num_input_frames)
                weights_B = batch.weights_B
                if max_samples is not None:
                    weights_B = weights_B * (batch.sample_ids_B < max_samples)
                rollout = _roll_out(model, inputs.frames_BTCHW, window, device)
                forecasts = {
                    MODEL: rollout.predictions_BTCHW[:, window.num_input_frames - 1 :],
                    PERSISTENCE: persistence(inputs.frames_BTCHW, window.num_target_frames),
                }
                if flow is not None:
                    forecasts[FLOW] = flow_time.extrapolate(flow, inputs, truth, weights_B)
                tables.update(forecasts, truth, batch.sample_ids_B, weights_B)
                tables.add_gates(rollout, batch.sample_ids_B, weights_B)
                if max_samples is not None and batch.consumed >= max_samples:
                    break
        return tables

    slices = (collectives or Collectives()).on_all(score_own_slice)
    seconds = time.perf_counter() - started - flow_time.seconds
    merged = new_tables()
    for part in slices:
        merged.merge(part)
    return PassScores(
        forecasts={name: table.compute() for name, table in merged.forecasts.items()},
        definitions=merged.forecasts[MODEL].scores.definitions,
        gates=_mean_gates(merged.gates, tables.layers) if tables.layers else None,
        batch_size=tables.batch_size,
        seconds_per_batch=seconds / max(tables.num_batches, 1),
        flow_ms_per_sequence=flow_time.ms_per_sequence,
    )


class _FlowTime:
    """Extrapolates the sequences of this rank, and measures how long that takes."""

    def __init__(self) -> None:
        self.seconds, self.num_sequences = 0.0, 0

    def extrapolate(
        self, flow: OpticalFlow, inputs: Window, truth: Window, weights_B: Tensor
    ) -> Tensor:
        """Forecast of a batch; padding is not worth the time and stays 0."""
        started = time.perf_counter()
        kept = weights_B > 0
        forecast_BTCHW = torch.zeros_like(truth.frames_BTCHW)
        if kept.any():
            observed = inputs.observed_BTCHW
            forecast_BTCHW[kept] = flow.forecast(
                inputs.frames_BTCHW[kept],
                None if observed is None else observed[kept],
                forecast_BTCHW.shape[1],
            )
        self.seconds += time.perf_counter() - started
        self.num_sequences += int(kept.sum())
        return forecast_BTCHW

    @property
    def ms_per_sequence(self) -> float | None:
        """None where nothing was extrapolated."""
        return 1e3 * self.seconds / self.num_sequences if self.num_sequences else None


def _split(whole: Window, num_input_frames: int) -> tuple[Window, Window]:
    """Input frames, and the frames to predict."""
    frames, observed = whole
    cuts = slice(None, num_input_frames), slice(num_input_frames, None)
    inputs, truth = (
        Window(frames[:, cut], None if observed is None else observed[:, cut]) for cut in cuts
    )
    return inputs, truth


def evaluate(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    data: EvaluatedData,
    *,
    units: Units,
    timing_frames_BTCHW: Tensor,
    device: torch.device,
    collectives: Collectives | None = None,
    ssim_mode: SSIMMode = "uint8_7x7",
    radar: RadarSettings | None = None,
    flow: OpticalFlow | FlowUnavailableError | None = None,
) -> EvaluationResult:
    """Everything that is reported about a trained model on one split.

    Args:
        loaded: model on `device`, and its card.
        batches: `SequenceLoader.one_pass()`.
        data: what the batches are.
        units: of the archive.
        timing_frames_BTCHW: stored frames of at least one sequence, to measure time with.
        device, collectives, ssim_mode: as in `score_predictor`.
        radar: `rain.radar_settings` of the archive; None for video.
        flow: also score optical flow; of radar, an error says in the report why it is missing.

    Raises:
        ValueError: as `score_predictor`.
    """
    card, window, model = loaded.card, loaded.card.window, loaded.model
    collectives = collectives or Collectives()
    scored = score_predictor(
        model,
        batches,
        window=window,
        units=units,
        device=device,
        collectives=collectives,
        metrics=METRIC_NAMES if radar is None else (*METRIC_NAMES, *PHYSICAL_METRIC_NAMES),
        ssim_mode=ssim_mode,
        radar=radar,
        flow=flow if isinstance(flow, OpticalFlow) else None,
    )
    gates = scored.gates
    if gates is not None:
        unused = tuple(f"{slot}, no teacher" for slot in gates.teachers)
        gates = replace(gates, teachers=card.teachers or unused)
    # On one rank: ranks that measure at once slow each other down.
    timed = (model, timing_frames_BTCHW, window, units, device)
    runtime = collectives.on_main(
        lambda: Runtime(
            ms_per_sequence_batch_1=latency_ms(*timed),
            ms_per_sequence_batch_8=latency_ms(*timed, batch_size=8),
            seconds_per_evaluation_batch=scored.seconds_per_batch,
            evaluation_batch_size=scored.batch_size,
            device=describe_device(device),
        )
    )
    own = count_parameters(model)
    errors = {name: forecast.scores for name, forecast in scored.forecasts.items()}
    contingency = {
        name: forecast.contingency_NTKX
        for name, forecast in scored.forecasts.items()
        if forecast.contingency_NTKX is not None
    }
    return EvaluationResult(
        model=EvaluatedModel(
            name=card.name,
            method=card.method,
            teachers=card.teachers,
            seed=card.seed,
            step=card.step,
            num_input_frames=window.num_input_frames,
            num_target_frames=window.num_target_frames,
        ),
        data=data,
        definitions=_definitions(scored, radar),
        overall={name: scores.overall() for name, scores in errors.items()},
        per_lead_time={
            name: {metric: tuple(v_T.tolist()) for metric, v_T in scores.per_lead_time().items()}
            for name, scores in errors.items()
        },
        gates=gates,
        parameters=ParameterCounts(train=own + sum(card.teacher_parameters), test=own),
        runtime=runtime,
        radar=None if radar is None else _radar_result(scored, radar, flow),
        per_sequence=errors,
        contingency=contingency or None,
    )


def _definitions(scored: PassScores, radar: RadarSettings | None) -> dict[str, str]:
    """What every number of a result means."""
    texts = scored.definitions | RUNTIME_DEFINITIONS
    if scored.gates is not None:
        texts["gates"] = GATES_DEFINITION
    if radar is not None:
        texts |= radar_definitions(radar)
    if FLOW in scored.forecasts:
        texts[FLOW] = FLOW_DEFINITION
    return texts


def _radar_result(
    scored: PassScores, settings: RadarSettings, flow: OpticalFlow | FlowUnavailableError | None
) -> RadarResult:
    note = None
    if not isinstance(flow, OpticalFlow):
        note = f"optical flow not computed: {flow or 'it was not asked for'}"
    return RadarResult(
        settings=settings,
        forecasts={
            name: forecast.radar
            for name, forecast in scored.forecasts.items()
            if forecast.radar is not None
        },
        flow_note=note,
        flow_ms_per_sequence=scored.flow_ms_per_sequence,
    )


def check_archive_fits(card: TeacherCard, manifest: Manifest) -> None:
    """Refuse an archive whose frames are not what the model was made for.

    How the archive marks missing pixels does not matter: a network never sees their code.

    Raises:
        ValueError: other channels, frame size (where the network is tied to one), frame interval,
            or another meaning of the numbers; names what the model has and what the archive has.
    """
    mine = (card.frame.channels, card.frame.height, card.frame.width)
    theirs = (manifest.channels, manifest.height, manifest.width)
    has_norms = card.num_slots > 0 or card.model.gate_norm == "layer"
    is_tied_to_size = card.model.peephole == "full" or (
        has_norms and card.model.norm_affine == "full"
    )
    if mine[0] != theirs[0] or (is_tied_to_size and mine != theirs):
        raise ValueError(
            f"{card.name} was made for frames of channels x height x width = "
            f"{'x'.join(map(str, mine))}, but {manifest.name} has {'x'.join(map(str, theirs))}: "
            "evaluate on an archive of that shape."
        )
    if not same_scale(card.data.units, manifest.units):
        raise ValueError(
            f"{card.name} learned numbers that mean {card.data.units}, but in {manifest.name} "
            f"they mean {manifest.units}: prepare the archive with the model's units."
        )
    mine_minutes, theirs_minutes = card.data.frame_interval_minutes, manifest.frame_interval_minutes
    if mine_minutes != theirs_minutes:
        raise ValueError(
            f"{card.name} learned frames every {mine_minutes} minutes, but those of "
            f"{manifest.name} are {theirs_minutes} minutes apart: prepare the archive with the "
            "model's interval."
        )


def _roll_out(
    model: Predictor, inputs_BTCHW: Tensor, window: WindowConfig, device: torch.device
) -> Rollout:
    return model(
        inputs_BTCHW.to(device),
        num_input_frames=window.num_input_frames,
        num_frames=window.num_frames,
        diagnostics=True,
    )


def _mean_gates(rows: SampleRows, layers: tuple[int, ...]) -> TransferGates:
    _, gates_NLM = rows.stacked()
    means_LM = gates_NLM.mean(axis=0)
    return TransferGates(
        teachers=tuple(f"slot {m}" for m in range(means_LM.shape[1])),
        layers=layers,
        means_LM=tuple(tuple(row) for row in means_LM.tolist()),
    )
