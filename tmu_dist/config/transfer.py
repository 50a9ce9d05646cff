"""How knowledge of teachers reaches the student: a section for each method."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Literal, TypeAlias

from tmu_dist.config.checks import require

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
    teachers, `mean` for more (docs/lab_log.md), and always `mean` for M (zigzag)."""
    hidden_from: Literal["fused", "own"] = "fused"
    """`fused`: h reads the memory after transfer (Eq. 5); `own`: before it."""
    zigzag: bool = False
    """Cells with ST-LSTM's spatiotemporal memory M (PredRNN, MIM, E3D-LSTM): imitate and gate in
    the teachers' M as well, by distillers and gates of its own; the paper transfers C alone."""

    def __post_init__(self) -> None:
        require(
            self.gate_kernel_size >= 1 and self.gate_kernel_size % 2 == 1,
            f"transfer.tmu.gate_kernel_size must be odd, got {self.gate_kernel_size}.",
        )
        require(
            self.layers == "all" or len(self.layers) > 0,
            "transfer.tmu.layers is empty: name layers (0 is the lowest), 'all', "
            "or use transfer.method=scratch for a network without TMU layers.",
        )
        require(
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


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Which of the student's tensors start from a teacher's weights, and what of the others."""

    teacher: int | None = None
    """The teacher (from 0) whose weights the student's own tensors start from, beside whatever the
    method does; None: random. finetune and l2_sp always start from their only teacher."""
    unmatched: Literal["refuse", "random"] = "refuse"
    """Tensors of the plain network that the teacher has not under the same name and shape: an
    error, or a random start; the run's log lists them."""

    def __post_init__(self) -> None:
        require(
            self.teacher is None or self.teacher >= 0,
            f"transfer.start.teacher must be >= 0 or left out, got {self.teacher}.",
        )


@dataclass(frozen=True, kw_only=True)
class L2SPConfig:
    """Finetuning with a penalty on the distance from the start (Li et al., ICML 2018)."""

    alpha: float = 1e-3
    """Of alpha / 2 times the squared distance of the started tensors from their start."""
    beta: float = 1e-4
    """Of beta / 2 times the squared norm of the tensors that started at random."""
    include: Literal["all", "weights"] = "all"
    """weights: leave biases, gains, shifts and peepholes (one axis) out of both terms."""
    exclude: tuple[str, ...] = ()
    """Name patterns (as of files, `stack.layers.0.*`) of tensors that neither term sees."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            require(value >= 0, f"transfer.l2_sp.{name} must be >= 0, got {value}.")


@dataclass(frozen=True, kw_only=True)
class KnowledgeFlowConfig:
    """Teachers' hidden states mixed into the student's until it stands alone (Liu et al. 2019)."""

    candidates: Literal["same", "all"] = "same"
    """Layers of each teacher that flow into a layer: the one that teaches it, or all."""
    kernel_size: int = 1
    """Of the transforms of the teachers' hidden states."""
    independence: float = 0.05
    """Highest weight of the term that drives every layer's mixture towards the student itself."""
    ramp_fraction: float = 0.6
    """Part of the iterations over which that weight rises from 0, linearly."""
    consistency: float = 0.0
    """Weight of the distance from the last iterate's predictions; costs a forward pass."""
    alone_fraction: float = 0.1
    """Last part of the iterations that the student is trained alone, exactly as it is tested."""
    mixture_rate: float = 10.0
    """Learning rate of the mixtures, in learning rates of the run."""

    def __post_init__(self) -> None:
        require(
            self.kernel_size >= 1 and self.kernel_size % 2 == 1,
            f"transfer.knowledge_flow.kernel_size must be odd, got {self.kernel_size}.",
        )
        for name in ("independence", "consistency"):
            value = getattr(self, name)
            require(value >= 0, f"transfer.knowledge_flow.{name} must be >= 0, got {value}.")
        for name in ("ramp_fraction", "alone_fraction"):
            value = getattr(self, name)
            require(
                0 <= value <= 1, f"transfer.knowledge_flow.{name} must be in [0, 1], got {value}."
            )
        require(
            self.mixture_rate > 0,
            f"transfer.knowledge_flow.mixture_rate must be > 0, got {self.mixture_rate}.",
        )


@dataclass(frozen=True, kw_only=True)
class ARTConfig:
    """Aligned recurrent transfer: attention over the teachers' states (Cui et al., ICLR 2019)."""

    states: Literal["both", "hidden"] = "both"
    """The student's states that are merged before each step: H and C, or H alone."""
    kernel_size: int = 1
    """Of the merge; attention is always 1x1."""
    window: int | None = None
    """Latest steps that attention sees; None: all up to now."""
    sources: Literal["joint", "sequential"] = "joint"
    """Attention over all teachers at once, or one merge after another with weights of its own."""
    gate: bool = True
    """Gate between the aligned and the attended state; without, the attended one is taken."""

    def __post_init__(self) -> None:
        require(
            self.kernel_size >= 1 and self.kernel_size % 2 == 1,
            f"transfer.art.kernel_size must be odd, got {self.kernel_size}.",
        )
        require(
            self.window is None or self.window >= 1,
            f"transfer.art.window must be >= 1 or left out, got {self.window}.",
        )


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Plain distillation, a control without any new unit (Hinton et al. 2015, FitNets 2015)."""

    features: float = 0.1
    """Weight of the distance of regressed student states from the teachers'."""
    state: Literal["hidden", "memory"] = "hidden"
    """Which states: H, or the memory C as in memory transfer."""
    responses: float = 0.0
    """Weight of the distance of the student's predictions from each teacher's."""

    def __post_init__(self) -> None:
        for name in ("features", "responses"):
            value = getattr(self, name)
            require(value >= 0, f"transfer.distillation.{name} must be >= 0, got {value}.")


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """What counts how much when the student's states are compared with the teachers'."""

    layers: Literal["all"] | tuple[int, ...] = "all"
    """Layers (from 0) whose states are compared; of memory transfer, among the TMU layers."""
    teacher_weights: tuple[float, ...] = ()
    """Weight of each teacher's part of the sum over teachers; empty: 1 each (Eq. 4)."""
    masking: Literal["patch", "memory", "off"] = "patch"
    """Where pixels are missing, an element counts by the share of its patch that was observed now;
    `memory`: or before, fading by half with every step; `off`: fully."""
    scale: Literal["plain", "variance"] = "plain"
    """variance: a teacher's distance in a layer, of a sequence, is divided by the variance of its
    states there, so that all layers and teachers count alike, however large their states are."""

    def __post_init__(self) -> None:
        require(
            self.layers == "all"
            or (
                len(self.layers) > 0
                and min(self.layers) >= 0
                and len(set(self.layers)) == len(self.layers)
            ),
            f"transfer.imitation.layers={self.layers} must be different numbers from 0 on, or all.",
        )
        require(
            all(0 <= weight < math.inf for weight in self.teacher_weights),
            f"transfer.imitation.teacher_weights must be >= 0, got {list(self.teacher_weights)}.",
        )


@dataclass(frozen=True, kw_only=True)
class BetaSchedule:
    """How the weight of the distillation term of Eq. 6 changes; the paper's is constant."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """From transfer.beta to `final`, along a line or half a cosine."""
    start: int = 0
    """Last iteration with transfer.beta."""
    stop: int = 0
    """First iteration with `final`."""
    final: float = 0.0

    def __post_init__(self) -> None:
        require(self.final >= 0, f"transfer.beta_schedule.final must be >= 0, got {self.final}.")
        if self.shape == "constant":
            require(
                (self.start, self.stop, self.final) == (0, 0, 0.0),
                "transfer.beta_schedule.start, stop and final have no effect with "
                "transfer.beta_schedule.shape=constant.",
            )
        else:
            require(
                0 <= self.start < self.stop,
                "transfer.beta_schedule needs 0 <= start < stop, got "
                f"{self.start} and {self.stop}.",
            )

    def at(self, step: int, beta: float) -> float:
        """The weight at an iteration, from `beta` on."""
        if self.shape == "constant":
            return beta
        done = min(max((step - self.start) / (self.stop - self.start), 0.0), 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return beta + (self.final - beta) * done


Method: TypeAlias = Literal[
    "scratch",
    "finetune",
    "l2_sp",
    "knowledge_flow",
    "art",
    "distillation",
    "tmu",
    "tmu_scratch",
]
Control: TypeAlias = Literal["none", "shuffled", "random_weights"]

_START = ("finetune", "l2_sp")
_BESIDE = ("knowledge_flow", "art", "distillation", "tmu")
"""Methods whose teachers run during training."""
_TAUGHT = ("knowledge_flow", "distillation", "tmu")
"""... and are no part of the student."""
_USED_BY: dict[str, tuple[str, ...]] = {
    "start": (*_START, *_BESIDE),
    "adapter": (*_START, *_BESIDE),
    "control": _BESIDE,
    "teacher_input": _TAUGHT,
    "imitation": ("distillation", "tmu"),
    "imitation_start": ("tmu",),
    "beta": ("tmu",),
    "beta_schedule": ("tmu",),
    "tmu": ("tmu", "tmu_scratch"),
    "num_slots": ("tmu_scratch",),
    "l2_sp": ("l2_sp",),
    "knowledge_flow": ("knowledge_flow",),
    "art": ("art",),
    "distillation": ("distillation",),
}
"""Methods that a field of `TransferConfig` has an effect on."""


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """How knowledge of the teachers reaches the student."""

    method: Method = "scratch"
    """scratch: no transfer; finetune, l2_sp: start from the one teacher's weights, l2_sp stays near
    them; knowledge_flow: mix teachers' hidden states in until the student stands alone; art: attend
    to teachers' states, at test time too; distillation: imitate teachers' states or predictions;
    tmu: memory transfer (the paper's method); tmu_scratch: the TMU network with unused slots
    (docs/methods.md)."""
    teachers: tuple[str, ...] = ()
    """Teacher folders, run folders or URLs, in the order of the transfer gates."""
    num_slots: int = 0
    """tmu_scratch only: how many teachers the network has room for."""
    teacher_input: Literal["own", "student", "truth"] = "own"
    """What replaces a frame that the sampling mask hides from a teacher: its own prediction, the
    student's input, or nothing (teachers always see true frames)."""
    control: Control = "none"
    """Teachers that cannot know better (the ledger's controls): shuffled: each sequence is taught
    by what the teachers make of another one of the batch; random_weights: the teachers' networks
    before any training."""
    start: StartConfig = field(default_factory=StartConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    imitation_start: Literal["ones", "memories"] = "ones"
    """Gains and shifts of the distillers' normalisations (Eq. 3) before the first update: 1 and 0,
    or standard deviations and means of the teachers' memories in the first batch."""
    beta: float = 0.1
    """Weight of the distillation term of Eq. 6."""
    beta_schedule: BetaSchedule = field(default_factory=BetaSchedule)
    tmu: TMUConfig = field(default_factory=TMUConfig)
    l2_sp: L2SPConfig = field(default_factory=L2SPConfig)
    knowledge_flow: KnowledgeFlowConfig = field(default_factory=KnowledgeFlowConfig)
    art: ARTConfig = field(default_factory=ARTConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"transfer.beta must be >= 0, got {self.beta}.")
        self._check_teachers()
        default = {entry.name: _default(entry) for entry in fields(self)}
        for name, methods in _USED_BY.items():
            require(
                self.method in methods or getattr(self, name) == default[name],
                f"transfer.{name} only has an effect with transfer.method={', '.join(methods)}, "
                f"not with {self.method}: leave it out.",
            )
        require(
            self.method != "tmu_scratch" or self.num_slots >= 1,
            f"transfer.method=tmu_scratch needs transfer.num_slots >= 1, got {self.num_slots}.",
        )
        require(
            (self.method, self.teacher_input) != ("knowledge_flow", "student"),
            "transfer.teacher_input=student does not go with transfer.method=knowledge_flow, whose "
            "student reads the teachers' states: use own or truth.",
        )
        require(
            (self.method, self.control) != ("art", "shuffled"),
            "transfer.control=shuffled does not go with transfer.method=art, whose teachers are "
            "part of the tested network: use random_weights.",
        )

    def _check_teachers(self) -> None:
        count = len(self.teachers)
        given = f"transfer.teachers={list(self.teachers)}"
        if self.method in ("scratch", "tmu_scratch"):
            require(
                count == 0,
                f"transfer.method={self.method} uses no teachers, got {given}: remove them or "
                "choose another method.",
            )
        elif self.method in _START:
            require(
                count == 1,
                f"transfer.method={self.method} starts from exactly one teacher, got {given}.",
            )
            require(
                self.start.teacher is None,
                f"transfer.start.teacher has no effect with transfer.method={self.method}, which "
                "starts from its only teacher.",
            )
        else:
            require(
                count >= 1,
                f"transfer.method={self.method} needs at least one teacher in transfer.teachers"
                + (
                    "; use tmu_scratch for the same network without teachers."
                    if self.method == "tmu"
                    else "."
                ),
            )
            require(
                self.start.teacher is None or self.start.teacher < count,
                f"transfer.start.teacher={self.start.teacher} is none of the {count} teachers "
                "(from 0).",
            )
            require(
                self.start.teacher is not None or self.start.unmatched == "refuse",
                "transfer.start.unmatched has no effect without transfer.start.teacher.",
            )
        weights = self.imitation.teacher_weights
        require(
            not weights or len(weights) == count,
            f"transfer.imitation.teacher_weights needs one number for each of the {count} "
            f"teachers, got {list(weights)}.",
        )

    @property
    def runs_teachers_beside(self) -> bool:
        """Whether frozen teachers that are no part of the student run during training."""
        return self.method in _TAUGHT

    @property
    def starting_teacher(self) -> int | None:
        """Number of the teacher whose weights the student starts from."""
        return 0 if self.method in _START else self.start.teacher

    @property
    def num_tmu_slots(self) -> int:
        """Teachers that the student's TMU layers have room for (M); 0 means no TMU layers."""
        return len(self.teachers) if self.method == "tmu" else self.num_slots


def _default(entry: Field[object]) -> object:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()
