"""The contract of a network, and the only loop over time: warm-up, sampling mask, memory taps.

Legend: B batch, T time, K layers, L TMU layers, M teachers, C channels, P hidden channels, Z noise,
H, W height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.models.cells.base import FrameLoss
from tmu_dist.models.layer import Guide, LayerStep
from tmu_dist.models.per_rollout import begin_rollout
from tmu_dist.models.shapes import MemoryShape

StateName = Literal["memory", "hidden", "zigzag"]
"""What layers remember: the memory C, the hidden state H, and in cells that have it ST-LSTM's M."""

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Diagnostics(NamedTuple):
    """Means that tell what the gates do; each over channels and pixels."""

    transfer_gates_BTLM: Tensor | None
    """Transfer gates a of every TMU layer and teacher (paper, Table 5); None without TMU layers."""
    forget_gates_BTK: Tensor
    """NaN for layers whose cell has no such gate."""
    memory_rms_BTK: Tensor
    """Root mean square of each layer's memory; Eq. 5 lets it grow with M and time."""


class Step(NamedTuple):
    """One time step of a network."""

    prediction_BCHW: Tensor
    state: Any
    """What the network remembers, of its own making."""
    layers: Sequence[LayerStep]
    """The layers that have a memory, from the input to the output."""
    objectives: Mapping[str, Tensor] = NOTHING
    """What only the network itself can compute of what its paper minimises (`Rollout`)."""


class Rollout(NamedTuple):
    """A network unrolled over num_frames - 1 steps (T); step t reads frame t, predicts t + 1."""

    predictions_BTCHW: Tensor
    """Predictions of frames 2..num_frames in pixel space, unbounded floats around [0, 1]."""
    inputs_BTCHW: Tensor
    """What the network saw at each step: true frames, or its own predictions where masked out."""
    steps: Sequence[Sequence[LayerStep]]
    """What every layer did, by time, then by layer; `states` stacks it."""
    imitations: Mapping[int, tuple[Tensor, ...]]
    """Per TMU layer (by layer number), an imitation of each teacher's memory [B, T, P, h, w]."""
    zigzag_imitations: Mapping[int, tuple[Tensor, ...]] = MappingProxyType({})
    """The same of ST-LSTM's memory M, where that is transferred, too."""
    objectives: Mapping[str, Tensor] = NOTHING
    """Only of networks that have them, and only where all targets were known:
    "kl_BT", divergence of the latents' posterior from their prior, in nats;
    "nll_BTCHW", negative log-likelihood of the true next frame, in nats.
    Trainees of transfer methods add what their losses read."""
    prior_predictions_BTCHW: Tensor | None = None
    """Of stochastic networks in training: predictions from latents of the prior."""
    diagnostics: Diagnostics | None = None

    @property
    def memories(self) -> tuple[Tensor, ...]:
        """Per layer, the memory C of every step, [B, T, P, h, w]."""
        return self.states("memory")

    def states(self, name: StateName) -> tuple[Tensor, ...]:
        """Per layer, a state of every step, [B, T, P, h, w].

        Raises:
            ValueError: the cells have no such state.
        """
        return tuple(
            _over_time([_state(step, name) for step in over_time]) for over_time in zip(*self.steps)
        )


