"""The video pixel network against references written here, in float64.

Legend: B batch, C channels, D context channels, H, W height and width, L logits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tmu_dist.config import ModelConfig, TMUConfig, VPNConfig
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.shapes import FrameShape, MemoryShape
from tmu_dist.models.vpn.blocks import CausalConv2d, ResidualMultiplicativeBlock
from tmu_dist.models.vpn.likelihood import LIKELIHOODS
from tmu_dist.models.vpn.network import FrameDecoder, VideoPixelNetwork
from tmu_dist.models.vpn.sampler import decode_frame, sweep

FRAME = FrameShape(channels=2, height=12, width=20)
SMALL = VPNConfig(channels=4, num_encoder_blocks=2, num_decoder_blocks=2)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def network(
    frame: FrameShape = FRAME, num_slots: int = 0, vpn: VPNConfig = SMALL
) -> VideoPixelNetwork:
    torch.manual_seed(0)
    model = ModelConfig(cell="vpn", hidden_channels=5, kernel_size=3, vpn=vpn)
    built = build_predictor(frame, model, tmu=TMUConfig(), num_slots=num_slots)
    assert isinstance(built, VideoPixelNetwork)
    return built.double()


def decoder(num_colours: int = 2, num_blocks: int = 2, num_logits: int = 256) -> FrameDecoder:
    torch.manual_seed(1)
    made = FrameDecoder(num_colours, 4, num_blocks=num_blocks, num_logits=num_logits).double()
    for parameter in made.parameters():  # strong enough that pixels differ
        torch.nn.init.normal_(parameter, std=0.6)
    return made


def frames(batch: int = 2, time: int = 5, frame: FrameShape = FRAME) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    levels = torch.randint(
        256, (batch, time, frame.channels, frame.height, frame.width), generator=generator
    )
    return levels.double() / 255


# --- blocks ---------------------------------------------------------------------------------------


def full_filter(layer: CausalConv2d, num_colours: int, parts: int, strict: bool) -> Tensor:
    """The layer's 3x3 (or 1x1) filter as an ordinary one, zero where a feature must not look."""
    out_channels, in_channels, _, size = layer.weight.shape
    full = torch.zeros(out_channels, in_channels, size, size, dtype=layer.weight.dtype)
    middle = size // 2
    for o, i, row, column in itertools.product(
        range(out_channels), range(in_channels), range(size), range(size)
    ):
        before = (row, column) < (middle, middle)
        if (row, column) == (middle, middle):
            per_part = out_channels // parts
            reader = math.floor((o % per_part) * num_colours / per_part)
            source = math.floor(i * num_colours / in_channels)
            before = source < reader or (source == reader and not strict)
        if before:
            full[o, i, row, column] = layer.weight[o, i, row, column]
    return full


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("num_colours", "parts", "size"), [(1, 1, 3), (2, 4, 3), (3, 1, 1)])
def test_causal_convolution_is_a_masked_one(
    strict: bool, num_colours: int, parts: int, size: int
) -> None:
    layer = CausalConv2d(
        5, 7 * parts, size, num_colours=num_colours, parts=parts, sees_own_colour=not strict
    ).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    masked = full_filter(layer, num_colours, parts, strict)
    expected = F.conv2d(x, masked, layer.bias, padding=size // 2)
    torch.testing.assert_close(layer(x), expected, **EXACT)


def reference_block(block: ResidualMultiplicativeBlock, h: Tensor, convolve) -> Tensor:
    """RMB by its formula, with four gates computed one by one."""
    inner = convolve(block.reduce, h, 1)
    for unit in block.units:
        g1, g2, g3, u = (convolve(unit.gates, inner, 4)[:, k * 4 : k * 4 + 4] for k in range(4))
        g1, g2, g3 = (1 / (1 + torch.exp(-g)) for g in (g1, g2, g3))
        inner = g1 * torch.tanh(g2 * inner + g3 * torch.tanh(u))
    return h + convolve(block.expand, inner, 1)


def reference_encoder(net: VideoPixelNetwork, frame: Tensor, dilations: list[int]) -> Tensor:
    first, *blocks = net.encoder
    h = F.conv2d(frame, first.weight, first.bias, padding=1)
    for block, dilation in zip(blocks, dilations, strict=True):

        def plain(layer: torch.nn.Conv2d, x: Tensor, parts: int, d: int = dilation) -> Tensor:
            size = layer.weight.shape[-1]
            x = F.pad(x, (d * (size // 2),) * 4)
            return F.conv2d(x, layer.weight, layer.bias, dilation=d)

        h = reference_block(block, h, plain)
    return h


def reference_decoder(net: FrameDecoder, frame: Tensor, context: Tensor) -> Tensor:
    num_colours = net.image_channels

    def masked(layer: CausalConv2d, x: Tensor, parts: int, strict: bool = False) -> Tensor:
        weight = full_filter(layer, num_colours, parts, strict)
        return F.conv2d(x, weight, layer.bias, padding=weight.shape[-1] // 2)

    h = context + masked(net.pixels, frame, 1, strict=True)
    for block in net.blocks:
        h = reference_block(block, h, masked)
    logits = masked(net.output, h, 1)
    batch, _, height, width = logits.shape
    return logits.reshape(batch, num_colours, -1, height, width).permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize("dilated", [False, True])
def test_teacher_forced_rollout_follows_the_formulas(dilated: bool) -> None:
    vpn = dataclasses.replace(SMALL, num_encoder_blocks=5, dilated=dilated)
    net = network(vpn=vpn)
    given = frames(time=3)
    for name, parameter in net.named_parameters():
        if name.endswith(("bias", "peepholes")):  # which begin as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    mask = torch.ones(2, 1, dtype=torch.bool)
    rollout = net(given, num_input_frames=1, num_frames=3, sampling_mask_BT=mask)

    cell = net.memory.cell
    hidden = memory = torch.zeros(2, 5, 12, 20, dtype=torch.float64)
    for t in range(2):
        x = reference_encoder(net, given[:, t], [1, 2, 4, 8, 1] if dilated else [1] * 5)
        gates = F.conv2d(torch.cat([x, hidden], 1), cell.gates.weight, cell.gates.bias, padding=1)
        i, f, o, g = gates.split(5, 1)
        wi, wf, wo = cell.peepholes
        memory_before = memory
        memory = torch.sigmoid(f + wf * memory_before) * memory_before
        memory = memory + torch.sigmoid(i + wi * memory_before) * torch.tanh(g)
        hidden = torch.sigmoid(o + wo * memory) * torch.tanh(memory)
        context = torch.einsum("dp,bphw->bdhw", net.context.weight[:, :, 0, 0], hidden)
        context = context + net.context.bias[:, None, None]
        logits = reference_decoder(net.decoder, given[:, t + 1], context)
        chances = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        levels = torch.round(given[:, t + 1] * 255).long()
        nll = -torch.log(torch.gather(chances, -1, levels[..., None])[..., 0])
        mean = sum(chances[..., level] * level / 255 for level in range(256))
        torch.testing.assert_close(rollout.memories[0][:, t], memory, **EXACT)
        torch.testing.assert_close(rollout.objectives["nll_BTCHW"][:, t], nll, **EXACT)
        torch.testing.assert_close(rollout.predictions_BTCHW[:, t], mean, **EXACT)


# --- what a pixel sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_colours", [1, 3])
def test_a_pixel_sees_exactly_the_documented_ones(num_colours: int) -> None:
    height, width, num_blocks = 6, 11, 1
    reach = 1 + 2 * num_blocks
    net = decoder(num_colours, num_blocks, num_logits=2)
    frame = torch.rand(1, num_colours, height, width, dtype=torch.float64, requires_grad=True)
    logits = net(frame, torch.randn(1, 8, height, width, dtype=torch.float64))
    places = list(itertools.product(range(height), range(width), range(num_colours)))
    for row, column, colour in places:
        chosen = logits[0, colour, row, column] @ torch.tensor([1.0, 0.7], dtype=torch.float64)
        (gradient,) = torch.autograd.grad(chosen, frame, retain_graph=True)
        seen = {
            (r, x, k)
            for r, x, k in places
            if (r == row and x == column and k < colour)
            or (r == row and column - reach <= x < column)
            or (0 < row - r <= reach and column - reach <= x <= column + row - r)
        }
        assert {(r, x, k) for k, r, x in gradient[0].nonzero().tolist()} == seen


# --- likelihoods ----------------------------------------------------------------------------------


def test_levels_are_drawn_by_the_inverse_cumulative_distribution() -> None:
    """Evenly spaced numbers in (0, 1) must hit each level as often as its probability says."""
    torch.manual_seed(3)
    logits = torch.randn(256, dtype=torch.float64)
    evenly = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    noise = math.sqrt(2) * torch.erfinv(2 * evenly - 1)
    values = LIKELIHOODS["softmax"].quantile(logits.expand(20_000, 256), noise)
    assert (values.diff() >= 0).all()
    shares = torch.bincount((values * 255).round().long(), minlength=256) / 20_000
    torch.testing.assert_close(shares.double(), logits.softmax(0), rtol=0, atol=1.01 / 20_000)
    white = LIKELIHOODS["bernoulli"].quantile(torch.full((20_000, 1), 0.4).double(), noise)
    assert set(white.tolist()) == {0.0, 1.0}
    assert white.mean().item() == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-4)
    assert (white.diff() >= 0).all()


def test_extreme_noise_stays_among_the_levels() -> None:
    values = LIKELIHOODS["softmax"].quantile(torch.zeros(2, 256), torch.tensor([-40.0, 40.0]))
    assert values.tolist() == [0.0, 1.0]


def test_nll_of_a_grey_pixel_under_bernoulli() -> None:
    logits = torch.tensor([0.3, -2.0], dtype=torch.float64).reshape(1, 1, 1, 2, 1)
    target = torch.tensor([0.25, 1.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    p = [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(2.0))]
    expected = [-0.25 * math.log(p[0]) - 0.75 * math.log(1 - p[0]), -math.log(p[1])]
    assert LIKELIHOODS["bernoulli"].nll(logits, target).flatten().tolist() == pytest.approx(
        expected
    )
    assert LIKELIHOODS["bernoulli"].mean(logits).flatten().tolist() == pytest.approx(p)


def test_values_are_seen_as_their_nearest_level() -> None:
    values = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.3])
    levels = LIKELIHOODS["softmax"].as_seen(values) * 255
    assert levels.round().tolist() == [0, 0, 0, 1, 255, 255]
    assert torch.equal(LIKELIHOODS["bernoulli"].as_seen(values), values)


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 20), (1, 6), (6, 1), (5, 2), (1, 1)])
@pytest.mark.parametrize("num_colours", [1, 2, 3])
def test_waves_give_the_logits_of_the_whole_decoder(
    num_colours: int, size: tuple[int, int]
) -> None:
    net = decoder(num_colours)
    known = torch.rand(2, num_colours, *size, dtype=torch.float64)
    context = torch.randn(2, 8, *size, dtype=torch.float64)
    found = torch.full((2, num_colours, *size, 256), torch.nan, dtype=torch.float64)
    decided: list[tuple[int, int, int]] = []

    def follow(logits: Tensor, rows: Tensor, columns: Tensor, colour: int):
        found[:, colour, rows, columns] = logits.transpose(0, 1)
        decided.extend((r, x, colour) for r, x in zip(rows.tolist(), columns.tolist(), strict=True))
        value = known[:, colour, rows, columns].T
        return value, value

    with torch.no_grad():
        frame = sweep(context, net.weights(), follow)
        torch.testing.assert_close(found, net(known, context), **EXACT)
    assert torch.equal(frame, known)
    every = itertools.product(range(size[0]), range(size[1]), range(num_colours))
    assert sorted(decided) == sorted(every)


