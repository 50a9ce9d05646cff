"""SAVP against independent references, written out with other operations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.config import ModelConfig, SAVPConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.models.savp.blocks import InstanceNorm, upsampled
from tmu_dist.models.savp.cell import NormalisedConvLSTMCell
from tmu_dist.models.savp.discriminators import ImageDiscriminator, VideoDiscriminator
from tmu_dist.models.savp.latents import LSTM, Gaussian, GaussianHead, LSTMState, Posterior
from tmu_dist.models.savp.network import SAVP
from tmu_dist.models.savp.transforms import Composition, as_kernels, convolve_each, warped
from tmu_dist.models.shapes import FrameShape
from tmu_dist.models.tmu import MemoryTransfer

FRAME = FrameShape(channels=2, height=12, width=20)
SMALL = {"base_channels": 3, "latent_size": 4, "posterior_channels": 4}
WINDOW = {"num_input_frames": 3, "num_frames": 5}


def build(num_slots: int = 0, frame: FrameShape = FRAME, **savp: Any) -> SAVP:
    torch.manual_seed(0)
    model = ModelConfig(cell="savp", savp=SAVPConfig(**(SMALL | savp)))
    network = build_predictor(frame, model, tmu=TMUConfig(), num_slots=num_slots)
    assert isinstance(network, SAVP)
    return network


def randomised(module: nn.Module, std: float = 0.3) -> Any:
    """In float64, with weights that are far from their start (norms' shifts and biases are 0)."""
    torch.manual_seed(1)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=std)
    return module


def frames(batch: int = 2, time: int = 5, frame: FrameShape = FRAME) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, time, frame.channels, frame.height, frame.width)
    return torch.rand(*shape, generator=generator).double()


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).double()


def instance_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Sample by sample, channel by channel."""
    out = torch.empty_like(x)
    for b, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        plane = x[b, c]
        deviation = ((plane - plane.mean()) ** 2).mean().add(1e-6).sqrt()
        out[b, c] = (plane - plane.mean()) / deviation * gain[c] + shift[c]
    return out


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# The recurrent cell


def reference_cell(
    p: dict[str, Tensor], prefix: str, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """C-tilde and the output gate."""
    weight_xh = p[f"{prefix}gates.weight"]
    u = F.conv2d(x, weight_xh[:, : x.shape[1]], padding=2)
    u = u + F.conv2d(h, weight_xh[:, x.shape[1] :], padding=2)
    u = instance_norm(u, p[f"{prefix}gate_norm.gain"], p[f"{prefix}gate_norm.shift"])
    width = h.shape[1]
    i, j, f, o = (u[:, k * width : (k + 1) * width] for k in range(4))
    memory = c / (1 + torch.exp(-f - 1)) + torch.tanh(j) / (1 + torch.exp(-i))
    gain, shift = p[f"{prefix}memory_norm.gain"], p[f"{prefix}memory_norm.shift"]
    return instance_norm(memory, gain, shift), 1 / (1 + torch.exp(-o))


def test_cell_normalises_gates_and_memory() -> None:
    cell = randomised(NormalisedConvLSTMCell(3, 2, map_size=(4, 5)))
    x, h, c = draws(2, 3, 4, 5), draws(2, 2, 4, 5), draws(2, 2, 4, 5) * 3
    memory, output = reference_cell(dict(cell.named_parameters()), "", x, h, c)
    proposal = cell.propose(x, CellState(h, c), Carry())
    close(proposal.memory_BPHW, memory)
    state, _ = cell.emit(proposal, proposal.memory_BPHW)
    close(state.hidden_BPHW, torch.tanh(memory) * output)
    close(state.memory_BPHW, memory)


def test_transferred_memory_is_the_normalised_one_and_is_what_the_next_step_reads() -> None:
    """The TMU sits behind the memory's norm; hidden state and next step use the fused memory."""
    cell = NormalisedConvLSTMCell(3, 2, map_size=(4, 5))
    layer = randomised(RecurrentLayer(cell, MemoryTransfer(3, 2, 2, map_size=(4, 5))))
    p = dict(cell.named_parameters())
    state = CellState(draws(1, 2, 4, 5), draws(1, 2, 4, 5))
    x = draws(1, 3, 4, 5) + 0.5
    for _ in range(2):
        own, output = reference_cell(p, "", x, state.hidden_BPHW, state.memory_BPHW)
        fused, imitations, gates = layer.transfer(own, x, state.hidden_BPHW)
        mixed = gates * imitations + (1 - gates) * own.unsqueeze(1)
        step = layer(x, state, Carry())
        close(step.imitations_BMPHW, imitations)
        close(fused, own + mixed.sum(1))
        close(step.state.memory_BPHW, own + mixed.sum(1))
        close(step.state.hidden_BPHW, torch.tanh(own + mixed.sum(1)) * output)
        state = step.state


