"""Optimisation, what happens every so many steps, and where processes come from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

from tmu_dist.config.checks import require

Precision: TypeAlias = Literal["fp32", "tf32", "bf16", "fp16"]
"""Of convolutions and matrix products; memories, losses and weights stay float32 in all of them."""


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Weight of the divergence of a stochastic network's posterior from its prior (SAVP)."""

    weight: float = 0.01
    anneal_from: int = 50_000
    """Iteration at which the weight begins to rise from 0, linearly."""
    anneal_until: int = 100_000
    """Iteration at which it is reached."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"training.kl.weight must be >= 0, got {self.weight}.")
        require(
            0 <= self.anneal_from <= self.anneal_until,
            "training.kl needs 0 <= anneal_from <= anneal_until, got "
            f"{self.anneal_from} and {self.anneal_until}.",
        )


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Discriminators beside the student (SAVP); with both weights 0 there are none."""

    video_weight: float = 0.0
    """Of a discriminator that sees clips, one for each kind of rollout; SAVP: 0.1."""
    image_weight: float = 0.0
    """Of a discriminator that sees single frames."""
    feature_weight: float = 0.0
    """Of matching the discriminators' features of true frames; SAVP: 10."""
    base_channels: int = 32
    """Channels of a discriminator's first convolution (ndf)."""
    clip_length: int = 10
    """Frames of a clip, at most."""

    def __post_init__(self) -> None:
        for name in ("video_weight", "image_weight", "feature_weight"):
            value = getattr(self, name)
            require(value >= 0, f"training.adversarial.{name} must be >= 0, got {value}.")
        for name in ("base_channels", "clip_length"):
            value = getattr(self, name)
            require(value >= 1, f"training.adversarial.{name} must be >= 1, got {value}.")
        unused = [
            entry.name
            for entry in fields(self)
            if not self.is_on and getattr(self, entry.name) != entry.default
        ]
        require(
            not unused,
            f"training.adversarial.{' and '.join(unused)} has no effect without discriminators: "
            "set training.adversarial.video_weight or image_weight.",
        )

    @property
    def is_on(self) -> bool:
        """Whether there are discriminators."""
        return self.video_weight > 0 or self.image_weight > 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation (paper, Sec. 4: Adam, 1e-3, batch 8, 80,000 iterations)."""

    num_steps: int = 80_000
    """Iterations; with reverse_input=update each one makes two updates."""
    batch_size: int = 8
    """Sequences of one iteration over all ranks together."""
    learning_rate: float = 1e-3
    decay_from: int | None = None
    """Iteration from which the learning rate falls linearly to 0 at the last; None: constant."""
    rates: tuple[str, ...] = ()
    """PATTERN=FACTOR: parameters whose names match the pattern (as of files, `stack.layers.0.*`)
    learn at so many learning rates, or not at all (0: frozen); the last match counts."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment; SAVP uses 0.5."""
    grad_clip_norm: float | None = None
    """Clip the global gradient norm; 1.0 is advised for four and more teachers."""
    reverse_input: Literal["update", "average", "off"] = "update"
    """Also learn each sequence backwards: as a second update, in one averaged update, or not."""
    sampling: Literal["linear", "inverse_sigmoid", "always"] = "linear"
    """Scheduled sampling: how the probability of a true input falls from 1; always: it does not
    (video pixel networks learn from true frames only)."""
    sampling_stop_step: int = 50_000
    """linear: the iteration where it reaches 0."""
    sampling_scale: float = 900.0
    """inverse_sigmoid: k of k / (k + exp(n / k)) at iteration n."""
    frame_loss: Literal["backbone", "l2", "l1l2", "l1"] = "backbone"
    """Squared error, absolute error, or both; backbone: what its own paper minimises (squared
    error but for E3D-LSTM: both, SAVP: absolute error, VPN: likelihood)."""
    frame_weight: float = 1.0
    """Weight of that loss; SAVP: 100."""
    kl: KLConfig = field(default_factory=KLConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Element means of both terms of Eq. 6 (default), or the sums as printed over the batch."""
    precision: Precision = "fp32"
    """bf16: convolutions in bfloat16 by autocast; memories, losses and weights stay float32. fp16:
    the same in float16, whose small range takes loss scaling and memories that do not grow
    (transfer.tmu.combine=mean). tf32: float32 rounded to 11 bits by CUDA cards as they multiply."""
    seed: int = 0
    select: Literal["best", "final"] = "best"
    """Which weights the run offers: the lowest validation error, or the last iterate."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "sampling_stop_step"):
            value = getattr(self, name)
            require(value >= 1, f"training.{name} must be >= 1, got {value}.")
        require(
            self.learning_rate > 0, f"training.learning_rate must be > 0, got {self.learning_rate}."
        )
        require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            f"training.grad_clip_norm must be > 0 or left out, got {self.grad_clip_norm}.",
        )
        require(self.seed >= 0, f"training.seed must be >= 0, got {self.seed}.")
        require(
            0 <= self.adam_beta1 < 1,
            f"training.adam_beta1 must be in [0, 1), got {self.adam_beta1}.",
        )
        require(
            self.decay_from is None or 0 <= self.decay_from < self.num_steps,
            f"training.decay_from={self.decay_from} must lie before the last iteration, "
            f"training.num_steps={self.num_steps}.",
        )
        for name in ("sampling_scale", "frame_weight"):
            value = getattr(self, name)
            require(value > 0, f"training.{name} must be > 0, got {value}.")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What happens every so many steps. None of these changes the training; which weights can be
    selected depends on when they are validated."""

    log_every: int = 20
    validate_every: int = 1_000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            require(value >= 1, f"schedule.{entry.name} must be >= 1, got {value}.")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where the processes of a run come from."""

    launcher: Literal["ray", "local", "torchrun"] = "ray"
    """ray: Ray Train workers; local: this process; torchrun: one process of a torchrun job."""
    max_failures: int = 3
    """Ray only: how often a lost worker group is started again from the newest checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        require(
            self.max_failures >= 0, f"launch.max_failures must be >= 0, got {self.max_failures}."
        )
