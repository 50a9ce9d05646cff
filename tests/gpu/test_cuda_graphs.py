"""On a GPU a step that is recorded and replayed learns what one does whose kernels are launched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.transfer_methods import CASES, batch, case_of, masked
from tmu_dist.collectives import Collectives
from tmu_dist.config import ComputeConfig, Precision, RunConfig, ScaleConfig
from tmu_dist.run_folder import read_log
from tmu_dist.training.graphed import REHEARSALS
from tmu_dist.training.loop import Run, train
from tmu_dist.transfer.base import TrainingBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CARD = torch.device("cuda", 0)
ITERATIONS = 5
"""Ten parts, of which the first are rehearsals, and all after them replays."""
STEADY = [
    name for name in CASES if name not in ("knowledge_flow", "knowledge_flow-all", "tmu-annealed")
]


def with_settings(config: RunConfig, graph: str, **training: Any) -> RunConfig:
    return replace(
        config,
        output=f"{config.output}-{graph}",
        compute=ComputeConfig(cuda_graph=graph),  # type: ignore[arg-type]
        training=replace(config.training, **training),
    )


def learned(config: RunConfig, batches: list[TrainingBatch]) -> tuple[Run, list[dict[str, float]]]:
    run = Run(config, Collectives(), CARD)
    return run, [dict(run.training_step(each.on(CARD))) for each in batches]


def assert_close_training(
    config: RunConfig, batches: list[TrainingBatch], rtol: float, **training: Any
) -> Run:
    """Recorded or not: the same terms and weights but for the order of sums."""
    eager, expected = learned(with_settings(config, "off", **training), batches)
    graphed, found = learned(with_settings(config, "on", **training), batches)
    assert not eager.training_step.is_recorded and graphed.training_step.is_recorded
    assert [sorted(each) for each in found] == [sorted(each) for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=rtol)
    for name, value in eager.trainee.state_dict().items():
        torch.testing.assert_close(
            graphed.trainee.state_dict()[name], value, rtol=rtol, atol=10 * rtol
        )
    assert graphed.training_step.facts() == eager.training_step.facts()
    return graphed


@pytest.mark.parametrize("name", STEADY)
def test_every_steady_method(
    name: str, tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    config = case_of(tiny_config, name, teacher_runs)
    batches = [masked(batch(step)) for step in range(1, ITERATIONS + 1)]
    run = assert_close_training(config, batches, rtol=1e-4, learning_rate=1e-3)
    assert 2 * ITERATIONS > REHEARSALS
    torch.cuda.synchronize()
    assert all(p.isfinite().all() for p in run.student.parameters())


@pytest.mark.parametrize("reverse_input", ["off", "update", "average"])
@pytest.mark.parametrize(("precision", "rtol"), [("tf32", 1e-3), ("bf16", 3e-2), ("fp16", 1e-2)])
def test_every_precision(
    precision: Precision,
    rtol: float,
    reverse_input: str,
    tiny_config: RunConfig,
    teacher_runs: tuple[str, str],
) -> None:
    config = case_of(tiny_config, "tmu", teacher_runs)
    batches = [batch(step) for step in range(1, ITERATIONS + 1)]
    assert_close_training(
        config,
        batches,
        rtol,
        learning_rate=1e-3,
        precision=precision,
        reverse_input=reverse_input,
        grad_clip_norm=1.0,
    )


def test_batches_of_other_sizes_between_replays(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """A smaller batch, and one without missing pixels, are learned from as ever."""
    config = case_of(tiny_config, "l2_sp", teacher_runs)
    batches = [masked(batch(step)) for step in range(1, ITERATIONS + 1)]
    batches.insert(3, masked(batch(9, size=2)))
    batches.insert(5, batch(10))
    assert_close_training(config, batches, rtol=1e-4, learning_rate=1e-3)


def test_parts_of_a_batch(tiny_config: RunConfig, teacher_runs: tuple[str, str]) -> None:
    """Of four sequences three are replayed and one is not."""
    config = replace(
        case_of(tiny_config, "tmu", teacher_runs), scale=ScaleConfig(sequences_at_once=3)
    )
    batches = [batch(step) for step in range(1, ITERATIONS + 1)]
    assert_close_training(config, batches, rtol=1e-4, learning_rate=1e-3)


def test_recomputation_is_recorded_too(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    config = case_of(tiny_config, "tmu", teacher_runs)
    batches = [batch(step) for step in range(1, ITERATIONS + 1)]
    off, on = (
        replace(config, compute=ComputeConfig(cuda_graph=graph, recompute=True))  # type: ignore[arg-type]
        for graph in ("off", "on")
    )
    expected, found = learned(off, batches)[1], learned(on, batches)[1]
    assert found == [pytest.approx(each, rel=1e-4) for each in expected]


def test_a_whole_run_with_validation_and_checkpoints(tmu_config: RunConfig) -> None:
    """Stopped and continued, which records anew."""
    longer = replace(tmu_config, training=replace(tmu_config.training, num_steps=10))

    def losses(config: RunConfig) -> list[float]:
        run = train(config, Collectives(), CARD).run
        return [e["loss/total"] for e in read_log(run) if e["event"] == "train"]

    expected = losses(with_settings(longer, "off"))
    assert losses(with_settings(longer, "on")) == pytest.approx(expected, rel=1e-3)


def test_fp32_is_finer_than_tf32(tiny_config: RunConfig, teacher_runs: tuple[str, str]) -> None:
    """Convolutions of cards would be TensorFloat-32's anyway, had fp32 not forbidden it."""
    config = case_of(tiny_config, "scratch", teacher_runs)
    given = batch()
    cpu = Run(replace(config, output=config.output + "-cpu"), Collectives(), torch.device("cpu"))
    exact = cpu.training_step(given)["loss/total"]
    errors = {}
    for precision in ("fp32", "tf32"):
        (terms,) = learned(with_settings(config, "off", precision=precision), [given])[1]
        errors[precision] = abs(terms["loss/total"] - exact) / exact
    assert errors["fp32"] < 1e-5
    if torch.cuda.get_device_capability(CARD) >= (8, 0):
        assert errors["fp32"] < errors["tf32"] < 1e-2
