"""Scores against scikit-image, hand sums and closed forms; merging equals scoring at once.

Shape letters: B batch, T lead time, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from tests.synthetic_radar import DBZ
from tmu_dist.evaluation.baselines import persistence
from tmu_dist.evaluation.metrics import (
    METRIC_NAMES,
    PHYSICAL_METRIC_NAMES,
    SSIM_MODES,
    FramePair,
    select_metrics,
)
from tmu_dist.evaluation.score_table import ScoreTable

B, T, C, H, W = 7, 3, 2, 16, 20


@pytest.fixture
def truth_BTCHW() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    stored = torch.randint(0, 256, (B, T, C, H, W), dtype=torch.uint8, generator=generator)
    return stored.float() / 255


@pytest.fixture
def prediction_BTCHW(truth_BTCHW: Tensor) -> Tensor:
    """Truth with noise that leaves [0, 1], so that clipping matters."""
    generator = torch.Generator().manual_seed(2)
    return truth_BTCHW + 0.2 * torch.randn(truth_BTCHW.shape, generator=generator)


@pytest.fixture
def observed_BTCHW() -> Tensor:
    """About four of five pixels, in blocks of four rows, so that some SSIM windows are whole."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand((B, T, C, H // 4, 1), generator=generator).gt(0.2).repeat(1, 1, 1, 4, W)


def table_of(
    prediction: Tensor,
    truth: Tensor,
    ids: list[int] | None = None,
    observed: Tensor | None = None,
    **options: object,
) -> ScoreTable:
    table = ScoreTable(**options)  # type: ignore[arg-type]
    chosen = torch.arange(len(truth)) if ids is None else torch.tensor(ids)
    mask = None if observed is None else observed[chosen]
    weights = torch.ones(len(chosen))
    table.update(prediction[chosen], truth[chosen], chosen, weights, observed_BTCHW=mask)
    return table


def assert_bit_equal(first: ScoreTable, second: ScoreTable) -> None:
    a, b = first.compute(), second.compute()
    assert a.overall() == b.overall()
    np.testing.assert_array_equal(a.sample_ids_N, b.sample_ids_N)
    for name in METRIC_NAMES:
        np.testing.assert_array_equal(a.values_NT[name], b.values_NT[name])


def test_errors_agree_with_sums_by_hand(prediction_BTCHW: Tensor, truth_BTCHW: Tensor) -> None:
    overall = table_of(prediction_BTCHW, truth_BTCHW).compute().overall()
    error = prediction_BTCHW.double().clamp(0, 1) - truth_BTCHW.double()
    assert overall["mse_per_frame"] == pytest.approx(float((error**2).sum() / (B * T)), rel=1e-12)
    assert overall["mse_mean"] == pytest.approx(float((error**2).mean()), rel=1e-12)
    assert overall["mae_per_frame"] == pytest.approx(float(error.abs().sum() / (B * T)), rel=1e-12)
    assert overall["mae_mean"] == pytest.approx(float(error.abs().mean()), rel=1e-12)


def test_lead_times_are_kept_apart(prediction_BTCHW: Tensor, truth_BTCHW: Tensor) -> None:
    per_lead_time = table_of(prediction_BTCHW, truth_BTCHW).compute().per_lead_time()
    for t in range(T):
        alone = table_of(prediction_BTCHW[:, [t]], truth_BTCHW[:, [t]]).compute().overall()
        for name in METRIC_NAMES:
            assert per_lead_time[name][t] == pytest.approx(alone[name], rel=1e-12)


def test_image_scores_agree_with_scikit_image_on_uint8(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor
) -> None:
    scores = table_of(prediction_BTCHW, truth_BTCHW).compute()
    predicted = (prediction_BTCHW.double().clamp(0, 1) * 255).floor().numpy().astype(np.uint8)
    true = (truth_BTCHW * 255).round().numpy().astype(np.uint8)  # the stored bytes
    for b, t in itertools.product(range(B), range(T)):
        ssim = structural_similarity(
            true[b, t].transpose(1, 2, 0), predicted[b, t].transpose(1, 2, 0), channel_axis=-1
        )
        psnr = peak_signal_noise_ratio(true[b, t], predicted[b, t])
        assert scores.values_NT["ssim"][b, t] == pytest.approx(ssim, rel=1e-12)
        assert scores.values_NT["psnr_db"][b, t] == pytest.approx(psnr, rel=1e-12)


