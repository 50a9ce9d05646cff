"""E3D-LSTM against its equations, written out again in numpy.

Legend: O output channels, C input channels, P hidden channels, L time slices, H, W map height and
width, B batch, M teachers, N elements of a window. References keep slices in a dimension of their
own, where the cell has them below each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.numerics.reference import (
    FRAME,
    MAP_SIZE,
    Array,
    LayerOutcome,
    Parameters,
    check_gradient,
    check_windowed_rollout,
    cut,
    fuse,
    layers_of,
    parameters_of,
    random_network,
    same,
    sigmoid,
    sliced,
    stacked,
)
from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.cells.base import Carry
from tmu_dist.models.cells.e3d_lstm import recall
from tmu_dist.models.shapes import FrameShape
from tmu_dist.models.tmu import MemoryTransfer

FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"recall_window": 1},
    {"recall_window": 2},
    {"e3d_memory": "code"},
    {"e3d_memory": "code", "recall_window": 2, "bias": False},
]


def conv_3d(x_CLHW: Array, p: Parameters, name: str) -> Array:
    """Depth: no zeros in front, one slice behind; height and width: "same". One element a time."""
    weight_OCLRS = p[f"{name}.weight"]
    depth, size = weight_OCLRS.shape[2], weight_OCLRS.shape[-1]
    reach = size // 2
    padded = np.pad(x_CLHW, ((0, 0), (0, depth - 1), (reach, reach), (reach, reach)))
    out = np.zeros((len(weight_OCLRS), *x_CLHW.shape[1:]))
    for age, row, column in np.ndindex(*x_CLHW.shape[1:]):
        window = padded[:, age : age + depth, row : row + size, column : column + size]
        out[:, age, row, column] = (weight_OCLRS * window).sum((1, 2, 3, 4))
    return out + p.get(f"{name}.bias", np.zeros(len(out)))[:, None, None, None]


def layer_norm_3d(x_CLHW: Array, p: Parameters, name: str) -> Array:
    gain, shift = (p[f"{name}.{part}"][:, None, None, None] for part in ("weight", "bias"))
    return (x_CLHW - x_CLHW.mean()) / np.sqrt(x_CLHW.var() + 1e-12) * gain + shift


def recalled(r_PLHW: Array, history: list[Array]) -> Array:
    """softmax(q k^T) v, where k = v = the elements of all past memories; one query at a time."""
    width = len(r_PLHW)
    past_NP = np.concatenate([c.reshape(width, -1).T for c in history])
    found = np.zeros_like(r_PLHW)
    for at in np.ndindex(*r_PLHW.shape[1:]):
        scores = past_NP @ r_PLHW[:, *at]
        weights = np.exp(scores - scores.max())
        found[:, *at] = weights / weights.sum() @ past_NP
    return found


class Eidetic:
    """One layer and one sequence, with the transfer of Eqs. 3 and 5 into C.

    Args:
        p: parameters of the layer.
        settings: of the model.
        tmu, num_slots: of the layer; 0 slots without transfer.
    """

    def __init__(
        self, p: Parameters, settings: dict[str, Any], tmu: TMUConfig, num_slots: int
    ) -> None:
        self.p, self.tmu, self.num_slots = p, tmu, num_slots
        self.published = settings.get("e3d_memory") == "code"
        self.reach = settings.get("recall_window") or 1000
        self.h = self.c = np.zeros((3, 2, *MAP_SIZE))
        self.history = [self.c]

    def gates(self, x: Array, name: str, order: str) -> dict[str, Array]:
        maps = conv_3d(x, self.p, f"cell.conv_{name}")
        return cut(layer_norm_3d(maps, self.p, f"cell.norm_{name}"), order)

    def step(self, x: Array, m: Array) -> tuple[LayerOutcome, Array]:
        """The outcome, and the M for the layer above."""
        wx = self.gates(x, "x", "i g r o i' g' f'")
        wh = self.gates(self.h, "h", "i g r o")
        wm = self.gates(m, "m", "i f g m")
        i, r = sigmoid(wx["i"] + wh["i"]), sigmoid(wx["r"] + wh["r"])
        g = np.tanh(wx["g"] + wh["g"])
        found = recalled(r, self.history[-self.reach :])
        own = layer_norm_3d(self.c + found, self.p, "cell.norm_c") + i * g
        i_m, f_m = sigmoid(wx["i'"] + wm["i"]), sigmoid(wx["f'"] + wm["f"] + 1)
        g_m = np.tanh(wx["g'"] + wm["g"])
        new_m = i_m * g_m + f_m * (np.tanh(wm["m"]) if self.published else m)

        fused, imitations = fuse(
            stacked(own), stacked(x), stacked(self.h), self.p, self.tmu, self.num_slots
        )
        self.c = sliced(fused)
        seen = self.c if self.tmu.hidden_from == "fused" else own
        o = wx["o"] + wh["o"]
        o = o + conv_3d(seen, self.p, "cell.conv_c") + conv_3d(new_m, self.p, "cell.conv_n")
        mixing = self.p["cell.conv_last.weight"][:, :, 0, 0]
        mixed = np.einsum("oc,clhw->olhw", mixing, np.concatenate([seen, new_m]))
        mixed = mixed + self.p.get("cell.conv_last.bias", np.zeros(3))[:, None, None, None]
        self.h = sigmoid(np.tanh(o) if self.published else o) * np.tanh(mixed)
        self.history.append(self.c)
        return LayerOutcome(self.h, fused, imitations), m if self.published else new_m


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_steps_of_a_cell_follow_the_equations(settings: dict[str, Any]) -> None:
    """With a foreign M at every step, as a cell in the middle of a network gets it."""
    layer = layers_of(random_network("e3d_lstm", **settings))[1]
    references = [Eidetic(parameters_of(layer), settings, TMUConfig(), 0) for _ in range(2)]
    size = (2, 3, 2 * MAP_SIZE[0], MAP_SIZE[1])
    state = layer.cell.initial_state(torch.zeros(size, dtype=torch.float64))
    for _ in range(4):
        x_BPHW, m_BPHW = torch.randn(2, *size, dtype=torch.float64)
        step = layer(x_BPHW, state, Carry(zigzag_BPHW=m_BPHW))
        state = step.state
        assert step.forget_BPHW is None
        for b, reference in enumerate(references):
            outcome, m = reference.step(sliced(x_BPHW[b].numpy()), sliced(m_BPHW[b].numpy()))
            same(state.hidden_BPHW[b], stacked(outcome.hidden_PHW))
            same(state.memory_BPHW[b], outcome.memory_PHW)
            same(step.carry.zigzag_BPHW[b], stacked(m))


TRANSFERS: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (2, {}),
    (2, {"combine": "mean"}),
    (2, {"hidden_from": "own"}),
]


@pytest.mark.parametrize(("num_slots", "transfer"), TRANSFERS, ids=str)
@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_rollouts_follow_the_equations(
    settings: dict[str, Any], num_slots: int, transfer: dict[str, Any]
) -> None:
    """Three layers, closed loop: windows of frames, zig-zag, recall of fused memories, output."""
    tmu = TMUConfig(**transfer)
    network = random_network("e3d_lstm", tmu=tmu, num_slots=num_slots, **settings)
    check_windowed_rollout(network, lambda p: Eidetic(p, settings, tmu, num_slots), num_slots)


@pytest.mark.parametrize("num_slots", [0, 2])
@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_no_path_of_the_gradient_is_cut(settings: dict[str, Any], num_slots: int) -> None:
    check_gradient(random_network("e3d_lstm", tmu=TMUConfig(), num_slots=num_slots, **settings))


@pytest.mark.parametrize("affine", ["full", "channel", "none"])
def test_transfer_of_stacked_slices_is_the_transfer_in_3d(affine: Any) -> None:
    """Every 1x1x1 convolution and norm over C, L, H, W, in torch's own 3-D operations."""
    torch.manual_seed(0)
    slots, width, slices = 2, 3, (2, *MAP_SIZE)
    map_size = (2 * MAP_SIZE[0], MAP_SIZE[1])
    transfer = MemoryTransfer(4, width, slots, map_size=map_size, norm_affine=affine).double()
    for parameter in transfer.parameters():
        torch.nn.init.normal_(parameter)
    p = dict(transfer.named_parameters())

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv3d(x, p[f"{name}.weight"].unsqueeze(-1), p.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str, rows: slice) -> torch.Tensor:
        x = F.layer_norm(x, x.shape[1:])
        if affine == "none":
            return x
        size = slices if affine == "full" else (1, 1, 1)
        gain, shift = (p[f"{name}.{part}"].unflatten(0, (-1, 1)) for part in ("gain", "shift"))
        return x * gain.view(-1, *size)[rows] + shift.view(-1, *size)[rows]

    x, h, c = (torch.randn(2, n, *slices, dtype=torch.float64) for n in (4, width, width))
    gates = torch.sigmoid(norm(conv(torch.cat([x, h], 1), "gates"), "gate_norm", slice(None)))
    distilled, fused = conv(c, "distillers"), c
    for m in range(slots):
        rows = slice(m * width, (m + 1) * width)
        imitation = norm(distilled[:, rows], "distiller_norm", rows)
        fused = fused + gates[:, rows] * imitation + (1 - gates[:, rows]) * c

    own = c.flatten(2, 3)
    ours, _, _ = transfer(own, x.flatten(2, 3), h.flatten(2, 3))
    torch.testing.assert_close(ours, fused.flatten(2, 3), rtol=1e-12, atol=1e-12)