def test_norm_of_a_single_pixel_is_the_shift() -> None:
    norm = randomised(InstanceNorm(3))
    close(norm(draws(1, 3, 1, 1))[0, :, 0, 0], norm.shift)


# Upsampling


def reference_upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification's exact recipe: transposed convolution, padding 2, crop."""
    channels, height, width = x.shape[1:]
    line = torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=x.dtype)
    kernel = torch.outer(line, line).expand(channels, 1, 4, 4)
    large = F.conv_transpose2d(x, kernel, stride=2, groups=channels)
    assert large.shape[2:] == (2 * height + 2, 2 * width + 2)
    full = F.conv2d(large, weight, padding=2)
    return full[:, :, 2 : 2 + 2 * height, 2 : 2 + 2 * width] + bias[:, None, None]


def test_exact_upsampling_is_the_transposed_convolution() -> None:
    x, weight, bias = draws(2, 3, 4, 5), draws(2, 3, 3, 3), draws(2)
    ours = F.conv2d(upsampled(x, "exact"), weight, bias)
    close(ours, reference_upsampled_conv(x, weight, bias))


def test_plain_upsampling_differs_at_the_border_only() -> None:
    x, weight = draws(2, 3, 4, 5), draws(2, 3, 3, 3)
    exact = F.conv2d(upsampled(x, "exact"), weight)
    large = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    plain = F.conv2d(upsampled(x, "plain"), weight)
    close(plain, F.conv2d(large, weight, padding=1))
    close(exact[..., 2:-2, 2:-2], plain[..., 2:-2, 2:-2])
    assert not torch.isclose(exact, plain)[..., 0, :].any()


# Moved copies


def test_kernels_are_positive_sum_to_one_and_start_as_the_identity() -> None:
    weights = draws(2, 25, 3)
    kernels = as_kernels(weights)
    shifted = weights.numpy().copy()
    shifted[:, 12] += 1.0
    positive = np.maximum(shifted - 1e-12, 0.0) + 1e-12
    expected = positive / positive.sum(1, keepdims=True)
    close(kernels, torch.from_numpy(expected))
    frame = frames()[:, 0]
    moved = convolve_each(frame, as_kernels(torch.zeros(2, 25, 3).double()))
    torch.testing.assert_close(
        moved, frame.unsqueeze(1).expand(-1, 3, -1, -1, -1), atol=1e-9, rtol=0
    )


def moved_by_loops(frame_CHW: Tensor, kernels_SNHW: Tensor) -> Tensor:
    """Pixel by pixel; the outside mirrors the inside with the edge repeated."""
    channels, height, width = frame_CHW.shape
    padded = np.pad(frame_CHW.numpy(), ((0, 0), (2, 2), (2, 2)), mode="symmetric")
    out = np.zeros((kernels_SNHW.shape[1], channels, height, width))
    for n, c, y, x in np.ndindex(*out.shape):
        for row, column in np.ndindex(5, 5):
            weight = float(kernels_SNHW[5 * row + column, n, y, x])
            out[n, c, y, x] += weight * padded[c, y + row, x + column]
    return torch.from_numpy(out)


def test_cdna_moves_a_whole_image_by_each_kernel() -> None:
    small = FrameShape(channels=2, height=8, width=12)
    network = randomised(build(frame=small, num_transformed=3)).transformation
    frame, encoded = frames(frame=small)[:, 0], draws(2, 6, 2, 3)
    moved = network(frame, encoded, draws(2, 3, 8, 12))
    flat = encoded.reshape(2, 36) @ network.dense.weight.T + network.dense.bias
    for b in range(2):
        kernels = as_kernels(flat[b].reshape(1, 5, 5, 3).flatten(1, 2))[0].detach()
        expected = moved_by_loops(frame[b], kernels[:, :, None, None].expand(-1, -1, 8, 12))
        close(moved[b], expected)


