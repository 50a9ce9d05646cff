"""PredRNN against its equations, written out again in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.reference import (
    MAP_SIZE,
    STLSTM,
    Array,
    LayerOutcome,
    check_gradient,
    check_rollout,
    parameters_of,
    random_network,
    same,
)
from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.cells.st_lstm import STLSTMCell
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape

FORMS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"forget_bias": 0.5},
    {"gate_norm": "layer"},
    {"gate_norm": "layer", "norm_affine": "channel"},
    {"gate_norm": "layer", "norm_affine": "none"},
    {"st_form": "shared"},
    {"st_form": "shared", "bias": False},
    {"st_form": "shared", "gate_norm": "layer"},
    {"st_form": "shared", "gate_norm": "layer", "norm_affine": "channel"},
]


class PredRNN:
    """Three layers: M of the top enters the lowest layer at the next time step."""

    def __init__(
        self,
        network: Predictor,
        settings: dict[str, Any],
        *,
        forget_biases: list[float],
        tmu: TMUConfig | None = None,
        num_slots: int = 0,
    ) -> None:
        self.layers = [
            STLSTM(
                parameters_of(layer),
                settings,
                forget_bias,
                tmu if layer.transfer is not None else None,
                num_slots,
            )
            for layer, forget_bias in zip(network.stack.layers, forget_biases, strict=True)
        ]
        self.m: Array = np.zeros((3, *MAP_SIZE))

    def step(self, x: Array) -> list[LayerOutcome]:
        outcomes = []
        for layer in self.layers:
            outcome, self.m = layer.step(x, self.m)
            x = outcome.hidden_PHW
            outcomes.append(outcome)
        return outcomes


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_a_cell_follows_the_equations(settings: dict[str, Any]) -> None:
    """From random states, with M given in the first and third step and None in the second."""
    layer = random_network("predrnn", **settings).stack.layers[1]
    state = CellState(*torch.randn(2, 2, 3, *MAP_SIZE, dtype=torch.float64).unbind())
    references = []
    for b in range(2):
        reference = STLSTM(parameters_of(layer), settings, settings.get("forget_bias", 1.0))
        reference.h, reference.c = (s[b].numpy() for s in (state.hidden_BPHW, state.memory_BPHW))
        references.append(reference)
    for given in (True, False, True):
        x, m = torch.randn(2, 2, 3, *MAP_SIZE, dtype=torch.float64)
        step = layer(x, state, Carry(zigzag_BPHW=m if given else None))
        state = step.state
        for b, reference in enumerate(references):
            expected, new_m = reference.step(x[b].numpy(), (m[b] if given else 0 * m[b]).numpy())
            same(state.hidden_BPHW[b], expected.hidden_PHW)
            same(state.memory_BPHW[b], expected.memory_PHW)
            same(step.carry.zigzag_BPHW[b], new_m)
        assert step.carry.difference_BPHW is None


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_a_network_follows_the_equations(settings: dict[str, Any]) -> None:
    network = random_network("predrnn", **settings)
    biases = [settings.get("forget_bias", 1.0)] * 3
    check_rollout(network, lambda: PredRNN(network, settings, forget_biases=biases))


@pytest.mark.parametrize(
    ("tmu", "settings", "forget_biases"),
    [
        (TMUConfig(), {}, [0, 0, 0]),
        (TMUConfig(combine="mean"), {}, [1, 1, 1]),
        (TMUConfig(layers=(0, 2)), {}, [0, 1, 0]),
        (TMUConfig(hidden_from="own"), {}, [0, 0, 0]),
        (TMUConfig(), {"forget_bias": 1.0}, [1, 1, 1]),
        (TMUConfig(), {"st_form": "shared"}, [0, 0, 0]),
        (TMUConfig(combine="mean"), {"gate_norm": "layer", "norm_affine": "channel"}, [1, 1, 1]),
    ],
    ids=str,
)
def test_a_tmu_network_follows_the_equations(
    tmu: TMUConfig, settings: dict[str, Any], forget_biases: list[float]
) -> None:
    """Eq. 5 as printed lets C grow, so there its forget gate starts without a bias."""
    network = random_network("predrnn", tmu=tmu, num_slots=2, **settings)
    check_rollout(
        network,
        lambda: PredRNN(network, settings, forget_biases=forget_biases, tmu=tmu, num_slots=2),
    )


def test_forget_gate_is_that_of_the_memory() -> None:
    """With all weights at zero the pre-activations are zero, but for the bias."""
    cell = STLSTMCell(2, 3, kernel_size=3, map_size=MAP_SIZE, forget_bias=2.0)
    for parameter in cell.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(1, 2, *MAP_SIZE)
    proposal = cell.propose(x, cell.initial_state(x), Carry())
    assert proposal.forget_BPHW is not None
    torch.testing.assert_close(
        proposal.forget_BPHW, torch.full((1, 3, *MAP_SIZE), 1 / (1 + np.exp(-2.0)))
    )


@pytest.mark.parametrize("settings", [{}, {"st_form": "shared", "gate_norm": "layer"}], ids=str)
def test_gradients_are_whole(settings: dict[str, Any]) -> None:
    check_gradient(random_network("predrnn", **settings))


DIGITS = FrameShape(channels=1, height=64, width=64)
PEOPLE = FrameShape(channels=3, height=128, width=128)


def count(frame: FrameShape, *, slots: int = 0, **settings: Any) -> int:
    with torch.device("meta"):
        network = build_predictor(
            frame, ModelConfig(cell="predrnn", **settings), tmu=TMUConfig(), num_slots=slots
        )
    return count_parameters(network)


def test_parameter_counts() -> None:
    assert count(DIGITS) == 6_049_792
    assert count(DIGITS, gate_norm="layer") == 8_015_872
    assert count(PEOPLE) == 6_410_240
    assert count(DIGITS, slots=2) - count(DIGITS) == 616_960
    assert count(PEOPLE, slots=2) - count(PEOPLE) == 2_193_920


def test_biases_are_those_of_the_public_code() -> None:
    """None in seven_gate; in the shared form 4 x 4P from three convolutions, and P in the last."""
    names = [name for name, _ in random_network("predrnn").named_parameters()]
    assert not any(name.endswith("bias") for name in names)
    assert count(DIGITS, st_form="shared") - count(DIGITS, st_form="shared", bias=False) == (
        4 * (3 * 4 + 1) * 64
    )


def test_weights_have_the_documented_names() -> None:
    layer = random_network("predrnn", gate_norm="layer").stack.layers[0]
    shapes = {name: tuple(p.shape) for name, p in layer.cell.named_parameters()}
    assert shapes == {
        "conv_x.weight": (21, 8, 3, 3),
        "conv_h.weight": (12, 3, 3, 3),
        "conv_m.weight": (9, 3, 3, 3),
        "conv_o.weight": (3, 6, 3, 3),
        "conv_last.weight": (3, 6, 1, 1),
        **{
            f"norm_{part}.{name}": (gates * 3, *MAP_SIZE)
            for part, gates in {"x": 7, "h": 4, "m": 3, "o": 1}.items()
            for name in ("gain", "shift")
        },
    }
