"""The cells against the paper's equations, written out again in numpy, one gate at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.numerics.reference import (
    Array,
    LayerOutcome,
    conv,
    cut,
    fuse,
    layer_norm,
    parameters_of,
    sigmoid,
)
from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape


def reference_step(
    layer: RecurrentLayer, x: Array, h: Array, c: Array, tmu: TMUConfig, num_teachers: int
) -> LayerOutcome:
    """Eqs. 2, 3 and 5 for one sample."""
    p = parameters_of(layer)
    if "cell.gates.weight" in p:
        stacked = conv(np.concatenate([x, h]), p, "cell.gates")
    else:
        of_x, of_h = conv(x, p, "cell.conv_x"), conv(h, p, "cell.conv_h")
        stacked = layer_norm(of_x, p, "cell.norm_x") + layer_norm(of_h, p, "cell.norm_h")
    gates = cut(stacked, "i f o g")
    of_input, of_forget, of_output = p["cell.peepholes"]
    g = np.tanh(gates["g"])
    i = sigmoid(gates["i"] + of_input * c)
    f = sigmoid(gates["f"] + of_forget * c)
    fused, imitations = fuse(f * c + i * g, x, h, p, tmu, num_teachers)
    o = sigmoid(gates["o"] + of_output * fused)
    return LayerOutcome(o * np.tanh(fused), fused, imitations)


def random_network(num_slots: int, tmu: TMUConfig, **settings: str) -> Predictor:
    torch.manual_seed(3)
    network = build_predictor(
        FrameShape(channels=2, height=6, width=10),
        ModelConfig(num_layers=2, hidden_channels=3, kernel_size=5, patch_size=2, **settings),
        tmu=tmu,
        num_slots=num_slots,
    ).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # peepholes and shifts start at 0 otherwise
    return network


@pytest.mark.parametrize("combine", ["paper", "mean"])
@pytest.mark.parametrize("num_teachers", [0, 1, 3])
@pytest.mark.parametrize("gates", [{}, {"gate_form": "apart", "gate_norm": "layer"}])
def test_three_steps_follow_the_paper(
    gates: dict[str, str], num_teachers: int, combine: str
) -> None:
    tmu = TMUConfig(combine=combine)  # type: ignore[arg-type]
    layer = random_network(num_teachers, tmu, **gates).stack.layers[1]
    batch, size = 2, (3, 5)
    state = CellState(torch.randn(batch, 3, *size).double(), torch.randn(batch, 3, *size).double())
    expected = [
        LayerOutcome(state.hidden_BPHW[b].numpy(), state.memory_BPHW[b].numpy(), [])
        for b in range(batch)
    ]
    for _ in range(3):
        x = torch.randn(batch, 3, *size).double()
        step = layer(x, state, Carry())
        state = step.state
        for b in range(batch):
            before = expected[b]
            expected[b] = after = reference_step(
                layer, x[b].numpy(), before.hidden_PHW, before.memory_PHW, tmu, num_teachers
            )
            np.testing.assert_allclose(state.hidden_BPHW[b].detach(), after.hidden_PHW, atol=1e-12)
            np.testing.assert_allclose(state.memory_BPHW[b].detach(), after.memory_PHW, atol=1e-12)
            if num_teachers:
                assert step.imitations_BMPHW is not None
                np.testing.assert_allclose(
                    step.imitations_BMPHW[b].detach(), np.stack(after.imitations), atol=1e-12
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
    """The sum's weights add up to more than one; `mean` is convex."""
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
