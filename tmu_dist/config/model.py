"""The predictive network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from tmu_dist.backbones import BACKBONES
from tmu_dist.config.checks import ConfigError, nearest, require

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
            require(value >= 1, f"model.savp.{name} must be >= 1, got {value}.")
        require(
            self.latent_size >= 0, f"model.savp.latent_size must be >= 0, got {self.latent_size}."
        )
        require(
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
            require(value >= 1, f"model.vpn.{name} must be >= 1, got {value}.")


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
            raise ConfigError(
                f"Unknown model.cell={self.cell!r}.{nearest(self.cell, BACKBONES)} Backbones: "
                f"{', '.join(BACKBONES)}."
            )
        for name in ("num_layers", "hidden_channels", "kernel_size", "patch_size"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name} must be >= 1, got {value}.")
        require(
            self.kernel_size % 2 == 1,
            f"model.kernel_size must be odd so that maps keep their size, got {self.kernel_size}.",
        )
        require(
            self.recall_window is None or self.recall_window >= 1,
            f"model.recall_window must be >= 1 or left out, got {self.recall_window}.",
        )
