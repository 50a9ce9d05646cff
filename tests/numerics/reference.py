"""What references in plain numpy share: one sample, one pixel and one gate at a time.

Legend: O output channels, C input channels, R, S filter height and width, H, W map height and
width, T time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.models.stack import StackedPredictor

Array = NDArray[np.float64]
Parameters = dict[str, Array]

FRAME = FrameShape(channels=2, height=6, width=10)
PATCH_SIZE = 2
MAP_SIZE = (3, 5)


class LayerOutcome(NamedTuple):
    """What one layer's time step gives."""

    hidden_PHW: Array
    memory_PHW: Array
    imitations: list[Array]


class Reference(Protocol):
    """A network that has just begun a sequence."""

    def step(self, x_CHW: Array) -> list[LayerOutcome]:
        """Read one patch map; the outcomes of all layers, from the input to the output."""


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def parameters_of(module: torch.nn.Module) -> Parameters:
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


def conv(x_CHW: Array, p: Parameters, name: str) -> Array:
    """Zero-padded "same" cross-correlation, summed pixel by pixel."""
    weight_OCRS = p[f"{name}.weight"]
    reach = weight_OCRS.shape[-1] // 2
    padded = np.pad(x_CHW, ((0, 0), (reach, reach), (reach, reach)))
    out = np.zeros((weight_OCRS.shape[0], *x_CHW.shape[1:]))
    for row in range(x_CHW.shape[1]):
        for column in range(x_CHW.shape[2]):
            window = padded[:, row : row + 2 * reach + 1, column : column + 2 * reach + 1]
            out[:, row, column] = (weight_OCRS * window).sum((1, 2, 3))
    bias = p.get(f"{name}.bias")
    return out if bias is None else out + bias[:, None, None]


def layer_norm(x_CHW: Array, p: Parameters, name: str, rows: slice = slice(None)) -> Array:
    """Over the whole map, with the gain and shift that there are: per element, per channel, none.

    `rows` are the channels of gain and shift that belong to `x`.
    """
    x_CHW = (x_CHW - x_CHW.mean()) / np.sqrt(x_CHW.var() + 1e-5)
    if f"{name}.gain" not in p:
        return x_CHW
    gain, shift = p[f"{name}.gain"][rows], p[f"{name}.shift"][rows]
    if gain.ndim == 1:
        gain, shift = gain[:, None, None], shift[:, None, None]
    return x_CHW * gain + shift


def pre_activations(x_CHW: Array, p: Parameters, conv_name: str, normalised: bool) -> Array:
    """A convolution, and the normalisation of the same name (conv_x and norm_x)."""
    out = conv(x_CHW, p, conv_name)
    return layer_norm(out, p, conv_name.replace("conv_", "norm_")) if normalised else out


def cut(maps_CHW: Array, names: str) -> dict[str, Array]:
    """Gates by name out of a stack, such as "i f g o"."""
    return dict(zip(names.split(), np.split(maps_CHW, len(names.split())), strict=True))


def fuse(
    own_PHW: Array, x_CHW: Array, h_PHW: Array, p: Parameters, tmu: TMUConfig | None, num_slots: int
) -> tuple[Array, list[Array]]:
    """Eqs. 3 and 5: the memory after transfer, and the imitations; without a TMU, the memory."""
    if tmu is None or num_slots == 0:
        return own_PHW, []
    width = own_PHW.shape[0]
    gates = conv(np.concatenate([x_CHW, h_PHW]), p, "transfer.gates")
    gates = sigmoid(layer_norm(gates, p, "transfer.gate_norm"))
    distilled = conv(own_PHW, p, "transfer.distillers")
    imitations = []
    fused = own_PHW
    for m in range(num_slots):
        rows = slice(m * width, (m + 1) * width)
        imitation = layer_norm(distilled[rows], p, "transfer.distiller_norm", rows)
        fused = fused + gates[rows] * imitation + (1 - gates[rows]) * own_PHW
        imitations.append(imitation)
    return (fused / (1 + num_slots) if tmu.combine == "mean" else fused), imitations


def stacked(slices_CLHW: Array) -> Array:
    """Slices below each other, the oldest on top."""
    return np.concatenate(list(np.moveaxis(slices_CLHW, 1, 0)), axis=1)


