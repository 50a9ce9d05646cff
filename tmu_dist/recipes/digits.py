"""Flying digits: teachers learn one and two digits, the student must predict three (Table 1).

Each recipe exists in two sizes: `digits-*` finishes in minutes on two cores, and
`paper-digits-*` is the paper's protocol (Sec. 4 and 4.1). Both exist for every backbone:
`digits-mim-*` is `digits-*` with the MIM network (Table 2), and so on. `*-fractions` is `*-tmu` on
an archive with twice the target's sequences, for `data.fraction` from 0.25 to 2 (Fig. 7), as are
`*-fractions-scratch` and `*-fractions-finetune-2`.

A third size, `study-digits-*`, is what the studies run on small machines (docs/studies.md). Its
only target archive holds twice the sequences, so that a study of fractions shares its runs of all
the data with the others. Full MNIST is used where $TMU_DIST_MNIST names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from tmu_dist.config import (
    AdversarialConfig,
    KLConfig,
    ModelConfig,
    SAVPConfig,
    ScheduleConfig,
    TrainingConfig,
    VPNConfig,
    WindowConfig,
)
from tmu_dist.recipes.base import Archives, ExperimentSize, Recipes, transfer_recipes
from tmu_dist.recipes.originals import MNIST, is_named, originals
from tmu_dist.workspace import in_workspace

SOURCES = ("1", "2")
TARGET = "3"
"""Digits in a sequence."""
LARGER_TARGET = f"{TARGET}-twice"
STACKS = {"predrnn": "predrnn", "mim": "mim", "e3d": "e3d_lstm"}
"""Backbones that differ from ConvLSTM in their cell alone, by their name in recipes."""


@dataclass(frozen=True, kw_only=True)
class Size(ExperimentSize):
    """Everything in which the small and the paper's experiment differ."""

    source_sequences: tuple[int, int, int]
    """Training, validation and test sequences of the 1- and 2-digit archives."""
    target_sequences: tuple[int, int, int]
    archive_arguments: tuple[str, ...]
    archive_prefix: str
    """First part of the archives' names; backbones share archives."""
    target_holds_twice: bool = False
    """The target's archive is the larger one; what is learned from is 100 % of it."""
    may_use_mnist: bool = True
    """Whether $TMU_DIST_MNIST is heeded: not in the size whose results are committed."""


SMALL = Size(
    prefix="digits",
    archive_prefix="digits",
    source_sequences=(2000, 100, 100),
    # A target with few sequences: the situation that the paper's method is for.
    target_sequences=(200, 100, 500),
    may_use_mnist=False,
    archive_arguments=(
        *("--frames", "10"),
        *("--frame-size", "32"),
        *("--digit-size", "14"),
        *("--speed", "1.5", "2.5"),
    ),
    window=WindowConfig(num_input_frames=5, num_target_frames=5),
    model=ModelConfig(num_layers=2, hidden_channels=32),
    training=TrainingConfig(num_steps=500, batch_size=8, sampling_stop_step=250),
    teacher_steps=600,
    schedule=ScheduleConfig(log_every=10, validate_every=50, checkpoint_every=100),
)

PAPER = Size(
    prefix="paper-digits",
    archive_prefix="paper-digits",
    source_sequences=(10_000, 2_000, 3_000),
    target_sequences=(10_000, 2_000, 3_000),
    archive_arguments=(),
    window=WindowConfig(),
    model=ModelConfig(),
    training=TrainingConfig(),
    teacher_steps=80_000,
    schedule=ScheduleConfig(),
)


STUDY_STEPS, STUDY_TEACHER_STEPS = 1_000, 4_000
"""Iterations of students and of teachers at the small scale of studies."""
STUDY_CLIP_TEACHER_STEPS = 2_000
"""Iterations of teachers where sources are clips, of which there are a few hundred sequences."""
STUDY_TRAINING = TrainingConfig(
    num_steps=STUDY_STEPS, batch_size=8, sampling_stop_step=STUDY_STEPS // 2
)
STUDY_SCHEDULE = ScheduleConfig(log_every=20, validate_every=100, checkpoint_every=200)
STUDY = replace(
    SMALL,
    prefix="study-digits",
    archive_prefix="study-digits",
    source_sequences=(10_000, 200, 500),
    target_sequences=(300, 200, 500),
    target_holds_twice=True,
    may_use_mnist=True,
    # Of maps with 8 places on a side; the paper's have 16, and filters of 5.
    model=replace(SMALL.model, kernel_size=3),
    training=STUDY_TRAINING,
    teacher_steps=STUDY_TEACHER_STEPS,
    schedule=STUDY_SCHEDULE,
)
STUDY_STACKS = ("predrnn", "mim")
"""Backbones of Table 2."""