def slow_frame(
    net: FrameDecoder, context: Tensor, noise: Tensor | None, likelihood: str
) -> tuple[Tensor, Tensor]:
    """Run the whole decoder again for every pixel and channel, in raster order."""
    batch, _, height, width = context.shape
    shape = (batch, net.image_channels, height, width)
    seen = torch.rand(shape, dtype=torch.float64)  # whatever lies ahead must not matter
    values = torch.empty_like(seen)
    for row, column, colour in itertools.product(
        range(height), range(width), range(net.image_channels)
    ):
        logits = net(seen, context)[:, colour, row, column]
        for b in range(batch):
            if likelihood == "bernoulli":
                white = 1 / (1 + math.exp(-logits[b, 0]))
                chances = [1 - white, white]
            else:
                chances = logits[b].softmax(0).tolist()
            last = len(chances) - 1
            # Without noise later pixels see medians, where u is a half.
            z = 0.0 if noise is None else noise[b, colour, row, column]
            u = 0.5 * (1 + math.erf(z / math.sqrt(2)))
            sums = itertools.accumulate(chances)
            later = next(k for k, total in enumerate(sums) if total >= u) / last
            mean = sum(p * k / last for k, p in enumerate(chances))
            values[b, colour, row, column] = mean if noise is None else later
            seen[b, colour, row, column] = later
    return values, seen


