"""What every network must do, whatever its cell: run for each kind of cell and with the TMU."""

from __future__ import annotations

import itertools

import pytest
import torch

from tmu_dist.backbones import BACKBONES
from tmu_dist.config import ConfigError, ModelConfig, SAVPConfig, TMUConfig, VPNConfig
from tmu_dist.models.build import build_predictor, skeleton
from tmu_dist.models.patches import patchify, unpatchify
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.models.shapes import FrameShape
from tmu_dist.transfer.base import Objective, TrainingBatch

FRAME = FrameShape(channels=2, height=12, width=20)  # neither square nor a power of two
SMALL_STACK = {"num_layers": 3, "hidden_channels": 4, "kernel_size": 3, "patch_size": 4}
SMALL_NETWORKS = {
    "savp": {"savp": SAVPConfig(base_channels=4, latent_size=3, posterior_channels=4)},
    "vpn": {
        "hidden_channels": 4,
        "kernel_size": 3,
        "vpn": VPNConfig(channels=3, num_encoder_blocks=2, num_decoder_blocks=2),
    },
}


def small(cell: str) -> ModelConfig:
    """A small network of any backbone; a new cell needs no entry."""
    return ModelConfig(cell=cell, **SMALL_NETWORKS.get(cell, SMALL_STACK))  # type: ignore[arg-type]


@pytest.fixture(params=itertools.product(BACKBONES, (0, 2)), ids=lambda p: f"{p[0]}-{p[1]}slots")
def network(request: pytest.FixtureRequest) -> Predictor:
    cell, num_slots = request.param
    torch.manual_seed(0)
    return build_predictor(FRAME, small(cell), tmu=TMUConfig(), num_slots=num_slots)


def frames(batch: int = 3, time: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, time, FRAME.channels, FRAME.height, FRAME.width, generator=generator)


def noise(network: Predictor, batch: int = 3, time: int = 7) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(2)
    size = network.noise_size
    return torch.randn(batch, time - 1, size, generator=generator) if size else None


def in_training(network: Predictor, given: torch.Tensor) -> Rollout:
    """As the training loop calls it, with every frame shown."""
    return network(
        given,
        num_input_frames=4,
        num_frames=7,
        sampling_mask_BT=torch.ones(3, 2, dtype=torch.bool),
        noise_BTZ=noise(network),
    )


def test_shapes_of_a_rollout(network: Predictor) -> None:
    rollout = network(frames(), num_input_frames=4, num_frames=7, diagnostics=True)
    assert rollout.predictions_BTCHW.shape == (3, 6, 2, 12, 20)
    assert rollout.inputs_BTCHW.shape == (3, 6, 2, 12, 20)
    shapes = [
        (3, 6, shape.channels, shape.slices * shape.height, shape.width)
        for shape in network.memory_shapes
    ]
    assert [m.shape for m in rollout.memories] == shapes
    assert rollout.diagnostics is not None
    assert rollout.diagnostics.memory_rms_BTK.shape == (3, 6, len(shapes))
    assert rollout.diagnostics.forget_gates_BTK.shape == (3, 6, len(shapes))
    has_tmu = any("transfer" in name for name, _ in network.named_modules())
    if not has_tmu:
        assert rollout.imitations == {}
        assert rollout.diagnostics.transfer_gates_BTLM is None
    else:
        assert {k: [x.shape for x in each] for k, each in rollout.imitations.items()} == {
            k: [shape] * 2 for k, shape in enumerate(shapes)
        }
        gates = rollout.diagnostics.transfer_gates_BTLM
        assert gates is not None and gates.shape == (3, 6, len(shapes), 2)
        assert (gates > 0).all() and (gates < 1).all()


@pytest.mark.parametrize("cell", BACKBONES)
def test_a_tmu_network_starts_as_the_plain_one_and_more(cell: str) -> None:
    """Under one seed, so that students with and without the TMU can be compared pair by pair."""
    found = []
    for num_slots in (0, 2):
        torch.manual_seed(3)
        network = build_predictor(
            FRAME, small(cell), tmu=TMUConfig(combine="mean"), num_slots=num_slots
        )
        found.append(network.state_dict())
    plain, taught = found
    assert plain.keys() < taught.keys()
    assert all(torch.equal(value, taught[name]) for name, value in plain.items())


def test_every_parameter_gets_a_gradient(network: Predictor) -> None:
    given = frames()
    batch = TrainingBatch(
        frames_BTCHW=given,
        observed_BTCHW=None,
        sampling_mask_BT=torch.ones(3, 2, dtype=torch.bool),
        weights_B=torch.ones(3),
    )
    terms = Objective(network.frame_loss).terms(in_training(network, given), batch)
    sum(term.value for term in terms.values()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_sequences_of_a_batch_do_not_influence_each_other(network: Predictor) -> None:
    network.double()
    given = frames().double()
    changed = given.clone()
    changed[1] = 0.5
    before = network.predict(given[:, :4], 2)
    after = network.predict(changed[:, :4], 2)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-12, atol=1e-12)
    assert not torch.equal(before[1], after[1])


def test_hidden_targets_cannot_leak_into_a_forecast(network: Predictor) -> None:
    given = frames()
    changed = given.clone()
    changed[:, 4:] = 1.0
    arguments = {"num_input_frames": 4, "num_frames": 7, "noise_BTZ": noise(network)}
    forecast = network(given, **arguments).predictions_BTCHW
    assert torch.equal(forecast, network(changed, **arguments).predictions_BTCHW)
    if network.learns_from_targets:
        return  # in training its prediction depends on the target: that is how it learns
    nothing_shown = torch.zeros(3, 2, dtype=torch.bool)
    hidden = network(changed, **arguments, sampling_mask_BT=nothing_shown)
    assert torch.equal(forecast, hidden.predictions_BTCHW)


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