def sliced(maps_CHW: Array) -> Array:
    return np.stack(np.split(maps_CHW, 2, axis=1), axis=1)


def patches(frame_CHW: Array) -> Array:
    """Channel (row * k + column) * C + c of a map is pixel (row, column) of every patch."""
    k = PATCH_SIZE
    return np.concatenate(
        [frame_CHW[:, row::k, column::k] for row in range(k) for column in range(k)]
    )


def pixels(map_CHW: Array) -> Array:
    """The inverse of `patches`."""
    k, channels = PATCH_SIZE, map_CHW.shape[0] // PATCH_SIZE**2
    frame = np.zeros((channels, k * map_CHW.shape[1], k * map_CHW.shape[2]))
    for row in range(k):
        for column in range(k):
            first = (row * k + column) * channels
            frame[:, row::k, column::k] = map_CHW[first : first + channels]
    return frame


def random_network(
    cell: str, *, tmu: TMUConfig | None = None, num_slots: int = 0, **settings: Any
) -> Predictor:
    """Three narrow layers in float64 with weights, gains, shifts and peepholes all at random."""
    torch.manual_seed(3)
    model = ModelConfig(
        cell=cell,
        num_layers=3,
        hidden_channels=3,
        kernel_size=3,
        patch_size=PATCH_SIZE,
        **settings,
    )
    network = build_predictor(FRAME, model, tmu=tmu, num_slots=num_slots).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def check_rollout(network: Predictor, begin: Callable[[], Reference]) -> None:
    """Compare whole rollouts of two sequences with a reference that begins anew for each.

    After three input frames each sequence is shown a true frame where the other reads its own
    prediction. The network has unrolled other frames before, and must have forgotten them.
    """
    frames = torch.rand(2, 6, FRAME.channels, FRAME.height, FRAME.width, dtype=torch.float64)
    sees_truth = torch.tensor([[True, False], [False, True]])
    with torch.no_grad():
        network(frames.flip(1), num_input_frames=3, num_frames=6)
        rollout = network(frames, num_input_frames=3, num_frames=6, sampling_mask_BT=sees_truth)
    p = parameters_of(network)
    for b in range(2):
        reference, prediction = begin(), np.zeros(())
        for t in range(5):
            shown = t < 3 or sees_truth[b, t - 3]
            layers = reference.step(patches(frames[b, t].numpy() if shown else prediction))
            prediction = pixels(conv(layers[-1].hidden_PHW, p, "output"))
            same(rollout.predictions_BTCHW[b, t], prediction)
            for k, layer in enumerate(layers):
                same(rollout.memories[k][b, t], layer.memory_PHW)
                imitations = rollout.imitations.get(k, ())
                assert len(imitations) == len(layer.imitations)
                for ours, expected in zip(imitations, layer.imitations):
                    same(ours[b, t], expected)


class WindowedLayer(Protocol):
    """One layer of a network whose maps hold two time slices, for one sequence."""

    def step(self, x: Array, m: Array) -> tuple[LayerOutcome, Array]:
        """Read a window and M; the outcome, and the M for the layer above."""


def check_windowed_rollout(
    network: Predictor, begin: Callable[[Parameters], WindowedLayer], num_slots: int
) -> None:
    """Three layers, closed loop: windows of frames, zig-zag, recall of fused memories, output."""
    frames = torch.rand(2, 3, FRAME.channels, FRAME.height, FRAME.width, dtype=torch.float64)
    with torch.no_grad():
        network(frames.flip(1), num_input_frames=3, num_frames=6)  # must be forgotten
        rollout = network(frames, num_input_frames=3, num_frames=6)
    p = parameters_of(network)
    weight_OCL = p["output.weight"][..., 0, 0]
    bias_O11 = p.get("output.bias", np.zeros(len(weight_OCL)))[:, None, None]
    for b in range(2):
        layers = [begin(parameters_of(layer)) for layer in layers_of(network)]
        m, prediction = np.zeros((3, 2, *MAP_SIZE)), np.zeros(())
        before = np.zeros((FRAME.channels * PATCH_SIZE**2, *MAP_SIZE))
        for t in range(5):
            now = patches(frames[b, t].numpy() if t < 3 else prediction)
            x, before = np.stack([before, now], axis=1), now
            for k, layer in enumerate(layers):
                outcome, m = layer.step(x, m)
                x = outcome.hidden_PHW
                same(rollout.memories[k][b, t], outcome.memory_PHW)
                imitations = rollout.imitations.get(k, ())
                assert len(imitations) == len(outcome.imitations) == num_slots
                for ours, expected in zip(imitations, outcome.imitations):
                    same(ours[b, t], expected)
            prediction = pixels(np.einsum("ocl,clhw->ohw", weight_OCL, x) + bias_O11)
            same(rollout.predictions_BTCHW[b, t], prediction)


