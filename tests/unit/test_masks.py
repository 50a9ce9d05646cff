"""Missing pixels in training: they change no loss, no gradient and no weight.

Legend: B batch, T time, M teachers, P hidden channels, C channels, H, W height, width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tests.unit.test_training import assert_same, final_state, make_step, run
from tests.unit.test_transfer import batch, student_of, teacher, tmu_method
from tmu_dist.config import RunConfig
from tmu_dist.data.manifest import Manifest, Units
from tmu_dist.models.rollout import Rollout
from tmu_dist.models.shapes import MemoryShape
from tmu_dist.run_folder import read_log
from tmu_dist.transfer.base import Reduction, TrainingBatch, reduce_squares
from tmu_dist.transfer.imitation import observed_share
from tmu_dist.transfer.tmu import MemoryDistillation

REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")


def masked_batch(size: int = 3) -> TrainingBatch:
    """Random pixels and whole areas are missing; of the last sequence everything is."""
    given = batch(size)
    generator = torch.Generator().manual_seed(8)
    observed = torch.rand(given.frames_BTCHW.shape, generator=generator) < 0.7
    observed[:, :, :, :8, 4:12] = False
    observed[-1] = False
    return replace(given, frames_BTCHW=given.frames_BTCHW * observed, observed_BTCHW=observed)


def other_values_where_missing(given: TrainingBatch, value: float) -> TrainingBatch:
    assert given.observed_BTCHW is not None
    return replace(given, frames_BTCHW=given.frames_BTCHW.masked_fill(~given.observed_BTCHW, value))


def all_observed(given: TrainingBatch) -> TrainingBatch:
    return replace(given, observed_BTCHW=torch.ones_like(given.frames_BTCHW, dtype=torch.bool))


def rollout_of(method: MemoryDistillation, given: TrainingBatch) -> Rollout:
    """A student's rollout whose outputs are leaves, so that gradients stop at them."""
    rollout = method.unroll(student_of(method), given)
    return rollout._replace(
        predictions_BTCHW=rollout.predictions_BTCHW.detach().requires_grad_(),
        imitations={
            k: tuple(x.detach().requires_grad_() for x in each)
            for k, each in rollout.imitations.items()
        },
    )


def share_of(given: TrainingBatch) -> Tensor:
    """What each element of the tiny network's memories counts, [B, T-1, 1, h, w]."""
    assert given.observed_BTCHW is not None
    maps = torch.zeros(len(given.weights_B), 5, 4, 4, 4)
    return observed_share(given.observed_BTCHW[:, :-1], maps, MemoryShape(4, 4, 4))


def prediction_of(method: MemoryDistillation, rollout: Rollout, given: TrainingBatch) -> Tensor:
    return method.task.objective.terms(rollout, given)["prediction"].value


def distillation_of(method: MemoryDistillation, rollout: Rollout, given: TrainingBatch) -> Tensor:
    return method._distillation(rollout, method.teach(given, rollout), given)