def test_dna_moves_every_pixel_by_kernels_of_its_own() -> None:
    small = FrameShape(channels=2, height=8, width=8)
    network = randomised(build(frame=small, num_transformed=2, transformation="dna"))
    network = network.transformation
    frame, decoded = frames(frame=small)[:, 0], draws(2, 3, 8, 8)
    moved = network(frame, draws(2, 6, 2, 2), decoded)
    weights = network.kernels(network.features(decoded)).detach()
    for b in range(2):
        kernels = as_kernels(weights[b].reshape(1, 25, 2, 8, 8))[0]
        close(moved[b], moved_by_loops(frame[b], kernels))


def warped_by_loops(frame_CHW: Tensor, flow_DHW: Tensor) -> Tensor:
    """Four neighbours by weights of the displacement's fraction; indices are kept inside."""
    _, height, width = frame_CHW.shape
    out = torch.zeros_like(frame_CHW)
    for y, x in itertools.product(range(height), range(width)):
        dx, dy = flow_DHW[0, y, x].item(), flow_DHW[1, y, x].item()
        for right, below in itertools.product((0, 1), (0, 1)):
            column = min(max(x + math.floor(dx) + right, 0), width - 1)
            row = min(max(y + math.floor(dy) + below, 0), height - 1)
            weight_x = dx - math.floor(dx) if right else 1 - (dx - math.floor(dx))
            weight_y = dy - math.floor(dy) if below else 1 - (dy - math.floor(dy))
            out[:, y, x] += weight_x * weight_y * frame_CHW[:, row, column]
    return out


def test_flow_looks_up_where_the_displacement_points() -> None:
    frame, flow = frames()[:, 0], draws(2, 2, 12, 20) * 4
    moved = warped(frame, flow)
    for b in range(2):
        close(moved[b], warped_by_loops(frame[b], flow[b]))
    network = randomised(build(transformation="flow", num_transformed=3)).transformation
    decoded = draws(2, 3, 12, 20)
    displacements = network.displacements(network.features(decoded))
    moved = network(frame, draws(2, 6, 3, 5), decoded)
    for n in range(3):  # channel = component * 3 + copy
        close(moved[:, n], warped(frame, displacements[:, [n, 3 + n]]))


def test_masks_mix_candidates_and_scratch_image() -> None:
    compose = randomised(Composition(3, 4, 2, num_candidates=5))
    p = dict(compose.named_parameters())
    decoded, candidates = draws(2, 3, 4, 6), torch.rand(2, 5, 2, 4, 6).double()

    def features(name: str) -> Tensor:
        x = F.conv2d(decoded, p[f"{name}.0.weight"], p[f"{name}.0.bias"], padding=1)
        return instance_norm(x, p[f"{name}.1.gain"], p[f"{name}.1.shift"]).clamp(min=0)

    scratch = F.conv2d(features("scratch.0"), p["scratch.1.weight"], p["scratch.1.bias"], padding=1)
    images = [*candidates.unbind(1), 1 / (1 + torch.exp(-scratch))]
    logits = F.conv2d(
        torch.cat([features("features"), *images], 1), p["masks.weight"], p["masks.bias"], padding=1
    )
    masks = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = sum(masks[:, k : k + 1] * image for k, image in enumerate(images))
    close(compose(decoded, candidates), expected)


# Latents


def test_posterior_halves_three_times_and_averages() -> None:
    posterior = randomised(Posterior(2, 3, 4))
    p = dict(posterior.named_parameters())
    pair = frames(frame=FrameShape(channels=2, height=32, width=40))[:, :2]
    x = torch.cat([pair[:, 0], pair[:, 1]], 1)
    for k in range(3):
        weight, bias = p[f"encoder.convs.{k}.weight"], p[f"encoder.convs.{k}.bias"]
        assert weight.shape[0] == 3 * 2**k
        x = F.conv2d(x, weight, bias, stride=2, padding=1)
        if k:
            x = instance_norm(x, p[f"encoder.norms.{k}.gain"], p[f"encoder.norms.{k}.shift"])
        x = torch.where(x > 0, x, 0.2 * x)
    assert x.shape[2:] == (4, 5)
    pooled = x.mean((2, 3))
    ours = posterior(pair[:, 0], pair[:, 1])
    close(ours.mean_BZ, pooled @ p["head.mean.weight"].T + p["head.mean.bias"])
    close(
        ours.log_variance_BZ,
        pooled @ p["head.log_variance.weight"].T + p["head.log_variance.bias"],
    )


