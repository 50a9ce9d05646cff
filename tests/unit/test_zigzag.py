"""Memory transfer into ST-LSTM's second memory M (transfer.tmu.zigzag)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contracts import test_predictor as suite
from tests.numerics.reference import (
    FRAME,
    MAP_SIZE,
    Array,
    LayerOutcome,
    Parameters,
    check_gradient,
    conv,
    cut,
    fuse,
    layers_of,
    parameters_of,
    patches,
    pixels,
    random_network,
    same,
    sigmoid,
)
from tmu_dist.config import ConfigError, ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.bank import FrozenTeacher

BOTH = TMUConfig(zigzag=True)
FORMS: dict[str, dict[str, Any]] = {
    "predrnn": {"cell": "predrnn"},
    "mim": {"cell": "mim"},
    "e3d paper": {"cell": "e3d_lstm"},
    "e3d code": {"cell": "e3d_lstm", "e3d_memory": "code"},
    "e3d openstl": {"cell": "e3d_openstl"},
}


@pytest.fixture(params=FORMS)
def network(request: pytest.FixtureRequest) -> Predictor:
    settings = FORMS[request.param]
    torch.manual_seed(0)
    model = replace(suite.small(settings["cell"]), **settings)
    return build_predictor(suite.FRAME, model, tmu=BOTH, num_slots=2)


class STLSTM:
    """One ST-LSTM of seven gates and one sequence, whose C and M are both fused.

    Args:
        p: parameters of the layer.
        of_memory, of_zigzag: how each memory is combined; None: not at all.
    """

    def __init__(
        self,
        p: Parameters,
        forget_bias: float,
        of_memory: TMUConfig | None,
        of_zigzag: TMUConfig | None,
    ) -> None:
        self.p, self.forget_bias = p, forget_bias
        self.of_memory, self.of_zigzag = of_memory, of_zigzag
        self.p_zigzag = {
            name.replace("transfer_zigzag.", "transfer."): value
            for name, value in p.items()
            if not name.startswith("transfer.")
        }
        self.h = self.c = np.zeros((3, *MAP_SIZE))

    def step(self, x: Array, m: Array) -> tuple[LayerOutcome, Array, list[Array]]:
        """The outcome, M after transfer and the imitations of the teachers' M."""
        wx = cut(conv(x, self.p, "cell.conv_x"), "i f g i' f' g' o")
        wh = cut(conv(self.h, self.p, "cell.conv_h"), "i f g o")
        wm = cut(conv(m, self.p, "cell.conv_m"), "i f g")
        own = sigmoid(wx["f"] + wh["f"] + self.forget_bias) * self.c
        own = own + sigmoid(wx["i"] + wh["i"]) * np.tanh(wx["g"] + wh["g"])
        own_m = sigmoid(wx["f'"] + wm["f"] + 1) * m
        own_m = own_m + sigmoid(wx["i'"] + wm["i"]) * np.tanh(wx["g'"] + wm["g"])
        c, imitations = fuse(own, x, self.h, self.p, self.of_memory, 2)
        m, imitations_of_m = fuse(own_m, x, self.h, self.p_zigzag, self.of_zigzag, 2)
        reads_own = self.of_memory is not None and self.of_memory.hidden_from == "own"
        both = np.concatenate([own if reads_own else c, m])
        o = sigmoid(wx["o"] + wh["o"] + conv(both, self.p, "cell.conv_o"))
        self.h, self.c = o * np.tanh(conv(both, self.p, "cell.conv_last")), c
        return LayerOutcome(self.h, c, imitations), m, imitations_of_m


