"""Running a predictor closed-loop over a split, and scoring it beside the baselines.

`score_predictor` is the pass itself, also used for validation inside a training run; `evaluate`
adds what a finished evaluation reports: radar scores, parameters, runtime, the facts of model and
data.

Deliberately not here: opening runs and archives (the commands), files and figures (`report`).

Shape letters: B batch, D draws of one sequence, T time, C channels, H height, W width, L TMU
layers, M teachers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
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
from tmu_dist.evaluation.ensemble import ENSEMBLE_DEFINITIONS, Ensemble
from tmu_dist.evaluation.forecaster import Forecaster
from tmu_dist.evaluation.metrics import METRIC_NAMES, PHYSICAL_METRIC_NAMES, SSIMMode
from tmu_dist.evaluation.pass_tables import ForecastScores, ForecastTable, PassTables
from tmu_dist.evaluation.predictions import Keep
from tmu_dist.evaluation.radar_result import RadarResult
from tmu_dist.evaluation.rain import RadarSettings, RadarTable, radar_definitions
from tmu_dist.evaluation.result import (
    ENSEMBLE,
    ENSEMBLE_MEAN,
    FLOW,
    GATES_DEFINITION,
    MEAN_OVER_SAMPLES,
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
from tmu_dist.evaluation.score_table import RowTable, Scores, ScoreTable
from tmu_dist.evaluation.timing import FlowTime, describe_device, latency_ms, predicting
from tmu_dist.models.build import count_parameters, weight_shapes
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import TeacherCard, frame_shape, same_scale
from tmu_dist.teachers.store import LoadedModel


class PassScores(NamedTuple):
    """What one pass over a split found; equal on every rank except for the times it took."""

    forecasts: dict[str, ForecastScores]
    """The model and the baselines."""
    ensemble: Scores | None
    """All draws of a stochastic network together; None where it drew nothing."""
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
    ensemble: Ensemble | None = None,
    keep: Keep | None = None,
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
        ensemble: how often a stochastic network forecasts each sequence; the best forecast by
            SSIM is the model's. None: once, without noise (the mean of its latents).
        keep: is given every forecast of the model; not of an ensemble's, which has many.

    Raises:
        ValueError: sequences shorter than the window, a prediction that is not finite, or an
            ensemble whose SSIM is not asked for.
    """
    if ensemble is not None and "ssim" not in metrics:
        raise ValueError(f"The best sample is chosen by SSIM: add 'ssim' to {list(metrics)}.")
    names = [MODEL, PERSISTENCE]
    names += [] if flow is None else [FLOW]
    names += [] if ensemble is None else [ENSEMBLE_MEAN, MEAN_OVER_SAMPLES]

    def new_tables() -> PassTables:
        return PassTables(
            {
                name: ForecastTable(
                    ScoreTable(metrics, ssim_mode=ssim_mode, units=units),
                    None if radar is None or name == MEAN_OVER_SAMPLES else RadarTable(radar),
                )
                for name in names
            },
            None if ensemble is None else RowTable(ENSEMBLE_DEFINITIONS),
        )

    tables, flow_time = new_tables(), FlowTime()
    forecaster = Forecaster(model, window, device)
    started = time.perf_counter()

    def score_own_slice() -> PassTables:
        with predicting(model):
            for batch in batches:
                whole = window_frames(batch.frames_BTCHW, window, units)
                inputs, truth = _split(whole, window.num_input_frames)
                ids_B, weights_B = batch.sample_ids_B, batch.weights_B
                if max_samples is not None:
                    weights_B = weights_B * (ids_B < max_samples)
                still_BTCHW = persistence(inputs.frames_BTCHW, window.num_target_frames)
                forecasts = {PERSISTENCE: still_BTCHW}
                if flow is not None:
                    forecasts[FLOW] = flow_time.extrapolate(flow, inputs, truth, weights_B)
                if ensemble is None:
                    rollout = forecaster.roll_out(inputs.frames_BTCHW)
                    forecasts[MODEL] = forecaster.target_frames(rollout)
                    tables.add_gates(rollout, ids_B, weights_B)
                    if keep is not None:
                        keep(forecasts[MODEL], ids_B, weights_B)
                else:
                    _score_draws(tables, forecaster, ensemble, inputs, truth, ids_B, weights_B)
                tables.update(forecasts, truth, ids_B, weights_B)
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
        ensemble=None if merged.ensemble is None else merged.ensemble.compute(),
        definitions=merged.forecasts[MODEL].scores.definitions,
        gates=merged.mean_gates(),
        batch_size=tables.batch_size,
        seconds_per_batch=seconds / max(tables.num_batches, 1),
        flow_ms_per_sequence=flow_time.ms_per_sequence,
    )


