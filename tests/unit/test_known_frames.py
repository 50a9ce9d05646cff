"""Input terms of frames that are known in advance are convolved at once, to the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tmu_dist.config import ModelConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.models.stack import StackedPredictor

SETTINGS = {
    "predrnn": {"cell": "predrnn", "gate_norm": "layer"},
    "mim": {"cell": "mim"},
    "convlstm, gates apart": {"cell": "convlstm", "gate_form": "apart"},
}


def network(name: str) -> Predictor:
    torch.manual_seed(0)
    model = ModelConfig(num_layers=2, hidden_channels=8, **SETTINGS[name])  # type: ignore[arg-type]
    return build_predictor(FrameShape(channels=1, height=16, width=16), model).double()


def unroll(net: Predictor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """Predictions, and how many sequences the lowest layer's convolution of inputs read at once."""
    assert isinstance(net, StackedPredictor)
    read: list[int] = []
    lowest = net.stack.layers[0].cell.conv_x
    handle = lowest.register_forward_hook(lambda _, maps, __: read.append(len(maps[0])))
    frames = torch.rand(3, 7, 1, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    rollout = net(frames, num_input_frames=4, num_frames=7, sampling_mask_BT=mask)
    handle.remove()
    return rollout.predictions_BTCHW, read


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("mask", "at_once"),
    [
        pytest.param(None, [12, 3, 3], id="closed loop: the input frames"),
        pytest.param(torch.ones(3, 2, dtype=torch.bool), [18], id="true frames only: all"),
        pytest.param(
            torch.tensor([[True, True], [True, False], [True, True]]), [12, 3, 3], id="mixed"
        ),
    ],
)
def test_known_frames_are_read_at_once(
    name: str, mask: Tensor | None, at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(name)
    predictions, read = unroll(net, mask)
    assert read == at_once
    monkeypatch.setattr(StackedPredictor, "foresee", Predictor.foresee)
    step_by_step, read = unroll(net, mask)
    assert read == [3] * 6
    torch.testing.assert_close(predictions, step_by_step, rtol=1e-12, atol=1e-12)
    along = torch.randn_like(predictions)
    for ours, plain in zip(
        torch.autograd.grad(predictions, list(net.parameters()), along, allow_unused=True),
        torch.autograd.grad(step_by_step, list(net.parameters()), along, allow_unused=True),
        strict=True,
    ):
        if plain is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
