"""Winograd's minimal filtering: exact matrices, bounded error, gradients, and when it is used."""

from __future__ import annotations

import copy
import gc
import weakref
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.config import ComputeConfig, ConfigError, ModelConfig, TMUConfig
from tmu_dist.models import convolution, native
from tmu_dist.models.arrange import arrange
from tmu_dist.models.build import build_predictor
from tmu_dist.models.convolution import Convolution
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.models.winograd.choice import is_faster
from tmu_dist.models.winograd.filters import Filters
from tmu_dist.models.winograd.matrices import TILE, transforms

ERROR = {3: 3e-6, 5: 1e-5}
"""Of a convolution and its gradients in float32, relative to float64, by taps; direct: 5e-7."""


@pytest.mark.parametrize("taps", [3, 5])
def test_matrices_are_exact(taps: int) -> None:
    """y = A^T [(G g) . (B^T d)] in fractions, for any filter and inputs."""
    each = transforms(taps)
    g = [Fraction(k + 2, 3 * k + 1) for k in range(taps)]
    d = [Fraction((-1) ** k * (k + 1), k + 2) for k in range(TILE + taps - 1)]

    def apply(matrix: tuple[tuple[Fraction, ...], ...], x: list[Fraction]) -> list[Fraction]:
        return [sum((a * b for a, b in zip(row, x, strict=True)), Fraction(0)) for row in matrix]

    points = [a * b for a, b in zip(apply(each.filters, g), apply(each.inputs, d), strict=True)]
    direct = [sum((d[i + k] * g[k] for k in range(taps)), Fraction(0)) for i in range(TILE)]
    assert apply(each.output, points) == direct


def draw(*shape: int, learns: bool = True) -> Tensor:
    return torch.randn(*shape).requires_grad_(learns)


