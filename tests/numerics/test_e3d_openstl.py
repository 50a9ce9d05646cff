"""OpenSTL's E3D-LSTM against its computation, written out again in numpy.

The reference has the memory M and its convolution, whose weights the cell does not have: any will
do. Slices have a dimension of their own, where the cell has them below each other.

Legend: O output channels, C input channels, P hidden channels, L time slices, H, W map height and
width, B batch, N rows of a memory (L * H * W).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.reference import (
    MAP_SIZE,
    Array,
    LayerOutcome,
    Parameters,
    check_gradient,
    check_windowed_rollout,
    cut,
    fuse,
    layer_norm,
    random_network,
    sigmoid,
    sliced,
    stacked,
)
from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.shapes import FrameShape

FORMS: list[dict[str, Any]] = [
    {},
    {"gate_norm": "layer"},
    {"norm_affine": "channel"},
    {"gate_norm": "layer", "norm_affine": "channel"},
    {"gate_norm": "layer", "norm_affine": "none"},
]


def conv_3d(x_CLHW: Array, weight_OCLRS: Array) -> Array:
    """One slice, from a filter as deep as the window and without padding of time; then repeated."""
    size = weight_OCLRS.shape[-1]
    reach = size // 2
    padded = np.pad(x_CLHW, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    one = np.zeros((len(weight_OCLRS), *x_CLHW.shape[2:]))
    for row, column in np.ndindex(*one.shape[1:]):
        window = padded[:, :, row : row + size, column : column + size]
        one[:, row, column] = (weight_OCLRS * window).sum((1, 2, 3, 4))
    return np.stack([one, one], axis=1)


def normalised(x_CLHW: Array, p: Parameters, name: str) -> Array:
    return sliced(layer_norm(stacked(x_CLHW), p, name))


def recalled(r_PLHW: Array, history: list[Array]) -> Array:
    """softmax(Q K^T) K; rows are P numbers of C-ordered maps, of which times are joined first."""
    width = len(r_PLHW)
    past_NP = np.concatenate(history).reshape(-1, width)
    scores_NN = r_PLHW.reshape(-1, width) @ past_NP.T
    weights_NN = np.exp(scores_NN - scores_NN.max(axis=1, keepdims=True))
    weights_NN /= weights_NN.sum(axis=1, keepdims=True)
    return (weights_NN @ past_NP).reshape(r_PLHW.shape)


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
        self.norms_gates = settings.get("gate_norm") == "layer"
        self.h = self.c = np.zeros((3, 2, *MAP_SIZE))
        self.history: list[Array] = []

    def gates(self, x: Array, name: str, order: str) -> dict[str, Array]:
        weight = self.p[f"cell.conv_{name}.weight"]
        maps = conv_3d(x, weight.reshape(len(weight), len(x), 2, *weight.shape[2:]))
        if self.norms_gates:
            maps = normalised(maps, self.p, f"cell.norm_{name}")
        return cut(maps, order)

    def gates_of_m(self, m: Array) -> dict[str, Array]:
        """Convolution and normalisation of M; without the latter there is nothing but zeros."""
        maps = conv_3d(m, np.random.default_rng(0).normal(size=(12, 3, 2, 3, 3)))
        if self.norms_gates:
            anything = {"norm.gain": np.full(12, 7.0), "norm.shift": np.zeros(12)}
            maps = normalised(maps, anything, "norm")
            if "cell.shift_m" in self.p:
                shift = np.broadcast_to(self.p["cell.shift_m"], (12, 2 * MAP_SIZE[0], MAP_SIZE[1]))
                maps = maps + sliced(shift)
        return cut(maps, "i f g m")

    def step(self, x: Array, m: Array) -> tuple[LayerOutcome, Array]:
        """The outcome, and the M for the layer above: the one that came in."""
        if self.norms_gates:
            wx = self.gates(x, "x", "i g r o i' g' f'")
        else:
            wx = self.gates(x, "x", "i g r o i' g'")
            wx["f'"] = 3.0 * wx["i"]  # anything
        wh, wm = self.gates(self.h, "h", "i g r o"), self.gates_of_m(m)
        i, r = sigmoid(wx["i"] + wh["i"]), sigmoid(wx["r"] + wh["r"])
        g = np.tanh(wx["g"] + wh["g"])
        self.history.append(self.c)
        found = self.c + recalled(r, self.history)
        own = normalised(found, self.p, "cell.norm_recalled") + i * g
        i_m, f_m = sigmoid(wx["i'"] + wm["i"]), sigmoid(wx["f'"] + wm["f"] + 1)
        new_m = f_m * np.tanh(wm["m"]) + i_m * np.tanh(wx["g'"] + wm["g"])

        fused, imitations = fuse(
            stacked(own), stacked(x), stacked(self.h), self.p, self.tmu, self.num_slots
        )
        self.c = sliced(fused)
        seen = self.c if self.tmu.hidden_from == "fused" else own
        o = wx["o"] + wh["o"] + self.gates(seen, "c", "o")["o"] + self.gates(new_m, "n", "o")["o"]
        mixing = self.p["cell.conv_last.weight"][:, :, 0, 0]
        mixed = np.einsum("oc,clhw->olhw", mixing, np.concatenate([seen, new_m]))
        self.h = sigmoid(np.tanh(o)) * np.tanh(mixed)
        return LayerOutcome(self.h, fused, imitations), m


TRANSFERS: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (2, {}),
    (2, {"combine": "mean", "hidden_from": "own"}),
]


@pytest.mark.parametrize(("num_slots", "transfer"), TRANSFERS, ids=str)
@pytest.mark.parametrize("settings", FORMS[:2], ids=str)
def test_rollouts_follow_the_computation(
    settings: dict[str, Any], num_slots: int, transfer: dict[str, Any]
) -> None:
    check_rollout(settings, TMUConfig(**transfer), num_slots)


@pytest.mark.parametrize("settings", FORMS[2:], ids=str)
def test_normalisations_of_any_map_size(settings: dict[str, Any]) -> None:
    check_rollout(settings, TMUConfig(), 0)


def check_rollout(settings: dict[str, Any], tmu: TMUConfig, num_slots: int) -> None:
    network = random_network("e3d_openstl", tmu=tmu, num_slots=num_slots, **settings)
    check_windowed_rollout(network, lambda p: Eidetic(p, settings, tmu, num_slots), num_slots)


@pytest.mark.parametrize("num_slots", [0, 2])
@pytest.mark.parametrize("settings", FORMS[:2], ids=str)
def test_no_path_of_the_gradient_is_cut(settings: dict[str, Any], num_slots: int) -> None:
    check_gradient(random_network("e3d_openstl", tmu=TMUConfig(), num_slots=num_slots, **settings))


@pytest.mark.parametrize("gate_norm", ["none", "layer"])
def test_map_sizes(gate_norm: Any) -> None:
    frames = torch.rand(1, 2, 1, 24, 16)
    small, shape = (
        {"num_layers": 1, "hidden_channels": 4},
        FrameShape(channels=1, height=16, width=16),
    )
    model = ModelConfig(cell="e3d_openstl", gate_norm=gate_norm, **small)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm_affine=channel"):
        build_predictor(shape, model).predict(frames, 1)
    model = ModelConfig(
        cell="e3d_openstl",
        gate_norm=gate_norm,
        norm_affine="channel",
        **small,  # type: ignore[arg-type]
    )
    assert build_predictor(shape, model).predict(frames, 1).shape == (1, 1, 1, 24, 16)


WIDTH, FILTER, MAP = 128, 2 * 5 * 5, 2 * 16 * 16
CONV = WIDTH * WIDTH * FILTER  # from P to P channels
UNUSED = 4 * 4 * CONV  # their `conv_gm`
UNUSED_GATE = (3 * WIDTH + 16) * WIDTH * FILTER  # their f' of `conv_x`, without its normalisation
UNUSED_GAIN = 4 * 4 * WIDTH * MAP  # that of M's normalisation


@pytest.mark.parametrize(
    ("gate_norm", "theirs", "unused"),
    [
        ("none", 51_347_456, UNUSED + UNUSED_GATE),
        ("layer", 51_347_456 + 4 * 17 * 2 * WIDTH * MAP, UNUSED + UNUSED_GAIN),
    ],
)
def test_parameter_counts(gate_norm: Any, theirs: int, unused: int) -> None:
    """OpenSTL's setting for Moving MNIST: 4 layers of 128, of which M's weights are left out."""
    model = ModelConfig(cell="e3d_openstl", hidden_channels=WIDTH, gate_norm=gate_norm)
    with torch.device("meta"):
        network = build_predictor(FrameShape(channels=1, height=64, width=64), model)
    assert count_parameters(network) == theirs - unused