def layers_of(network: Predictor) -> list[RecurrentLayer]:
    assert isinstance(network, StackedPredictor)
    return list(network.stack.layers)


def same(ours: torch.Tensor, expected: Array) -> None:
    np.testing.assert_allclose(ours.detach(), expected, rtol=1e-12, atol=1e-12)


def check_gradient(network: Predictor) -> None:
    """The gradient in a random direction is the central difference: no path is cut."""
    frames = torch.rand(1, 5, FRAME.channels, FRAME.height, FRAME.width, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return network(frames, num_input_frames=4, num_frames=5).predictions_BTCHW.square().mean()

    loss().backward()
    parameters = list(network.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions) if p.grad is not None)
    step = 1e-5
    losses = []
    with torch.no_grad():
        for shift in (step, -2 * step):
            for p, d in zip(parameters, directions):
                p.add_(d, alpha=shift)
            losses.append(loss())
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / (2 * step), rtol=1e-6, atol=1e-9)


class STLSTM:
    """ST-LSTM for one layer and one sequence, with the transfer of Eqs. 3 and 5 into C.

    Args:
        p: parameters of the layer.
        settings: of the model.
        forget_bias: of C.
    """

    def __init__(
        self,
        p: Parameters,
        settings: dict[str, Any],
        forget_bias: float,
        tmu: TMUConfig | None = None,
        num_slots: int = 0,
    ) -> None:
        self.p, self.forget_bias, self.tmu, self.num_slots = p, forget_bias, tmu, num_slots
        self.shared = settings.get("st_form") == "shared"
        self.normalised = settings.get("gate_norm") == "layer"
        self.reads_own = tmu is not None and tmu.hidden_from == "own"
        self.h = self.c = np.zeros((3, *MAP_SIZE))

    def gates(self, x: Array, name: str, order: str) -> dict[str, Array]:
        return cut(pre_activations(x, self.p, f"cell.conv_{name}", self.normalised), order)

    def step(self, x: Array, m: Array) -> tuple[LayerOutcome, Array]:
        """The outcome, and the new M."""
        if self.shared:
            wx = self.gates(x, "x", "i g f o")
            wh = self.gates(self.h, "h", "i g f o")
            wm = self.gates(m, "m", "i g f o")
            wx |= {"i'": wx["i"], "g'": wx["g"], "f'": wx["f"]}
        else:
            wx = self.gates(x, "x", "i f g i' f' g' o")
            wh = self.gates(self.h, "h", "i f g o")
            wm = self.gates(m, "m", "i f g")
        i = sigmoid(wx["i"] + wh["i"])
        f = sigmoid(wx["f"] + wh["f"] + self.forget_bias)
        g = np.tanh(wx["g"] + wh["g"])
        own = f * self.c + i * g
        i_m = sigmoid(wx["i'"] + wm["i"])
        f_m = sigmoid(wx["f'"] + wm["f"] + 1)
        g_m = np.tanh(wx["g'"] + wm["g"])
        m = f_m * m + i_m * g_m

        c, imitations = fuse(own, x, self.h, self.p, self.tmu, self.num_slots)
        both = np.concatenate([own if self.reads_own else c, m])
        if self.shared:
            o = sigmoid(wx["o"] + wh["o"] + wm["o"])
        else:
            o = pre_activations(both, self.p, "cell.conv_o", self.normalised)
            o = sigmoid(wx["o"] + wh["o"] + o)
        self.h, self.c = o * np.tanh(conv(both, self.p, "cell.conv_last")), c
        return LayerOutcome(self.h, c, imitations), m