SMALL_SAVP = ModelConfig(
    cell="savp", savp=SAVPConfig(base_channels=8, latent_size=8, posterior_channels=16)
)
SMALL_VPN = ModelConfig(
    cell="vpn",
    hidden_channels=16,
    kernel_size=3,
    vpn=VPNConfig(channels=8, num_encoder_blocks=2, num_decoder_blocks=3, likelihood="bernoulli"),
)

SAVP_TRAINING = TrainingConfig(
    num_steps=300_000,
    batch_size=16,
    learning_rate=2e-4,
    decay_from=200_000,
    adam_beta1=0.5,
    reverse_input="off",
    sampling="inverse_sigmoid",
    frame_weight=100.0,
    adversarial=AdversarialConfig(video_weight=0.1, feature_weight=10.0),
)
"""As published (Lee et al. 2018)."""
SMALL_SAVP_TRAINING = replace(
    SAVP_TRAINING,
    num_steps=SMALL.training.num_steps,
    batch_size=SMALL.training.batch_size,
    learning_rate=1e-3,
    decay_from=None,
    sampling_scale=60.0,
    frame_loss="l2",
    frame_weight=300.0,
    kl=KLConfig(weight=1.0, anneal_from=0, anneal_until=100),
    adversarial=replace(SAVP_TRAINING.adversarial, base_channels=4),
)
"""Squared error: of a few bright digits, black frames are a minimum of the absolute error that a
short training does not leave (docs/lab_log.md)."""


def sizes() -> list[Size]:
    """Both sizes, for every backbone."""
    found = [SMALL, PAPER]
    for size in (SMALL, PAPER):
        found += [
            _with(size, name, replace(size.model, cell=cell)) for name, cell in STACKS.items()
        ]
    small_vpn = replace(SMALL.training, sampling="always", reverse_input="off")
    paper_vpn = replace(PAPER.training, sampling="always", learning_rate=3e-4)
    return [
        *found,
        _with(SMALL, "savp", SMALL_SAVP, SMALL_SAVP_TRAINING),
        _with(PAPER, "savp", ModelConfig(cell="savp"), SAVP_TRAINING),
        _with(SMALL, "vpn", SMALL_VPN, small_vpn),
        _with(PAPER, "vpn", ModelConfig(cell="vpn"), paper_vpn),
    ]


def experiments() -> dict[str, Recipes]:
    """Every recipe of the two sizes, by prefix, then by name."""
    return {size.prefix: _recipes(size) for size in sizes()}


def study_experiments() -> dict[str, Recipes]:
    """Those of the studies' small scale."""
    stacks = [_with(STUDY, name, replace(STUDY.model, cell=STACKS[name])) for name in STUDY_STACKS]
    return {size.prefix: _recipes(size) for size in (STUDY, *stacks)}


def _recipes(size: Size) -> Recipes:
    return transfer_recipes(
        size,
        partial(_archive, size),
        sources=SOURCES,
        target=TARGET,
        larger_target=LARGER_TARGET,
    )


def _with(
    size: Size, backbone: str, model: ModelConfig, training: TrainingConfig | None = None
) -> Size:
    """The same experiment with another backbone."""
    training = training or size.training
    same_length = training.num_steps == size.training.num_steps
    return replace(
        size,
        prefix=f"{size.prefix}-{backbone}",
        model=model,
        training=training,
        teacher_steps=size.teacher_steps if same_length else training.num_steps,
    )


def _archive(size: Size, name: str) -> Archives:
    """One archive; both of the target validate and test on the same sequences."""
    if name == TARGET and size.target_holds_twice:
        name = LARGER_TARGET
    url = in_workspace(f"archives/{size.archive_prefix}-{name}")
    train, val, test = size.source_sequences if name in SOURCES else size.target_sequences
    full: tuple[str, ...] = ()
    if name == LARGER_TARGET:
        train, full = 2 * train, ("--full-train-samples", str(train))
    arguments = (
        *("moving-mnist", "--digits", name if name in SOURCES else TARGET, "--out", url),
        *("--train", str(train), "--val", str(val), "--test", str(test)),
        *full,
        *size.archive_arguments,
        *(mnist() if size.may_use_mnist else ()),
    )
    return {url: arguments}


def mnist() -> tuple[str, ...]:
    """Arguments for the user's own copy of MNIST, if there is one."""
    return ("--mnist", originals(MNIST)) if is_named(MNIST) else ()
