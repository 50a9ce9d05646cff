"""What every network must do, whatever its cell: run for each kind of cell and with the TMU."""

from __future__ import annotations

import itertools
from typing import get_args, get_type_hints

import pytest
import torch

from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import FrameShape, build_predictor
from tmu_dist.models.patches import patchify, unpatchify
from tmu_dist.models.rollout import Predictor

CELLS = get_args(get_type_hints(ModelConfig)["cell"])
FRAME = FrameShape(channels=2, height=12, width=20)  # neither square nor a power of two


@pytest.fixture(params=itertools.product(CELLS, (0, 2)), ids=lambda p: f"{p[0]}-{p[1]}slots")
def network(request: pytest.FixtureRequest) -> Predictor:
    cell, num_slots = request.param
    torch.manual_seed(0)
    model = ModelConfig(cell=cell, num_layers=3, hidden_channels=4, kernel_size=3, patch_size=4)
    return build_predictor(FRAME, model, tmu=TMUConfig(), num_slots=num_slots)


def frames(batch: int = 3, time: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, time, FRAME.channels, FRAME.height, FRAME.width, generator=generator)


def test_shapes_of_a_rollout(network: Predictor) -> None:
    slots = network.stack.layers[0].transfer
    rollout = network(frames(), num_input_frames=4, num_frames=7, diagnostics=True)
    assert rollout.predictions_BTCHW.shape == (3, 6, 2, 12, 20)
    assert [m.shape for m in rollout.memories] == [(3, 6, 4, 3, 5)] * 3
    assert rollout.diagnostics is not None
    assert rollout.diagnostics.memory_rms_BTK.shape == (3, 6, 3)
    if slots is None:
        assert rollout.imitations == {}
        assert rollout.diagnostics.transfer_gates_BTLM is None
    else:
        assert {k: x.shape for k, x in rollout.imitations.items()} == dict.fromkeys(
            range(3), (3, 6, 2, 4, 3, 5)
        )
        gates = rollout.diagnostics.transfer_gates_BTLM
        assert gates is not None and gates.shape == (3, 6, 3, 2)
        assert (gates > 0).all() and (gates < 1).all()


def test_every_parameter_gets_a_gradient(network: Predictor) -> None:
    network(frames(), num_input_frames=4, num_frames=7).predictions_BTCHW.square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_sequences_of_a_batch_do_not_influence_each_other(network: Predictor) -> None:
    network.double()
    given = frames().double()
    changed = given.clone()
    changed[1] = 0.5
    before = network.predict(given[:, :4], 3)
    after = network.predict(changed[:, :4], 3)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-12, atol=1e-12)
    assert not torch.equal(before[1], after[1])


def test_hidden_targets_cannot_leak_into_a_forecast(network: Predictor) -> None:
    given = frames()
    changed = given.clone()
    changed[:, 4:] = 1.0
    arguments = {"num_input_frames": 4, "num_frames": 7}
    assert torch.equal(
        network(given, **arguments).predictions_BTCHW,
        network(changed, **arguments).predictions_BTCHW,
    )
    nothing_shown = torch.zeros(3, 2, dtype=torch.bool)
    assert torch.equal(
        network(given, **arguments).predictions_BTCHW,
        network(changed, **arguments, sampling_mask_BT=nothing_shown).predictions_BTCHW,
    )


def test_sampling_mask_shows_the_true_frame(network: Predictor) -> None:
    given = frames()
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    rollout = network(given, num_input_frames=4, num_frames=7, sampling_mask_BT=mask)
    inputs, predictions = rollout.inputs_BTCHW, rollout.predictions_BTCHW
    assert torch.equal(inputs[:, :4], given[:, :4])
    assert torch.equal(inputs[0, 4], given[0, 4])
    assert torch.equal(inputs[1, 4], predictions[1, 3])
    assert torch.equal(inputs[1, 5], given[1, 5])
    assert torch.equal(inputs[2, 5], predictions[2, 4])


def test_prediction_continues_to_any_length(network: Predictor) -> None:
    given = frames()[:, :4]
    longer, shorter = network.predict(given, 30), network.predict(given, 3)
    assert longer.shape == (3, 30, 2, 12, 20)
    torch.testing.assert_close(longer[:, :3], shorter)


def test_state_dict_round_trip(network: Predictor) -> None:
    expected = network.predict(frames()[:, :4], 3)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    network.load_state_dict(state)
    assert torch.equal(network.predict(frames()[:, :4], 3), expected)


