"""What the tensors of other codebases are called, and which of ours they become.

Facts of predrnn-pytorch and transferable-memory (thuml) and of OpenSTL (chengtan9907). All of them
cut frames into patches in the order of `models.patches`, run their layers and memories in ours, and
begin at zeros; convolutions have stride 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tmu_dist.config import ModelConfig
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import TeacherError

Shapes = Mapping[str, tuple[int, ...]]
Parts = Mapping[str, str]
"""Parts of our convolution and normalisation, such as "norm.gain", and their places at theirs."""


@dataclass(frozen=True)
class Rule:
    """Where one of our tensors comes from."""

    ours: str
    theirs: tuple[str, ...]
    """Joined along `axis`; none: zeros."""
    axis: int = 1
    gates: tuple[int, ...] = ()
    """Their number of each of our gates, which are equal parts of the rows; (): as they are."""
    num_gates: int = 0
    """How many there are at theirs; 0: as many as `gates`."""
    parts: int = 0
    """Cut the rows into so many equal parts, as a new first axis."""
    has_slices: bool = False
    """Make one of the second and the third axis, which holds the time slices of a window."""

    def convert(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Our tensor, of the shape that theirs give."""
        if not self.theirs:
            return torch.zeros_like(like)
        joined = torch.cat([tensors[name] for name in self.theirs], self.axis)
        if self.gates:
            rows = joined.chunk(self.num_gates or len(self.gates))
            joined = torch.cat([rows[gate] for gate in self.gates])
        if self.has_slices:
            joined = joined.flatten(1, 2)
        return joined.unflatten(0, (self.parts, -1)) if self.parts else joined


@dataclass(frozen=True)
class Layout:
    """How a foreign network is read; patch size and frames are still to be set in `model`."""

    name: str
    model: ModelConfig
    rules: tuple[Rule, ...]
    patch_channels: int
    """Channels of the maps between frames and network."""
    maps: tuple[str, tuple[int, int]] | None
    """A tensor that is tied to the size of the maps, and that size; None: any size."""
    dimensions: int = 2
    """Of the convolutions."""
    unused: tuple[str, ...] = ()
    """Tensors that the codebase keeps but that have no effect when it predicts."""
    notes: tuple[str, ...] = ()
    """How the codebase's own predictions may differ."""
    check: Callable[[Mapping[str, Tensor]], None] | None = None
    """Refuses tensors by their values, once names and shapes are right."""


def recognise(shapes: Shapes) -> Layout:
    """Find the layout that a state dict has.

    Raises:
        TeacherError: none, or a network that the project cannot compute; or tensors that are
            missing or unknown, by name.
    """
    sign = next((sign for sign in _SIGNS if sign in shapes), None)
    if sign is None:
        raise TeacherError(
            f"No known layout: none of {', '.join(_SIGNS)} is among the {len(shapes)} tensors "
            f"({', '.join(sorted(shapes)[:4])}, ...). docs/importing_weights.md lists what can be "
            "read."
        )
    layout = _SIGNS[sign](shapes)
    wanted = {name for rule in layout.rules for name in rule.theirs}
    wrong = [f"{name} is missing" for name in sorted(wanted - shapes.keys())]
    wrong += [f"{name} is unknown" for name in sorted(shapes.keys() - wanted - {*layout.unused})]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise TeacherError(
            f"These weights look like {layout.name}, but {'; '.join(wrong[:8])}{more}."
        )
    for name in (sign, "conv_last.weight"):
        if len(shapes[name]) != 2 + layout.dimensions:
            raise TeacherError(
                f"{name} is {shapes[name]}, not the weights of a {layout.dimensions}-D convolution."
            )
    model = replace(layout.model, kernel_size=_size(shapes, sign, -1))
    return replace(layout, model=model, unused=tuple(n for n in layout.unused if n in shapes))