@pytest.mark.parametrize(
    ("tmu", "of_zigzag"),
    [
        (BOTH, "mean"),
        (replace(BOTH, combine="paper"), "paper"),
        (replace(BOTH, combine="mean", hidden_from="own"), "mean"),
        (replace(BOTH, layers=(1,)), "mean"),
    ],
    ids=str,
)
def test_both_memories_follow_the_equations(tmu: TMUConfig, of_zigzag: str) -> None:
    """Three layers, closed loop after three frames: what is fused is read and travels on."""
    network = random_network("predrnn", tmu=tmu, num_slots=2)
    taught = range(3) if tmu.layers == "all" else tmu.layers
    layers = [
        STLSTM(
            parameters_of(layer),
            1.0 if tmu.combine == "mean" or k not in taught else 0.0,
            tmu if k in taught else None,
            replace(tmu, combine=of_zigzag) if k in taught else None,  # type: ignore[arg-type]
        )
        for k, layer in enumerate(layers_of(network))
    ]
    frames = torch.rand(1, 3, FRAME.channels, FRAME.height, FRAME.width, dtype=torch.float64)
    with torch.no_grad():
        rollout = network(frames, num_input_frames=3, num_frames=5)
    assert list(rollout.imitations) == list(rollout.zigzag_imitations) == list(taught)
    m, prediction = np.zeros((3, *MAP_SIZE)), np.zeros(())
    for t in range(4):
        x = patches(frames[0, t].numpy() if t < 3 else prediction)
        for k, layer in enumerate(layers):
            outcome, m, imitations_of_m = layer.step(x, m)
            x = outcome.hidden_PHW
            same(rollout.memories[k][0, t], outcome.memory_PHW)
            same(rollout.states("zigzag")[k][0, t], m)
            for ours, expected in (
                (rollout.imitations, outcome.imitations),
                (rollout.zigzag_imitations, imitations_of_m),
            ):
                for imitation, each in zip(ours.get(k, ()), expected, strict=True):
                    same(imitation[0, t], each)
        prediction = pixels(conv(x, parameters_of(network), "output"))
        same(rollout.predictions_BTCHW[0, t], prediction)


@pytest.mark.parametrize("cell", ["predrnn", "mim", "e3d_lstm"])
def test_gradients_are_whole(cell: str) -> None:
    check_gradient(random_network(cell, tmu=BOTH, num_slots=2))


@pytest.mark.parametrize(
    "case",
    [
        suite.test_shapes_of_a_rollout,
        suite.test_sequences_of_a_batch_do_not_influence_each_other,
        suite.test_hidden_targets_cannot_leak_into_a_forecast,
        suite.test_steps_one_by_one_are_the_rollout,
        suite.test_state_dict_round_trip,
        suite.test_bf16_stays_near_fp32_and_keeps_memories_in_fp32,
    ],
    ids=lambda case: case.__name__,
)
def test_the_contract_holds(network: Predictor, case: Any) -> None:
    case(network)


def test_the_compiler_sees_one_graph() -> None:
    """MIM has both kinds of cells whose M travels."""
    network = build_predictor(suite.FRAME, suite.small("mim"), tmu=BOTH, num_slots=2)
    suite.test_whole_rollout_is_one_graph(network)


def test_every_parameter_gets_a_gradient(network: Predictor) -> None:
    suite.in_training(network, suite.frames()).predictions_BTCHW.square().mean().backward()
    # In the authors' code M is zero when it is convolved (docs/backbones.md).
    idle = {f"{k}.cell.conv_m.weight" for k in range(3)}
    without = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    is_code = getattr(layers_of(network)[0].cell, "e3d_memory", "paper") == "code"
    assert without == ({f"stack.layers.{name}" for name in idle} if is_code else set())


def rollout_of(network: Predictor) -> Rollout:
    return network(suite.frames(), num_input_frames=6, num_frames=7)


def test_imitations_of_both_memories_have_the_memories_shapes(network: Predictor) -> None:
    rollout = rollout_of(network)
    shapes = [[memory.shape] * 2 for memory in rollout.memories]
    for imitations in (rollout.imitations, rollout.zigzag_imitations):
        assert [[x.shape for x in imitations[k]] for k in range(3)] == shapes
    assert [x.shape for x in rollout.states("zigzag")] == [each[0] for each in shapes]


def test_m_after_transfer_is_what_the_next_layer_reads(network: Predictor) -> None:
    """But for the forms that follow E3D-LSTM's code, where M never moves and stays zero."""
    stays = {"E3DLSTMCell": "code", "OpenSTLE3DCell": None}
    cell = layers_of(network)[0].cell
    form = getattr(cell, "e3d_memory", None)
    for step in rollout_of(network).steps[-1]:
        assert step.zigzag_BPHW is not None and step.zigzag_BPHW.any()
        if stays.get(type(cell).__name__, "moves") == form:
            assert step.carry.zigzag_BPHW is None or not step.carry.zigzag_BPHW.any()
        else:
            assert step.carry.zigzag_BPHW is step.zigzag_BPHW


