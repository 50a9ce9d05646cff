"""Weights of other codebases: the imported network predicts what the codebase's own would.

The references are written from the facts of each codebase (docs/importing_weights.md): plain loops
over time and layers, one line a gate, in float64.

Legend: B batch, T time, C channels, P hidden channels, H, W height and width, k patch size.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tmu_dist import evaluate
from tmu_dist.config import RunConfig, TransferConfig, WindowConfig
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import Units
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import DataFacts, TeacherError
from tmu_dist.teachers.foreign.importing import Imported, import_network
from tmu_dist.teachers.store import load_card, load_model, write_model
from tmu_dist.training.launch import launch
from tmu_dist.zoo import main

Weights = dict[str, Tensor]
Network = Callable[[Weights, Tensor, dict[str, Tensor]], Tensor]
"""One time step: from weights, a patch map and states, which it renews, to the top hidden state."""

LAYERS, P, KERNEL = 3, 3, 3
FRAME = FrameShape(channels=2, height=8, width=12)
PATCH = 2
MAP = (4, 6)
PATCH_CHANNELS = FRAME.channels * PATCH**2
WINDOW = WindowConfig(num_input_frames=3, num_target_frames=3)
DATA = DataFacts(
    archive="theirs",
    manifest_hash="theirs",
    units=Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None),
    frame_interval_minutes=None,
)


class Maker:
    """Random tensors by name."""

    def __init__(self, *, norm: bool = False, bias: bool = False, maps: tuple[int, int] = MAP):
        self.random = torch.Generator().manual_seed(0)
        self.norm, self.bias, self.maps = norm, bias, maps
        self.made: Weights = {}

    def tensor(self, name: str, *shape: int, scale: float = 0.3) -> None:
        self.made[name] = scale * torch.randn(*shape, generator=self.random)

    def conv(self, name: str, inputs: int, outputs: int, size: int = KERNEL) -> None:
        self.tensor(f"{name}.weight", outputs, inputs, size, size)
        if self.bias:
            self.tensor(f"{name}.bias", outputs)

    def sequence(self, name: str, inputs: int, outputs: int) -> None:
        self.conv(f"{name}.0", inputs, outputs)
        if self.norm:
            for kind in ("weight", "bias"):
                self.tensor(f"{name}.1.{kind}", outputs, *self.maps, scale=1.0)

    def st_lstm(self, name: str, inputs: int) -> None:
        for letter, reads, gates in (("x", inputs, 7), ("h", P, 4), ("m", P, 3), ("o", 2 * P, 1)):
            self.sequence(f"{name}.conv_{letter}", reads, gates * P)
        self.conv(f"{name}.conv_last", 2 * P, P, 1)

    def finish(self, channels: int = PATCH_CHANNELS) -> Weights:
        self.tensor("conv_last.weight", channels, P, 1, 1)
        return self.made


def inputs_of(layer: int, channels: int = PATCH_CHANNELS) -> int:
    return channels if layer == 0 else P


def joint_convlstm(channels: int = PATCH_CHANNELS, layers: int = LAYERS) -> Weights:
    make = Maker(bias=True)
    for k in range(layers):
        make.conv(f"cell_list.{k}.conv.0", inputs_of(k, channels) + P, 4 * P)
    return make.finish(channels)


def openstl_convlstm(*, norm: bool = False) -> Weights:
    make = Maker(norm=norm)
    for k in range(LAYERS):
        make.sequence(f"cell_list.{k}.conv_x", inputs_of(k), 4 * P)
        make.sequence(f"cell_list.{k}.conv_h", P, 4 * P)
        make.sequence(f"cell_list.{k}.conv_o", 2 * P, P)
        make.conv(f"cell_list.{k}.conv_last", 2 * P, P, 1)
    return make.finish()


def predrnn(**parts: Any) -> Weights:
    make = Maker(**parts)
    for k in range(LAYERS):
        make.st_lstm(f"cell_list.{k}", inputs_of(k))
    return make.finish()


def mim(**parts: Any) -> Weights:
    make = Maker(**parts)
    make.st_lstm("stlstm_layer.0", PATCH_CHANNELS)
    for k in range(1, LAYERS):
        block, differences = f"stlstm_layer.{k}", f"stlstm_layer_diff.{k - 1}"
        make.sequence(f"{block}.conv_t_cc", P, 3 * P)
        make.sequence(f"{block}.conv_s_cc", P, 4 * P)
        make.sequence(f"{block}.conv_x_cc", P, 4 * P)
        for core in (block, differences):
            make.sequence(f"{core}.conv_h_concat", P, 4 * P)
            make.sequence(f"{core}.conv_x_concat", P, 4 * P)
            make.tensor(f"{core}.ct_weight", 2 * P, *MAP)
            make.tensor(f"{core}.oc_weight", P, *MAP)
            make.conv(f"{core}.conv_last", 2 * P, P, 1)
    return make.finish()


def e3d_lstm(*, norm: bool = False) -> Weights:
    make = Maker()
    for k in range(LAYERS):
        name = f"cell_list.{k}"
        parts = (("x", inputs_of(k), 7), ("h", P, 4), ("gm", P, 4), ("new_cell", P, 1))
        for part, reads, gates in (*parts, ("new_gm", P, 1)):
            weight = f"{name}.conv_{part}.0.conv3d.weight"
            make.tensor(weight, gates * P, reads, 2, KERNEL, KERNEL)
            for kind in ("weight", "bias") if norm else ():
                make.tensor(f"{name}.conv_{part}.1.{kind}", gates * P, 2, *MAP, scale=1.0)
        for kind in ("weight", "bias"):
            make.tensor(f"{name}._norm_c_t.{kind}", P, 2, *MAP, scale=1.0)
        make.tensor(f"{name}.conv_last.conv3d.weight", P, 2 * P, 1, 1, 1)
    make.tensor("conv_last.weight", PATCH_CHANNELS, P, 2, 1, 1)
    return make.made


def conv(w: Weights, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def normalised(w: Weights, name: str, x: Tensor) -> Tensor:
    axes = tuple(range(1, x.dim()))
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def sequence(w: Weights, name: str, x: Tensor) -> tuple[Tensor, ...]:
    """Convolution, normalisation if there is one, and its gates."""
    x = conv(w, f"{name}.0", x)
    if f"{name}.1.weight" in w:
        x = normalised(w, f"{name}.1", x)
    return x.split(P, dim=1)


def zeros_like_states(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], P, *x.shape[2:])


def joint_convlstm_step(w: Weights, x: Tensor, states: dict[str, Tensor]) -> Tensor:
    zeros = zeros_like_states(x)
    for k in range(LAYERS):
        h, c = states.get(f"h{k}", zeros), states.get(f"c{k}", zeros)
        i, f, o, g = conv(w, f"cell_list.{k}.conv.0", torch.cat([x, h], 1)).split(P, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        x = o.sigmoid() * c.tanh()
        states[f"h{k}"], states[f"c{k}"] = x, c
    return x


def openstl_convlstm_step(w: Weights, x: Tensor, states: dict[str, Tensor]) -> Tensor:
    zeros = zeros_like_states(x)
    for k in range(LAYERS):
        h, c = states.get(f"h{k}", zeros), states.get(f"c{k}", zeros)
        ix, fx, gx, ox = sequence(w, f"cell_list.{k}.conv_x", x)
        ih, fh, gh, oh = sequence(w, f"cell_list.{k}.conv_h", h)
        c = (fx + fh).sigmoid() * c + (ix + ih).sigmoid() * (gx + gh).tanh()
        x = (ox + oh).sigmoid() * c.tanh()
        states[f"h{k}"], states[f"c{k}"] = x, c
    return x


def st_lstm_step(
    w: Weights, name: str, x: Tensor, h: Tensor, c: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    ix, fx, gx, jx, ex, dx, ox = sequence(w, f"{name}.conv_x", x)
    ih, fh, gh, oh = sequence(w, f"{name}.conv_h", h)
    jm, em, dm = sequence(w, f"{name}.conv_m", m)
    c = (fx + fh + 1).sigmoid() * c + (ix + ih).sigmoid() * (gx + gh).tanh()
    m = (ex + em + 1).sigmoid() * m + (jx + jm).sigmoid() * (dx + dm).tanh()
    both = torch.cat([c, m], 1)
    (om,) = sequence(w, f"{name}.conv_o", both)
    return (ox + oh + om).sigmoid() * conv(w, f"{name}.conv_last", both).tanh(), c, m


def predrnn_step(w: Weights, x: Tensor, states: dict[str, Tensor]) -> Tensor:
    zeros = zeros_like_states(x)
    m = states.get("m", zeros)
    for k in range(LAYERS):
        h, c = states.get(f"h{k}", zeros), states.get(f"c{k}", zeros)
        x, c, m = st_lstm_step(w, f"cell_list.{k}", x, h, c, m)
        states[f"h{k}"], states[f"c{k}"] = x, c
    states["m"] = m
    return x


def core_step(w: Weights, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    ih, gh, fh, oh = sequence(w, f"{name}.conv_h_concat", h)
    ix, gx, fx, ox = sequence(w, f"{name}.conv_x_concat", x)
    i = ih + ix + w[f"{name}.ct_weight"][:P] * c
    f = fh + fx + w[f"{name}.ct_weight"][P:] * c
    c = (f + 1).sigmoid() * c + i.sigmoid() * (gh + gx).tanh()
    return (oh + ox + w[f"{name}.oc_weight"] * c).sigmoid() * c.tanh(), c


def mim_step(w: Weights, x: Tensor, states: dict[str, Tensor]) -> Tensor:
    zeros = zeros_like_states(x)
    is_first, before = "h0" not in states, states.get("h0", zeros)
    x, c, m = st_lstm_step(
        w, "stlstm_layer.0", x, before, states.get("c0", zeros), states.get("m", zeros)
    )
    states["h0"], states["c0"] = x, c
    change = x - before
    for k in range(1, LAYERS):
        name = f"stlstm_layer.{k}"
        difference = zeros
        if not is_first:
            difference, states[f"n{k}"] = core_step(
                w, f"stlstm_layer_diff.{k - 1}", change,
                states.get(f"d{k}", zeros), states.get(f"n{k}", zeros),
            )  # fmt: skip
        change = states[f"d{k}"] = difference
        h, c = states.get(f"h{k}", zeros), states.get(f"c{k}", zeros)
        i_s, g_s, f_s, o_s = sequence(w, f"{name}.conv_s_cc", m)
        i_t, g_t, o_t = sequence(w, f"{name}.conv_t_cc", h)
        i_x, g_x, f_x, o_x = sequence(w, f"{name}.conv_x_cc", x)
        m = (f_x + f_s + 1).sigmoid() * m + (i_x + i_s).sigmoid() * (g_x + g_s).tanh()
        kept, states[f"s{k}"] = core_step(w, name, difference, c, states.get(f"s{k}", zeros))
        c = kept + (i_x + i_t).sigmoid() * (g_x + g_t).tanh()
        last = conv(w, f"{name}.conv_last", torch.cat([c, m], 1))
        x = (o_x + o_t + o_s).sigmoid() * last.tanh()
        states[f"h{k}"], states[f"c{k}"] = x, c
    states["m"] = m
    return x


def window_sequence(w: Weights, name: str, x_BCLHW: Tensor) -> tuple[Tensor, ...]:
    """The same of a window of two slices; the convolution gives one, which is repeated."""
    weight = w[f"{name}.0.conv3d.weight"]
    older, newer = (F.conv2d(x_BCLHW[:, :, n], weight[:, :, n], padding="same") for n in (0, 1))
    x = torch.stack([older + newer] * 2, 2)
    if f"{name}.1.weight" in w:
        x = normalised(w, f"{name}.1", x)
    return x.split(P, dim=1)


def rows(x: Tensor) -> Tensor:
    """Numbers of each sample as they lie in memory, cut into rows of P."""
    return x.contiguous().view(x.shape[0], -1, P)


def e3d_lstm_step(w: Weights, x: Tensor, states: dict[str, Tensor]) -> Tensor:
    """The top hidden state's two slices as channels [slice 0's, slice 1's]."""
    now, before = x, states.get("before", torch.zeros_like(x))
    states["before"] = now
    x = torch.stack([before, now], 2)
    zeros = now.new_zeros(now.shape[0], P, 2, *now.shape[2:])
    m = states.get("m", zeros)
    for k in range(LAYERS):
        name = f"cell_list.{k}"
        h, c = states.get(f"h{k}", zeros), states.get(f"c{k}", zeros)
        past = torch.cat([states[f"past{k}"], c], 1) if f"past{k}" in states else c
        ix, gx, rx, ox, jx, dx, ex = window_sequence(w, f"{name}.conv_x", x)
        ih, gh, rh, oh = window_sequence(w, f"{name}.conv_h", h)
        scores = rows((rx + rh).sigmoid()) @ rows(past).mT
        found = (scores.softmax(2) @ rows(past)).view(c.shape)
        c = normalised(w, f"{name}._norm_c_t", c + found) + (ix + ih).sigmoid() * (gx + gh).tanh()
        jm, em, dm, mm = window_sequence(w, f"{name}.conv_gm", m)
        new_m = (ex + em + 1).sigmoid() * mm.tanh() + (jx + jm).sigmoid() * (dx + dm).tanh()
        (oc,), (om,) = (
            window_sequence(w, f"{name}.conv_new_{part}", memory)
            for part, memory in (("cell", c), ("gm", new_m))
        )
        mixed = F.conv3d(torch.cat([c, new_m], 1), w[f"{name}.conv_last.conv3d.weight"])
        x = (ox + oh + oc + om).tanh().sigmoid() * mixed.tanh()
        states[f"h{k}"], states[f"c{k}"], states[f"past{k}"] = x, c, past
    states["m"] = m  # and not the new one
    return torch.cat([x[:, :, 0], x[:, :, 1]], 1)