@pytest.mark.parametrize("size", [(8, 8), (8, 64), (12, 20), (16, 16)])
def test_posterior_of_small_frames_still_tells_them_apart(size: tuple[int, int]) -> None:
    posterior = randomised(Posterior(2, 3, 4))
    given = frames(frame=FrameShape(channels=2, height=size[0], width=size[1]))
    means = [posterior(given[:, 0], given[:, k]).mean_BZ for k in (1, 2)]
    assert (means[0] - means[1]).abs().max() > 2e-3


def test_log_variance_is_clipped() -> None:
    head = randomised(GaussianHead(5, 6), std=100.0)
    log_variance = head(draws(4, 5)).log_variance_BZ
    assert log_variance.abs().max() == 10.0


def test_divergence_of_gaussians() -> None:
    q, p = (Gaussian(draws(3, 5) + k, draws(3, 5).roll(1) - k) for k in (0, 1))
    mean, log_variance = q
    to_normal = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1)
    close(q.divergence_from(Gaussian.standard(mean)), to_normal)
    normals = [torch.distributions.Normal(g.mean_BZ, (g.log_variance_BZ / 2).exp()) for g in (q, p)]
    close(q.divergence_from(p), torch.distributions.kl_divergence(*normals).sum(1))
    assert q.divergence_from(q).abs().max() == 0
    noise = draws(3, 5)
    close(q.draw(noise), mean + log_variance.exp().sqrt() * noise)
    assert q.draw(None) is mean


def test_lstm_is_torchs_with_another_order_and_forget_bias() -> None:
    ours = randomised(LSTM(3, 5))
    reference = nn.LSTMCell(3, 5).double()
    i, j, f, o = ours.gates.weight.chunk(4)
    bi, bj, bf, bo = ours.gates.bias.chunk(4)
    with torch.no_grad():
        ordered = torch.cat([i, f, j, o])
        reference.weight_ih.copy_(ordered[:, :3])
        reference.weight_hh.copy_(ordered[:, 3:])
        reference.bias_ih.copy_(torch.cat([bi, bf + 1, bj, bo]))
        reference.bias_hh.zero_()
    state = LSTMState(draws(2, 5), draws(2, 5) + 1)
    expected = reference(draws(2, 3), (state.hidden_BF, state.memory_BF))
    new = ours(draws(2, 3), state)
    close(new.hidden_BF, expected[0])
    close(new.memory_BF, expected[1])


# The whole step


def reference_step(
    network: SAVP, x: Tensor, first: Tensor, z: Tensor, states: list[CellState]
) -> Tensor:
    """One step of the generator with two blocks, from its named weights; changes the states."""
    p = dict(network.named_parameters())

    def tiled(maps: Tensor) -> Tensor:
        return torch.cat([maps, z[:, :, None, None].repeat(1, 1, *maps.shape[2:])], 1)

    def normalised(name: str, maps: Tensor) -> Tensor:
        gain, shift = p[f"{name}.resample.norm.gain"], p[f"{name}.resample.norm.shift"]
        return instance_norm(maps, gain, shift).clamp(min=0)

    def recurrent(name: str, maps: Tensor, k: int) -> Tensor:
        memory, output = reference_cell(p, f"{name}.layer.cell.", tiled(maps), *states[k][:2])
        states[k] = CellState(torch.tanh(memory) * output, memory)
        return states[k].hidden_BPHW

    def conv(name: str) -> tuple[Tensor, Tensor]:
        return p[f"{name}.resample.conv.weight"], p[f"{name}.resample.conv.bias"]

    e0 = F.conv2d(tiled(torch.cat([x, first], 1)), *conv("encoder.0"), padding=2)
    e0 = recurrent("encoder.0", normalised("encoder.0", F.avg_pool2d(e0, 2)), 0)
    e1 = F.conv2d(tiled(e0), *conv("encoder.1"), padding=1)
    e1 = recurrent("encoder.1", normalised("encoder.1", F.avg_pool2d(e1, 2)), 1)
    d0 = normalised("decoder.0", reference_upsampled_conv(tiled(e1), *conv("decoder.0")))
    d0 = recurrent("decoder.0", d0, 2)
    skip = tiled(torch.cat([d0, e0], 1))
    d1 = normalised("decoder.1", reference_upsampled_conv(skip, *conv("decoder.1")))
    moved = network.transformation(x, e1, d1)
    return network.composition(d1, torch.cat([moved, torch.stack([x, first], 1)], 1))