def test_recall_of_large_memories_is_the_best_match() -> None:
    """Scores in the thousands must not overflow; their softmax picks one element."""
    gate = torch.rand(1, 8, 4, 3)
    history = tuple(1000 * torch.randn(2, 1, 8, 4, 3))
    past = torch.cat([c.flatten(2) for c in history], dim=2)[0]
    best = (gate[0].flatten(1).T @ past).argmax(dim=1)
    torch.testing.assert_close(recall(gate, history)[0].flatten(1), past[:, best])


@pytest.mark.parametrize("settings", [{}, {"e3d_memory": "code"}], ids=str)
def test_empty_frames_before_the_first_rain_have_a_gradient(settings: dict[str, Any]) -> None:
    """The normalisation of zeros is steep: biases must keep maps away from them."""
    torch.manual_seed(0)
    model = ModelConfig(cell="e3d_lstm", hidden_channels=4, patch_size=2, **settings)
    network = build_predictor(FRAME, model, tmu=TMUConfig(), num_slots=2)
    dry = torch.zeros(1, 10, FRAME.channels, FRAME.height, FRAME.width)
    predictions = network(dry, num_input_frames=10, num_frames=20).predictions_BTCHW
    (predictions - 0.5).square().mean().backward()
    largest = max(p.grad.abs().max() for p in network.parameters() if p.grad is not None)
    assert largest < 100


def test_parameter_counts() -> None:
    flying_digits = FrameShape(channels=1, height=64, width=64)
    counts = [
        count_parameters(
            build_predictor(
                flying_digits, ModelConfig(cell="e3d_lstm"), tmu=TMUConfig(), num_slots=num_slots
            )
        )
        for num_slots in (0, 2)
    ]
    assert counts == [12_898_832, 12_898_832 + 1_141_248]
