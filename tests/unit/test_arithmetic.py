"""Precisions: what they set and put back, and which numbers stay float32 in half of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.contracts import test_predictor as suite
from tests.unit.test_training import run
from tmu_dist.arithmetic import HALVES, arithmetic, autocast, check_precision, float32_products
from tmu_dist.backbones import BACKBONES
from tmu_dist.config import ConfigError, Precision, RunConfig, TMUConfig, TrainingConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.tmu import MemoryTransfer
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.bank import FrozenTeacher

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def switches() -> tuple[str, str]:
    """How cards multiply float32 numbers now: in matrix products, and in convolutions."""
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )


# What a precision sets


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", ("ieee", "ieee")),
        ("tf32", ("tf32", "tf32")),
        ("bf16", ("ieee", "tf32")),
        ("fp16", ("ieee", "tf32")),
    ],
)
def test_cards_multiply_as_they_are_told_and_only_for_so_long(
    precision: Precision, expected: tuple[str, str]
) -> None:
    before = switches()
    with float32_products(precision, CARD):
        assert switches() == expected
        with float32_products("fp32", CARD):
            assert switches() == ("ieee", "ieee")
        assert switches() == expected
    assert switches() == before
    with pytest.raises(KeyError), float32_products(precision, CARD):
        raise KeyError
    assert switches() == before


@pytest.mark.parametrize("precision", get_args(Precision))
def test_other_devices_have_no_such_switches(precision: Precision) -> None:
    before = switches()
    with float32_products(precision, CPU):
        assert switches() == before


def test_teachers_in_fp32_multiply_in_full_beside_a_student_in_tf32() -> None:
    torch.manual_seed(0)
    network = build_predictor(suite.FRAME, suite.small("convlstm"))
    with float32_products("tf32", CARD):
        with FrozenTeacher(network, precision="student").arithmetic(CARD):
            assert switches() == ("tf32", "tf32")
        with FrozenTeacher(network, precision="fp32").arithmetic(CARD):
            assert switches() == ("ieee", "ieee")


def test_tf32_has_no_effect_on_a_cpu_and_is_refused(tiny_config: RunConfig) -> None:
    check_precision("tf32", CARD)
    with pytest.raises(ConfigError, match=r"training\.precision=tf32.* computes on cpu: use fp32"):
        check_precision("tf32", CPU)
    with pytest.raises(ConfigError, match="tf32"), arithmetic("tf32", CPU):
        pass
    training = replace(tiny_config.training, precision="tf32")
    with pytest.raises(ConfigError, match="tf32"):
        run(replace(tiny_config, training=training))
    assert not Path(tiny_config.output).exists()


@pytest.mark.parametrize("precision", get_args(Precision))
def test_convolutions_run_in_the_chosen_half(precision: Precision) -> None:
    convolution, maps = torch.nn.Conv2d(2, 2, 3), torch.rand(1, 2, 4, 4)
    expected = HALVES.get(precision, torch.float32)
    for keeps_weights in (True, False):
        with autocast(precision, CPU, keeps_weights=keeps_weights):
            assert convolution(maps).dtype == expected
            assert torch.is_autocast_cache_enabled() == keeps_weights


def test_every_precision_of_the_settings_is_known() -> None:
    assert set(HALVES) < set(get_args(Precision))
    assert get_args(Precision)[0] == TrainingConfig().precision


# What stays float32


def unrolled(network: Predictor, precision: Precision) -> Any:
    with autocast(precision, CPU):
        return network(
            suite.frames(),
            num_input_frames=4,
            num_frames=7,
            sampling_mask_BT=torch.ones(3, 2, dtype=torch.bool),
            noise_BTZ=suite.noise(network),
        )


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a nested value, by where they are."""
    if isinstance(value, Tensor):
        yield path, value
    elif hasattr(value, "_asdict"):
        for name, each in value._asdict().items():
            yield from tensors(each, f"{path}.{name}")
    elif isinstance(value, tuple | list):
        for number, each in enumerate(value):
            yield from tensors(each, f"{path}[{number}]")
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from tensors(each, f"{path}.{name}")


PASSING = ("output_BPHW", "hidden_BPHW", "forget_BPHW", "gates_BMPHW", "extra.input_BCHW")
"""What may be in half precision: gates, and hidden states (in [-1, 1]), which convolutions round
anyway as they read them; also where MIM keeps one as the input before."""


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("cell", BACKBONES)
def test_what_is_remembered_and_what_is_compared_stay_float32(
    cell: str, precision: Precision
) -> None:
    torch.manual_seed(0)
    tmu = TMUConfig(zigzag=cell in ("predrnn", "mim", "e3d_lstm", "e3d_openstl"))
    network = build_predictor(suite.FRAME, suite.small(cell), tmu=tmu, num_slots=2)
    rollout = unrolled(network, precision)
    halves = {path for path, value in tensors(rollout) if value.dtype == HALVES[precision]}
    assert {path for path in halves if not path.endswith(PASSING)} == set()
    names = {path.rpartition(".")[2].partition("[")[0] for path, _ in tensors(rollout)}
    assert names >= {"memory_BPHW", "predictions_BTCHW", "inputs_BTCHW"}
    assert tmu.zigzag == any("zigzag_BPHW" in path for path, _ in tensors(rollout))
    rollout.predictions_BTCHW.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("precision", HALVES)
def test_distillers_read_memories_as_they_are(precision: Precision) -> None:
    """With Eq. 5 memories grow; float16 ends at 65,504, and bfloat16 has three digits."""
    torch.manual_seed(0)
    transfer = MemoryTransfer(4, 4, 2, map_size=(4, 4))
    memory, maps = 1e6 * torch.rand(1, 4, 4, 4), torch.rand(1, 4, 4, 4)
    with autocast(precision, CPU):
        fused, imitations, gates = transfer(memory, maps, maps)
    _, expected, _ = transfer(memory, maps, maps)
    assert torch.equal(imitations, expected)
    assert fused.dtype == imitations.dtype == torch.float32
    assert fused.isfinite().all() and gates.min() > 0 and gates.max() < 1


# What is learned


def test_loss_curves_agree(tmu_config: RunConfig) -> None:
    """The finer the numbers, the nearer; half of the curves' way down is learned here."""
    curves: dict[str, Tensor] = {}
    for precision in ("fp32", "bf16", "fp16"):
        config = replace(
            tmu_config,
            output=f"{tmu_config.output}-{precision}",
            training=replace(
                tmu_config.training,
                num_steps=24,
                learning_rate=3e-3,
                precision=precision,  # type: ignore[arg-type]
            ),
            schedule=replace(tmu_config.schedule, validate_every=24, checkpoint_every=24),
        )
        log = read_log(Path(run(config).run))
        curves[precision] = torch.tensor(
            [e["loss/total"] for e in log if e["event"] == "train"], dtype=torch.float64
        )
        assert len(curves[precision]) == 24
    exact = curves["fp32"]
    assert exact[-1] < 0.7 * exact[0]
    errors = {name: ((curve - exact).abs() / exact).max() for name, curve in curves.items()}
    assert 0 < errors["fp16"] < errors["bf16"] < 2e-2, errors