def test_two_steps_are_the_specified_encoder_and_decoder() -> None:
    network = randomised(build())
    given, noise = frames(time=3), draws(2, 2, 4)
    rollout = network(
        given,
        num_input_frames=2,
        num_frames=3,
        sampling_mask_BT=torch.ones(2, 0, dtype=torch.bool),
        noise_BTZ=noise,
    )
    state = network.initial_state(given[:, 0], num_input_frames=2)
    smoothed, states = state.latent.smoothed, list(state.layers)
    for t in range(2):
        posterior = network.latents.posterior(given[:, t], given[:, t + 1])
        smoothed = network.latents.lstm(posterior.draw(noise[:, t]), smoothed)
        expected = reference_step(network, given[:, t], given[:, 0], smoothed.hidden_BF, states)
        close(rollout.predictions_BTCHW[:, t], expected)
        divergence = posterior.divergence_from(Gaussian.standard(posterior.mean_BZ))
        close(rollout.objectives["kl_BT"][:, t], divergence)
    for memory, layer_state in zip(rollout.memories, states, strict=True):
        close(memory[:, -1], layer_state.memory_BPHW)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((12, 20), "3x6x10 6x3x5 3x6x10"),
        ((32, 40), "3x16x20 6x8x10 3x16x20"),
        ((64, 72), "3x32x36 6x16x18 12x8x9 6x16x18 3x32x36"),
        ((144, 128), "6x36x32 12x18x16 24x9x8 24x18x16 12x36x32"),
        ((256, 288), "12x32x36 24x16x18 24x8x9 24x16x18 12x32x36"),
    ],
)
def test_frames_choose_the_blocks(size: tuple[int, int], expected: str) -> None:
    frame = FrameShape(channels=1, height=size[0], width=size[1])
    network = build(frame=frame)
    assert " ".join(map(str, network.memory_shapes)) == expected
    given = frames(1, 1, frame).float()
    with torch.no_grad():
        rollout = network(given, num_input_frames=1, num_frames=3)
    assert [m.shape[2:] for m in rollout.memories] == [s[:3] for s in network.memory_shapes]
    assert rollout.predictions_BTCHW.shape == (1, 2, 1, *size)


def test_sizes_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4; got 30x32 pixels"):
        build(frame=FrameShape(channels=1, height=30, width=32))
    with pytest.raises(ValueError, match="multiples of 8; got 64x68 pixels"):
        build(frame=FrameShape(channels=1, height=64, width=68))
    with pytest.raises(ValueError, match="at least 8 pixels on each side, got 4x32"):
        build(frame=FrameShape(channels=1, height=4, width=32))
    with pytest.raises(ValueError, match=r"built for frames of 12x20 pixels, got 16x20.*flow"):
        build().predict(torch.rand(1, 2, 2, 16, 20), 1)
    with pytest.raises(ValueError, match="multiples of 4; got 14x20"):
        build(transformation="flow").predict(torch.rand(1, 2, 2, 14, 20), 1)
    other_size = build(transformation="flow").predict(torch.rand(1, 2, 2, 16, 24), 1)
    assert other_size.shape == (1, 1, 2, 16, 24)


@pytest.mark.parametrize(
    ("size", "clip_length", "expected"),
    [
        ((1, 64), 10, (7_542_597, 675_072, 5_142_273, 1_479_873)),
        ((3, 128), 7, (39_785_625, 679_168, 5_209_537, 1_529_601)),
    ],
)
def test_parameter_counts(
    size: tuple[int, int], clip_length: int, expected: tuple[int, ...]
) -> None:
    frame = FrameShape(channels=size[0], height=size[1], width=size[1])
    with torch.device("meta"):
        network: Predictor = build_predictor(frame, ModelConfig(cell="savp"))
    video = VideoDiscriminator(frame, clip_length=clip_length, base_channels=32)
    image = ImageDiscriminator(frame, base_channels=32)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert isinstance(network, SAVP) and network.latents is not None
    posterior = count(network.latents.posterior)
    assert (count(network) - posterior, posterior, count(video), count(image)) == expected