def layer(in_channels: int, out_channels: int, taps: int) -> tuple[Tensor, Tensor]:
    size = (taps * taps * in_channels) ** 0.5
    weight = (torch.randn(out_channels, in_channels, taps, taps) / size).requires_grad_()
    return weight, draw(out_channels)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float(((ours - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize("taps", [3, 5])
def test_filters_may_lie_in_any_order(taps: int) -> None:
    torch.manual_seed(0)
    weight, bias = layer(64, 256, taps)
    x = draw(2, 64, 8, 8)

    def results(weight: Tensor, bias: Tensor) -> list[Tensor]:
        y = Filters(weight, bias)(x)
        gradients = torch.autograd.grad(y.sum(), [weight, bias, x])
        return [each.contiguous() for each in (y, *gradients)]

    turned = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    spread = torch.stack([bias.detach(), bias.detach()], 1)[:, 0].requires_grad_()
    assert not turned.is_contiguous() and not spread.is_contiguous()
    for expected, found in zip(results(weight, bias), results(turned, spread), strict=True):
        assert torch.equal(expected, found)


def test_an_address_keeps_what_lies_there() -> None:
    values = torch.zeros(3)
    kept = weakref.ref(values)
    address = native.pointer(values)
    del values
    assert kept() is not None
    del address
    assert kept() is None


@pytest.mark.parametrize(
    ("batch", "channels", "out_channels", "height", "width", "taps"),
    [
        pytest.param(4, (64, 64), 256, 16, 16, 5, id="paper"),
        pytest.param(2, (16, 64), 256, 16, 16, 3, id="radar"),
        pytest.param(2, (3, 20), 40, 9, 14, 5, id="odd sizes"),
        pytest.param(3, (17,), 7, 5, 4, 3, id="one map, few channels"),
        pytest.param(1, (2, 2), 100, 3, 21, 5, id="smaller than a tile"),
    ],
)
def test_error_against_float64(
    batch: int, channels: tuple[int, ...], out_channels: int, height: int, width: int, taps: int
) -> None:
    torch.manual_seed(0)
    weight, bias = layer(sum(channels), out_channels, taps)
    maps = [draw(batch, c, height, width) for c in channels]
    filters = Filters(weight, bias)
    # Used twice, as by two steps of a recurrence.
    output = filters(*maps) + 0.5 * filters(*maps)
    along = torch.randn_like(output)
    ours = torch.autograd.grad(output, [weight, bias, *maps], along)

    exact = [each.detach().double().requires_grad_() for each in (weight, bias, *maps)]
    wanted = 1.5 * F.conv2d(torch.cat(exact[2:], 1), exact[0], exact[1], padding=taps // 2)
    gradients = torch.autograd.grad(wanted, exact, along.double())
    assert relative(output, wanted) < ERROR[taps]
    assert max(map(relative, ours, gradients)) < ERROR[taps]


def test_filters_gradient_sums_more_rows_than_are_kept_at_once() -> None:
    torch.manual_seed(0)
    weight, bias = layer(4, 6, 3)
    maps = [draw(2, 4, 32, 32, learns=False) for _ in range(4)]  # 128 rows each
    filters = Filters(weight, bias)
    ours = torch.autograd.grad(sum(filters(x).square().sum() for x in maps), [weight, bias])
    exact = [each.detach().double().requires_grad_() for each in (weight, bias)]
    wanted = sum(F.conv2d(x.double(), *exact, padding=1).square().sum() for x in maps)
    gradients = torch.autograd.grad(wanted, exact)
    assert max(map(relative, ours, gradients)) < ERROR[3]


def test_a_gradient_that_is_not_asked_for_leaves_no_trace() -> None:
    """A backward pass to the maps alone must not add to the next one's gradient of the filters."""
    torch.manual_seed(0)
    weight, bias = layer(4, 6, 3)
    x = draw(1, 4, 8, 8)
    filters = Filters(weight, bias)
    output = filters(x).square().sum()
    alone = torch.autograd.grad(output, weight, retain_graph=True)[0]
    torch.autograd.grad(output, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(output, weight)[0], alone)


def test_filters_are_gone_with_their_graph() -> None:
    """They are large: none may wait for the collector of cycles."""
    weight, bias = layer(4, 6, 3)
    filters = Filters(weight, bias)
    seen = weakref.ref(filters)
    gc.disable()
    try:
        torch.autograd.grad(filters(draw(1, 4, 8, 8)).sum(), weight)
        filters(draw(1, 4, 8, 8))  # without a backward pass
        del filters
        assert seen() is None
    finally:
        gc.enable()


def test_frozen_filters_still_give_their_maps_a_gradient() -> None:
    torch.manual_seed(0)
    weight, bias = (each.detach() for each in layer(4, 6, 3))
    x = draw(1, 4, 8, 8)
    ours = torch.autograd.grad(Filters(weight, bias)(x).sum(), x)[0]
    wanted = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).sum(), x)[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    weight, bias = layer(40, 200, 5)
    x = draw(3, 40, 16, 16)
    filters = Filters(weight.detach(), bias.detach())

    def results(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            output = filters(x)
            return [output.detach(), *torch.autograd.grad(output.sum(), x)]
        finally:
            torch.set_num_threads(before)

    assert all(map(torch.equal, results(1), results(3)))


def test_transformed_filters_follow_the_weights() -> None:
    torch.manual_seed(0)
    conv = Convolution(8, 8, 3)
    conv.algorithm = "winograd"
    x = draw(1, 8, 8, 8, learns=False)
    with torch.no_grad():
        conv(x)
        conv.weight.mul_(2.0)  # as an optimiser changes them
        torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=1e-4, atol=1e-4)
        conv.weight.data = torch.randn_like(conv.weight)  # as some libraries exchange them
        torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=1e-4, atol=1e-4)
        conv.load_state_dict({name: 3 * each for name, each in conv.state_dict().items()})
        torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(conv)
    with torch.no_grad():
        assert torch.equal(copied(x), conv(x))


def test_the_choice_is_by_shape_and_never_by_batch() -> None:
    """The paper's layers were measured to be faster; a handful of channels, and 7x7, were not."""
    assert is_faster(5, 16, 16, 128, 256)
    assert is_faster(3, 32, 32, 128, 256)
    assert not is_faster(5, 16, 16, 4, 8)
    assert not is_faster(7, 16, 16, 128, 256)
    conv = Convolution(64, 64, 5)
    assert conv.uses_winograd(torch.zeros(1, 64, 16, 16))
    assert not conv.double().uses_winograd(torch.zeros(1, 64, 16, 16))


def test_without_a_compiler_the_librarys_convolution_is_used_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not native.is_there(lambda: native.load("empty", native.VECTORS))
    assert "no-such-compiler" in caplog.text and "install gcc" in caplog.text
    monkeypatch.setattr(convolution, "_has_kernels", lambda taps: False)
    assert not Convolution(64, 64, 5).uses_winograd(torch.zeros(1, 64, 16, 16))


def test_winograd_is_refused_where_it_cannot_be() -> None:
    conv = Convolution(8, 8, 7)
    conv.algorithm = "winograd"
    with pytest.raises(ConfigError, match=r"3x3 and 5x5 .* these are 7x7"):
        conv(torch.zeros(1, 8, 8, 8))


def student(hidden_channels: int = 32) -> Predictor:
    torch.manual_seed(0)
    model = ModelConfig(hidden_channels=hidden_channels, num_layers=2)
    frame = FrameShape(channels=1, height=32, width=32)
    return build_predictor(frame, model, tmu=TMUConfig(), num_slots=2)


def losses(compute: ComputeConfig, num_updates: int) -> Tensor:
    network = student()
    arrange(network, compute)
    # Fused: it changes weights without a trace in their versions.
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    frames = torch.rand(4, 8, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(num_updates):
        mask = torch.ones(4, 3, dtype=torch.bool)
        rollout = network(frames, num_input_frames=4, num_frames=8, sampling_mask_BT=mask)
        loss = (rollout.predictions_BTCHW - frames[:, 1:]).square().mean()
        loss = loss + 0.1 * sum(
            each.square().mean() for m in rollout.imitations.values() for each in m
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def test_the_loss_curve_stays_the_same() -> None:
    """Every way of computing a TMU student learns the same; direct and plain is the measure."""
    plain = losses(ComputeConfig(convolution="direct", arithmetic="plain"), 12)
    assert plain[-1] < 0.7 * plain[0]
    for compute in (
        ComputeConfig(convolution="winograd", arithmetic="plain"),
        ComputeConfig(convolution="winograd"),
        ComputeConfig(convolution="winograd", recompute=True),
    ):
        torch.testing.assert_close(losses(compute, 12), plain, rtol=1e-3, atol=0.0)


def test_recomputation_changes_no_number_and_keeps_less() -> None:
    def pass_through(recompute: bool) -> tuple[int, list[Tensor]]:
        network = student()
        arrange(network, ComputeConfig(recompute=recompute))
        kept: dict[int, int] = {}

        def pack(values: Tensor) -> Tensor:
            kept[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
            return values

        frames = torch.rand(2, 6, 1, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            rollout = network(frames, num_input_frames=3, num_frames=6)
        loss = rollout.predictions_BTCHW.square().sum()
        return sum(kept.values()), list(torch.autograd.grad(loss, list(network.parameters())[:4]))

    kept_all, gradients = pass_through(recompute=False)
    kept_inputs, again = pass_through(recompute=True)
    assert all(map(torch.equal, gradients, again))
    assert kept_inputs < kept_all