def patches(frame_BCHW: Tensor) -> Tensor:
    """Channel (row in patch * k + column in patch) * C + image channel."""
    parts = [frame_BCHW[:, :, y::PATCH, x::PATCH] for y in range(PATCH) for x in range(PATCH)]
    return torch.cat(parts, 1)


def reference(step: Network, w: Weights, frames_BTCHW: Tensor) -> Tensor:
    """Closed-loop predictions of a codebase's network, as patch maps [B, T-1, k*k*C, H, W]."""
    w = {name: tensor.double() for name, tensor in w.items()}
    if w["conv_last.weight"].dim() == 5:  # of both slices, which are its channels here
        w["conv_last.weight"] = torch.cat(w["conv_last.weight"].unbind(2), 1)
    states: dict[str, Tensor] = {}
    maps: list[Tensor] = []
    for t in range(WINDOW.num_frames - 1):
        x = patches(frames_BTCHW[:, t]) if t < WINDOW.num_input_frames else maps[-1]
        maps.append(conv(w, "conv_last", step(w, x, states)))
    return torch.stack(maps, 1)


def imported(source: str | Path, **changes: Any) -> Imported:
    facts: dict[str, Any] = {"name": "theirs", "frame": FRAME, "window": WINDOW, "data": DATA}
    return import_network(str(source), **facts | changes)