# Rollouts: which latents, which frames


def everything_shown(batch: int = 2) -> Tensor:
    return torch.ones(batch, 1, dtype=torch.bool)


def train(network: SAVP, given: Tensor, noise: Tensor | None, mask: Tensor) -> Rollout:
    rollout: Rollout = network(given, **WINDOW, sampling_mask_BT=mask, noise_BTZ=noise)
    return rollout


@pytest.mark.parametrize("prior", ["normal", "learned"])
def test_forecasts_and_prior_rollouts_do_not_see_targets_but_do_see_input_pairs(prior: str) -> None:
    network = randomised(build(prior=prior)).train()
    network.unrolls_prior = True
    noise, given = draws(2, 4, 4), frames()
    hidden, pair = given.clone(), given.clone()
    hidden[:, 3:] = 0.25
    pair[:, 2] = 0.25
    mask = torch.zeros(2, 1, dtype=torch.bool)
    rollouts = [train(network, x, noise, mask) for x in (given, hidden, pair)]
    base, other_targets, other_pair = (r.prior_predictions_BTCHW for r in rollouts)
    assert base is not None and other_targets is not None and other_pair is not None
    assert torch.equal(base, other_targets)
    assert torch.equal(base[:, 0], other_pair[:, 0])  # the pair of frames 0 and 1
    assert (base[:, 1] - other_pair[:, 1]).abs().max() > 1e-5  # that of 1 and 2, by its latent
    posterior = [r.predictions_BTCHW for r in rollouts[:2]]
    assert torch.equal(posterior[0][:, :2], posterior[1][:, :2])
    assert (posterior[0][:, 2] - posterior[1][:, 2]).abs().max() > 1e-5
    forecasts = [network(x, **WINDOW, noise_BTZ=noise) for x in (given, hidden, given[:, :3])]
    assert all(torch.equal(f.predictions_BTCHW, base) for f in forecasts)
    assert not any(f.objectives for f in forecasts)


def test_posterior_reads_true_frames_where_the_network_reads_its_own() -> None:
    network = randomised(build())
    noise, given = draws(2, 4, 4), frames()
    shown = train(network, given, noise, everything_shown())
    hidden = train(network, given, noise, ~everything_shown())
    assert not torch.equal(shown.predictions_BTCHW, hidden.predictions_BTCHW)
    close(shown.objectives["kl_BT"], hidden.objectives["kl_BT"])


def test_no_noise_means_the_mean_of_the_latents() -> None:
    network = randomised(build(prior="learned")).eval()
    given = frames()
    zeros = torch.zeros(2, 4, 4).double()
    for rollout, other in (
        (
            train(network, given, None, everything_shown()),
            train(network, given, zeros, everything_shown()),
        ),
        (network(given, **WINDOW), network(given, **WINDOW, noise_BTZ=zeros)),
    ):
        assert torch.equal(rollout.predictions_BTCHW, other.predictions_BTCHW)
    drawn = network(given, **WINDOW, noise_BTZ=draws(2, 4, 4))
    assert not torch.equal(drawn.predictions_BTCHW, other.predictions_BTCHW)


def test_learned_prior_reads_pairs_of_input_frames_then_zeros() -> None:
    network = randomised(build(prior="learned"))
    latents = network.latents
    given = frames()
    kl_BT = train(network, given, draws(2, 4, 4), everything_shown()).objectives["kl_BT"]
    state = latents.prior.lstm.initial_state(given)
    for t in range(4):
        posterior = latents.posterior(given[:, t], given[:, t + 1])
        features = latents.prior.encoder(given[:, t], given[:, t + 1])
        dense = latents.prior.dense(features if t < 2 else torch.zeros_like(features))
        state = latents.prior.lstm(dense, state)
        close(kl_BT[:, t], posterior.divergence_from(latents.prior.head(state.hidden_BF)))


