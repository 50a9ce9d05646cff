"""Running a predictor closed-loop over a split, and scoring it beside persistence.

`score_predictor` is the pass itself, also used for validation inside a training run; `evaluate`
adds what a finished evaluation reports: parameters, runtime, the facts of model and data.

Deliberately not here: opening runs and archives (the commands), files and figures (`report`).

Shape letters: B batch, T time, C channels, H height, W width, L TMU layers, M teachers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tmu_dist.collectives import Collectives
from tmu_dist.config import WindowConfig
from tmu_dist.data.loader import Batch
from tmu_dist.data.manifest import Manifest
from tmu_dist.data.transforms import window_frames
from tmu_dist.evaluation.baselines import persistence
from tmu_dist.evaluation.metrics import METRIC_NAMES, SampleRows, Scores, ScoreTable, SSIMMode
from tmu_dist.evaluation.result import (
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
from tmu_dist.models.build import count_parameters
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import LoadedModel


class PassScores(NamedTuple):
    """What one pass over a split found; equal on every rank except for the time it took."""

    model: Scores
    persistence: Scores
    definitions: dict[str, str]
    gates: TransferGates | None
    """None for a network without TMU layers; teachers are numbered, not named."""
    batch_size: int
    """Sequences of one batch of this rank."""
    seconds_per_batch: float


class _Tables:
    """All that a pass collects, so that ranks can exchange and merge it in one piece."""

    def __init__(self, metrics: Sequence[str], ssim_mode: SSIMMode) -> None:
        self.model = ScoreTable(metrics, ssim_mode=ssim_mode)
        self.persistence = ScoreTable(metrics, ssim_mode=ssim_mode)
        self.gates = SampleRows()
        self.layers: tuple[int, ...] = ()
        """Numbers of the TMU layers that have gates."""
        self.batch_size = self.num_batches = 0
        """Of this rank alone."""

    def update(
        self, rollout: Rollout, frames_BTCHW: Tensor, batch: Batch, weights_B: Tensor, inputs: int
    ) -> None:
        """Score the forecast of one batch; frames after the first `inputs` are the truth."""
        self.layers = tuple(sorted(rollout.imitations))
        self.batch_size, self.num_batches = len(weights_B), self.num_batches + 1
        truth_BTCHW = frames_BTCHW[:, inputs:]
        forecasts = (
            (self.model, rollout.predictions_BTCHW[:, inputs - 1 :]),
            (self.persistence, persistence(frames_BTCHW[:, :inputs], truth_BTCHW.shape[1])),
        )
        for table, forecast_BTCHW in forecasts:
            table.update(forecast_BTCHW, truth_BTCHW, batch.sample_ids_B, weights_B)
        if rollout.diagnostics is None or rollout.diagnostics.transfer_gates_BTLM is None:
            return
        gates_BLM = rollout.diagnostics.transfer_gates_BTLM.double().mean(dim=1).cpu().numpy()
        for position in weights_B.nonzero().flatten().tolist():
            self.gates.add(int(batch.sample_ids_B[position]), gates_BLM[position])

    def merge(self, other: _Tables) -> None:
        self.model.merge(other.model)
        self.persistence.merge(other.persistence)
        self.gates.merge(other.gates)


def score_predictor(
    model: Predictor,
    batches: Iterable[Batch],
    *,
    window: WindowConfig,
    device: torch.device,
    collectives: Collectives | None = None,
    metrics: Sequence[str] = METRIC_NAMES,
    ssim_mode: SSIMMode = "uint8_7x7",
    max_samples: int | None = None,
) -> PassScores:
    """Predict closed-loop and score, each rank its slice; every rank gets the merged result.

    The model is given the input frames only, so no target frame can leak into a forecast. It is
    left in the mode (training or evaluation) in which it came.

    Args:
        model: the bare predictor on `device`, not its wrapper for data-parallel training.
        batches: `SequenceLoader.one_pass()`: each sample once, in natural order.
        window: input and target frames; longer sequences are cut.
        device: where to predict; scores are computed on the CPU in float64.
        collectives: the ranks that share the pass; None means one process.
        metrics: names from `METRIC_NAMES`; validation takes `ERROR_METRIC_NAMES`.
        ssim_mode: which form of SSIM `ssim` means.
        max_samples: score only the first so many samples of the split.

    Raises:
        ValueError: sequences shorter than the window, or a prediction that is not finite.
    """
    tables = _Tables(metrics, ssim_mode)
    started = time.perf_counter()

    def score_own_slice() -> _Tables:
        with _predicting(model):
            for batch in batches:
                frames_BTCHW = window_frames(batch.frames_BTCHW, window)
                weights_B = batch.weights_B
                if max_samples is not None:
                    weights_B = weights_B * (batch.sample_ids_B < max_samples)
                rollout = _roll_out(
                    model, frames_BTCHW[:, : window.num_input_frames], window, device
                )
                tables.update(rollout, frames_BTCHW, batch, weights_B, window.num_input_frames)
                if max_samples is not None and batch.consumed >= max_samples:
                    break
        return tables

    slices = (collectives or Collectives()).on_all(score_own_slice)
    seconds = time.perf_counter() - started
    merged = _Tables(metrics, ssim_mode)
    for part in slices:
        merged.merge(part)
    return PassScores(
        model=merged.model.compute(),
        persistence=merged.persistence.compute(),
        definitions=merged.model.definitions,
        gates=_mean_gates(merged.gates, tables.layers) if tables.layers else None,
        batch_size=tables.batch_size,
        seconds_per_batch=seconds / max(tables.num_batches, 1),
    )


def evaluate(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    data: EvaluatedData,
    *,
    timing_frames_BTCHW: Tensor,
    device: torch.device,
    collectives: Collectives | None = None,
    ssim_mode: SSIMMode = "uint8_7x7",
) -> EvaluationResult:
    """Everything that is reported about a trained model on one split.

    Args:
        loaded: model on `device`, and its card.
        batches: `SequenceLoader.one_pass()`.
        data: what the batches are.
        timing_frames_BTCHW: stored frames (uint8) of at least one sequence, to measure time with.
        device, collectives, ssim_mode: as in `score_predictor`.

    Raises:
        ValueError: as `score_predictor`.
    """
    card, window, model = loaded.card, loaded.card.window, loaded.model
    collectives = collectives or Collectives()
    scored = score_predictor(
        model, batches, window=window, device=device, collectives=collectives, ssim_mode=ssim_mode
    )
    gates = scored.gates
    if gates is not None:
        unused = tuple(f"{slot}, no teacher" for slot in gates.teachers)
        gates = replace(gates, teachers=card.teachers or unused)
    # On one rank: ranks that measure at once slow each other down.
    runtime = collectives.on_main(
        lambda: _measure_runtime(model, timing_frames_BTCHW, window, device, scored)
    )
    own = count_parameters(model)
    forecasts = {MODEL: scored.model, PERSISTENCE: scored.persistence}
    gate_definition = {} if gates is None else {"gates": GATES_DEFINITION}
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
        definitions=scored.definitions | RUNTIME_DEFINITIONS | gate_definition,
        overall={name: scores.overall() for name, scores in forecasts.items()},
        per_lead_time={
            name: {metric: tuple(v_T.tolist()) for metric, v_T in scores.per_lead_time().items()}
            for name, scores in forecasts.items()
        },
        gates=gates,
        parameters=ParameterCounts(train=own + sum(card.teacher_parameters), test=own),
        runtime=runtime,
        per_sequence=forecasts,
    )


def check_archive_fits(card: TeacherCard, manifest: Manifest) -> None:
    """Refuse an archive whose frames are not what the model was made for.

    Raises:
        ValueError: other channels, frame size (where the network is tied to one), units or
            missing pixels; names what the model has and what the archive has.
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
    if card.data.units != manifest.units:
        raise ValueError(
            f"{card.name} learned numbers that mean {card.data.units}, but in {manifest.name} "
            f"they mean {manifest.units}: prepare the archive with the model's units."
        )
    if manifest.units.missing_code is not None:
        raise ValueError(
            f"{manifest.name} marks missing pixels (code {manifest.units.missing_code}), which "
            "these scores would count as observed: evaluate on an archive without missing pixels."
        )


