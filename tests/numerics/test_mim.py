"""MIM against its equations, written out again in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.reference import (
    FRAME,
    MAP_SIZE,
    STLSTM,
    Array,
    LayerOutcome,
    Parameters,
    check_gradient,
    check_rollout,
    conv,
    cut,
    fuse,
    parameters_of,
    pre_activations,
    random_network,
    same,
    sigmoid,
)
from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.cells.mim import InnerMemories, MIMCell
from tmu_dist.models.cells.st_lstm import STLSTMCell
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape

FORMS: list[dict[str, Any]] = [
    {},
    {"mim_difference": "hidden"},
    {"mim_output_gate": "paper"},
    {"mim_difference": "hidden", "mim_output_gate": "paper", "gate_norm": "layer"},
    {"bias": True},
    {"gate_norm": "layer"},
    {"gate_norm": "layer", "norm_affine": "channel", "bias": True},
    {"gate_norm": "layer", "norm_affine": "none"},
    {"st_form": "shared"},
]


def core(
    p: Parameters, name: str, normalised: bool, u: Array, v: Array, q: Array
) -> tuple[Array, Array]:
    """Output and new memory of MIM-N or MIM-S."""
    wu = cut(pre_activations(u, p, f"cell.{name}.conv_u", normalised), "i g f o")
    wv = cut(pre_activations(v, p, f"cell.{name}.conv_v", normalised), "i g f o")
    p_i, p_f, p_o = p[f"cell.{name}.peepholes"]
    i = sigmoid(wu["i"] + wv["i"] + p_i * q)
    f = sigmoid(wu["f"] + wv["f"] + p_f * q + 1)
    g = np.tanh(wu["g"] + wv["g"])
    q = f * q + i * g
    o = sigmoid(wu["o"] + wv["o"] + p_o * q)
    return o * np.tanh(q), q


class MIMBlock:
    """One block and one sequence, with the transfer of Eqs. 3 and 5 into C.

    Its lists hold what it read and found at every time step.
    """

    def __init__(
        self, p: Parameters, settings: dict[str, Any], tmu: TMUConfig | None, num_slots: int
    ) -> None:
        self.p, self.tmu, self.num_slots = p, tmu, num_slots
        self.normalised = settings.get("gate_norm") == "layer"
        self.cascade = settings.get("mim_difference", "cascade") == "cascade"
        self.reads_own = tmu is not None and tmu.hidden_from == "own"
        self.reads_new_memories = settings.get("mim_output_gate") == "paper"
        zeros = np.zeros((3, *MAP_SIZE))
        self.h, self.c, self.s, self.n = zeros, zeros, zeros, zeros
        self.xs: list[Array] = []
        self.ds: list[Array] = []

    def gates(self, x: Array, name: str, order: str) -> dict[str, Array]:
        return cut(pre_activations(x, self.p, f"cell.conv_{name}", self.normalised), order)

    def step(self, x: Array, m: Array, d_below: Array | None) -> tuple[LayerOutcome, Array]:
        """The outcome and the new M; `d_below` is None where there is no MIM-N below."""
        if not self.xs:
            d = np.zeros_like(self.n)
        else:
            change = x - self.xs[-1]
            if self.cascade and d_below is not None:
                change = d_below
            d, self.n = core(self.p, "nonstationary", self.normalised, change, self.ds[-1], self.n)
        self.xs.append(x)
        self.ds.append(d)
        t, self.s = core(self.p, "stationary", self.normalised, d, self.c, self.s)

        wx = self.gates(x, "x", "i g f o")
        wh = self.gates(self.h, "h", "i g o")
        wm = self.gates(m, "m", "i g f" if self.reads_new_memories else "i g f o")
        i = sigmoid(wx["i"] + wh["i"])
        g = np.tanh(wx["g"] + wh["g"])
        i_m = sigmoid(wx["i"] + wm["i"])
        g_m = np.tanh(wx["g"] + wm["g"])
        f_m = sigmoid(wx["f"] + wm["f"] + 1)
        m = f_m * m + i_m * g_m
        own = t + i * g
        c, imitations = fuse(own, x, self.h, self.p, self.tmu, self.num_slots)
        both = np.concatenate([own if self.reads_own else c, m])
        if self.reads_new_memories:
            third = pre_activations(both, self.p, "cell.conv_o", self.normalised)
        else:
            third = wm["o"]
        o = sigmoid(wx["o"] + wh["o"] + third)
        self.h, self.c = o * np.tanh(conv(both, self.p, "cell.conv_last")), c
        return LayerOutcome(self.h, c, imitations), m


class MIM:
    """An ST-LSTM and two MIM blocks: M zig-zags as in PredRNN, D rises from block to block."""

    def __init__(
        self,
        network: Predictor,
        settings: dict[str, Any],
        *,
        forget_bias: float = 1.0,
        tmu: TMUConfig | None = None,
        num_slots: int = 0,
    ) -> None:
        bottom, *upper = network.stack.layers
        self.bottom = STLSTM(parameters_of(bottom), settings, forget_bias, tmu, num_slots)
        self.blocks = [MIMBlock(parameters_of(b), settings, tmu, num_slots) for b in upper]
        self.m: Array = np.zeros((3, *MAP_SIZE))

    def step(self, x: Array) -> list[LayerOutcome]:
        outcome, self.m = self.bottom.step(x, self.m)
        outcomes, d_below = [outcome], None
        for block in self.blocks:
            outcome, self.m = block.step(outcomes[-1].hidden_PHW, self.m, d_below)
            d_below = block.ds[-1]
            outcomes.append(outcome)
        return outcomes


@pytest.mark.parametrize("settings", FORMS, ids=str)
@pytest.mark.parametrize("lowest", [True, False])
def test_a_block_follows_the_equations(settings: dict[str, Any], lowest: bool) -> None:
    """From random H, C, S and N; D and the input before the first step are none."""
    layer = random_network("mim", **settings).stack.layers[1 if lowest else 2]
    h, c, s, n = torch.randn(4, 2, 3, *MAP_SIZE, dtype=torch.float64)
    state = CellState(h, c, InnerMemories(s, n, torch.zeros_like(n), None))
    references = []
    for b in range(2):
        reference = MIMBlock(parameters_of(layer), settings, None, 0)
        reference.h, reference.c, reference.s, reference.n = (v[b].numpy() for v in (h, c, s, n))
        references.append(reference)
    for _ in range(4):
        x, m, d = torch.randn(3, 2, 3, *MAP_SIZE, dtype=torch.float64)
        step = layer(x, state, Carry(m, None if lowest else d))
        state = step.state
        for b, reference in enumerate(references):
            expected, new_m = reference.step(
                x[b].numpy(), m[b].numpy(), None if lowest else d[b].numpy()
            )
            same(state.hidden_BPHW[b], expected.hidden_PHW)
            same(state.memory_BPHW[b], expected.memory_PHW)
            same(state.extra.stationary_BPHW[b], reference.s)
            same(state.extra.nonstationary_BPHW[b], reference.n)
            same(step.carry.zigzag_BPHW[b], new_m)
            same(step.carry.difference_BPHW[b], reference.ds[-1])


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_a_network_follows_the_equations(settings: dict[str, Any]) -> None:
    network = random_network("mim", **settings)
    check_rollout(network, lambda: MIM(network, settings))


@pytest.mark.parametrize("settings", [{}, FORMS[3], {"norm_affine": "channel"}], ids=str)
@pytest.mark.parametrize(
    ("tmu", "forget_bias"),
    [
        (TMUConfig(), 0.0),
        (TMUConfig(combine="mean"), 1.0),
        (TMUConfig(combine="mean", hidden_from="own"), 1.0),
    ],
    ids=["paper", "mean", "own"],
)
def test_a_tmu_network_follows_the_equations(
    tmu: TMUConfig, forget_bias: float, settings: dict[str, Any]
) -> None:
    """MIM-S reads the fused C; only the ST-LSTM has a forget bias that follows `combine`."""
    network = random_network("mim", tmu=tmu, num_slots=2, **settings)
    check_rollout(
        network,
        lambda: MIM(network, settings, forget_bias=forget_bias, tmu=tmu, num_slots=2),
    )


def test_differences_rise_only_in_a_cascade() -> None:
    """The flag changes the third layer and leaves the second, which has no MIM-N below."""
    memories = {}
    frames = torch.rand(1, 4, FRAME.channels, FRAME.height, FRAME.width).double()
    for kind in ("cascade", "hidden"):
        network = random_network("mim", mim_difference=kind)
        memories[kind] = network(frames, num_input_frames=3, num_frames=4).memories
    for layer, equal_steps in ((0, 2), (1, 2), (2, 1)):
        a, b = memories["cascade"][layer], memories["hidden"][layer]
        assert torch.equal(a[:, :equal_steps], b[:, :equal_steps])
    assert not torch.equal(memories["cascade"][2][:, 1], memories["hidden"][2][:, 1])


def test_the_first_step_leaves_out_mim_n() -> None:
    """The first forecast does not depend on MIM-N at all, the second one does."""
    network = random_network("mim", bias=True)
    frames = torch.rand(1, 2, FRAME.channels, FRAME.height, FRAME.width).double()
    for num_frames, expected in ((2, False), (3, True)):
        network.zero_grad()
        rollout = network(frames, num_input_frames=num_frames - 1, num_frames=num_frames)
        rollout.predictions_BTCHW.sum().backward()
        for layer in network.stack.layers[1:]:
            gradients = [p.grad for p in layer.cell.nonstationary.parameters()]
            assert any(g is not None for g in gradients) == expected


@pytest.mark.parametrize("settings", [{}, FORMS[3]], ids=str)
def test_gradients_are_whole(settings: dict[str, Any]) -> None:
    """S and N carry gradients from step to step."""
    check_gradient(random_network("mim", **settings))


def test_forget_gate_is_that_of_mim_s() -> None:
    """With all weights at zero but the forget peephole of MIM-S, the gate tells S."""
    layer = random_network("mim").stack.layers[1]
    for parameter in layer.cell.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        layer.cell.stationary.peepholes[1] = 1.0
    x = torch.rand(2, 3, *MAP_SIZE).double()
    state = layer.cell.initial_state(x)
    stationary = torch.randn_like(x)
    state = state._replace(extra=state.extra._replace(stationary_BPHW=stationary))
    forget = layer(x, state, Carry()).forget_BPHW
    torch.testing.assert_close(forget, torch.sigmoid(stationary + 1))


def test_only_the_bottom_layer_is_an_st_lstm() -> None:
    cells = [type(layer.cell) for layer in random_network("mim").stack.layers]
    assert cells == [STLSTMCell, MIMCell, MIMCell]


def test_another_frame_size_is_refused() -> None:
    network = random_network("mim", norm_affine="channel")
    with pytest.raises(ValueError, match=r"maps of \(3, 5\), got \(4, 5\)"):
        network.predict(torch.rand(1, 2, FRAME.channels, 8, 10).double(), 1)


DIGITS = FrameShape(channels=1, height=64, width=64)
PEOPLE = FrameShape(channels=3, height=128, width=128)
RADAR = FrameShape(channels=1, height=256, width=256)


@pytest.mark.parametrize(
    ("frame", "settings", "count"),
    [
        (DIGITS, {}, 9_723_904),
        (DIGITS, {"gate_norm": "layer"}, 12_869_632),
        (PEOPLE, {}, 10_969_088),
        (RADAR, {"kernel_size": 3, "patch_size": 8}, 4_792_320),
    ],
)
def test_parameter_counts(frame: FrameShape, settings: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        network = build_predictor(frame, ModelConfig(cell="mim", **settings))
    assert count_parameters(network) == count


@pytest.mark.parametrize("output_gate", ["code", "paper"])
def test_weights_have_the_documented_names(output_gate: str) -> None:
    cell = random_network("mim", mim_output_gate=output_gate).stack.layers[2].cell
    expected = {
        "conv_x.weight": (12, 3, 3, 3),
        "conv_h.weight": (9, 3, 3, 3),
        "conv_m.weight": (12, 3, 3, 3),
        "conv_last.weight": (3, 6, 1, 1),
    }
    if output_gate == "paper":
        expected |= {"conv_m.weight": (9, 3, 3, 3), "conv_o.weight": (3, 6, 3, 3)}
    for name in ("stationary", "nonstationary"):
        expected[f"{name}.conv_u.weight"] = expected[f"{name}.conv_v.weight"] = (12, 3, 3, 3)
        expected[f"{name}.peepholes"] = (3, 3, *MAP_SIZE)
    assert {name: tuple(p.shape) for name, p in cell.named_parameters()} == expected