class Predictor(nn.Module, ABC):
    """Frames in, the next frame out, at every step.

    A network says what one step does (`initial_state`, `step`); the loop over time is here.
    """

    frame_loss: FrameLoss = "l2"
    """What the backbone's own paper minimises."""
    learns_from_targets: bool = False
    """Whether `step` makes use of the true next frame where it is known."""
    noise_size: int = 0
    """Standard normal numbers that a step can make use of (Z); 0 for deterministic networks."""
    latent_size: int = 0
    """Those of them that choose latents, which steps with a known target have, too: all or none."""
    unrolls_prior: bool = False
    """Whether training also needs predictions whose steps know no targets beyond the inputs."""

    def __init__(self, *, image_channels: int, memory_shapes: Sequence[MemoryShape]) -> None:
        """Remember the shapes.

        Args:
            image_channels: channels of the frames.
            memory_shapes: of the layers that have a memory, at the size the network was built for.
        """
        super().__init__()
        self.image_channels = image_channels
        self.memory_shapes = tuple(memory_shapes)

    @abstractmethod
    def initial_state(self, frame_BCHW: Tensor, *, num_input_frames: int) -> Any:
        """The state before the first step.

        Args:
            frame_BCHW: the first frame.
            num_input_frames: frames that will be read as they are.
        """

    def foresee(self, state: Any, known_BTCHW: Tensor) -> Any:
        """The state before the first step, with what can be computed of known frames all at once.

        Args:
            state: as `initial_state` returned it.
            known_BTCHW: the frames of the first steps, which are read as they are.
        """
        return state

    @abstractmethod
    def step(
        self,
        frame_BCHW: Tensor,
        state: Any,
        *,
        target_BCHW: Tensor | None,
        noise_BZ: Tensor | None,
        guide: Guide | None = None,
    ) -> Step:
        """Read one frame and predict the next.

        Args:
            frame_BCHW: a true frame, or the network's own prediction of it.
            state: as `initial_state` or the step before returned it.
            target_BCHW: the true next frame where it may be known: in training, and among the
                input frames. The prediction of a network with `learns_from_targets` depends on
                it, so it is never shown where a forecast is made.
            noise_BZ: standard normal numbers; None means the mean of whatever they would draw.
            guide: to be handed to every layer that has a memory, whose output, not whose hidden
                state, the network goes on with.
        """

    def forward(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor | None = None,
        noise_BTZ: Tensor | None = None,
        guides: Sequence[Guide] | None = None,
        diagnostics: bool = False,
    ) -> Rollout:
        """Unroll over `num_frames` frames.

        Args:
            frames_BTCHW: true frames in [0, 1]: at least the input frames; where a sampling mask
                is given, all but the last one, and that too if the network learns from targets.
            num_input_frames: frames that are always read as they are.
            num_frames: input and predicted frames together; may exceed the frames given.
            sampling_mask_BT: bool [B, num_frames - num_input_frames - 1]; True lets the network
                read the true frame at that step (scheduled sampling), False its own prediction.
                Without a mask the network runs closed-loop on its own predictions and sees nothing
                of the target frames.
            noise_BTZ: [B, num_frames - 1, noise_size] standard normal numbers for a stochastic
                network; None means no noise: the mean of its latents.
            guides: what acts on the layers from outside, one a step.
            diagnostics: also return gate and memory statistics (costs a little time).

        Raises:
            ValueError: too few frames, wrong number of channels, or a mask or noise of another
                shape.
        """
        self._check(frames_BTCHW, num_input_frames, num_frames, sampling_mask_BT, noise_BTZ)
        begin_rollout(self)
        unroll = partial(
            self._unroll,
            frames_BTCHW,
            num_input_frames=num_input_frames,
            num_frames=num_frames,
            sampling_mask_BT=sampling_mask_BT,
            noise_BTZ=noise_BTZ,
            guides=guides,
        )
        if sampling_mask_BT is None:
            return unroll(num_known_frames=num_input_frames, diagnostics=diagnostics)
        rollout = unroll(num_known_frames=num_frames, diagnostics=diagnostics)
        if not (self.unrolls_prior and self.training):
            return rollout
        prior = unroll(num_known_frames=num_input_frames, diagnostics=False)
        return rollout._replace(prior_predictions_BTCHW=prior.predictions_BTCHW)

    def _unroll(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        num_known_frames: int,
        sampling_mask_BT: Tensor | None,
        noise_BTZ: Tensor | None,
        guides: Sequence[Guide] | None,
        diagnostics: bool,
    ) -> Rollout:
        """The loop over time; arguments as in `forward`, and how many frames targets may show."""
        known = min(num_known_frames, frames_BTCHW.shape[1]) if self.learns_from_targets else 0
        state = self.initial_state(frames_BTCHW[:, 0], num_input_frames=num_input_frames)
        read_as_they_are = num_frames - 1 if _hides_nothing(sampling_mask_BT) else num_input_frames
        state = self.foresee(state, frames_BTCHW[:, :read_as_they_are])
        predictions: list[Tensor] = []
        inputs: list[Tensor] = []
        layers: list[Sequence[LayerStep]] = []
        objectives: list[Mapping[str, Tensor]] = []
        for t in range(num_frames - 1):
            x = self._input(t, frames_BTCHW, predictions, num_input_frames, sampling_mask_BT)
            step = self.step(
                x,
                state,
                target_BCHW=frames_BTCHW[:, t + 1] if t + 1 < known else None,
                noise_BZ=None if noise_BTZ is None else noise_BTZ[:, t],
                guide=None if guides is None else guides[t],
            )
            state = step.state
            # Predictions feed back as inputs, so they stay float32 even under autocast.
            predictions.append(step.prediction_BCHW.to(frames_BTCHW.dtype))
            inputs.append(x)
            layers.append(step.layers)
            objectives.append(step.objectives)
        return Rollout(
            _over_time(predictions),
            _over_time(inputs),
            steps=layers,
            imitations=_Imitations(layers, "imitations_BMPHW"),
            zigzag_imitations=_Imitations(layers, "zigzag_imitations_BMPHW"),
            objectives={name: _over_time([o[name] for o in objectives]) for name in objectives[-1]},
            diagnostics=_diagnose(layers) if diagnostics else None,
        )

    @torch.no_grad()
    def predict(
        self,
        input_frames_BTCHW: Tensor,
        num_target_frames: int,
        *,
        noise_BTZ: Tensor | None = None,
    ) -> Tensor:
        """Continue the given frames closed-loop by any number of frames.

        Args:
            input_frames_BTCHW: the frames that are known.
            num_target_frames: how many to predict.
            noise_BTZ: as in `forward`, for input and target frames less one.

        Returns:
            Predicted frames [B, num_target_frames, C, H, W].
        """
        given = input_frames_BTCHW.shape[1]
        rollout = self(
            input_frames_BTCHW,
            num_input_frames=given,
            num_frames=given + num_target_frames,
            noise_BTZ=noise_BTZ,
        )
        return rollout.predictions_BTCHW[:, given - 1 :]

    def _input(
        self,
        t: int,
        frames_BTCHW: Tensor,
        predictions: list[Tensor],
        num_input_frames: int,
        sampling_mask_BT: Tensor | None,
    ) -> Tensor:
        if t < num_input_frames:
            return frames_BTCHW[:, t]
        if sampling_mask_BT is None:
            return predictions[-1]
        sees_truth = sampling_mask_BT[:, t - num_input_frames, None, None, None]
        return torch.where(sees_truth, frames_BTCHW[:, t], predictions[-1])

    def _check(
        self,
        frames_BTCHW: Tensor,
        num_input_frames: int,
        num_frames: int,
        mask_BT: Tensor | None,
        noise_BTZ: Tensor | None,
    ) -> None:
        batch, given, channels = frames_BTCHW.shape[:3]
        if channels != self.image_channels:
            raise ValueError(
                f"This network was built for frames with {self.image_channels} channel(s), "
                f"got {channels} (frames {tuple(frames_BTCHW.shape)})."
            )
        if not 1 <= num_input_frames < num_frames:
            raise ValueError(
                f"num_input_frames={num_input_frames} must be at least 1 and less than "
                f"num_frames={num_frames}."
            )
        with_mask = num_frames if self.learns_from_targets else num_frames - 1
        needed = num_input_frames if mask_BT is None else with_mask
        if given < needed:
            raise ValueError(
                f"{needed} true frames are needed ({num_input_frames} inputs"
                f"{'' if mask_BT is None else ' and a sampling mask'}), got {given}."
            )
        shape = (batch, num_frames - num_input_frames - 1)
        if mask_BT is not None and tuple(mask_BT.shape) != shape:
            raise ValueError(
                f"sampling_mask_BT must have shape {shape} (batch, predicted frames fed back), "
                f"got {tuple(mask_BT.shape)}."
            )
        noise_shape = (batch, num_frames - 1, self.noise_size)
        if noise_BTZ is not None and tuple(noise_BTZ.shape) != noise_shape:
            raise ValueError(
                f"noise_BTZ must have shape {noise_shape} (batch, steps, this network's "
                f"noise_size), got {tuple(noise_BTZ.shape)}."
            )