@pytest.mark.parametrize("likelihood", ["softmax", "bernoulli"])
@pytest.mark.parametrize("drawn", [True, False])
def test_decoded_frame_is_that_of_the_slow_way(drawn: bool, likelihood: str) -> None:
    net = decoder(num_logits=LIKELIHOODS[likelihood].num_logits)
    context = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    noise = torch.randn(2, 2, 5, 7, dtype=torch.float64) if drawn else None
    with torch.no_grad():
        expected, _ = slow_frame(net, context, noise, likelihood)
        found = decode_frame(context, noise, net.weights(), likelihood)
    torch.testing.assert_close(found, expected, **EXACT)
    assert expected.std() > 0.05
    if drawn:
        levels = found * (255 if likelihood == "softmax" else 1)
        torch.testing.assert_close(levels, levels.round(), **EXACT)


def test_teacher_forcing_a_drawn_frame_repeats_its_draws() -> None:
    net = decoder()
    context = torch.randn(2, 8, 12, 20, dtype=torch.float64)
    noise = torch.randn(2, 2, 12, 20, dtype=torch.float64)
    with torch.no_grad():
        drawn = decode_frame(context, noise, net.weights(), "softmax")
        logits = net(LIKELIHOODS["softmax"].as_seen(drawn), context)
    torch.testing.assert_close(LIKELIHOODS["softmax"].quantile(logits, noise), drawn)


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [0, 2])
@pytest.mark.parametrize("likelihood", ["softmax", "bernoulli"])
def test_rollouts_on_frames_that_are_not_square(likelihood: str, num_slots: int) -> None:
    vpn = dataclasses.replace(SMALL, likelihood=likelihood)
    net = network(num_slots=num_slots, vpn=vpn)
    assert net.noise_size == 2 * 12 * 20
    assert net.memory_shapes == (MemoryShape(5, 12, 20),)
    mask = torch.ones(2, 2, dtype=torch.bool)
    taught = net(frames(), num_input_frames=2, num_frames=5, sampling_mask_BT=mask)
    assert taught.objectives["nll_BTCHW"].shape == (2, 4, 2, 12, 20)
    assert (taught.objectives["nll_BTCHW"] > 0).all()
    assert [m.shape for m in taught.memories] == [(2, 4, 5, 12, 20)]
    assert {k: [x.shape for x in v] for k, v in taught.imitations.items()} == (
        {0: [(2, 4, 5, 12, 20)] * 2} if num_slots else {}
    )
    noise = torch.randn(2, 6, net.noise_size, dtype=torch.float64)
    forecast = net(frames(time=2), num_input_frames=2, num_frames=7, noise_BTZ=noise)
    assert forecast.objectives == {}
    drawn = forecast.predictions_BTCHW[:, 1:]
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert not torch.equal(drawn, net.predict(frames(time=2), 5))
    assert torch.equal(drawn, net.predict(frames(time=2), 5, noise_BTZ=noise))