def _split(whole: Window, num_input_frames: int) -> tuple[Window, Window]:
    """Input frames, and the frames to predict."""
    frames, observed = whole
    cuts = slice(None, num_input_frames), slice(num_input_frames, None)
    inputs, truth = (
        Window(frames[:, cut], None if observed is None else observed[:, cut]) for cut in cuts
    )
    return inputs, truth


def _score_draws(
    tables: PassTables,
    forecaster: Forecaster,
    ensemble: Ensemble,
    inputs: Window,
    truth: Window,
    sample_ids_B: Tensor,
    weights_B: Tensor,
) -> None:
    """Draw forecasts of the sequences of a batch, and score them.

    The network makes as many draws at once as the batch has sequences. They are kept until those
    of one sequence are complete: D of them, not B * D.
    """
    kept_B = weights_B > 0
    ids, batch_size = sample_ids_B[kept_B], len(sample_ids_B)

    def draws() -> Iterator[Tensor]:
        drawn = forecaster.draw(inputs.frames_BTCHW[kept_B], ids, ensemble, batch_size=batch_size)
        for numbers_B, rollout in drawn:
            tables.add_gates(rollout, numbers_B, torch.ones(len(numbers_B)))
            yield from forecaster.target_frames(rollout).cpu()

    waiting = draws()
    for row in kept_B.nonzero().flatten().tolist():
        draws_DTCHW = torch.stack(list(islice(waiting, ensemble.num_samples)))
        one = slice(row, row + 1)
        observed = None if truth.observed_BTCHW is None else truth.observed_BTCHW[one]
        own_truth = Window(truth.frames_BTCHW[one], observed)
        tables.add_draws(int(sample_ids_B[row]), draws_DTCHW, own_truth)


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
    ensemble: Ensemble | None = None,
    keep: Keep | None = None,
) -> EvaluationResult:
    """Everything that is reported about a trained model on one split.

    Args:
        loaded: model on `device`, and its card.
        batches: `SequenceLoader.one_pass()`.
        data: what the batches are.
        units: of the archive.
        timing_frames_BTCHW: stored frames of at least one sequence, to measure time with.
        device, collectives, ssim_mode, keep: as in `score_predictor`.
        radar: `rain.radar_settings` of the archive; None for video.
        flow: also score optical flow; of radar, an error says in the report why it is missing.
        ensemble: `choose_ensemble` of the model; None for deterministic ones.

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
        ensemble=ensemble,
        keep=keep,
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
    if scored.ensemble is not None:
        errors[ENSEMBLE] = scored.ensemble
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
        definitions=_definitions(scored, radar, ensemble),
        overall={name: scores.overall() for name, scores in errors.items()},
        per_lead_time={
            name: {metric: tuple(v_T.tolist()) for metric, v_T in scores.per_lead_time().items()}
            for name, scores in errors.items()
        },
        gates=gates,
        parameters=ParameterCounts(
            train=own + card.auxiliary_parameters + sum(card.teacher_parameters), test=own
        ),
        runtime=runtime,
        radar=None if radar is None else _radar_result(scored, radar, flow),
        ensemble=ensemble,
        per_sequence=errors,
        contingency=contingency or None,
    )


def _definitions(
    scored: PassScores, radar: RadarSettings | None, ensemble: Ensemble | None
) -> dict[str, str]:
    """What every number of a result means."""
    texts = scored.definitions | ({} if ensemble is None else ensemble.definitions)
    texts |= RUNTIME_DEFINITIONS
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
    archive = frame_shape(manifest)

    def weights(frame: FrameShape) -> dict[str, torch.Size]:
        return weight_shapes(frame, card.model, tmu=card.tmu, num_slots=card.num_slots)

    # What is inside a network with sources may be tied to its frames, too.
    if archive != card.frame and (card.sources or weights(archive) != weights(card.frame)):
        raise ValueError(
            f"{card.name} was made for frames of channels x height x width = "
            f"{card.frame}, but {manifest.name} has {archive}: "
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