def test_without_a_latent_the_network_is_deterministic() -> None:
    network = randomised(build(latent_size=0)).train()
    given = frames()
    rollout = network(given, **WINDOW, sampling_mask_BT=everything_shown())
    assert network.noise_size == 0 and not network.learns_from_targets and not network.latents
    assert not rollout.objectives
    changed = given.clone()
    changed[:, 4] = 0.0  # only ever a target
    other = network(changed, **WINDOW, sampling_mask_BT=everything_shown())
    assert torch.equal(rollout.predictions_BTCHW, other.predictions_BTCHW)


@pytest.mark.parametrize("transformation", ["cdna", "flow", "dna"])
@pytest.mark.parametrize("num_slots", [0, 2])
def test_every_weight_learns_and_every_memory_is_imitated(
    transformation: str, num_slots: int
) -> None:
    network = build(num_slots, transformation=transformation, prior="learned").train()
    rollout = train(network, frames().float(), draws(2, 4, 4).float(), everything_shown())
    maps = [(2, 4, 3, 6, 10), (2, 4, 6, 3, 5), (2, 4, 3, 6, 10)]
    assert [m.shape for m in rollout.memories] == maps
    assert [[i.shape for i in of_layer] for of_layer in rollout.imitations.values()] == [
        [shape] * 2 for shape in maps if num_slots
    ]
    imitated = sum(i.square().sum() for of_layer in rollout.imitations.values() for i in of_layer)
    (
        rollout.predictions_BTCHW.square().sum() + rollout.objectives["kl_BT"].sum() + imitated
    ).backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert rollout.predictions_BTCHW.min() >= 0 and rollout.predictions_BTCHW.max() <= 1


def test_weights_start_as_a_cut_normal_and_the_tmu_keeps_its_own_start() -> None:
    network = build(num_slots=1, base_channels=16)
    transfer = {
        id(p) for m in network.modules() if isinstance(m, MemoryTransfer) for p in m.parameters()
    }
    for name, parameter in network.named_parameters():
        if id(parameter) in transfer:
            continue
        if parameter.dim() > 1:
            assert parameter.abs().max() <= 0.04, name
            assert 0.7 * 0.02 < parameter.std() < 0.02, name
        else:
            assert (parameter == (1.0 if name.endswith("gain") else 0.0)).all(), name
    assert network.encoder[0].layer.transfer.gates.weight.abs().max() > 0.04


def test_both_rollouts_are_one_graph() -> None:
    network = build(num_slots=1, prior="learned").train()
    network.unrolls_prior = True
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    given, noise = frames(time=3).float(), draws(2, 2, 4).float()
    arguments = {
        "num_input_frames": 2,
        "num_frames": 3,
        "sampling_mask_BT": torch.ones(2, 0, dtype=torch.bool),
        "noise_BTZ": noise,
    }
    found, expected = compiled(given, **arguments), network(given, **arguments)
    torch.testing.assert_close(found.predictions_BTCHW, expected.predictions_BTCHW)
    torch.testing.assert_close(found.prior_predictions_BTCHW, expected.prior_predictions_BTCHW)


def test_bf16_keeps_memories_and_divergence_exact() -> None:
    network = build(num_slots=1)
    given, noise = frames().float(), draws(2, 4, 4).float()
    exact = train(network, given, noise, everything_shown())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = train(network, given, noise, everything_shown())
    assert {m.dtype for m in rough.memories} == {torch.float32}
    assert rough.objectives["kl_BT"].dtype == torch.float32
    torch.testing.assert_close(
        rough.predictions_BTCHW, exact.predictions_BTCHW, rtol=2e-2, atol=2e-2
    )


def test_network_learns_to_move_a_square() -> None:
    """A few updates: the error of the one-step prediction falls below that of the last frame."""
    torch.manual_seed(0)
    network = build(latent_size=0, base_channels=8)
    given = torch.zeros(4, 4, 2, 12, 20)
    for b, t in itertools.product(range(4), range(4)):
        given[b, t, :, 4:8, 2 * b + 2 * t : 2 * b + 2 * t + 4] = 1.0
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    still = (given[:, 1:] - given[:, :-1]).abs().mean()
    for _ in range(40):
        optimizer.zero_grad()
        predictions = network(
            given,
            num_input_frames=3,
            num_frames=4,
            sampling_mask_BT=torch.ones(4, 0, dtype=torch.bool),
        ).predictions_BTCHW
        loss = (predictions - given[:, 1:]).abs().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * still
