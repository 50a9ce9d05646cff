"""What a recipe is, and the runs that every transfer experiment has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

from tmu_dist.config import (
    AdapterConfig,
    DataConfig,
    Method,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    TransferConfig,
    WindowConfig,
)
from tmu_dist.workspace import in_workspace

Archives: TypeAlias = Mapping[str, tuple[str, ...]]
"""By archive URL: arguments of `python -m data_prep` that write it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, and how to make the archives and teachers that it names if they are not there."""

    config: RunConfig
    archives: Archives = field(default_factory=dict)
    teachers: Mapping[str, str] = field(default_factory=dict)
    """By run folder: the recipe that trains this teacher."""


Recipes: TypeAlias = dict[str, Callable[[], Recipe]]


_OF_ONE_SOURCE: dict[str, Method] = {"finetune": "finetune", "l2sp": "l2_sp", "tmu": "tmu"}
_OF_ALL_SOURCES: dict[str, Method] = {
    "knowledge-flow": "knowledge_flow",
    "art": "art",
    "distillation": "distillation",
    "tmu": "tmu",
}
"""Students by the names of their recipes."""


@dataclass(frozen=True, kw_only=True)
class ExperimentSize:
    """What the runs of one experiment have in common at one size; files of recipes add to it."""

    prefix: str
    """First part of the names of recipes, runs and archives."""
    window: WindowConfig
    model: ModelConfig
    training: TrainingConfig
    teacher_steps: int
    schedule: ScheduleConfig
    max_validation_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class OwnNetwork:
    """A source whose frames are not the target's: what its teacher has for itself.

    Its memories still have the student's layers, channels and maps, which takes a patch size of its
    own (paper, Sec. 4); `transfer.adapter` brings the frames to it.
    """

    model: ModelConfig
    window: WindowConfig


def transfer_recipes(
    size: ExperimentSize,
    archive_of: Callable[[str], Archives],
    *,
    sources: Sequence[str],
    target: str,
    larger_target: str | None = None,
    unlike: Mapping[str, OwnNetwork] = MappingProxyType({}),
    sets: Mapping[str, Sequence[str]] = MappingProxyType({}),
    variant: Callable[[str], str] = lambda source: "",
) -> Recipes:
    """Every recipe of a transfer experiment, by name: teachers and students (Table 1).

    Args:
        size: of all runs.
        archive_of: the one archive of a source or of the target; asked when a recipe is called.
        sources: what a teacher each learns from, in the order of the transfer gates.
        target: what all students learn.
        larger_target: the target with more than its full training data, of which `fractions` learns
            a part (Fig. 7); None: there is none.
        unlike: sources whose teachers have a network of their own; a student cannot start from one.
        sets: more students by memory transfer, `tmu-NAME`, each of some sources; these may be
            others than `sources` (Table 4).
        variant: what the name of a teacher's run has after the source's, where a source can be of
            different original files; asked when a recipe is called.
    """

    def recipe(
        name: str, data: str, transfer: TransferConfig, teachers: Mapping[str, str]
    ) -> Recipe:
        archives = archive_of(data)
        (url,) = archives
        config = RunConfig(
            output=in_workspace(f"runs/{size.prefix}-{name}"),
            window=size.window,
            data=DataConfig(url=url, max_validation_samples=size.max_validation_samples),
            model=size.model,
            transfer=transfer,
            training=size.training,
            schedule=size.schedule,
        )
        return Recipe(config=config, archives=archives, teachers=teachers)

    def run_of(source: str) -> str:
        return in_workspace(f"runs/{size.prefix}-teacher-{source}{variant(source)}")

    def teacher(source: str) -> Recipe:
        made = recipe(f"teacher-{source}", source, TransferConfig(method="scratch"), {})
        own = unlike.get(source, OwnNetwork(model=size.model, window=size.window))
        config = replace(
            made.config,
            output=run_of(source),
            model=own.model,
            window=own.window,
            training=replace(made.config.training, num_steps=size.teacher_steps),
        )
        return replace(made, config=config)

    def student(
        name: str,
        method: Method,
        taught_by: Sequence[str] = (),
        data: str = target,
        **settings: Any,
    ) -> Recipe:
        teachers = {run_of(source): f"{size.prefix}-teacher-{source}" for source in taught_by}
        if unlike.keys() & {*taught_by}:
            settings["adapter"] = AdapterConfig(frames="resize", units="any")
        transfer = TransferConfig(method=method, teachers=tuple(teachers), **settings)
        return recipe(name, data, transfer, teachers)

    found: Recipes = {}
    for source in sources:
        found[f"teacher-{source}"] = partial(teacher, source)
        for name, method in _OF_ONE_SOURCE.items():
            if method == "tmu" or source not in unlike:
                found[f"{name}-{source}"] = partial(student, f"{name}-{source}", method, [source])
    for name, taught_by in sets.items():
        for source in taught_by:
            found.setdefault(f"teacher-{source}", partial(teacher, source))
        found[f"tmu-{name}"] = partial(student, f"tmu-{name}", "tmu", taught_by)
    found["scratch"] = partial(student, "scratch", "scratch")
    found["tmu-scratch"] = partial(student, "tmu-scratch", "tmu_scratch", num_slots=len(sources))
    for name, method in _OF_ALL_SOURCES.items():
        found[name] = partial(student, name, method, sources)
    if larger_target is not None:
        found["fractions"] = partial(student, "fractions", "tmu", sources, larger_target)
        name = "fractions-scratch"
        found[name] = partial(student, name, "scratch", (), larger_target)
        for source in sources:
            if source not in unlike:
                name = f"fractions-finetune-{source}"
                found[name] = partial(student, name, "finetune", [source], larger_target)
    return found


def by_whole_name(experiments: Mapping[str, Recipes]) -> Recipes:
    """The recipes of several experiments, given by prefix, by their whole names."""
    return {
        f"{prefix}-{name}": make
        for prefix, own in experiments.items()
        for name, make in own.items()
    }