def _hides_nothing(sampling_mask_BT: Tensor | None) -> bool:
    """Whether all steps read true frames; asked on CPUs only, where the answer costs nothing."""
    if sampling_mask_BT is None or sampling_mask_BT.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():  # a graph cannot depend on what a tensor holds
        return False
    return bool(sampling_mask_BT.all())


def _over_time(maps: list[Tensor]) -> Tensor:
    return torch.stack(maps, dim=1)


def _state(step: LayerStep, name: StateName) -> Tensor:
    if name == "zigzag":
        if step.zigzag_BPHW is None:
            raise ValueError(
                "These cells have no zig-zag memory: that is ST-LSTM's (model.cell=predrnn, mim, "
                "e3d_lstm, e3d_openstl)."
            )
        return step.zigzag_BPHW
    return step.state.memory_BPHW if name == "memory" else step.state.hidden_BPHW


class _Imitations(Mapping[int, tuple[Tensor, ...]]):
    """By layer, of each teacher; stacked over time when asked for, which forecasts never do."""

    def __init__(
        self,
        steps: Sequence[Sequence[LayerStep]],
        name: Literal["imitations_BMPHW", "zigzag_imitations_BMPHW"],
    ) -> None:
        self._over_time = {
            k: [getattr(step, name) for step in over_time]
            for k, over_time in enumerate(zip(*steps))
            if getattr(over_time[0], name) is not None
        }
        self._stacked: dict[int, tuple[Tensor, ...]] = {}

    def __getitem__(self, layer: int) -> tuple[Tensor, ...]:
        if layer not in self._stacked:
            self._stacked[layer] = _over_time(self._over_time[layer]).unbind(2)
        return self._stacked[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._over_time)

    def __len__(self) -> int:
        return len(self._over_time)


@torch.no_grad()
def _diagnose(steps: list[Sequence[LayerStep]]) -> Diagnostics:
    def mean_per_layer(tensors: list[list[Tensor]]) -> Tensor:
        """Stack [time][layer] tensors of shape [B, ..., P, H, W] and average the last three."""
        means = [torch.stack([x.float().mean((-3, -2, -1)) for x in row], 1) for row in tensors]
        return torch.stack(means, 1)

    def forget_gate(step: LayerStep) -> Tensor:
        gate = step.forget_BPHW
        return torch.full_like(step.state.memory_BPHW, torch.nan) if gate is None else gate

    gates = [[s.gates_BMPHW for s in row if s.gates_BMPHW is not None] for row in steps]
    return Diagnostics(
        transfer_gates_BTLM=mean_per_layer(gates) if gates[0] else None,
        forget_gates_BTK=mean_per_layer([[forget_gate(s) for s in row] for row in steps]),
        memory_rms_BTK=mean_per_layer(
            [[s.state.memory_BPHW.float().square() for s in row] for row in steps]
        ).sqrt(),
    )