def test_every_stored_byte_survives_the_way_to_eight_bits() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16)
    overall = table_of(stored.float() / 255, stored.float().div(255)).compute().overall()
    assert overall["identical_frames"] == 1
    shifted = torch.where(stored > 0, stored - 1, stored).float() / 255
    psnr = table_of(shifted, stored.float() / 255).compute().overall()["psnr_db"]
    assert psnr == pytest.approx(20 * np.log10(255) - 10 * np.log10(255 / 256), rel=1e-12)


@pytest.mark.parametrize("mode", SSIM_MODES)
def test_ssim_of_two_flat_images_has_a_closed_form(mode: str) -> None:
    """No variance: SSIM = (2ab + c1) / (a^2 + b^2 + c1), c1 = (0.01 data range)^2."""
    a, b = 0.2, 0.8  # 51 and 204 of 255 exactly
    data_range = 2.0 if mode == "float_7x7_range2" else 1.0
    c1 = (0.01 * data_range) ** 2
    flat = torch.full((1, 1, 1, 16, 16), a, dtype=torch.float64)
    overall = table_of(flat, torch.full_like(flat, b), ssim_mode=mode).compute().overall()
    assert overall["ssim"] == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), rel=1e-9)


def test_gaussian_ssim_agrees_with_an_independent_convolution() -> None:
    """Wang et al. 2004 written out: 11x11 Gaussian, population covariance, valid region."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(1, 1, 1, 18, 18, dtype=torch.float64, generator=generator)
    y = torch.rand(1, 1, 1, 18, 18, dtype=torch.float64, generator=generator)
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = torch.outer(window, window)[None, None] / window.sum() ** 2

    def blur(image: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(image[0], kernel)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    overall = table_of(x, y, ssim_mode="gauss_11").compute().overall()
    assert overall["ssim"] == pytest.approx(float(ssim.mean()), rel=1e-10)


def test_range_two_gives_higher_ssim(prediction_BTCHW: Tensor, truth_BTCHW: Tensor) -> None:
    def ssim(mode: str) -> float:
        table = table_of(prediction_BTCHW, truth_BTCHW, names=["ssim"], ssim_mode=mode)
        return table.compute().overall()["ssim"]

    assert ssim("float_7x7_range2") > ssim("float_7x7_range1")


def test_perfect_forecast(truth_BTCHW: Tensor) -> None:
    scores = table_of(truth_BTCHW, truth_BTCHW).compute()
    overall = scores.overall()
    assert [overall[name] for name in METRIC_NAMES] == [0, 0, 0, 0, np.inf, 1]
    assert overall["identical_frames"] == B * T
    assert (scores.per_sequence("psnr_db") == np.inf).all()


def test_identical_images_are_counted_and_left_out_of_psnr(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor
) -> None:
    half_perfect = prediction_BTCHW.clone()
    half_perfect[0, 1] = truth_BTCHW[0, 1]
    scores = table_of(half_perfect, truth_BTCHW).compute()
    rest = table_of(prediction_BTCHW, truth_BTCHW, ids=list(range(1, B))).compute()
    per_lead_time = scores.per_lead_time()
    assert per_lead_time["identical_frames"].tolist() == [0, 1, 0]
    assert per_lead_time["psnr_db"][1] == pytest.approx(rest.per_lead_time()["psnr_db"][1])
    assert np.isfinite(scores.per_sequence("psnr_db")).all()


def test_any_batching_order_and_padding_gives_the_same_bits(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor
) -> None:
    whole = table_of(prediction_BTCHW, truth_BTCHW)
    pieces = ScoreTable()
    for ids in ([5, 3], [0, 6, 1], [4], [2, 0, 0]):
        chosen = torch.tensor(ids)
        weights = torch.ones(len(ids))
        prediction = prediction_BTCHW[chosen]
        if ids == [2, 0, 0]:  # padding, and what the model said about it does not matter
            weights[1:] = 0
            prediction[1:] = torch.nan
        pieces.update(prediction, truth_BTCHW[chosen], chosen, weights)
    assert_bit_equal(whole, pieces)


def test_merged_ranks_equal_one_rank(prediction_BTCHW: Tensor, truth_BTCHW: Tensor) -> None:
    whole = table_of(prediction_BTCHW, truth_BTCHW)
    ranks = [
        table_of(prediction_BTCHW, truth_BTCHW, ids)
        for ids in ([6, 0], [1, 2, 3], [4, 5, 0])  # sample 0 was padded onto a second rank
    ]
    for order in itertools.permutations(ranks):
        merged = ScoreTable()
        for table in order:
            merged.merge(pickle.loads(pickle.dumps(table)))  # as ranks exchange them
        assert_bit_equal(whole, merged)


def test_a_strided_prediction_scores_like_a_contiguous_one(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor
) -> None:
    strided = prediction_BTCHW.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert_bit_equal(table_of(strided, truth_BTCHW), table_of(prediction_BTCHW, truth_BTCHW))


def test_predictions_in_half_precision_are_scored_as_the_numbers_that_they_are(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor
) -> None:
    half = prediction_BTCHW.to(torch.bfloat16)
    assert_bit_equal(table_of(half, truth_BTCHW), table_of(half.float(), truth_BTCHW))


def test_one_sample_with_two_different_scores_is_refused(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor
) -> None:
    first = table_of(prediction_BTCHW, truth_BTCHW, ids=[0, 1])
    other = table_of(prediction_BTCHW + 0.01, truth_BTCHW, ids=[1, 2])
    with pytest.raises(ValueError, match="Sample 1 was scored twice"):
        first.merge(other)


def test_tables_of_different_metrics_do_not_merge() -> None:
    with pytest.raises(ValueError, match="different metrics"):
        ScoreTable(["ssim"]).merge(ScoreTable(["mse_mean"]))
    with pytest.raises(ValueError, match="ssim_mode"):
        ScoreTable(["ssim"]).merge(ScoreTable(["ssim"], ssim_mode="gauss_11"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_model_is_named_not_averaged(value: float, truth_BTCHW: Tensor) -> None:
    prediction = truth_BTCHW.clone()
    prediction[4, 2, 0, 0, 0] = value
    with pytest.raises(ValueError, match="sample 4 holds NaN or infinite"):
        table_of(prediction, truth_BTCHW)


def test_bad_input_is_refused(truth_BTCHW: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[7, 2, 2, 16, 20\] and \[7, 3, 2, 16, 20\]"):
        table_of(truth_BTCHW[:, :2], truth_BTCHW)
    with pytest.raises(ValueError, match=r"sample 0 spans \[0, 255\]"):
        table_of(truth_BTCHW, truth_BTCHW * 255)
    with pytest.raises(ValueError, match="frames are 6x20"):
        table_of(truth_BTCHW[..., :6, :], truth_BTCHW[..., :6, :])
    with pytest.raises(ValueError, match="No sample was scored"):
        ScoreTable().compute()
    with pytest.raises(ValueError, match=r"Unknown metrics \['rmse'\].*mse_per_frame"):
        ScoreTable(["rmse"])
    with pytest.raises(ValueError, match=r"Unknown ssim_mode .best.*uint8_7x7"):
        ScoreTable(ssim_mode="best")  # type: ignore[arg-type]


def test_every_metric_explains_itself() -> None:
    definitions = ScoreTable().definitions
    assert set(definitions) == {*METRIC_NAMES, "identical_frames"}
    assert "summed over the channels and pixels" in definitions["mse_per_frame"]
    texts = {select_metrics(["ssim"], ssim_mode=m)["ssim"].definition for m in SSIM_MODES}
    assert len(texts) == len(SSIM_MODES)


def test_missing_pixels_count_nowhere(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor, observed_BTCHW: Tensor
) -> None:
    scores = table_of(prediction_BTCHW, truth_BTCHW, observed=observed_BTCHW, units=DBZ).compute()
    error = prediction_BTCHW.double().clamp(0, 1) - truth_BTCHW.double()
    for b, t in itertools.product(range(B), range(T)):
        own, count = error[b, t][observed_BTCHW[b, t]], C * H * W
        expected = {
            "mse_mean": float((own**2).mean()),
            "mae_mean": float(own.abs().mean()),
            "mse_per_frame": float((own**2).mean()) * count,
            "mae_per_frame": float(own.abs().mean()) * count,
            "observed_fraction": len(own) / count,
        }
        for name, value in expected.items():
            assert scores.values_NT[name][b, t] == pytest.approx(value, rel=1e-12)
        seen = observed_BTCHW[b, t]
        predicted = (prediction_BTCHW[b, t][seen].double().clamp(0, 1) * 255).floor()
        true = (truth_BTCHW[b, t][seen] * 255).round()
        psnr = peak_signal_noise_ratio(true.byte().numpy(), predicted.byte().numpy())
        assert scores.values_NT["psnr_db"][b, t] == pytest.approx(psnr, rel=1e-12)


@pytest.mark.parametrize("mode", SSIM_MODES)
def test_ssim_looks_only_through_whole_windows(mode: str) -> None:
    """With everything missing but a rectangle, it is the SSIM of the rectangle alone."""
    generator = torch.Generator().manual_seed(5)
    truth = torch.rand(1, 1, 2, 40, 36, generator=generator)
    prediction = (truth + 0.2 * torch.rand(truth.shape, generator=generator)).clamp(0, 1)
    inside = np.s_[:, :, :, 9:31, 5:30]
    observed = torch.zeros_like(truth, dtype=torch.bool)
    observed[inside] = True
    masked = table_of(prediction, truth, observed=observed, names=["ssim"], ssim_mode=mode)
    alone = table_of(prediction[inside], truth[inside], names=["ssim"], ssim_mode=mode)
    assert masked.compute().overall()["ssim"] == pytest.approx(
        alone.compute().overall()["ssim"], rel=1e-9
    )


@pytest.mark.parametrize("mode", SSIM_MODES)
def test_what_is_predicted_under_missing_pixels_does_not_matter(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor, observed_BTCHW: Tensor, mode: str
) -> None:
    wild = torch.where(observed_BTCHW, prediction_BTCHW, 1 - prediction_BTCHW)
    other_fill = torch.where(observed_BTCHW, truth_BTCHW, torch.ones(()))
    first = table_of(prediction_BTCHW, truth_BTCHW, observed=observed_BTCHW, ssim_mode=mode)
    second = table_of(wild, other_fill, observed=observed_BTCHW, ssim_mode=mode)
    for name in METRIC_NAMES:
        np.testing.assert_array_equal(
            first.compute().values_NT[name], second.compute().values_NT[name]
        )


@pytest.mark.parametrize("mode", SSIM_MODES)
def test_nothing_missing_gives_the_bits_of_the_plain_formulas(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor, mode: str
) -> None:
    """Written out as they stood before there were masks; and a full mask changes no bit."""
    everywhere = torch.ones_like(truth_BTCHW, dtype=torch.bool)
    plain = table_of(prediction_BTCHW, truth_BTCHW, ssim_mode=mode).compute()
    masked = table_of(
        prediction_BTCHW, truth_BTCHW, observed=everywhere, units=DBZ, ssim_mode=mode
    ).compute()
    for name in METRIC_NAMES:
        np.testing.assert_array_equal(plain.values_NT[name], masked.values_NT[name])
    error_BTX = (prediction_BTCHW.double().clamp(0, 1) - truth_BTCHW.double()).numpy()
    error_BTX = error_BTX.reshape(B, T, -1)
    for b in range(B):
        squares_TX, sizes_TX = error_BTX[b] ** 2, np.abs(error_BTX[b])
        for name, values_T in (
            ("mse_per_frame", squares_TX.sum(axis=1)),
            ("mse_mean", squares_TX.mean(axis=1)),
            ("mae_per_frame", sizes_TX.sum(axis=1)),
            ("mae_mean", sizes_TX.mean(axis=1)),
        ):
            np.testing.assert_array_equal(plain.values_NT[name][b], values_T)
    overall = masked.overall()
    assert (overall["observed_fraction"], overall["unobserved_frames"]) == (1, 0)


def test_a_frame_without_observations_has_no_score(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor
) -> None:
    observed = torch.ones_like(truth_BTCHW, dtype=torch.bool)
    observed[2, 1] = False
    observed[3, 1, :, ::5] = False  # pixels enough, but no whole window
    scores = table_of(prediction_BTCHW, truth_BTCHW, observed=observed, units=DBZ).compute()
    for name in METRIC_NAMES:
        assert np.isnan(scores.values_NT[name][2, 1])
        assert np.isfinite(scores.values_NT[name][3, 1]) == (name != "ssim")
    per_lead_time = scores.per_lead_time()
    assert per_lead_time["unobserved_frames"].tolist() == [0, 1, 0]
    assert per_lead_time["frames_without_ssim"].tolist() == [0, 1, 0]
    assert per_lead_time["identical_frames"].tolist() == [0, 0, 0]
    rest = table_of(prediction_BTCHW, truth_BTCHW, ids=[0, 1, 4, 5, 6]).compute()
    assert per_lead_time["ssim"][1] == pytest.approx(rest.per_lead_time()["ssim"][1])
    everything = table_of(prediction_BTCHW, truth_BTCHW, ids=[2]).compute().values_NT["mse_mean"]
    assert scores.per_sequence("mse_mean")[2] == pytest.approx(everything[0, [0, 2]].mean())


def test_nothing_observed_at_all(prediction_BTCHW: Tensor, truth_BTCHW: Tensor) -> None:
    nowhere = torch.zeros_like(truth_BTCHW, dtype=torch.bool)
    overall = (
        table_of(prediction_BTCHW, truth_BTCHW, observed=nowhere, units=DBZ).compute().overall()
    )
    assert all(np.isnan(overall[name]) for name in METRIC_NAMES)
    assert overall["unobserved_frames"] == B * T
    assert overall["frames_without_ssim"] == overall["identical_frames"] == 0


def test_masked_ranks_merge(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor, observed_BTCHW: Tensor
) -> None:
    observed_BTCHW[0, 0] = False  # a row with NaN on two ranks is still the same row
    arguments = (prediction_BTCHW, truth_BTCHW)
    whole = table_of(*arguments, observed=observed_BTCHW)
    merged = ScoreTable()
    for ids in ([3, 4, 0], [0, 6], [5, 2, 1]):
        merged.merge(table_of(*arguments, ids, observed_BTCHW))
    for name in METRIC_NAMES:
        np.testing.assert_array_equal(
            merged.compute().values_NT[name], whole.compute().values_NT[name]
        )


def test_physical_errors_have_the_unit_of_the_archive(
    prediction_BTCHW: Tensor, truth_BTCHW: Tensor, observed_BTCHW: Tensor
) -> None:
    names = ("mse_mean", "mae_mean", *PHYSICAL_METRIC_NAMES)
    shifted = replace(DBZ, offset=-10.0)  # a range of 70 dBZ wherever it starts
    for units in (DBZ, shifted):
        overall = table_of(
            prediction_BTCHW, truth_BTCHW, observed=observed_BTCHW, names=names, units=units
        ).compute().overall()  # fmt: skip
        assert overall["mse_physical"] == pytest.approx(70**2 * overall["mse_mean"], rel=1e-12)
        assert overall["mae_physical"] == pytest.approx(70 * overall["mae_mean"], rel=1e-12)
    metrics = select_metrics(names, units=DBZ)
    assert metrics["mse_physical"].label == "MSE [dBZ²]"
    rain = replace(DBZ, quantity="rain_rate", unit="mm/h")
    assert select_metrics(names, units=rain)["mse_physical"].label == "MSE [(mm/h)²]"
    with pytest.raises(ValueError, match="Unknown metrics"):
        select_metrics(names)


def test_masks_must_fit_the_frames(truth_BTCHW: Tensor) -> None:
    with pytest.raises(ValueError, match="mask must have the shape of the frames"):
        table_of(truth_BTCHW, truth_BTCHW, observed=torch.ones(B, T, 1, H, W, dtype=torch.bool))


def test_definitions_speak_of_missing_pixels_only_where_there_can_be_some() -> None:
    with_missing, without = ScoreTable(units=DBZ), ScoreTable(units=replace(DBZ, missing_code=None))
    assert without.definitions == ScoreTable().definitions
    assert "observed pixels" in with_missing.definitions["mse_per_frame"]
    assert "without missing pixels" in with_missing.definitions["ssim"]
    extra = set(with_missing.definitions) - set(without.definitions)
    assert extra == {"observed_fraction", "unobserved_frames", "frames_without_ssim"}


def test_frames_keep_zero_where_nothing_was_observed(truth_BTCHW: Tensor) -> None:
    observed = torch.zeros_like(truth_BTCHW[0], dtype=torch.bool)
    frames = FramePair(truth_BTCHW[0].numpy(), truth_BTCHW[0].numpy(), observed.numpy())
    assert not frames.predicted_TCHW.any() and not frames.true_8bit_TCHW.any()


def test_persistence_repeats_the_last_input(truth_BTCHW: Tensor) -> None:
    forecast = persistence(truth_BTCHW, 4)
    assert forecast.shape == (B, 4, C, H, W)
    assert all(torch.equal(forecast[:, t], truth_BTCHW[:, -1]) for t in range(4))
    with pytest.raises(ValueError, match="no frame was given"):
        persistence(truth_BTCHW[:, :0], 4)
