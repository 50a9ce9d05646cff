"""People in motion: Human3.6M as the target of KTH and Weizmann (Table 3), and KTH as a target of
Human3.6M and two flying digits (Table 6).

`paper-human-*` and `paper-kth-*` have the paper's sizes (Sec. 4 and 4.2), `study-human-*` and
`study-kth-*` those of the studies' small scale, which differ in values only. Where the original
files lie is said by $TMU_DIST_HUMAN36M, $TMU_DIST_WEIZMANN and $TMU_DIST_KTH; at the small scale
$TMU_DIST_CLIPS may stand in for the first two (`clips`).

The paper says nothing of how SAVP was trained: here with its own losses and rates, at the paper's
size for as many iterations as the other networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from tmu_dist.config import KLConfig, ModelConfig, ScheduleConfig, TrainingConfig, WindowConfig
from tmu_dist.recipes import digits
from tmu_dist.recipes.base import (
    Archives,
    ExperimentSize,
    OwnNetwork,
    Recipes,
    transfer_recipes,
)
from tmu_dist.recipes.clips import (
    digits_archive,
    human_archive,
    kth_archive,
    stands_in,
    weizmann_archive,
)
from tmu_dist.recipes.originals import HUMAN36M, WEIZMANN
from tmu_dist.workspace import in_workspace

HUMAN_WINDOW = WindowConfig(num_input_frames=4, num_target_frames=4)


@dataclass(frozen=True, kw_only=True)
class Size(ExperimentSize):
    """Everything in which the small and the paper's experiment differ."""

    side: int
    """Of the frames, in pixels."""
    archive_prefix: str
    """First part of the archives' names; backbones share archives."""
    kth_timing: tuple[str, ...] = ()
    """Arguments that say how far apart frames and sequences of KTH are; none: the usual ones."""
    may_stand_in: bool
    """Whether other clips may be taken for data sets that are not there."""
    digit_sequences: tuple[int, int, int]
    """Training, validation and test sequences of two digits as a source."""
    digit_patch: int
    """Patch size of their teacher; the side of its frames is that many times that of the maps."""


STUDY_HUMAN = Size(
    prefix="study-human",
    archive_prefix="study",
    side=32,
    # People who hardly move from frame to frame are forecast best by standing still.
    kth_timing=("--frame-step", "3", "--stride", "5"),
    may_stand_in=True,
    digit_sequences=digits.STUDY.source_sequences,
    digit_patch=digits.STUDY.model.patch_size,
    window=HUMAN_WINDOW,
    model=digits.STUDY.model,
    training=digits.STUDY_TRAINING,
    teacher_steps=digits.STUDY_CLIP_TEACHER_STEPS,
    schedule=digits.STUDY_SCHEDULE,
    max_validation_samples=64,
)
PAPER_HUMAN = Size(
    prefix="paper-human",
    archive_prefix="paper",
    side=128,
    may_stand_in=False,
    digit_sequences=digits.PAPER.source_sequences,
    digit_patch=2,
    window=HUMAN_WINDOW,
    model=ModelConfig(),
    training=TrainingConfig(),
    teacher_steps=80_000,
    schedule=ScheduleConfig(),
)
STUDY_KTH = replace(
    STUDY_HUMAN,
    prefix="study-kth",
    window=WindowConfig(num_input_frames=5, num_target_frames=5),
)
PAPER_KTH = replace(PAPER_HUMAN, prefix="paper-kth", window=WindowConfig())

STUDY_SAVP_STEPS, STUDY_SAVP_TEACHER_STEPS = 400, 800
"""An iteration costs about five of ConvLSTM's, and SAVP moves pixels from its first one on."""
STUDY_SAVP_TRAINING = replace(
    digits.SMALL_SAVP_TRAINING,
    num_steps=STUDY_SAVP_STEPS,
    sampling_scale=digits.SMALL_SAVP_TRAINING.sampling_scale
    * STUDY_SAVP_STEPS
    / digits.SMALL_SAVP_TRAINING.num_steps,
)
PAPER_SAVP_TRAINING = replace(
    digits.SAVP_TRAINING,
    num_steps=PAPER_HUMAN.training.num_steps,
    batch_size=PAPER_HUMAN.training.batch_size,
    decay_from=None,
    # Its place in the published 300,000 iterations.
    kl=KLConfig(anneal_from=13_300, anneal_until=26_700),
)


def experiments() -> dict[str, Recipes]:
    """Every recipe of this file, by prefix, then by name."""
    human = [
        *(STUDY_HUMAN, _with(STUDY_HUMAN, "mim"), PAPER_HUMAN, _with(PAPER_HUMAN, "mim")),
        replace(
            STUDY_HUMAN,
            prefix="study-human-savp",
            model=digits.SMALL_SAVP,
            training=STUDY_SAVP_TRAINING,
            teacher_steps=STUDY_SAVP_TEACHER_STEPS,
        ),
        replace(
            PAPER_HUMAN,
            prefix="paper-human-savp",
            model=ModelConfig(cell="savp"),
            training=PAPER_SAVP_TRAINING,
        ),
    ]
    return {size.prefix: _human(size) for size in human} | {
        size.prefix: _kth(size) for size in (STUDY_KTH, PAPER_KTH)
    }


def _with(size: Size, cell: str) -> Size:
    return replace(size, prefix=f"{size.prefix}-{cell}", model=replace(size.model, cell=cell))


def _human(size: Size) -> Recipes:
    return transfer_recipes(
        size,
        partial(_human_archive, size),
        sources=("kth", "weizmann"),
        target="human",
        variant=lambda source: _variant(size, WEIZMANN) if source == "weizmann" else "",
    )


def _kth(size: Size) -> Recipes:
    return transfer_recipes(
        size,
        partial(_kth_archive, size),
        sources=("human", "mnist2"),
        target="kth",
        unlike={
            "human": OwnNetwork(model=size.model, window=HUMAN_WINDOW),
            "mnist2": OwnNetwork(
                model=replace(size.model, patch_size=size.digit_patch), window=size.window
            ),
        },
        variant=lambda source: _variant(size, HUMAN36M) if source == "human" else "",
    )


def _variant(size: Size, variable: str) -> str:
    """A teacher of other clips is another teacher."""
    return "-clips" if size.may_stand_in and stands_in(variable) else ""


def _human_archive(size: Size, name: str) -> Archives:
    if name == "kth":
        url = in_workspace(f"archives/{size.archive_prefix}-kth-rgb")
        return kth_archive(
            url,
            frames=size.window.num_frames,
            side=size.side,
            colour="rgb",
            timing=size.kth_timing,
        )
    make = human_archive if name == "human" else weizmann_archive
    return make(size.archive_prefix, side=size.side, may_stand_in=size.may_stand_in)


def _kth_archive(size: Size, name: str) -> Archives:
    frames, url = size.window.num_frames, in_workspace(f"archives/{size.prefix}-{name}")
    match name:
        case "human":
            return human_archive(
                size.archive_prefix, side=size.side, may_stand_in=size.may_stand_in
            )
        case "mnist2":
            side = size.side // size.model.patch_size * size.digit_patch
            return digits_archive(url, frames=frames, side=side, sequences=size.digit_sequences)
        case _:
            return kth_archive(url, frames=frames, side=size.side, timing=size.kth_timing)