# The definitions


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from(REDUCTIONS))
def test_only_observed_elements_count(seed: int, share: float, reduction: Reduction) -> None:
    random = np.random.default_rng(seed)
    error_BTCHW = random.normal(size=(3, 2, 1, 4, 5))
    observed_BTCHW = random.random(error_BTCHW.shape) < share
    observed_BTCHW[0] = False
    expected = []
    for error, observed in zip(error_BTCHW, observed_BTCHW, strict=True):
        squares = error[observed] ** 2
        total = squares.sum()
        expected.append(total / max(len(squares), 1) if reduction == "mean" else total)
    found = reduce_squares(
        torch.from_numpy(error_BTCHW), reduction, torch.from_numpy(observed_BTCHW)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_distillation_weighs_memories_by_what_was_observed_under_them(
    reduction: Reduction,
) -> None:
    """Eq. 4 with masks, written out again element by element."""
    method = tmu_method(1, 2, reduction=reduction)
    given = masked_batch()
    rollout = method.unroll(student_of(method), given)
    teachings = method.teach(given, rollout)
    assert given.observed_BTCHW is not None
    observed = given.observed_BTCHW.numpy()
    size, steps, k = len(observed), 5, method.task.model.patch_size
    expected = 0.0
    for b in range(size):
        shares = np.zeros((steps, 4, 4))
        for t, row, column in np.ndindex(shares.shape):
            patch = observed[b, t, :, row * k : row * k + k, column * k : column * k + k]
            shares[t, row, column] = patch.mean()  # of the frame that step t reads
        assert (shares == 0).any() and ((shares > 0) & (shares < 1)).any() == (b < size - 1)
        for layer, imitations in rollout.imitations.items():
            for m in range(2):
                error = (
                    (imitations[m][b] - teachings[m].states["memory"][layer][b])
                    .detach()
                    .double()
                    .numpy()
                )
                total = (error**2 * shares[:, None]).sum()
                channels = error.shape[1]
                counted = channels * shares.sum() if reduction == "mean" else 1
                expected += float(given.weights_B[b]) * (total / counted if shares.any() else 0)
    found = method._distillation(rollout, teachings, given)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_share_of_a_patch_is_over_its_pixels_and_channels() -> None:
    observed_BTCHW = torch.zeros(1, 1, 2, 4, 6, dtype=torch.bool)
    observed_BTCHW[0, 0, 0, :2, :2] = True  # one channel of one patch
    observed_BTCHW[0, 0, :, 3, 5] = True  # one pixel of another
    memory_BTPHW = torch.zeros(1, 1, 7, 2, 3, dtype=torch.float64)
    share_BT1HW = observed_share(observed_BTCHW, memory_BTPHW, MemoryShape(7, 2, 3))
    assert share_BT1HW.dtype == torch.float64
    assert share_BT1HW.tolist() == [[[[[0.5, 0, 0], [0, 0, 0.25]]]]]
    two_slices = observed_share(
        observed_BTCHW, memory_BTPHW.repeat(1, 1, 1, 2, 1), MemoryShape(7, 2, 3, 2)
    )
    assert torch.equal(two_slices, share_BT1HW.repeat(1, 1, 1, 2, 1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_missing_is_the_plain_loss(reduction: Reduction) -> None:
    """Without a mask to the last bit, with a mask of ones up to rounding."""
    method = tmu_method(1, 2, reduction=reduction)
    given = batch()
    student = student_of(method)
    terms = method.loss(student, given)
    rollout = method.unroll(student, given)
    teachings = method.teach(given, rollout)

    def plain(error: Tensor) -> Tensor:
        squares = error.square().flatten(1)
        return squares.mean(1) if reduction == "mean" else squares.sum(1)

    prediction = plain(rollout.predictions_BTCHW - given.frames_BTCHW[:, 1:])
    distillation = torch.stack(
        [
            plain(imitation - taught.states["memory"][k])
            for k, imitations in rollout.imitations.items()
            for imitation, taught in zip(imitations, teachings, strict=True)
        ]
    ).sum(0)
    values = {name: term.value for name, term in terms.terms.items()}
    assert torch.equal(values["prediction"], (prediction * given.weights_B).sum())
    assert torch.equal(values["distillation"], (distillation * given.weights_B).sum())

    masked = method.loss(student, all_observed(given)).terms
    assert masked.keys() == values.keys() == {"prediction", "distillation"}
    for name, value in values.items():
        torch.testing.assert_close(masked[name].value, value, rtol=1e-6, atol=0)


# No trace of a missing pixel


@pytest.mark.parametrize("value", [0.25, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_value_of_a_missing_pixel_changes_no_bit_of_loss_or_gradient(
    reduction: Reduction, value: float
) -> None:
    method = tmu_method(1, reduction=reduction)
    found = []
    given = masked_batch()
    rollout = rollout_of(method, given)
    for one in (given, other_values_where_missing(given, value)):
        loss = prediction_of(method, rollout, one)
        (gradient,) = torch.autograd.grad(loss, rollout.predictions_BTCHW)
        found.append((loss, gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0] > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_gradient_comes_from_a_missing_pixel(reduction: Reduction) -> None:
    method = tmu_method(1, 2, reduction=reduction)
    given = masked_batch()
    assert given.observed_BTCHW is not None
    rollout = rollout_of(method, given)
    (gradient,) = torch.autograd.grad(
        prediction_of(method, rollout, given), rollout.predictions_BTCHW
    )
    # Frame t + 1 is what step t predicts.
    assert torch.equal(gradient != 0, given.observed_BTCHW[:, 1:])

    imitations = [x for each in rollout.imitations.values() for x in each]
    share = share_of(given)
    for gradient in torch.autograd.grad(distillation_of(method, rollout, given), imitations):
        assert torch.equal(gradient != 0, (share > 0).expand_as(gradient))
        assert (share == 0).any()


@pytest.mark.parametrize("choice", ["own", "student", "truth"])
def test_the_target_of_a_missing_pixel_reaches_no_weight(choice: str) -> None:
    """Through the whole network: the last frame is a target only."""
    gradients = []
    for value in (0.0, 0.7):
        given = masked_batch()
        changed = other_values_where_missing(given, value).frames_BTCHW[:, -1:]
        frames = torch.cat([given.frames_BTCHW[:, :-1], changed], dim=1)
        method = tmu_method(1, 2, teacher_input=choice)
        student = student_of(method)
        method.loss(student, replace(given, frames_BTCHW=frames)).total().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert_same(*gradients)


def test_a_batch_without_a_single_observed_pixel_teaches_nothing_and_breaks_nothing() -> None:
    given = batch()
    blind = replace(
        given,
        frames_BTCHW=torch.zeros_like(given.frames_BTCHW),
        observed_BTCHW=torch.zeros_like(given.frames_BTCHW, dtype=torch.bool),
    )
    for reduction in REDUCTIONS:
        method = tmu_method(1, 2, reduction=reduction)
        student = student_of(method)
        terms = method.loss(student, blind)
        terms.total().backward()
        assert terms.total() == 0
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert gradients and all(not gradient.any() for gradient in gradients)
        assert method.liveness(student, blind) is None


def test_a_sequence_of_which_nothing_is_observed_counts_as_zero() -> None:
    method = tmu_method(1, 2)
    student = student_of(method)
    given = masked_batch(3)
    first_two = TrainingBatch(
        frames_BTCHW=given.frames_BTCHW[:2],
        observed_BTCHW=given.observed_BTCHW[:2],  # type: ignore[index]
        sampling_mask_BT=given.sampling_mask_BT[:2],
        weights_B=given.weights_B[:2],
    )
    torch.testing.assert_close(
        method.loss(student, given).total(), method.loss(student, first_two).total()
    )


def test_liveness_looks_at_what_was_observed() -> None:
    method = tmu_method(1, 2)
    student = student_of(method)
    given = masked_batch()
    report = method.liveness(student, given)
    assert report is not None and report.teaching_gradient_norm > 0

    rollout = method.unroll(student, given)
    memory = teacher(2)(
        given.frames_BTCHW,
        num_input_frames=3,
        num_frames=6,
        sampling_mask_BT=given.sampling_mask_BT,
    ).memories[1]
    share = share_of(given)
    pairs = np.stack([rollout.imitations[1][1].detach().numpy(), memory.detach().numpy()])
    weights = share.expand_as(memory).numpy().ravel()
    covariance = np.cov(pairs.reshape(2, -1), aweights=weights)
    expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert report.memory_correlation[1][1] == pytest.approx(expected, rel=1e-4)

    losses = [
        method.beta * distillation_of(method, method.unroll(student, one), one)
        for one in (given, replace(given, observed_BTCHW=None))
    ]
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(x, parameters, allow_unused=True)
                if g is not None
            ]
        ).norm()
        for x in losses
    ]
    assert report.teaching_gradient_norm == pytest.approx(norms[0].item(), rel=1e-5)
    assert norms[0].item() != pytest.approx(norms[1].item(), rel=1e-3)


def test_the_mask_is_reversed_with_the_frames() -> None:
    given = masked_batch()
    assert given.observed_BTCHW is not None
    backwards = replace(
        given,
        frames_BTCHW=given.frames_BTCHW.flip(1),
        observed_BTCHW=given.observed_BTCHW.flip(1),
    )
    both, learned = make_step("update")
    both(given)
    one_by_one, expected = make_step("off")
    one_by_one(given)
    one_by_one(backwards)
    assert_same(dict(learned.state_dict()), dict(expected.state_dict()))


# Whole runs


def write_masked_archive(
    url: str, *, missing_code: int | None, dtype: str = "uint8", val_observed: bool = True
) -> str:
    """12 training and 4 validation sequences of moving blobs; a corner and specks are missing.

    With a missing code of None, the missing pixels hold 0 and count as observed.
    """
    max_code = 200 if dtype == "uint8" else 60_000
    random = np.random.default_rng(3)
    splits = {}
    for split, count in (("train", 12), ("val", 4)):
        samples = []
        for index in range(count):
            codes = _blob(random, max_code).astype(dtype)
            hidden = random.random(codes.shape) < 0.1
            hidden[..., :6, :6] = True
            hidden |= split == "val" and not val_observed
            codes[hidden] = missing_code or 0
            samples.append(Sample(f"{split}-{index}", codes, {"sample_id": index}))
        splits[split] = (write_shard(url, shard_path(split, 0), samples),)
    units = Units(
        quantity="reflectivity",
        unit="dBZ",
        scale=70 / max_code,
        offset=0.0,
        max_code=max_code,
        missing_code=missing_code,
    )
    manifest = Manifest(
        name="masked",
        num_frames=6,
        channels=1,
        height=16,
        width=16,
        dtype=dtype,  # type: ignore[arg-type]
        units=units,
        frame_interval_minutes=5.0,
        splits=splits,
        created_by={"source": "test"},
    )
    write_manifest(url, manifest)
    return url


def _blob(random: np.random.Generator, max_code: int) -> NDArray[np.float64]:
    """One sequence: a round blob that moves; codes [6, 1, 16, 16]."""
    centre, speed = random.uniform(4, 12, 2), random.uniform(-1, 1, 2)
    rows, columns = np.mgrid[:16, :16]
    places = centre + speed * np.arange(6)[:, None]
    distances = (rows - places[:, :1, None]) ** 2 + (columns - places[:, 1:, None]) ** 2
    return np.round(max_code * np.exp(-distances / 18))[:, None]


def on_archive(config: RunConfig, url: str, name: str, **transfer: Any) -> RunConfig:
    return replace(
        config,
        output=f"{config.output}-{name}",
        data=replace(config.data, url=url),
        transfer=replace(config.transfer, **transfer),
        training=replace(config.training, num_steps=3),
    )


@pytest.fixture(scope="module")
def source_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_masked_archive(str(tmp_path_factory.mktemp("source")), missing_code=None)


@pytest.mark.parametrize("method", ["scratch", "finetune", "tmu"])
def test_how_missing_pixels_are_stored_changes_no_weight(
    tiny_config: RunConfig, source_url: str, tmp_path: Path, method: str
) -> None:
    """A source without missing pixels teaches targets that have them, marked in two ways."""
    transfer: dict[str, Any] = {"method": method}
    if method != "scratch":
        transfer["teachers"] = (run(on_archive(tiny_config, source_url, "source")).run,)
    states = {}
    for code in (201, 255, None):
        url = write_masked_archive(str(tmp_path / f"archive-{code}"), missing_code=code)
        config = on_archive(tiny_config, url, f"{method}-{code}", **transfer)
        states[code] = final_state(run(config).run)["weights"]
    assert_same(states[201], states[255])
    assert any(not torch.equal(states[201][name], states[None][name]) for name in states[201])


def test_sixteen_bits_with_missing_pixels_train_in_both_precisions(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    url = write_masked_archive(str(tmp_path / "archive"), missing_code=65_535, dtype="uint16")
    teacher_run = run(on_archive(tiny_config, url, "teacher")).run
    losses = {}
    for precision in ("fp32", "bf16"):
        config = on_archive(tiny_config, url, precision, method="tmu", teachers=(teacher_run,))
        training = replace(config.training, precision=precision)
        log = read_log(Path(run(replace(config, training=training)).run))
        losses[precision] = [e["loss/total"] for e in log if e["event"] == "train"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


def test_validation_on_nothing_is_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    url = write_masked_archive(str(tmp_path / "archive"), missing_code=255, val_observed=False)
    with pytest.raises(ValueError, match="No pixel of the target frames is observed"):
        run(on_archive(tiny_config, url, "blind"))