def test_a_target_changes_its_own_step_only() -> None:
    """The next frame enters the decoder, never the context: memories do not depend on it."""
    net = network()
    given = frames()
    changed = given.clone()
    changed[:, 4] = 0.0
    arguments = {"num_input_frames": 4, "num_frames": 5}
    mask = torch.ones(2, 0, dtype=torch.bool)
    before = net(given, **arguments, sampling_mask_BT=mask)
    after = net(changed, **arguments, sampling_mask_BT=mask)
    assert torch.equal(before.memories[0], after.memories[0])
    for one, other in (
        (before.objectives["nll_BTCHW"], after.objectives["nll_BTCHW"]),
        (before.predictions_BTCHW, after.predictions_BTCHW),
    ):
        assert torch.equal(one[:, :3], other[:, :3])
        assert not torch.equal(one[:, 3], other[:, 3])


@pytest.mark.parametrize("num_slots", [0, 2])
def test_likelihood_reaches_every_parameter(num_slots: int) -> None:
    net = network(num_slots=num_slots)
    mask = torch.ones(2, 2, dtype=torch.bool)
    rollout = net(frames(), num_input_frames=2, num_frames=5, sampling_mask_BT=mask)
    rollout.objectives["nll_BTCHW"].mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_likelihood_can_be_learned() -> None:
    """A white column that wanders to the right: far below the 5.5 nats of ignorance."""
    net = network(FrameShape(channels=1, height=4, width=6))
    given = torch.stack([torch.eye(6).double()[t].expand(1, 4, 6) for t in range(5)]).unsqueeze(0)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for _ in range(80):
        rollout = net(given, num_input_frames=2, num_frames=5, sampling_mask_BT=mask)
        loss = rollout.objectives["nll_BTCHW"].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.02
    torch.testing.assert_close(net.predict(given[:, :2], 3), given[:, 2:], rtol=0, atol=0.1)


