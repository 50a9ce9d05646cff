"""Questions about memory transfer that the paper leaves open, on the targets of Tables 1 and 4.

Deliberately not here: the paper's own tables (`digits`, `people_and_rain`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmu_dist.config import RunConfig
from tmu_dist.recipes import radar
from tmu_dist.study import digits, people_and_rain
from tmu_dist.study.design import CSI, MAE, MSE, SSIM, Claim, Row, Study

SMALL_FRACTIONS = (0.05, 0.1)
"""Below those of Figure 7."""

_MEAN: Mapping[str, Any] = {"transfer.tmu.combine": "mean"}
_MEMORIES: Mapping[str, Any] = {"transfer.imitation_start": "memories"}


def _started_from(teacher: int) -> Mapping[str, Any]:
    return {"transfer.start.teacher": teacher}


def _as_teacher(teacher: int) -> Mapping[str, Any]:
    """Settings of a student that begins as one of its teachers."""
    return {**_MEAN, **_started_from(teacher), **_MEMORIES}


def _claim(key: str, text: str, *pairs: tuple[str, str], scores: tuple[str, ...] = ()) -> Claim:
    return Claim(key=key, text=text, where="ours", pairs=pairs, scores=scores)


def _digits_row(key: str, label: str, settings: Mapping[str, Any] | None = None) -> Row:
    """Memory transfer from both sources to three digits, with other settings."""
    return Row(
        key=key, label=label, sources="both", recipe="digits-fractions", settings=settings or {}
    )


def _last_step(config: RunConfig) -> int:
    return config.training.num_steps


def _top_layer(config: RunConfig) -> tuple[int, ...]:
    return (config.model.num_layers - 1,)


_AS_SECOND = _as_teacher(1)
_FALLING: Mapping[str, Any] = {
    "transfer.beta_schedule.shape": "cosine",
    "transfer.beta_schedule.stop": _last_step,
}


def beyond_digits() -> Study:
    """A student that begins as a teacher, and very little data, on the target of Table 1."""
    return Study(
        name="beyond",
        title="Beyond the paper: flying digits, beginning as a teacher, and very little data",
        question="What does a student gain that begins as one of its teachers, and what is "
        "memory transfer worth where there is hardly any data?",
        scores=(MSE, SSIM),
        rows=(
            Row(key="scratch", label="from scratch", recipe="digits-fractions-scratch"),
            Row(key="finetune-2", label="finetune", sources="2 digits",
                recipe="digits-fractions-finetune-2"),
            _digits_row("tmu", "memory transfer"),
            _digits_row("as-teacher", "begins as the second teacher (start, memories, mean)",
                        _AS_SECOND),
            _digits_row("as-teacher-falling", "begins as the second teacher, beta falls to 0",
                        {**_AS_SECOND, **_FALLING}),
            # With beta 0 nobody would look at memories, and imitations would start otherwise.
            _digits_row("as-teacher-alone", "begins as the second teacher, beta 0.0001",
                        {**_AS_SECOND, "transfer.beta": 1e-4}),
            *digits.fraction_rows(SMALL_FRACTIONS),
        ),
        claims=(
            _claim("as-teacher", "Memory transfer that begins as a teacher (its weights, a mean in "
                   "Eq. 5, imitations with the statistics of the memories) is better than one that "
                   "begins at random.", ("as-teacher", "tmu")),
            _claim("beats-finetuning", "Memory transfer that begins as a teacher is better than "
                   "finetuning from that teacher.", ("as-teacher", "finetune-2")),
            _claim("as-teacher-falling", "If it begins as a teacher, a beta that falls to 0 is "
                   "better than a constant one.", ("as-teacher-falling", "as-teacher")),
            _claim("as-teacher-imitates", "If it begins as a teacher, imitation still helps.",
                   ("as-teacher", "as-teacher-alone")),
            _claim("little-data", "With 5 and 10 % of the data memory transfer is better than "
                   "training from scratch.", *digits.better_at(SMALL_FRACTIONS, ("scratch",))),
            _claim("little-data-finetuning", "With 5 and 10 % of the data memory transfer is "
                   "better than finetuning.",
                   *digits.better_at(SMALL_FRACTIONS, ("finetune-1", "finetune-2"))),
        ),
        notes=digits.NOTES,
    )  # fmt: skip


def beyond_parts() -> Study:
    """What of memory transfer is needed, one thing changed at a time."""
    finetuned = (row for row in digits.fraction_rows(SMALL_FRACTIONS) if "finetune-2" in row.key)
    return Study(
        name="beyond-parts",
        title="Beyond the paper: flying digits, memory transfer taken apart",
        question="What of memory transfer is needed, and what would do better?",
        scores=(MSE, SSIM),
        rows=(
            _digits_row("tmu", "memory transfer"),
            _digits_row("mean", "Eq. 5 as a mean", _MEAN),
            _digits_row("falling", "beta falls to 0 (half a cosine)", _FALLING),
            _digits_row("variance", "distances in the teachers' variance",
                        {"transfer.imitation.scale": "variance"}),
            _digits_row("started", "started from the second teacher", _started_from(1)),
            _digits_row("memories", "imitations start as the memories are", _MEMORIES),
            _digits_row("lowest", "TMU in the lowest layer only", {"transfer.tmu.layers": (0,)}),
            _digits_row("top", "TMU in the top layer only", {"transfer.tmu.layers": _top_layer}),
            _digits_row("beta-0", "teachers that are not imitated", {"transfer.beta": 0.0}),
            _digits_row("shuffled", "memories of another sequence",
                        {"transfer.control": "shuffled"}),
            _digits_row("untrained", "untrained teachers",
                        {"transfer.control": "random_weights"}),
            *finetuned,
            *(_digits_row(f"as-teacher-{100 * fraction:g}",
                          f"begins as the second teacher, {100 * fraction:g} %",
                          {**_AS_SECOND, "data.fraction": fraction})
              for fraction in SMALL_FRACTIONS),
        ),
        claims=(
            _claim("mean", "A mean in Eq. 5 is better than the sum as printed.", ("mean", "tmu")),
            _claim("falling", "A beta that falls to 0 is better than a constant one.",
                   ("falling", "tmu")),
            _claim("started", "Memory transfer that starts from a teacher's weights is better.",
                   ("started", "tmu")),
            _claim("variance", "Distances in units of the teachers' variance are better than plain "
                   "ones.", ("variance", "tmu")),
            _claim("memories", "Imitations that start with the statistics of the memories are "
                   "better.", ("memories", "tmu")),
            _claim("all-layers", "TMU layers everywhere are better than one.", ("tmu", "lowest"),
                   ("tmu", "top")),
            _claim("knowledge", "Memory transfer is better than with teachers that cannot know "
                   "better.", ("tmu", "beta-0"), ("tmu", "shuffled"), ("tmu", "untrained")),
            _claim("little-data-as-teacher", "With 5 and 10 % of the data memory transfer that "
                   "begins as a teacher is better than finetuning from that teacher.",
                   *digits.better_at(SMALL_FRACTIONS, ("finetune-2",), better="as-teacher")),
        ),
        notes=digits.NOTES,
        reference="",
    )  # fmt: skip


def beyond_rain() -> Study:
    """Whether radar of other countries helps, on the target of Table 4."""

    def row(key: str, label: str, sources: str, teacher: int | None = None) -> Row:
        return Row(
            key=key,
            label=label,
            sources=sources,
            recipe=f"radar-{key}" if teacher is None else "radar-tmu",
            settings={} if teacher is None else _as_teacher(teacher),
        )

    scores = (MSE, MAE, CSI)
    return Study(
        name="beyond-rain",
        title="Beyond the paper: rain of other countries",
        question="Does radar of other countries beat training on the target alone, and how is it "
        "best used?",
        scores=scores,
        rows=(
            row("scratch", "from scratch", "none"),
            row("tmu-scratch", "TMU network from scratch", "none"),
            row("finetune-fmi", "finetune", "FMI"),
            row("finetune-mch", "finetune", "MeteoSwiss"),
            row("tmu", "memory transfer", "both"),
            row("as-mch", "begins as the teacher of MeteoSwiss (start, memories, mean)", "both",
                teacher=radar.SOURCES.index("mch")),
            row("as-fmi", "begins as the teacher of FMI (start, memories, mean)", "both",
                teacher=radar.SOURCES.index("fmi")),
        ),
        claims=(
            _claim("finetuning", "Finetuning from radar of either country is better than training "
                   "on the target alone.", ("finetune-fmi", "scratch"), ("finetune-mch", "scratch"),
                   scores=scores),
            _claim("knowledge", "Memory transfer is better than the same network from scratch.",
                   ("tmu", "tmu-scratch"), scores=scores),
            _claim("as-teacher", "Memory transfer that begins as either teacher is better than one "
                   "that begins at random.", ("as-fmi", "tmu"), ("as-mch", "tmu"), scores=scores),
            _claim("helps", "Memory transfer that begins as either teacher is better than training "
                   "on the target alone.", ("as-fmi", "scratch"), ("as-mch", "scratch"),
                   scores=scores),
            _claim("beats-finetuning", "Memory transfer that begins as a teacher is better than "
                   "finetuning from that teacher.", ("as-fmi", "finetune-fmi"),
                   ("as-mch", "finetune-mch"), scores=scores),
        ),
        notes=people_and_rain.radar_notes(),
    )  # fmt: skip