def distance(rollout: Rollout, teacher: FrozenTeacher, frames: Tensor) -> Tensor:
    """Eq. 4 of M."""
    taught = teacher(
        frames, num_input_frames=6, num_frames=7, sampling_mask_BT=None, noise_BTZ=None
    ).states["zigzag"]
    return torch.stack(
        [
            (imitation - taught[k]).square().mean()
            for k, imitations in rollout.zigzag_imitations.items()
            for imitation in imitations
        ]
    ).sum()


def test_the_teachers_m_reaches_the_student(network: Predictor) -> None:
    """The gradient of the distance is its slope, and the cell of every layer has a part in it."""
    network.double()
    frames = suite.frames().double()
    kind = "predrnn" if network.memory_shapes[0].slices == 1 else "e3d_lstm"
    teacher = FrozenTeacher(
        build_predictor(suite.FRAME, suite.small(kind)).double(), wanted=["zigzag"]
    )

    def loss() -> Tensor:
        return distance(network(frames, num_input_frames=6, num_frames=7), teacher, frames)

    loss().backward()
    for k, layer in enumerate(layers_of(network)):
        assert layer.transfer_zigzag is not None
        for name in ("distillers.weight", "distiller_norm.gain"):
            gradient = layer.transfer_zigzag.get_parameter(name).grad
            assert gradient is not None and gradient.any(), (k, name)
        gradient = layer.cell.get_parameter("conv_x.weight").grad
        assert gradient is not None and gradient.any(), k
    parameters = [p for p in network.parameters() if p.grad is not None]
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions) if p.grad is not None)
    step, losses = 1e-6, []
    with torch.no_grad():
        for shift in (step, -2 * step):
            for p, d in zip(parameters, directions):
                p.add_(d, alpha=shift)
            losses.append(loss())
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / (2 * step), rtol=1e-5, atol=1e-8)


def test_a_second_transfer_has_as_many_parameters_as_the_first() -> None:
    """64x64 frames, two teachers: 2 x 154,240 a layer, but for the lowest layer's fewer inputs."""

    def count(tmu: TMUConfig) -> int:
        with torch.device("meta"):
            network = build_predictor(
                FrameShape(channels=1, height=64, width=64),
                ModelConfig(cell="predrnn"),
                tmu=tmu,
                num_slots=2,
            )
        return count_parameters(network)

    width, elements = 2 * 64, 2 * 64 * 16 * 16
    of_a_layer = 64 * width + 4 * elements  # distillers, gains and shifts of both normalisations
    gates = (16 + 64 + 3 * (64 + 64)) * width + 4 * width
    assert count(TMUConfig()) == 6_049_792 + 4 * of_a_layer + gates
    assert count(BOTH) == 6_049_792 + 2 * (4 * of_a_layer + gates) == 7_283_712


def test_without_it_nothing_is_there() -> None:
    torch.manual_seed(0)
    network = build_predictor(suite.FRAME, suite.small("mim"), tmu=TMUConfig(), num_slots=2)
    assert not [name for name, _ in network.named_parameters() if "zigzag" in name]
    assert rollout_of(network).zigzag_imitations == {}


@pytest.mark.parametrize("cell", ["convlstm", "savp", "vpn"])
def test_backbones_without_m_are_refused(cell: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"transfer.tmu.zigzag=true .* model.cell={cell} .* predrnn, mim, e3d_lstm, e3d_open",
    ):
        build_predictor(suite.FRAME, suite.small(cell), tmu=BOTH, num_slots=1)
    plain = build_predictor(suite.FRAME, suite.small(cell))
    with pytest.raises(ValueError, match="no zig-zag memory"):
        rollout_of(plain).states("zigzag")


def test_m_stays_small_by_default_and_explodes_as_printed() -> None:
    """Four layers and twenty frames fuse it 76 times."""

    def largest(tmu: TMUConfig) -> float:
        torch.manual_seed(0)
        model = ModelConfig(cell="predrnn", hidden_channels=8, kernel_size=3)
        frame = FrameShape(channels=1, height=32, width=32)
        network = build_predictor(frame, model, tmu=tmu, num_slots=2)
        with torch.no_grad():
            rollout = network(torch.rand(1, 20, 1, 32, 32), num_input_frames=19, num_frames=20)
        return max(float(x.square().mean().sqrt()) for x in rollout.states("zigzag"))

    assert largest(BOTH) < 1.0
    assert not largest(replace(BOTH, combine="paper")) < 1e6  # inf, or NaN after it