def saved(weights: Any, folder: Path, name: str = "model.ckpt") -> str:
    path = folder / name
    torch.save(weights, path)
    return str(path)


CASES: dict[str, tuple[Weights, Network]] = {
    "transferable-memory ConvLSTM": (joint_convlstm(), joint_convlstm_step),
    "OpenSTL ConvLSTM": (openstl_convlstm(), openstl_convlstm_step),
    "OpenSTL ConvLSTM, normalised": (openstl_convlstm(norm=True), openstl_convlstm_step),
    "PredRNN": (predrnn(), predrnn_step),
    "PredRNN, normalised": (predrnn(norm=True), predrnn_step),
    "PredRNN, normalised, biases": (predrnn(norm=True, bias=True), predrnn_step),
    "PredRNN-V2": (predrnn() | {"adapter.weight": torch.ones(P, P, 1, 1)}, predrnn_step),
    "MIM": (mim(), mim_step),
    "MIM, normalised": (mim(norm=True), mim_step),
    "E3D-LSTM": (e3d_lstm(), e3d_lstm_step),
    "E3D-LSTM, normalised": (e3d_lstm(norm=True), e3d_lstm_step),
}


@pytest.mark.parametrize("case", CASES)
def test_same_predictions(case: str, tmp_path: Path) -> None:
    weights, step = CASES[case]
    frames_BTCHW = torch.rand(
        2, WINDOW.num_frames, FRAME.channels, FRAME.height, FRAME.width,
        generator=torch.Generator().manual_seed(1), dtype=torch.float64,
    )  # fmt: skip
    found = imported(saved(weights, tmp_path))
    write_model(str(tmp_path / "teacher"), found.model, found.card)
    network = load_model(str(tmp_path / "teacher")).model.double()
    ours = network(frames_BTCHW, num_input_frames=3, num_frames=6).predictions_BTCHW
    expected = reference(step, weights, frames_BTCHW)
    got = torch.stack([patches(frame) for frame in ours.unbind(1)], 1)
    assert (got - expected).abs().max() < 1e-10
    assert expected.std() > 1e-3  # or anything would do
    again = network(frames_BTCHW, num_input_frames=3, num_frames=6).predictions_BTCHW
    assert torch.equal(ours, again)  # no state is left from one batch to the next


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"net_param": w},
        lambda w: {"state_dict": {f"model.{n}": t for n, t in w.items()}, "epoch": 3},
        lambda w: {f"module.model.{n}": t for n, t in w.items()},
        lambda w: {f"model.module.{n}": t.double() for n, t in w.items()},
    ],
)
def test_wrappings(wrap: Callable[[Weights], Any], tmp_path: Path) -> None:
    weights = openstl_convlstm()
    plain = imported(saved(weights, tmp_path)).model.state_dict()
    found = imported(saved(wrap(weights), tmp_path)).model.state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_safetensors_and_what_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file(openstl_convlstm(), path)
    found = imported(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.card.origin == f"theirs.safetensors: ConvLSTM of OpenSTL, sha256 {sha256}"
    assert "cell_list.0.conv_o.0.weight" in found.layout.unused
    assert "cell_list.2.conv_last.weight" in found.layout.unused
    assert "batch" in imported(saved(mim(), tmp_path)).layout.notes[0]
    layout = imported(saved(e3d_lstm(norm=True), tmp_path)).layout
    assert len(layout.unused) == 2 * LAYERS and "cell_list.0.conv_gm.1.weight" in layout.unused


def test_what_the_tensors_say(tmp_path: Path) -> None:
    model = imported(saved(predrnn(norm=True), tmp_path)).card.model
    assert (model.cell, model.num_layers, model.hidden_channels) == ("predrnn", LAYERS, P)
    assert (model.kernel_size, model.patch_size) == (KERNEL, PATCH)
    assert (model.gate_norm, model.bias, model.forget_bias) == ("layer", False, 1.0)
    for norm, gate_norm in ((False, "none"), (True, "layer")):
        model = imported(saved(e3d_lstm(norm=norm), tmp_path)).card.model
        assert (model.cell, model.num_layers, model.hidden_channels) == ("e3d_openstl", LAYERS, P)
        assert (model.kernel_size, model.patch_size) == (KERNEL, PATCH)
        assert (model.gate_norm, model.norm_affine) == (gate_norm, "full")
    source = saved(openstl_convlstm(), tmp_path)
    model = imported(source).card.model
    assert (model.cell, model.peephole, model.forget_bias) == ("convlstm", "none", 0.0)
    assert imported(source, forget_bias=1.0).card.model.forget_bias == 1.0
    larger = imported(source, frame=replace(FRAME, height=16)).card.frame
    assert larger.height == 16  # nothing ties these weights to a size


def without(weights: Weights, *names: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name not in names}


def changed(weights: Weights, name: str, *shape: int) -> Weights:
    return weights | {name: torch.zeros(*shape)}


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        (without(predrnn(), "cell_list.1.conv_h.0.weight"), {}, "cell_list.1.conv_h.0.weight is m"),
        (without(predrnn(bias=True), "cell_list.1.conv_x.0.bias"), {}, "conv_x.0.bias is missing"),
        (without(mim(), "stlstm_layer_diff.1.oc_weight"), {}, "diff.1.oc_weight is missing"),
        (without(predrnn(), "conv_last.weight"), {}, "conv_last.weight is missing"),
        (predrnn() | {"cell_list.0.conv_a.0.weight": torch.ones(1)}, {}, "conv_a.0.weight is unkn"),
        ({"encoder.0.weight": torch.ones(1)}, {}, "No known layout.*encoder.0.weight"),
        (without(e3d_lstm(), "cell_list.1._norm_c_t.bias"), {}, "1._norm_c_t.bias is missing"),
        (
            without(e3d_lstm(norm=True), "cell_list.2.conv_gm.1.bias"), {},
            "cell_list.2.conv_gm.1.bias is missing",
        ),
        (e3d_lstm(), {"frame": replace(FRAME, width=16)}, "_norm_c_t.weight belongs to maps of 4"),
        (changed(e3d_lstm(), "conv_last.weight", 8, P, 1, 1), {}, "3-D convolution"),
        (
            changed(e3d_lstm(), "cell_list.1.conv_h.0.conv3d.weight", 12, P, 3, 3, 3), {},
            r"conv3d.weight \(12, 3, 3, 3, 3\) cannot become .*conv_h.weight",
        ),
        (predrnn(), {"frame": replace(FRAME, channels=1)}, "maps of 8 channels, which are no sq"),
        (predrnn(), {"frame": replace(FRAME, width=13)}, "do not tile frames of 8x13"),
        (predrnn(norm=True), {"frame": replace(FRAME, width=14)}, "to frames of 8x12, not of 8x14"),
        (mim(), {"frame": replace(FRAME, height=16)}, "ct_weight belongs to maps of 4x6"),
        (
            predrnn(norm=True), {"frame": FrameShape(channels=8, height=8, width=12)},
            "1x1 patches to frames of 4x6",
        ),
        (
            changed(predrnn(), "cell_list.1.conv_h.0.weight", 8, 2, KERNEL, KERNEL), {},
            "layers of 3, 2, 3 hidden channels",
        ),
        (
            changed(predrnn(), "cell_list.1.conv_m.0.weight", 9, P, 5, 5), {},
            r"cell_list.1.conv_m.0.weight \(9, 3, 5, 5\) cannot become .*conv_m.weight",
        ),
        (
            changed(openstl_convlstm(), "cell_list.0.conv_x.0.weight", 12, 7, 3, 3), {},
            r"conv_x.0.weight \(12, 7, 3, 3\) cannot become",
        ),
        (changed(predrnn(), "conv_last.weight", 8, P, 2, 1, 1), {}, "2-D convolution"),
        (changed(predrnn(), "conv_last.weight", 8, P, 1, 1) | {
            "conv_last.weight": torch.full((8, P, 1, 1), torch.nan)}, {}, "not finite"),
    ],
)  # fmt: skip
def test_refusals(weights: Weights, changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=message):
        imported(saved(weights, tmp_path), **changes)


