"""The cells against the paper's equations, written out again in numpy, one gate at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.models.tmu import RecurrentLayer

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def conv(x_CHW: Array, weight_OCRS: Array) -> Array:
    """Zero-padded "same" cross-correlation, summed pixel by pixel."""
    reach = weight_OCRS.shape[-1] // 2
    padded = np.pad(x_CHW, ((0, 0), (reach, reach), (reach, reach)))
    out = np.zeros((weight_OCRS.shape[0], *x_CHW.shape[1:]))
    for row in range(x_CHW.shape[1]):
        for column in range(x_CHW.shape[2]):
            window = padded[:, row : row + 2 * reach + 1, column : column + 2 * reach + 1]
            out[:, row, column] = (weight_OCRS * window).sum((1, 2, 3))
    return out


def layer_norm(x: Array, gain: Array, shift: Array) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * gain + shift


class Weights:
    """The parameters of one layer, cut into the matrices that the equations name."""

    def __init__(self, layer: RecurrentLayer) -> None:
        self.p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
        self.inputs = layer.cell.in_channels
        self.width = layer.cell.hidden_channels

    def gate(self, index: int) -> tuple[Array, Array, Array]:
        """W_x, W_h and b of gate `index` in the order i, f, o, g."""
        rows = slice(index * self.width, (index + 1) * self.width)
        weight = self.p["cell.gates.weight"][rows]
        bias = self.p["cell.gates.bias"][rows][:, None, None]
        return weight[:, : self.inputs], weight[:, self.inputs :], bias

    def peephole(self, index: int) -> Array:
        return self.p["cell.peepholes"][index]


def reference_step(
    w: Weights, x: Array, h: Array, c: Array, *, num_teachers: int, combine: str = "paper"
) -> tuple[Array, Array, Array]:
    """Eqs. 2, 3 and 5 for one sample; returns H, C and the imitations."""
    (xi, hi, bi), (xf, hf, bf), (xo, ho, bo), (xg, hg, bg) = (w.gate(k) for k in range(4))
    g = np.tanh(conv(x, xg) + conv(h, hg) + bg)
    i = sigmoid(conv(x, xi) + conv(h, hi) + w.peephole(0) * c + bi)
    f = sigmoid(conv(x, xf) + conv(h, hf) + w.peephole(1) * c + bf)
    own = f * c + i * g

    imitations = np.zeros((num_teachers, *own.shape))
    fused = own.copy()
    if num_teachers:
        weight = w.p["transfer.gates.weight"]
        a = conv(x, weight[:, : w.inputs]) + conv(h, weight[:, w.inputs :])
        a = a + w.p["transfer.gates.bias"][:, None, None]
        a = layer_norm(a, w.p["transfer.gate_norm.gain"], w.p["transfer.gate_norm.shift"])
        a = sigmoid(a)
    for m in range(num_teachers):
        rows = slice(m * w.width, (m + 1) * w.width)
        imitations[m] = layer_norm(
            conv(own, w.p["transfer.distillers.weight"][rows]),
            w.p["transfer.distiller_norm.gain"][rows],
            w.p["transfer.distiller_norm.shift"][rows],
        )
        fused = fused + a[rows] * imitations[m] + (1 - a[rows]) * own
    if combine == "mean":
        fused = fused / (1 + num_teachers)

    o = sigmoid(conv(x, xo) + conv(h, ho) + w.peephole(2) * fused + bo)
    return o * np.tanh(fused), fused, imitations


def random_network(num_slots: int, **tmu: str) -> Predictor:
    torch.manual_seed(3)
    network = build_predictor(
        FrameShape(channels=2, height=6, width=10),
        ModelConfig(num_layers=2, hidden_channels=3, kernel_size=5, patch_size=2),
        tmu=TMUConfig(**tmu),  # type: ignore[arg-type]
        num_slots=num_slots,
    ).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # peepholes and shifts start at 0 otherwise
    return network


@pytest.mark.parametrize("combine", ["paper", "mean"])
@pytest.mark.parametrize("num_teachers", [0, 1, 3])
def test_three_steps_follow_the_paper(num_teachers: int, combine: str) -> None:
    layer = random_network(num_teachers, combine=combine).stack.layers[1]
    weights = Weights(layer)
    batch, size = 2, (3, 5)
    state = CellState(torch.randn(batch, 3, *size).double(), torch.randn(batch, 3, *size).double())
    expected = [(state.hidden_BPHW[b].numpy(), state.memory_BPHW[b].numpy()) for b in range(batch)]
    for _ in range(3):
        x = torch.randn(batch, 3, *size).double()
        step = layer(x, state, Carry())
        state = step.state
        for b in range(batch):
            hidden, memory, imitations = reference_step(
                weights, x[b].numpy(), *expected[b], num_teachers=num_teachers, combine=combine
            )
            expected[b] = hidden, memory
            np.testing.assert_allclose(state.hidden_BPHW[b].detach(), hidden, atol=1e-12)
            np.testing.assert_allclose(state.memory_BPHW[b].detach(), memory, atol=1e-12)
            if num_teachers:
                assert step.imitations_BMPHW is not None
                np.testing.assert_allclose(
                    step.imitations_BMPHW[b].detach(), imitations, atol=1e-12
                )


def test_one_pixel_convlstm_is_an_lstm() -> None:
    """With a 1x1 kernel, one pixel and no peepholes the cell is torch's LSTMCell."""
    model = ModelConfig(
        num_layers=1, hidden_channels=5, kernel_size=1, patch_size=1, peephole="none"
    )
    frame = FrameShape(channels=3, height=1, width=1)
    cell = build_predictor(frame, model).double().stack.layers[0].cell
    ours = dict(cell.named_parameters())
    i, f, o, g = ours["gates.weight"][:, :, 0, 0].chunk(4)
    bi, bf, bo, bg = ours["gates.bias"].chunk(4)
    reference = torch.nn.LSTMCell(3, 5).double()
    with torch.no_grad():
        ordered = torch.cat([i, f, g, o])
        reference.weight_ih.copy_(ordered[:, :3])
        reference.weight_hh.copy_(ordered[:, 3:])
        reference.bias_ih.copy_(torch.cat([bi, bf, bg, bo]))
        reference.bias_hh.zero_()
    x, h, c = torch.randn(4, 3).double(), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    proposal = cell.propose(
        x[:, :, None, None], CellState(h[..., None, None], c[..., None, None]), Carry()
    )
    state, _ = cell.emit(proposal, proposal.memory_BPHW)
    hidden, memory = reference(x, (h, c))
    torch.testing.assert_close(state.hidden_BPHW[..., 0, 0], hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.memory_BPHW[..., 0, 0], memory, rtol=1e-12, atol=1e-12)


def test_memory_of_eq_5_grows_with_teachers_and_mean_does_not() -> None:
    """models_spec A6: the sum's weights add up to more than one; `mean` is convex."""
    frames = torch.rand(2, 20, 1, 16, 16)
    rms = {}
    for combine in ("paper", "mean"):
        torch.manual_seed(0)
        network = build_predictor(
            FrameShape(channels=1, height=16, width=16),
            ModelConfig(num_layers=2, hidden_channels=8, kernel_size=3),
            tmu=TMUConfig(combine=combine),  # type: ignore[arg-type]
            num_slots=4,
        )
        rollout = network(frames, num_input_frames=19, num_frames=20, diagnostics=True)
        rms[combine] = rollout.diagnostics.memory_rms_BTK[:, -1].mean().item()
    assert rms["mean"] < 1
    assert rms["paper"] > 100 * rms["mean"]