def latency_ms(
    model: Predictor,
    frames_BTCHW: Tensor,
    window: WindowConfig,
    device: torch.device,
    *,
    batch_size: int = 1,
    repeats: int = 5,
) -> float:
    """Milliseconds per sequence to predict a batch: median of repeats after one warm-up.

    Args:
        model: the predictor, on `device`.
        frames_BTCHW: stored frames (uint8); repeated or cut to the batch size.
        window: input and target frames.
        device: where the model is.
        batch_size: sequences at once; the time of the batch is divided by it.
        repeats: timed runs.
    """
    copies = -(-batch_size // len(frames_BTCHW))
    batch_BTCHW = frames_BTCHW.repeat(copies, 1, 1, 1, 1)[:batch_size]
    inputs_BTCHW = window_frames(batch_BTCHW, window)[:, : window.num_input_frames].to(device)

    def run_once() -> float:
        started = time.perf_counter()
        model(inputs_BTCHW, num_input_frames=window.num_input_frames, num_frames=window.num_frames)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with _predicting(model):
        run_once()  # warm-up: first-call allocations and kernel choices
        seconds = statistics.median(run_once() for _ in range(repeats))
    return 1e3 * seconds / batch_size


def _measure_runtime(
    model: Predictor,
    frames_BTCHW: Tensor,
    window: WindowConfig,
    device: torch.device,
    scored: PassScores,
) -> Runtime:
    return Runtime(
        ms_per_sequence_batch_1=latency_ms(model, frames_BTCHW, window, device),
        ms_per_sequence_batch_8=latency_ms(model, frames_BTCHW, window, device, batch_size=8),
        seconds_per_evaluation_batch=scored.seconds_per_batch,
        evaluation_batch_size=scored.batch_size,
        device=_describe(device),
    )


@contextmanager
def _predicting(model: Predictor) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


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


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"