def test_steps_one_by_one_are_the_rollout(network: Predictor) -> None:
    given, draws = frames(), noise(network)
    rollout = network(given, num_input_frames=4, num_frames=6, noise_BTZ=None)
    state = network.initial_state(given[:, 0], num_input_frames=4)
    prediction = given[:, 0]
    with torch.no_grad():
        for t in range(5):
            frame = given[:, t] if t < 4 else prediction
            target = given[:, t + 1] if t < 3 else None
            prediction, state, *_ = network.step(frame, state, target_BCHW=target, noise_BZ=None)
            torch.testing.assert_close(prediction, rollout.predictions_BTCHW[:, t])
    if draws is not None:
        noisy = network(given, num_input_frames=4, num_frames=7, noise_BTZ=draws)
        assert not torch.allclose(noisy.predictions_BTCHW[:, :5], rollout.predictions_BTCHW)


def test_noise_matters_in_training_only_to_networks_with_latents(network: Predictor) -> None:
    assert network.latent_size in (0, network.noise_size)
    noisy = in_training(network, frames()).predictions_BTCHW
    quiet = network(
        frames(),
        num_input_frames=4,
        num_frames=7,
        sampling_mask_BT=torch.ones(3, 2, dtype=torch.bool),
    ).predictions_BTCHW
    assert torch.equal(noisy, quiet) == (network.latent_size == 0)


@pytest.mark.parametrize("cell", BACKBONES)
def test_a_skeleton_has_the_facts_and_draws_nothing(cell: str) -> None:
    before = torch.get_rng_state()
    bones = skeleton(FRAME, small(cell))
    assert torch.equal(torch.get_rng_state(), before)
    built = build_predictor(FRAME, small(cell))
    for fact in (
        *("frame_loss", "memory_shapes"),
        *("noise_size", "latent_size", "learns_from_targets"),
    ):
        assert getattr(bones, fact) == getattr(built, fact)
    assert {value.device.type for value in bones.state_dict().values()} == {"meta"}


def test_a_new_sequence_starts_from_nothing(network: Predictor) -> None:
    """No state survives from one call to the next."""
    given = frames()
    first = network.predict(given[:, :3], 1)
    network.predict(1 - given[:, :3], 1)
    assert torch.equal(network.predict(given[:, :3], 1), first)


def test_prediction_continues_to_any_length(network: Predictor) -> None:
    given = frames()[:, :4]
    longer, shorter = network.predict(given, 12), network.predict(given, 2)
    assert longer.shape == (3, 12, 2, 12, 20)
    torch.testing.assert_close(longer[:, :2], shorter)


def test_state_dict_round_trip(network: Predictor) -> None:
    expected = network.predict(frames()[:, :4], 1)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    network.load_state_dict(state)
    assert torch.equal(network.predict(frames()[:, :4], 1), expected)


def test_whole_rollout_is_one_graph(network: Predictor) -> None:
    """No data-dependent control flow: the compiler sees the unrolled network without breaks."""
    torch.compiler.reset()  # what was compiled for other networks counts towards a limit
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    arguments = {"num_input_frames": 2, "num_frames": 4, "noise_BTZ": noise(network, time=4)}
    mask = torch.tensor([[True], [not network.learns_from_targets], [True]])
    torch.testing.assert_close(
        compiled(frames()[:, :4], **arguments, sampling_mask_BT=mask).predictions_BTCHW,
        network(frames()[:, :4], **arguments, sampling_mask_BT=mask).predictions_BTCHW,
    )


def test_bf16_stays_near_fp32_and_keeps_memories_in_fp32(network: Predictor) -> None:
    exact = in_training(network, frames())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = in_training(network, frames())
    assert all(memory.dtype == torch.float32 for memory in rough.memories)
    assert rough.predictions_BTCHW.dtype == torch.float32
    difference = (rough.predictions_BTCHW - exact.predictions_BTCHW).norm()
    # Eq. 5 multiplies what rounding has changed: up to 4 % with some weights, 1 % without a TMU.
    tolerance = 6e-2 if rough.imitations else 2e-2
    assert difference <= tolerance * exact.predictions_BTCHW.norm()


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
    with pytest.raises(ValueError, match="this network's noise_size"):
        network(
            frames(),
            num_input_frames=4,
            num_frames=7,
            noise_BTZ=torch.zeros(3, 6, network.noise_size + 1),
        )


@pytest.mark.parametrize("cell", BACKBONES)
def test_settings_of_other_backbones_are_refused(cell: str) -> None:
    foreign = {"mim_output_gate": "paper"} if cell != "mim" else {"recall_window": 2}
    model = ModelConfig(cell=cell, **(SMALL_NETWORKS.get(cell, SMALL_STACK) | foreign))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{next(iter(foreign))}=.* no effect with .*{cell}"):
        build_predictor(FRAME, model)


@pytest.mark.parametrize("cell", BACKBONES)
def test_layers_that_do_not_exist_are_refused(cell: str) -> None:
    with pytest.raises(ConfigError, match="this network has layers 0 to"):
        build_predictor(FRAME, small(cell), tmu=TMUConfig(layers=(99,)), num_slots=1)


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
