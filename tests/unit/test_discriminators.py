"""SAVP's discriminators: shapes, spectral norms, and several passes before one update."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.models.savp.discriminators import ImageDiscriminator, SpectralNorm, VideoDiscriminator
from tmu_dist.models.shapes import FrameShape

FRAME = FrameShape(channels=2, height=12, width=20)


def image_discriminator() -> ImageDiscriminator:
    torch.manual_seed(0)
    return ImageDiscriminator(FRAME, base_channels=3)


def video_discriminator(clip_length: int = 5) -> VideoDiscriminator:
    torch.manual_seed(0)
    return VideoDiscriminator(FRAME, clip_length=clip_length, base_channels=3)


def clips(time: int = 5, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, time, 2, 12, 20, generator=generator)


def weights_and_biases(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """As the next forward pass in evaluation uses them."""
    layers = [*module.convs, module.score]  # type: ignore[union-attr,misc]
    return [(layer.weight, layer.bias) for layer in layers]  # type: ignore[union-attr]


def test_image_discriminator_is_seven_convolutions_and_a_dense_layer() -> None:
    network = image_discriminator().double().eval()
    x = clips()[:, 0].double()
    *convs, (dense, dense_bias) = weights_and_biases(network)
    score, features = network(x)
    for (weight, bias), stride, feature in zip(convs, (1, 2, 1, 2, 1, 2, 1), features, strict=True):
        x = F.conv2d(x, weight, bias, stride=stride, padding=1)
        x = torch.where(x > 0, x, 0.1 * x)
        torch.testing.assert_close(feature, x, rtol=1e-12, atol=1e-12)
    assert [f.shape[1:] for f in features][1::2] == [(6, 6, 10), (12, 3, 5), (24, 1, 2)]
    torch.testing.assert_close(score, (x.reshape(2, -1) @ dense.T + dense_bias)[:, 0])


def test_video_discriminator_halves_time_at_the_last() -> None:
    network = video_discriminator(clip_length=7).double().eval()
    x = clips(time=7).double().permute(0, 2, 1, 3, 4)
    *convs, (dense, dense_bias) = weights_and_biases(network)
    score, features = network(clips(time=7).double())
    strides = [1, (1, 2, 2), 1, (1, 2, 2), 1, (2, 2, 2), 1]
    for (weight, bias), stride, feature in zip(convs, strides, features, strict=True):
        x = F.conv3d(x, weight, bias, stride=stride, padding=1)
        x = torch.where(x > 0, x, 0.1 * x)
        torch.testing.assert_close(feature, x, rtol=1e-12, atol=1e-12)
    assert [f.shape[2] for f in features] == [7, 6, 6, 5, 5, 2, 2]
    torch.testing.assert_close(score, (x.reshape(2, -1) @ dense.T + dense_bias)[:, 0])


@pytest.mark.parametrize("clip_length", range(1, 11))
def test_clips_of_any_length(clip_length: int) -> None:
    network = video_discriminator(clip_length)
    score, features = network(clips(clip_length))
    assert score.shape == (2,) and len(features) == 7
    score.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_zeros_follow_clips_that_are_too_short() -> None:
    short, long = video_discriminator(2).eval(), video_discriminator(4).eval()
    long.load_state_dict(short.state_dict())
    given = clips(4)
    given[:, 2:] = 0.0
    torch.testing.assert_close(short(given[:, :2])[0], long(given)[0])


def test_a_training_pass_is_one_power_iteration() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2).double()
    norm = SpectralNorm(weight).double()
    matrix = weight.reshape(4, 12)
    u = norm.output_direction.clone()
    for _ in range(3):
        v = matrix.T @ u / (matrix.T @ u).norm()
        u = matrix @ v / (matrix @ v).norm()
        torch.testing.assert_close(norm(weight), weight / (u @ matrix @ v))
        torch.testing.assert_close(norm.output_direction, u)
    for _ in range(300):
        norm(weight)
    assert torch.linalg.svdvals(norm.eval()(weight).reshape(4, 12))[0] == pytest.approx(1.0)
    before = norm.output_direction.clone()
    norm(weight)
    assert torch.equal(norm.output_direction, before)  # evaluation changes nothing


def test_gradient_treats_the_singular_vectors_as_constants() -> None:
    norm = SpectralNorm(torch.randn(3, 4)).double().eval()
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        norm.train()(weight.detach())
    norm.eval()
    # At convergence u and v do not move to first order, so the true derivative is the same.
    assert torch.autograd.gradcheck(norm, (weight,), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make", [image_discriminator, video_discriminator])
def test_several_passes_come_before_one_backward_pass(make) -> None:  # type: ignore[no-untyped-def]
    """Each pass keeps its own norm: the gradient is the sum of the passes' own gradients."""
    network = make().double()
    batches = [clips().double() * scale for scale in (1.0, 0.5, 0.25)]
    if make is image_discriminator:
        batches = [batch[:, 0] for batch in batches]
    apart = [torch.zeros_like(p) for p in network.parameters()]
    replay = copy.deepcopy(network)
    for batch in batches:
        gradients = torch.autograd.grad(replay(batch)[0].square().sum(), list(replay.parameters()))
        apart = [total + gradient for total, gradient in zip(apart, gradients, strict=True)]
    torch.stack([network(batch)[0].square().sum() for batch in batches]).sum().backward()
    for parameter, expected in zip(network.parameters(), apart, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_gradient_of_an_evaluated_network_survives_a_training_pass() -> None:
    network = image_discriminator()
    score = network.eval()(clips()[:, 0])[0].sum()
    network.train()(clips()[:, 1])
    score.backward()


def test_state_dict_round_trip() -> None:
    network = video_discriminator()
    for _ in range(3):
        network(clips())
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    torch.manual_seed(5)
    other = VideoDiscriminator(FRAME, clip_length=5, base_channels=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):  # also the directions of the power iteration
        assert torch.equal(network(clips())[0], other(clips())[0])


def test_bf16_keeps_the_norms_exact() -> None:
    network = video_discriminator().eval()
    exact = network(clips())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(clips())[0]
    torch.testing.assert_close(rough.float(), exact, rtol=3e-2, atol=3e-2)


def test_samples_do_not_influence_each_other() -> None:
    network = video_discriminator().double().eval()
    given = clips().double()
    changed = given.clone()
    changed[1] = 0.5
    before, after = network(given)[0], network(changed)[0]
    torch.testing.assert_close(before[0], after[0], rtol=1e-12, atol=1e-12)
    assert before[1] != after[1]


def test_wrong_shapes_are_explained() -> None:
    with pytest.raises(ValueError, match="at least 8 pixels on each side; got 4x32"):
        ImageDiscriminator(FrameShape(channels=1, height=4, width=32), base_channels=2)
    with pytest.raises(ValueError, match=r"shape \(2, 12, 20\).*got \(2, 12, 16\)"):
        image_discriminator()(clips()[:, 0, :, :, :16])
    with pytest.raises(ValueError, match=r"shape \(2, 5, 12, 20\).*got \(2, 4, 12, 20\)"):
        video_discriminator()(clips(4))


def test_learns_to_tell_moving_clips_from_still_ones() -> None:
    network = video_discriminator()
    moving = clips(batch=4)
    still = moving[:, :1].expand_as(moving)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        gap = (network(moving)[0] - network(still)[0]).mean()
        (-gap).backward()
        optimizer.step()
    assert gap > 1