def test_a_convlstm_that_never_read_its_memory(tmp_path: Path) -> None:
    """Early OpenSTL: input and forget gates are as they were drawn, the other gates are trained."""
    weights = openstl_convlstm()
    for name, weight in weights.items():
        if "conv_x" in name or "conv_h" in name:
            drawn = torch.nn.Conv2d(weight.shape[1], 4 * P, KERNEL).weight.detach()
            weight[: 2 * P] = drawn[: 2 * P]
    with pytest.raises(TeacherError, match="input and forget gates .* were never trained"):
        imported(saved(weights, tmp_path))
    untrained = {n: w / w.abs().max() / w[0].numel() ** 0.5 for n, w in weights.items()}
    imported(saved(untrained, tmp_path))  # nothing trained: nothing to be told


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    pickled = {"state_dict": predrnn(), "hyper_parameters": argparse.Namespace(lr=1e-3)}
    with pytest.raises(TeacherError, match=r"Python objects \(argparse.Namespace\).*run any code"):
        imported(saved(pickled, tmp_path))
    with pytest.raises(TeacherError, match="no tensors of floats \\(epoch"):
        imported(saved(predrnn() | {"epoch": 3}, tmp_path))
    with pytest.raises(TeacherError, match="holds list, not tensors by name"):
        imported(saved([1, 2], tmp_path))
    whole = Path(saved(predrnn(), tmp_path)).read_bytes()
    for name in ("half.pt", "half.safetensors"):
        for content in (whole[: len(whole) // 2], b"", b"neither one nor the other"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(TeacherError, match=f"{name} is not a"):
                imported(tmp_path / name)
    for nothing in (tmp_path / "nothing.pt", f"{tmp_path}/"):
        with pytest.raises(TeacherError, match="There is no file"):
            imported(nothing)


def test_command_evaluation_and_teaching(
    archive_url: str, tiny_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = ["--zoo", str(tmp_path / "zoo")]
    window = ["--input-frames", "3", "--target-frames", "3"]
    source = saved({"net_param": joint_convlstm(16, layers=2)}, tmp_path)
    main([*zoo, "import", source, "--name", "one", "--frame", "1x16x16", *window])
    main([*zoo, "import", source, "--name", "two", "--archive", archive_url, *window])
    main([*zoo, "show", "two"])
    main([*zoo, "list"])
    shown = capsys.readouterr().out
    assert "ConvLSTM of transferable-memory" in shown and '"method": "imported"' in shown
    main([*zoo, "add", str(tmp_path / "zoo" / "one"), "--name", "copy"])
    main([*zoo, "show", "copy"])
    assert "model.ckpt: ConvLSTM of transferable-memory, sha256 " in capsys.readouterr().out
    first, second = (str(tmp_path / "zoo" / name) for name in ("one", "two"))
    assert load_card(second).data == DataFacts.of(open_archive(archive_url).manifest)
    evaluate.main([first, "--data", archive_url])
    assert "one (imported" in capsys.readouterr().out

    student = replace(
        tiny_config,
        model=replace(tiny_config.model, hidden_channels=P),
        training=replace(tiny_config.training, num_steps=2),
        transfer=TransferConfig(method="tmu", teachers=(first, second)),
    )
    assert load_card(launch(student).run).teachers == ("one", "two")

    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as leaving:
            main([*zoo, "import", source, *arguments])
        assert leaving.value.code == 2
        return capsys.readouterr().err

    assert "already has" in error("--name", "one", "--frame", "1x16x16")
    assert "give --frame" in error("--name", "three")
    assert "such as 1x64x64, got '16'" in error("--name", "three", "--frame", "16")
    minutes = ("--interval-minutes", "6", "--archive", archive_url)
    assert "says the interval" in error("--name", "three", *minutes)
    assert not (tmp_path / "zoo" / "three").exists()