def patch_size_of(layout: Layout, frame: FrameShape) -> int:
    """The patch size by which frames become maps of the network's channels and size.

    Raises:
        TeacherError: there is none.
    """
    per_channel, rest = divmod(layout.patch_channels, frame.channels)
    patch_size = math.isqrt(per_channel)
    if rest or patch_size**2 != per_channel:
        raise TeacherError(
            f"The network reads maps of {layout.patch_channels} channels, which are no square "
            f"patches of frames with {frame.channels} channel(s): {layout.patch_channels} must be "
            "channels * patch size * patch size. Give the frame shape it was trained on."
        )
    if frame.height % patch_size or frame.width % patch_size:
        raise TeacherError(
            f"The network's {patch_size}x{patch_size} patches (from {layout.patch_channels} "
            f"channels of its maps) do not tile frames of {frame.height}x{frame.width}."
        )
    size = (frame.height // patch_size, frame.width // patch_size)
    if layout.maps is not None and layout.maps[1] != size:
        name, (height, width) = layout.maps
        raise TeacherError(
            f"{name} belongs to maps of {height}x{width}, so with {patch_size}x{patch_size} "
            f"patches to frames of {height * patch_size}x{width * patch_size}, not of "
            f"{frame.height}x{frame.width}."
        )
    return patch_size


def _joint_convlstm(shapes: Shapes) -> Layout:
    """ConvLSTM of thuml's transferable-memory: one convolution of [X, H], gates i, f, o, g."""
    cells = _modules(shapes, "cell_list")
    rules = [
        Rule(f"{_cell(k)}gates.{kind}", (f"{theirs}conv.0.{kind}",), axis=0)
        for k, theirs in enumerate(cells)
        for kind in ("weight", "bias")
    ]
    model = ModelConfig(cell="convlstm", peephole="none", forget_bias=0.0)
    widths = [_size(shapes, f"{theirs}conv.0.weight", 0) // 4 for theirs in cells]
    return _layout("ConvLSTM of transferable-memory", model, rules, shapes, widths)


def _split_convlstm(shapes: Shapes) -> Layout:
    """ConvLSTM of OpenSTL: convolutions of X and of H without biases, gates i, f, g, o.

    Each cell also has `conv_o`, `conv_last` and a forget bias of 1, but uses none of them.
    """
    cells = _modules(shapes, "cell_list")
    parts = _parts(shapes, "cell_list.0.conv_x")
    order = (0, 1, 3, 2)
    rules, idle = [], []
    for k, theirs in enumerate(cells):
        for letter in ("x", "h"):
            apart = _gates(_cell(k), letter, f"{theirs}conv_{letter}", parts)
            rules += [replace(rule, gates=order) for rule in apart]
        idle += [f"{theirs}conv_o.{name}" for name in parts.values()] + [
            f"{theirs}conv_last.weight"
        ]
    model = ModelConfig(cell="convlstm", gate_form="apart", peephole="none", forget_bias=0.0)
    widths = [_size(shapes, f"{theirs}conv_h.0.weight", 1) for theirs in cells]
    layout = _layout("ConvLSTM of OpenSTL", model, rules, shapes, widths)
    return replace(layout, unused=tuple(idle), check=_refuse_idle_memory)


def _refuse_idle_memory(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what early versions of OpenSTL trained, where H = o . g does not read the memory.

    Only the values tell: without a gradient, all weights of the input and forget gates still lie
    where the framework draws them, within 1 / sqrt(fan in), which those of the other gates do not.
    """
    moved = {"memory": False, "others": False}
    for name, weight in tensors.items():
        if name.endswith(("conv_x.0.weight", "conv_h.0.weight")):
            largest = [gate.abs().max() * weight[0].numel() ** 0.5 for gate in weight.chunk(4)]
            moved["memory"] |= bool(max(largest[:2]) > 1 + 1e-5)
            moved["others"] |= bool(max(largest[2:]) > 1 + 1e-5)
    if moved["others"] and not moved["memory"]:
        raise TeacherError(
            "The input and forget gates of these weights were never trained, the others were. So "
            "they come from an early version of OpenSTL (with a folder modules/ or simvp/), whose "
            "ConvLSTM never reads its memory: H = o . g. Ours does: train it here instead."
        )


def _predrnn(shapes: Shapes) -> Layout:
    """PredRNN of predrnn-pytorch and OpenSTL, with the gate orders of our ST-LSTM.

    `adapter` (PredRNN-V2) is read by the training loss only.
    """
    cells = _modules(shapes, "cell_list")
    parts = _parts(shapes, "cell_list.0.conv_x")
    rules = [rule for k, theirs in enumerate(cells) for rule in _st_lstm(_cell(k), theirs, parts)]
    model = ModelConfig(cell="predrnn", bias="conv.bias" in parts, forget_bias=1.0)
    widths = [_size(shapes, f"{theirs}conv_h.0.weight", 1) for theirs in cells]
    layout = _layout("PredRNN of predrnn-pytorch or OpenSTL", model, rules, shapes, widths)
    return replace(layout, unused=("adapter.weight",))


def _mim(shapes: Shapes) -> Layout:
    """MIM of OpenSTL: an ST-LSTM below, above it blocks and, in a list of their own, their MIM-Ns.

    Gates are stacked as in ours: i, g, f, o, and i, g, o in the convolution of H.
    """
    lowest, *blocks = _modules(shapes, "stlstm_layer")
    parts = _parts(shapes, f"{lowest}conv_x")
    rules = _st_lstm(_cell(0), lowest, parts)
    idle = []
    for k, block in enumerate(blocks, start=1):
        ours, differences = _cell(k), f"stlstm_layer_diff.{k - 1}."
        rules += _single(f"{ours}conv_last", f"{block}conv_last", parts)
        for letter, theirs in (("x", "conv_x_cc"), ("h", "conv_t_cc"), ("m", "conv_s_cc")):
            rules += _gates(ours, letter, f"{block}{theirs}", parts)
        for core, theirs in (("stationary.", block), ("nonstationary.", differences)):
            rules += _gates(ours + core, "u", f"{theirs}conv_x_concat", parts)
            rules += _gates(ours + core, "v", f"{theirs}conv_h_concat", parts)
            peepholes = (f"{theirs}ct_weight", f"{theirs}oc_weight")  # i and f, o
            rules.append(Rule(f"{ours}{core}peepholes", peepholes, axis=0, parts=3))
        idle.append(f"{differences}conv_last.weight")
    model = ModelConfig(
        cell="mim", mim_difference="cascade", mim_output_gate="code", bias=False, forget_bias=1.0
    )
    widths = [_size(shapes, f"{lowest}conv_h.0.weight", 1)]
    widths += [_size(shapes, f"{block}conv_t_cc.0.weight", 0) // 3 for block in blocks]
    return replace(
        _layout("MIM of OpenSTL", model, rules, shapes, widths),
        unused=tuple(idle),
        notes=(
            "OpenSTL begins a batch with the memories S of MIM-S that the batch before it left; "
            "here they begin at zero, as there in the first batch.",
        ),
    )


def _e3d_lstm(shapes: Shapes) -> Layout:
    """E3D-LSTM of OpenSTL, with the gate orders of ours.

    Its memory M is zero in the whole network. Of what belongs to it only the shift of its
    normalisation has an effect; without that, the gate f' of X, which is the last, has none.
    """
    cells = _modules(shapes, "cell_list")
    parts = dict(_parts(shapes, "cell_list.0.conv_x")) | {"conv.weight": "0.conv3d.weight"}
    has_norms = "norm.gain" in parts
    convs = (("x", "conv_x"), ("h", "conv_h"), ("c", "conv_new_cell"), ("n", "conv_new_gm"))
    rules, idle = [], []
    for k, theirs in enumerate(cells):
        ours = _cell(k)
        pairs = {
            "conv_last.weight": "conv_last.conv3d.weight",
            "norm_recalled.gain": "_norm_c_t.weight",
            "norm_recalled.shift": "_norm_c_t.bias",
        } | ({"shift_m": "conv_gm.1.bias"} if has_norms else {})
        rules += [Rule(ours + name, (theirs + place,), axis=0) for name, place in pairs.items()]
        for letter, name in convs:
            rules += _gates(ours, letter, theirs + name, parts)
        idle += [f"{theirs}conv_gm.0.conv3d.weight", f"{theirs}conv_gm.1.weight"]
    rules = [replace(rule, has_slices=True) for rule in rules]
    if not has_norms:
        rules = [
            replace(rule, gates=(0, 1, 2, 3, 4, 5), num_gates=7)
            if rule.ours.endswith(".conv_x.weight")
            else rule
            for rule in rules
        ]
    widths = [_size(shapes, f"{theirs}conv_h.0.conv3d.weight", 1) for theirs in cells]
    layout = _layout("E3D-LSTM of OpenSTL", ModelConfig(cell="e3d_openstl"), rules, shapes, widths)
    return replace(layout, dimensions=3, unused=tuple(idle))


_SIGNS: dict[str, Callable[[Shapes], Layout]] = {
    "cell_list.0.conv.0.weight": _joint_convlstm,
    "cell_list.0.conv_gm.0.conv3d.weight": _e3d_lstm,
    "cell_list.0.conv_m.0.weight": _predrnn,
    "cell_list.0.conv_x.0.weight": _split_convlstm,
    "stlstm_layer.0.conv_m.0.weight": _mim,
}
"""A convolution by which each layout is known; the first that is there decides."""


def _layout(
    name: str, model: ModelConfig, rules: list[Rule], shapes: Shapes, widths: list[int]
) -> Layout:
    """A layout with what all have in common.

    Args:
        name: of the layout.
        model: what this layout alone decides.
        rules: of all tensors but the output's.
        shapes: of all their tensors.
        widths: hidden channels of each layer; 0 where the tensor that tells is missing.
    """
    if len({*widths} - {0}) > 1:
        raise TeacherError(
            f"{name} with layers of {', '.join(map(str, widths))} hidden channels: only networks "
            "whose layers have equally many can be imported."
        )
    tied = [
        (tensor, (shape[-2], shape[-1]))
        for tensor, shape in sorted(shapes.items())
        if tensor.endswith((".1.weight", ".ct_weight", "._norm_c_t.weight")) and len(shape) > 2
    ]
    has_norms = any(tensor.endswith(".1.weight") for tensor in shapes)
    return Layout(
        name,
        replace(
            model,
            num_layers=len(widths),
            hidden_channels=max(*widths, 1),
            gate_norm="layer" if has_norms else "none",
        ),
        (*rules, Rule("output.weight", ("conv_last.weight",), axis=0)),
        patch_channels=_size(shapes, "conv_last.weight", 0),
        maps=tied[0] if tied else None,
    )


def _st_lstm(ours: str, theirs: str, parts: Parts) -> list[Rule]:
    rules = _single(f"{ours}conv_last", f"{theirs}conv_last", parts)
    for letter in "xhmo":
        rules += _gates(ours, letter, f"{theirs}conv_{letter}", parts)
    return rules


def _gates(ours: str, letter: str, theirs: str, parts: Parts) -> list[Rule]:
    """Our `conv_<letter>` and `norm_<letter>` from their sequence of both."""
    pairs = ((part.replace(".", f"_{letter}."), place) for part, place in parts.items())
    return [Rule(ours + name, (f"{theirs}.{place}",), axis=0) for name, place in pairs]


def _single(ours: str, theirs: str, parts: Parts) -> list[Rule]:
    """A 1x1 convolution, which has a bias where the others have one, and no normalisation."""
    kinds = ["weight", "bias"] if "conv.bias" in parts else ["weight"]
    return [Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",), axis=0) for kind in kinds]


def _parts(shapes: Shapes, theirs: str) -> Parts:
    """What a sequence of a convolution and perhaps a normalisation consists of."""
    parts = {"conv.weight": "0.weight"}
    if f"{theirs}.0.bias" in shapes:
        parts["conv.bias"] = "0.bias"
    if f"{theirs}.1.weight" in shapes:
        parts |= {"norm.gain": "1.weight", "norm.shift": "1.bias"}
    return parts


def _cell(k: int) -> str:
    return f"stack.layers.{k}.cell."


def _modules(shapes: Shapes, stem: str) -> list[str]:
    """Names of the modules of a list, as many as have tensors, with a dot each."""
    found = (re.match(rf"{stem}\.\d+\.", name) for name in shapes)
    return [f"{stem}.{k}." for k in range(len({match[0] for match in found if match}))]


def _size(shapes: Shapes, name: str, axis: int) -> int:
    """A size of a convolution's weights; 0 where there are none."""
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) in (4, 5) else 0