def test_convolutions_keep_the_variance_of_what_they_see() -> None:
    """With inputs of variance 1, features seen through a mask have variance 1, too."""
    torch.manual_seed(4)
    layer = CausalConv2d(60, 4000, 3, num_colours=2)
    output = layer(torch.randn(1, 60, 9, 9))[:, :, 1:, 1:-1]
    assert [part.var().item() for part in output.chunk(2, 1)] == pytest.approx([1, 1], abs=0.1)


def test_parameters_at_the_default_size() -> None:
    """64x64x1; c = 32, 4 encoder and 6 decoder blocks, ConvLSTM 64 with 5x5 filters."""
    c, p = 32, 64
    plain = (2 * c * c + c) + 2 * (9 * c * 4 * c + 4 * c) + (c * 2 * c + 2 * c)
    masked = (2 * c * c + c) + 2 * (6 * c * 4 * c + 4 * c) + (c * 2 * c + 2 * c)
    encoder = (9 * 2 * c + 2 * c) + 4 * plain
    convlstm = 25 * (2 * c + p) * 4 * p + 4 * p + 3 * p
    context = p * 2 * c + 2 * c
    logits = 2 * c * 256 + 256
    net = build_predictor(FrameShape(channels=1, height=64, width=64), ModelConfig(cell="vpn"))
    total = encoder + convlstm + context + (6 * 2 * c + 2 * c) + 6 * masked + logits
    assert count_parameters(net) == total == 1_475_840


def test_rollout_is_one_graph() -> None:
    tiny = VPNConfig(channels=2, num_encoder_blocks=1, num_decoder_blocks=1)
    frame = FrameShape(channels=2, height=3, width=4)
    net = network(frame, num_slots=2, vpn=tiny)
    given = frames(time=2, frame=frame)
    arguments = {"num_input_frames": 2, "num_frames": 3}  # one step taught, one decoded
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(given, **arguments).predictions_BTCHW, net(given, **arguments).predictions_BTCHW
    )


@pytest.mark.parametrize("drawn", [True, False])
def test_decoding_is_a_well_behaved_operation(drawn: bool) -> None:
    context = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    noise = torch.randn(2, 2, 3, 4, dtype=torch.float64) if drawn else None
    weights = [tensor.detach() for tensor in decoder(num_blocks=1).weights()]
    torch.library.opcheck(decode_frame, (context, noise, weights, "softmax"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decode_frame(context.float(), None, [w.float() for w in weights], "softmax")
    outside = decode_frame(context.float(), None, [w.float() for w in weights], "softmax")
    assert torch.equal(inside, outside)  # always in full precision


def test_bf16_keeps_memories_and_likelihoods_in_fp32() -> None:
    net = network(num_slots=2).float()
    given = frames().float()
    mask = torch.ones(2, 2, dtype=torch.bool)
    arguments = {"num_input_frames": 2, "num_frames": 5}
    exact = net(given, **arguments, sampling_mask_BT=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net(given, **arguments, sampling_mask_BT=mask)
        forecast = net(given, **arguments).predictions_BTCHW
    assert rough.memories[0].dtype == rough.objectives["nll_BTCHW"].dtype == torch.float32
    torch.testing.assert_close(
        rough.objectives["nll_BTCHW"], exact.objectives["nll_BTCHW"], rtol=2e-2, atol=2e-2
    )
    torch.testing.assert_close(
        forecast, net(given, **arguments).predictions_BTCHW, rtol=2e-2, atol=2e-2
    )


def test_weights_that_masks_hide_do_not_matter() -> None:
    """State dicts hold no masks, and what they hold of hidden weights changes nothing."""
    net = network()
    assert not [name for name in net.state_dict() if "mask" in name]
    expected = net.predict(frames(time=2), 2)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, CausalConv2d):
                module.weight[module.mask == 0] = 1e3
    assert torch.equal(net.predict(frames(time=2), 2), expected)


def test_wrong_input_is_explained() -> None:
    with pytest.raises(ValueError, match=r"model.vpn.channels=1 is less than the 2 channels"):
        network(vpn=VPNConfig(channels=1))
    other = torch.rand(1, 2, 2, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="480 numbers does not fit frames of"):
        network().predict(other, 1, noise_BTZ=torch.randn(1, 2, 480).double())
    assert network().predict(other, 1).shape == (1, 1, 2, 8, 8)
