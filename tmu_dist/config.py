"""The configuration of a run: frozen dataclasses that check themselves.

There is one way to change a field by name, `with_overrides`; YAML files, resumed runs and searches
come through it, so an unknown name or a wrong type fails the same way everywhere and every check
runs again. Command-line flags are parsed by tyro from the same dataclasses (`tmu_dist.train`).

Deliberately not here: named runs (`tmu_dist.recipes`), and anything that needs torch or ray.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from tmu_dist.backbones import BACKBONES


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How many frames a model watches and how many it must predict."""

    num_input_frames: int = 10
    num_target_frames: int = 10

    def __post_init__(self) -> None:
        _require(
            self.num_input_frames >= 1 and self.num_target_frames >= 1,
            "A window needs at least one input and one target frame, got "
            f"window.num_input_frames={self.num_input_frames}, "
            f"window.num_target_frames={self.num_target_frames}.",
        )

    @property
    def num_frames(self) -> int:
        """Input and target frames together (T in the paper)."""
        return self.num_input_frames + self.num_target_frames


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which archive is streamed, and how."""

    url: str = "archives/moving-mnist-3"
    """Folder or URL (s3://, gs://, az://, https://) that holds a manifest.json."""
    fraction: float = 1.0
    """Training samples of it to use; 1 is what the archive calls its full training data (all of it,
    unless the manifest says less: then up to 2 or more). Smaller sets lie in larger ones."""
    mix_with: tuple[str, ...] = ()
    """More archives of the same kind of frames to learn from; validation stays with `url`."""
    mix_weights: tuple[float, ...] = ()
    """Each archive's share of an epoch, `url` first; empty: every sample exactly once."""
    shuffle_window: int = 4096
    """Samples among which each lane is shuffled; fewer need fewer shards at a time."""
    shuffle_lanes: int = 16
    """Neighbourhoods of shards that are read in turn; ranks share them."""
    num_workers: int = 0
    """Loader processes of each rank; they never change the order."""
    reading: Literal["auto", "cache", "range"] = "auto"
    """cache: copy shards to this node's disk before they are read; range: fetch samples by byte
    ranges, again in each epoch; auto: local archives in place, others through the cache."""
    cache_folder: str | None = None
    """The node's cache, on a disk of its own; None: $TMU_DIST_CACHE or ~/.cache/tmu_dist."""
    cache_gib: float | None = None
    """Most that all jobs of a node keep in that folder; None: four fifths of the room there."""
    max_validation_samples: int | None = None
    """Validate on the first so many samples of the validation split; None: on all of them."""

    def __post_init__(self) -> None:
        _require(
            0.0 < self.fraction < math.inf,
            f"data.fraction must be > 0 and finite (1 is 100 %), got {self.fraction}.",
        )
        _require(self.num_workers >= 0, f"data.num_workers must be >= 0, got {self.num_workers}.")
        num_archives = 1 + len(self.mix_with)
        _require(
            not self.mix_weights
            or (
                (self.mix_with != () and len(self.mix_weights) == num_archives)
                and all(0.0 < weight < math.inf for weight in self.mix_weights)
            ),
            "data.mix_weights needs one positive number for data.url and each of data.mix_with "
            f"({num_archives} archives), got {list(self.mix_weights)}.",
        )
        for name in ("shuffle_window", "shuffle_lanes"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name} must be >= 1, got {value}.")
        _require(
            self.cache_gib is None or self.cache_gib > 0,
            f"data.cache_gib must be > 0 or left out, got {self.cache_gib}.",
        )
        if self.reading == "range":
            for name in ("cache_folder", "cache_gib"):
                _require(
                    getattr(self, name) is None,
                    f"data.{name} has no effect with data.reading=range, which keeps no copies.",
                )
        _require(
            self.max_validation_samples is None or self.max_validation_samples >= 1,
            f"data.max_validation_samples must be >= 1, got {self.max_validation_samples}.",
        )


if TYPE_CHECKING:
    Backbone: TypeAlias = str
else:
    Backbone = Literal[tuple(BACKBONES)]


@dataclass(frozen=True, kw_only=True)
class SAVPConfig:
    """Stochastic adversarial video prediction (Lee et al. 2018)."""

    base_channels: int = 32
    """Channels of the first encoder block (ngf); the others are multiples of it."""
    latent_size: int = 32
    """Numbers of the latent z of each step; 0 makes the network deterministic."""
    posterior_channels: int = 64
    """Channels of the first convolution of the posterior."""
    prior: Literal["normal", "learned"] = "normal"
    """Where latents come from when nothing is known: N(0, 1), or a network of the frames so far."""
    transformation: Literal["cdna", "flow", "dna"] = "cdna"
    """How the last frame is moved: by kernels for the whole image, by optical flow, or by a kernel
    for each pixel."""
    num_transformed: int = 4
    """Moved copies of the last frame that the masks choose from."""
    upsample: Literal["exact", "plain"] = "exact"
    """Border rule of the bilinear upsampling: that of the original, or the framework's."""

    def __post_init__(self) -> None:
        for name in ("base_channels", "posterior_channels", "num_transformed"):
            value = getattr(self, name)
            _require(value >= 1, f"model.savp.{name} must be >= 1, got {value}.")
        _require(
            self.latent_size >= 0, f"model.savp.latent_size must be >= 0, got {self.latent_size}."
        )
        _require(
            self.latent_size > 0 or self.prior == "normal",
            "model.savp.prior=learned has no effect with model.savp.latent_size=0.",
        )


@dataclass(frozen=True, kw_only=True)
class VPNConfig:
    """The video pixel network around a ConvLSTM (Kalchbrenner et al. 2017)."""

    channels: int = 32
    """Channels inside the residual multiplicative blocks (c); their input has 2c."""
    num_encoder_blocks: int = 4
    num_decoder_blocks: int = 6
    dilated: bool = False
    """Encoder blocks with dilations 1, 2, 4, 8 in turn."""
    likelihood: Literal["softmax", "bernoulli"] = "softmax"
    """Of a pixel: 256 levels, or its value as a probability (binary-like data)."""

    def __post_init__(self) -> None:
        for name in ("channels", "num_encoder_blocks", "num_decoder_blocks"):
            value = getattr(self, name)
            _require(value >= 1, f"model.vpn.{name} must be >= 1, got {value}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The predictive network (paper, Sec. 4: four layers with 64 channels, 5x5 filters).

    A setting that the chosen backbone does not have must be left out.
    """

    cell: Backbone = "convlstm"
    """The recurrent cell of a stacked network, or savp or vpn, which are built otherwise."""
    num_layers: int = 4
    hidden_channels: int = 64
    kernel_size: int = 5
    """Filter size of the recurrent convolutions; the paper uses 3 on radar."""
    patch_size: int = 4
    """Frame sub-scaling factor k: H x W x C frames become H/k x W/k maps of C*k*k channels."""
    peephole: Literal["channel", "none", "full"] = "channel"
    """ConvLSTM: shape of the peephole weights of Eq. 2 and 5; `full` ties it to one frame size."""
    forget_bias: float | None = None
    """Added to the forget gate of the memory C. None: 0 in ConvLSTM, 1 in ST-LSTM, but 0 in its TMU
    layers that combine as printed (transfer.tmu.combine), which lets the memory grow."""
    gate_form: Literal["joint", "apart"] = "joint"
    """ConvLSTM: gates from one convolution of input and hidden state, or from one of each."""
    gate_norm: Literal["none", "layer"] = "none"
    """Layer normalisation over the pre-activations of the cell's gates, after each convolution."""
    bias: bool | None = None
    """Biases of the recurrent convolutions; None: as in the backbone's public code."""
    norm_affine: Literal["full", "channel", "none"] = "full"
    """Gain and shift of every layer normalisation: per element (as the paper's parameter counts
    need, tied to one frame size), per channel (any frame size), or none."""
    st_form: Literal["seven_gate", "shared"] = "seven_gate"
    """ST-LSTM: gates of both memories from convolutions of their own, or the form that shares the
    input's convolution."""
    mim_difference: Literal["cascade", "hidden"] = "cascade"
    """MIM: what the upper blocks' MIM-N reads: the output of the MIM-N below (public code), or the
    difference of the hidden states below (the MIM paper's figure)."""
    mim_output_gate: Literal["code", "paper"] = "code"
    """MIM: the output gate reads the incoming memory M, or the new C and M."""
    e3d_memory: Literal["paper", "code"] = "paper"
    """E3D-LSTM: zig-zag memory and output gate of its paper, or what its public code computes."""
    recall_window: int | None = None
    """E3D-LSTM: past memories that a step recalls; None: all on maps of up to 16x16, else 4."""
    savp: SAVPConfig = field(default_factory=SAVPConfig)
    vpn: VPNConfig = field(default_factory=VPNConfig)

    def __post_init__(self) -> None:
        if self.cell not in BACKBONES:
            near = difflib.get_close_matches(self.cell, BACKBONES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"Unknown model.cell={self.cell!r}.{hint} Backbones: {', '.join(BACKBONES)}."
            )
        for name in ("num_layers", "hidden_channels", "kernel_size", "patch_size"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name} must be >= 1, got {value}.")
        _require(
            self.kernel_size % 2 == 1,
            f"model.kernel_size must be odd so that maps keep their size, got {self.kernel_size}.",
        )
        _require(
            self.recall_window is None or self.recall_window >= 1,
            f"model.recall_window must be >= 1 or left out, got {self.recall_window}.",
        )


_MEAN_FROM = 4
"""Teachers from which on the memory of Eq. 5 as printed explodes before it is learned to shrink."""


@dataclass(frozen=True, kw_only=True)
class TMUConfig:
    """The Transferable Memory Unit (paper, Sec. 3.2, Eqs. 3-5)."""

    layers: Literal["all"] | tuple[int, ...] = "all"
    """Layers (from 0, bottom to top) that are TMU layers; the paper makes all of them so."""
    gate_kernel_size: int = 1
    """Filter size of the transfer gates; 1 is the size that reproduces Table 1's counts."""
    gate_norm: Literal["layer", "none"] = "layer"
    """Normalise the transfer gates' pre-activations; `none` is Eq. 5 as printed."""
    combine: Literal["auto", "paper", "mean"] = "auto"
    """`paper`: Eq. 5 as printed, whose memory can grow with the number of teachers and time;
    `mean`: the same sum divided by 1 + M, a convex combination; `auto`: `paper` for up to three
    teachers, `mean` for more (docs/lab_log.md)."""
    hidden_from: Literal["fused", "own"] = "fused"
    """`fused`: h reads the memory after transfer (Eq. 5); `own`: before it."""

    def __post_init__(self) -> None:
        _require(
            self.gate_kernel_size >= 1 and self.gate_kernel_size % 2 == 1,
            f"transfer.tmu.gate_kernel_size must be odd, got {self.gate_kernel_size}.",
        )
        _require(
            self.layers == "all" or len(self.layers) > 0,
            "transfer.tmu.layers is empty: name layers (0 is the lowest), 'all', "
            "or use transfer.method=scratch for a network without TMU layers.",
        )
        _require(
            self.layers == "all"
            or (min(self.layers) >= 0 and len(set(self.layers)) == len(self.layers)),
            f"transfer.tmu.layers={list(self.layers)} must be different numbers from 0 on.",
        )

    def combination(self, num_teachers: int) -> Literal["paper", "mean"]:
        """How imitations are combined with the memory of a student of so many teachers."""
        if self.combine == "auto":
            return "paper" if num_teachers < _MEAN_FROM else "mean"
        return self.combine


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What may differ between a teacher and the student, and how it is bridged.

    By default nothing may: the paper compares memories element by element (Sec. 4). Each setting
    declares one difference as wanted; teachers that do not have it are used as they are.
    """

    frames: Literal["same", "resize"] = "same"
    """resize: each teacher reads the frames in its own size and number of channels."""
    channels: Literal["same", "project"] = "same"
    """project: a learned 1x1 convolution of an imitation is compared with a teacher's memory that
    has another number of channels. It is part of the training, not of the student."""
    grid: Literal["same", "resample"] = "same"
    """resample: teacher memories are brought to the size of the student's maps."""
    layers: Literal["same", "stretch"] | tuple[int, ...] = "same"
    """Which layer of a teacher teaches which of the student: the same number, spread evenly over
    another number of layers, or a teacher's layer number for each student layer."""
    units: Literal["same", "any"] = "same"
    """any: teachers may have learned from other quantities or intervals; numbers are passed on as
    they are (the paper teaches rain by digits and walking people)."""


Method: TypeAlias = Literal["scratch", "finetune", "tmu", "tmu_scratch"]


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """How knowledge of the teachers reaches the student."""

    method: Method = "scratch"
    """scratch: no transfer; finetune: start from the one teacher's weights; tmu: memory transfer
    (the paper's method); tmu_scratch: the TMU network with unused slots (Table 1, second row)."""
    teachers: tuple[str, ...] = ()
    """Teacher folders, run folders or URLs, in the order of the transfer gates."""
    num_slots: int = 0
    """tmu_scratch only: how many teachers the network has room for."""
    beta: float = 0.1
    """Weight of the distillation term of Eq. 6."""
    teacher_input: Literal["own", "student", "truth"] = "own"
    """What replaces a frame that the sampling mask hides from a teacher: its own prediction, the
    student's input, or nothing (teachers always see true frames)."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tmu: TMUConfig = field(default_factory=TMUConfig)

    def __post_init__(self) -> None:
        count = len(self.teachers)
        _require(self.beta >= 0, f"transfer.beta must be >= 0, got {self.beta}.")
        if self.method in ("scratch", "tmu_scratch"):
            _require(
                count == 0,
                f"transfer.method={self.method} uses no teachers, got {list(self.teachers)}: "
                "remove transfer.teachers or choose method tmu or finetune.",
            )
        if self.method == "finetune":
            _require(
                count == 1,
                "transfer.method=finetune starts from exactly one teacher, got "
                f"transfer.teachers={list(self.teachers)}.",
            )
        if self.method == "tmu":
            _require(
                count >= 1,
                "transfer.method=tmu needs at least one teacher in transfer.teachers; "
                "use tmu_scratch for the same network without teachers.",
            )
        if self.method != "tmu":
            defaults = {"beta": 0.1, "teacher_input": "own", "adapter": AdapterConfig()}
            for name, default in defaults.items():
                _require(
                    getattr(self, name) == default,
                    f"transfer.{name} only has an effect with transfer.method=tmu; got "
                    f"{getattr(self, name)!r} with method={self.method}.",
                )
        if self.method not in ("tmu", "tmu_scratch"):
            _require(
                self.tmu == TMUConfig(),
                f"transfer.tmu.* only has an effect on TMU networks, not with "
                f"method={self.method}; got {self.tmu}.",
            )
        if self.method == "tmu_scratch":
            _require(
                self.num_slots >= 1,
                f"transfer.method=tmu_scratch needs transfer.num_slots >= 1, got {self.num_slots}.",
            )
        else:
            _require(
                self.num_slots == 0,
                "transfer.num_slots only has an effect with transfer.method=tmu_scratch; "
                f"got {self.num_slots} with method={self.method}.",
            )

    @property
    def num_tmu_slots(self) -> int:
        """Teachers that the student's TMU layers have room for (M); 0 means no TMU layers."""
        return len(self.teachers) if self.method == "tmu" else self.num_slots


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Weight of the divergence of a stochastic network's posterior from its prior (SAVP)."""

    weight: float = 0.01
    anneal_from: int = 50_000
    """Iteration at which the weight begins to rise from 0, linearly."""
    anneal_until: int = 100_000
    """Iteration at which it is reached."""

    def __post_init__(self) -> None:
        _require(self.weight >= 0, f"training.kl.weight must be >= 0, got {self.weight}.")
        _require(
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
            _require(value >= 0, f"training.adversarial.{name} must be >= 0, got {value}.")
        for name in ("base_channels", "clip_length"):
            value = getattr(self, name)
            _require(value >= 1, f"training.adversarial.{name} must be >= 1, got {value}.")
        unused = [
            entry.name
            for entry in fields(self)
            if not self.is_on and getattr(self, entry.name) != entry.default
        ]
        _require(
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
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: convolutions in bfloat16 by autocast; memories, losses and weights stay float32."""
    seed: int = 0
    select: Literal["best", "final"] = "best"
    """Which weights the run offers: the lowest validation error, or the last iterate."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "sampling_stop_step"):
            value = getattr(self, name)
            _require(value >= 1, f"training.{name} must be >= 1, got {value}.")
        _require(
            self.learning_rate > 0, f"training.learning_rate must be > 0, got {self.learning_rate}."
        )
        _require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            f"training.grad_clip_norm must be > 0 or left out, got {self.grad_clip_norm}.",
        )
        _require(self.seed >= 0, f"training.seed must be >= 0, got {self.seed}.")
        _require(
            0 <= self.adam_beta1 < 1,
            f"training.adam_beta1 must be in [0, 1), got {self.adam_beta1}.",
        )
        _require(
            self.decay_from is None or 0 <= self.decay_from < self.num_steps,
            f"training.decay_from={self.decay_from} must lie before the last iteration, "
            f"training.num_steps={self.num_steps}.",
        )
        for name in ("sampling_scale", "frame_weight"):
            value = getattr(self, name)
            _require(value > 0, f"training.{name} must be > 0, got {value}.")


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
            _require(value >= 1, f"schedule.{entry.name} must be >= 1, got {value}.")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where the processes of a run come from."""

    launcher: Literal["ray", "local", "torchrun"] = "ray"
    """ray: Ray Train workers; local: this process; torchrun: one process of a torchrun job."""
    num_workers: int | None = None
    """Ray only: ranks; None: one per GPU of the cluster, or two without GPUs (one on one core)."""
    max_failures: int = 3
    """Ray only: how often a lost worker group is started again from the newest checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        _require(
            self.num_workers is None or self.num_workers >= 1,
            f"launch.num_workers must be >= 1, got {self.num_workers}.",
        )
        _require(
            self.num_workers is None or self.launcher == "ray",
            f"launch.num_workers only has an effect with launch.launcher=ray, not "
            f"{self.launcher}; torchrun takes --nproc-per-node.",
        )
        _require(
            self.max_failures >= 0, f"launch.max_failures must be >= 0, got {self.max_failures}."
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole."""

    output: str = "runs/default"
    """Run folder: a path on a disk that all workers see, or a URL (s3://, gs://, az://). Starting
    again with the same folder continues the run."""
    window: WindowConfig = field(default_factory=WindowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


Config = TypeVar("Config")


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a copy with dotted fields replaced, such as {"training.learning_rate": 3e-4}.

    Overrides that must change together (a method and its teachers) may come in any order: they
    are applied as one change and checked once.

    Raises:
        ConfigError: an unknown field (the nearest name is suggested), a value of the wrong type,
            or a combination that the config refuses.
    """
    tree: dict[str, Any] = {}
    for path, value in flatten(overrides):
        node = tree
        *parents, leaf = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
            _require(isinstance(node, dict), f"Config field {path!r} is given twice.")
        _require(leaf not in node, f"Config field {path!r} is given twice.")
        node[leaf] = value
    return _replace_tree(config, tree, "")


def _replace_tree(node: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(type(node))
    names = [f.name for f in fields(node)]
    values = {}
    for key, value in changes.items():
        path = prefix + key
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" Did you mean {prefix + near[0]!r}?" if near else ""
            raise ConfigError(
                f"Unknown config field {path!r}.{hint} Fields here: {', '.join(names)}."
            )
        current = getattr(node, key)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path!r} is a section, not a value; got {value!r}.")
            values[key] = _replace_tree(current, value, path + ".")
        else:
            values[key] = _checked(hints[key], value, path)
    return replace(node, **values)


def _checked(hint: Any, value: Any, path: str) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reasons = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
        raise ConfigError(f"{path}={value!r}: {reasons}.") from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load_overrides(path: str | Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file of partial settings, nested or dotted, as dotted overrides."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"Config file {str(path)!r} does not exist.")
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"Config file {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"Config file {str(path)!r} must hold named settings, got {tree!r}.")
    return dict(flatten(tree))


def to_json(config: RunConfig) -> str:
    """The resolved config as it is saved beside every run."""
    return json.dumps(asdict(config), indent=2) + "\n"


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """Rebuild a run config from `asdict` or from a saved JSON file."""
    return with_overrides(RunConfig(), dict(flatten(tree)))


# What may differ between a checkpoint and the command that continues it: where things lie and run.
# An archive is compared by its manifest hash and a teacher by its weights hash, not by address.
_FREE_TO_CHANGE = (
    "output",
    "launch.",
    "schedule.",
    "data.url",
    "data.mix_with",
    "data.num_workers",
    "data.reading",
    "data.cache_",
    "transfer.teachers",
    "training.num_steps",
)


def resume_conflicts(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """Settings that forbid continuing `saved` as `wanted`, as readable lines; empty when none."""
    before, now = dict(flatten(asdict(saved))), dict(flatten(asdict(wanted)))
    free = set(_FREE_TO_CHANGE)
    if saved.training.decay_from is not None:  # then the last step shapes all steps before it
        free.remove("training.num_steps")
    return [
        f"{path}: the checkpoint has {before[path]!r}, this command {now[path]!r}"
        for path in before
        if not path.startswith(tuple(free)) and before[path] != now[path]
    ]
