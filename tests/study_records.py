"""Runs of a study with known scores, for tests of verdicts and pages.

Legend: N sequences, T lead time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tests.evaluated_runs import radar_result, result
from tmu_dist.evaluation.result import MODEL, EvaluationResult, TransferGates
from tmu_dist.evaluation.score_table import Scores
from tmu_dist.ledger.records import ArmRecord, Ledger, SeedRecord
from tmu_dist.study.design import Scale, Study
from tmu_dist.study.record import (
    ArchiveFacts,
    Circumstances,
    StudyRecord,
    TeacherFacts,
    make_record,
)
from tmu_dist.study.verdicts import find

SEEDS = (0, 1, 2)
N, T = 60, 3


def evaluation(
    mse: float,
    seed: int,
    *,
    noise: float = 0.15,
    gates: Mapping[str, float] | None = None,
    is_radar: bool = False,
) -> EvaluationResult:
    """Scores around a mean: sequences differ much, in the same way in every run, seeds a little."""
    shared, own = np.random.default_rng(1), np.random.default_rng((int(1000 * mse), seed))
    template = radar_result("run", hits=50) if is_radar else result("run", mse)
    hard_N1 = shared.normal(0, 6, (N, 1))
    mse_NT = mse + hard_N1 + own.normal(0, noise) + own.normal(0, 0.2, (N, T))
    names = template.overall[MODEL]
    values = {name: np.full((N, T), 0.5) for name in names if "physical" not in name}
    values |= {"mse_per_frame": mse_NT, "mae_per_frame": 2 * mse_NT, "ssim": 1 - mse_NT / 500}
    scores = Scores(np.arange(N), values)
    counts_NTKX = np.zeros((N, T, 2, 4), np.int64)
    counts_NTKX[..., 0], counts_NTKX[..., 1] = 50, np.maximum(mse_NT, 0)[..., None].astype(int)
    return replace(
        template,
        model=replace(template.model, seed=seed),
        data=replace(template.data, num_sequences=N),
        overall={**template.overall, MODEL: {**template.overall[MODEL], **scores.overall()}},
        per_sequence={MODEL: scores},
        contingency={MODEL: counts_NTKX} if is_radar else None,
        gates=None
        if gates is None
        else TransferGates(
            teachers=tuple(gates),
            layers=(0,),
            means_LM=(tuple(mean + own.normal(0, 0.002) for mean in gates.values()),),
        ),
    )  # fmt: skip


def fake_ledger(
    study: Study,
    mse: Mapping[str, float],
    *,
    seeds: Sequence[int] = SEEDS,
    noise: float = 0.15,
    gates: Mapping[str, float] | None = None,
    is_radar: bool = False,
) -> Ledger:
    """Runs of a study by the mean MSE of its rows; rows that `mse` leaves out have none."""
    arms = tuple(
        ArmRecord(
            name=row.key,
            label=row.label,
            group="memory",
            sources=tuple(gates or ()),
            method="tmu" if "tmu" in row.key else "scratch",
            seeds={
                seed: SeedRecord(
                    run=f"../runs/{row.key.replace('/', '-')}-seed{seed}",
                    evaluation=evaluation(
                        mse[row.key], seed, noise=noise, gates=gates, is_radar=is_radar
                    ),
                    seconds_per_batch=0.125,
                )
                for seed in seeds
            }
            if row.key in mse
            else {},
            failures={},
        )
        for row in study.rows
    )
    return Ledger(recipe=study.name, command="", git_revision=None, sources=(), facts={}, arms=arms)


def as_published(study: Study) -> dict[str, float]:
    """Means by which everything is as in the paper."""
    return {
        row.key: row.published["mse_per_frame"]
        for row in study.rows
        if "mse_per_frame" in row.published
    }


def circumstances(study: Study, scale: Scale = "small") -> Circumstances:
    """What a record says beside the results, made up."""
    keys = [row.key for row in study.rows]
    return Circumstances(
        scale=scale,
        weights="chosen",
        settings_for_all={},
        command=f"python -m tmu_dist.study {study.name} --seeds 0 1 2",
        git_revision="abc1234",
        software={"torch": "2.8", "numpy": "2.2"},
        finished="2026-01-02 03:04 UTC",
        recipes={row.key: row.recipe_name(scale) for row in study.rows},
        settings={key: {} for key in keys},
        num_steps=dict.fromkeys(keys, 3000),
        networks=("convlstm, 2 layers of 32 channels",),
        trainings=("3,000 iterations of 8 sequences",),
        archives=(
            ArchiveFacts(
                name="study-digits-3-twice", role="target", original="MNIST <embedded>",
                sequences={"train": 1000, "test": N}, frame=(1, 32, 32), manifest_hash="f" * 64,
            ),
        ),
        teachers=(
            TeacherFacts(
                name="study-digits-teacher-1", archive="study-digits-1", steps=5900,
                weights_sha256="e" * 64,
            ),
        ),
    )  # fmt: skip


def fake_record(study: Study, ledger: Ledger, scale: Scale = "small") -> StudyRecord:
    """The record of such runs."""
    runs = [record.run for arm in ledger.arms for record in arm.seeds.values()]
    validations = {run: {500: 40.0, 1500: 30.25, 2000: 31.0, 3000: 28.5} for run in runs}
    known = circumstances(study, scale)
    return make_record(study, ledger, find(study, ledger), known, validations)