def test_whole_rollout_is_one_graph(network: Predictor) -> None:
    """No data-dependent control flow: the compiler sees the unrolled network without breaks."""
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    arguments = {"num_input_frames": 2, "num_frames": 4}
    torch.testing.assert_close(
        compiled(frames(), **arguments).predictions_BTCHW,
        network(frames(), **arguments).predictions_BTCHW,
    )


def test_bf16_stays_near_fp32_and_keeps_memories_in_fp32(network: Predictor) -> None:
    arguments = {"num_input_frames": 4, "num_frames": 7}
    exact = network(frames(), **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(frames(), **arguments)
    assert all(memory.dtype == torch.float32 for memory in rough.memories)
    torch.testing.assert_close(
        rough.predictions_BTCHW, exact.predictions_BTCHW, rtol=2e-2, atol=2e-2
    )


def test_wrong_input_is_explained(network: Predictor) -> None:
    with pytest.raises(ValueError, match=r"2 channel\(s\), got 1"):
        network(frames()[:, :, :1], num_input_frames=4, num_frames=7)
    with pytest.raises(ValueError, match="4 true frames are needed"):
        network(frames()[:, :2], num_input_frames=4, num_frames=7)
    with pytest.raises(ValueError, match=r"must have shape \(3, 2\)"):
        network(
            frames(),
            num_input_frames=4,
            num_frames=7,
            sampling_mask_BT=torch.ones(3, 5, dtype=torch.bool),
        )
    with pytest.raises(ValueError, match="less than num_frames=4"):
        network(frames(), num_input_frames=4, num_frames=4)


def test_other_frame_sizes_need_a_norm_that_is_not_tied_to_one() -> None:
    model = ModelConfig(num_layers=1, hidden_channels=4, norm_affine="channel")
    any_size = build_predictor(FRAME, model, tmu=TMUConfig(), num_slots=2)
    assert any_size.predict(torch.rand(1, 2, 2, 32, 16), 1).shape == (1, 1, 2, 32, 16)
    full = build_predictor(FRAME, ModelConfig(num_layers=1, hidden_channels=4, peephole="full"))
    with pytest.raises(ValueError, match="peephole=channel"):
        full.predict(torch.rand(1, 2, 2, 32, 16), 1)
    one_size = build_predictor(
        FRAME, ModelConfig(num_layers=1, hidden_channels=4), tmu=TMUConfig(), num_slots=2
    )
    with pytest.raises(ValueError, match="norm_affine=channel"):
        one_size.predict(torch.rand(1, 2, 2, 32, 16), 1)


def test_only_chosen_layers_become_tmu_layers() -> None:
    model = ModelConfig(num_layers=3, hidden_channels=4)
    network = build_predictor(FRAME, model, tmu=TMUConfig(layers=(0, 2)), num_slots=2)
    assert list(network(frames(), num_input_frames=4, num_frames=7).imitations) == [0, 2]


def test_hidden_state_can_read_the_memory_before_transfer() -> None:
    """hidden_from=own (the released code): the first hidden state ignores the transfer."""
    model = ModelConfig(num_layers=1, hidden_channels=4)
    predictions = {}
    for hidden_from in ("own", "fused"):
        torch.manual_seed(0)
        tmu = TMUConfig(hidden_from=hidden_from)  # type: ignore[arg-type]
        network = build_predictor(FRAME, model, tmu=tmu, num_slots=2)
        first = network.predict(frames()[:, :1], 1)
        torch.nn.init.normal_(network.stack.layers[0].transfer.distillers.weight)
        predictions[hidden_from] = first, network.predict(frames()[:, :1], 1)
    assert torch.equal(*predictions["own"])
    assert not torch.equal(*predictions["fused"])


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_round_trip_in_the_documented_order(patch_size: int) -> None:
    given = frames()
    maps = patchify(given, patch_size)
    assert torch.equal(unpatchify(maps, patch_size), given)
    row, column, channel = patch_size - 1, 0, 1
    index = (row * patch_size + column) * FRAME.channels + channel
    assert torch.equal(maps[:, :, index], given[:, :, channel, row::patch_size, column::patch_size])


def test_frames_that_patches_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="12x20 pixels are not tiled by 8x8"):
        build_predictor(FRAME, ModelConfig(patch_size=8))
