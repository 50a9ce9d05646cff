"""The runs that tell knowledge from parameters: from the settings of one TMU student to all arms.

Deliberately not here: running anything, or reading any file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal, TypeAlias

from tmu_dist.config import (
    AdapterConfig,
    BetaSchedule,
    ConfigError,
    Method,
    PlacementConfig,
    RunConfig,
    StartConfig,
    TransferConfig,
    identity,
    with_overrides,
)

Group: TypeAlias = Literal["baseline", "start", "features", "memory", "control", "subset"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the student, beside which the others stand."""

    name: str
    label: str
    sources: tuple[str, ...]
    """Short names of the teachers that it uses."""
    group: Group
    config: RunConfig
    run_name: str = ""
    """First part of its runs' folders; empty: its name."""


def make_arms(config: RunConfig, cost_of_transfer: float) -> tuple[Arm, ...]:
    """Every arm of a TMU student, in the order of the paper's Table 1, then the controls.

    All share the student's data, iterations, batches and seed; what an arm does not use of the
    student's transfer settings is left out of its own.

    Args:
        config: of the TMU student with all teachers.
        cost_of_transfer: operations of one of its iterations, in iterations of the plain network.

    Raises:
        ConfigError: that is not what the config is.
    """
    _check(config)
    return (
        *_baselines(config, cost_of_transfer),
        *_other_methods(config),
        *_memory_transfer(config),
        *_controls(config),
    )


def _baselines(config: RunConfig, cost: float) -> Iterator[Arm]:
    base, plain = config.transfer, TransferConfig()
    yield _arm(config, "scratch", "from scratch", "baseline", plain)
    longer = stretched(config, cost)
    label = f"from scratch, {cost:.2f} times the iterations"
    yield _arm(longer, "scratch-longer", label, "baseline", plain)
    slots = TransferConfig(method="tmu_scratch", num_slots=len(base.teachers), tmu=base.tmu)
    yield _arm(config, "tmu-scratch", "TMU network without teachers", "baseline", slots)


def _other_methods(config: RunConfig) -> Iterator[Arm]:
    base = config.transfer
    names = short_names(base.teachers)
    for m, source in enumerate(names):
        transfer = started(base, "finetune", m)
        yield _arm(config, f"finetune-{source}", "finetune", "start", transfer, [m])
    for m, source in enumerate(names):
        transfer = started(base, "l2_sp", m)
        yield _arm(config, f"l2sp-{source}", "L2-SP", "start", transfer, [m])
    everyone = range(len(names))
    flow = beside(base, "knowledge_flow")
    yield _arm(config, "knowledge-flow", "Knowledge Flow", "features", flow, everyone)
    yield _arm(config, "art", "ART", "features", beside(base, "art"), everyone)
    plain = beside(base, "distillation")
    yield _arm(config, "distillation", "feature distillation", "features", plain, everyone)


def _memory_transfer(config: RunConfig) -> Iterator[Arm]:
    """From each source alone, from all, and from all but one; of one source these are one."""
    base = config.transfer
    names = short_names(base.teachers)
    several = names if len(names) > 1 else ()
    for m, source in enumerate(several):
        transfer = subset(base, [m])
        yield _arm(config, f"tmu-alone-{source}", "memory transfer", "subset", transfer, [m])
    yield _arm(config, "tmu", "memory transfer", "memory", base, range(len(names)))
    for m, source in enumerate(several):
        rest = [other for other in range(len(names)) if other != m]
        label = f"memory transfer without {source}"
        yield _arm(config, f"tmu-without-{source}", label, "subset", subset(base, rest), rest)


def _controls(config: RunConfig) -> Iterator[Arm]:
    base = config.transfer
    everyone = range(len(base.teachers))
    silent = replace(base, beta=0.0, beta_schedule=BetaSchedule())
    yield _arm(config, "tmu-beta-0", "TMU, beta = 0", "control", silent, everyone)
    shuffled = replace(base, control="shuffled")
    yield _arm(config, "tmu-shuffled", "TMU, shuffled memories", "control", shuffled, everyone)
    untrained = replace(base, control="random_weights")
    label = "TMU, untrained teachers"
    yield _arm(config, "tmu-random-weights", label, "control", untrained, everyone)


def _arm(
    config: RunConfig,
    name: str,
    label: str,
    group: Group,
    transfer: TransferConfig,
    used: Sequence[int] = (),
) -> Arm:
    """One arm: the student's run with other transfer settings, from the teachers of `used`."""
    sources = short_names(config.transfer.teachers)
    return Arm(
        name=name,
        label=label,
        sources=tuple(sources[m] for m in used),
        group=group,
        config=replace(
            config,
            transfer=transfer,
            placement=config.placement if transfer.runs_teachers_beside else PlacementConfig(),
        ),
    )


def run_configs(
    arms: Sequence[Arm], seeds: Sequence[int], folder: str, contents: Mapping[str, str]
) -> dict[tuple[str, int], RunConfig]:
    """The run of each arm and seed; arms that differ in name alone share one.

    A run's folder is named by its first arm, its seed, and a hash of everything that shapes its
    result: another setting, archive or teacher gives another folder.

    Args:
        arms: all there are, or names of shared runs would depend on which are wanted.
        seeds: the same for every arm.
        folder: of the runs.
        contents: hash of what lies at the address of each archive and teacher.
    """
    first: dict[str, str] = {}
    found = {}
    for arm in arms:
        for seed in seeds:
            config = with_overrides(arm.config, {"training.seed": seed})
            fingerprint = _fingerprint(config, contents)
            name = first.setdefault(fingerprint, arm.run_name or arm.name)
            output = f"{folder}/{name}-seed{seed}-{fingerprint[:8]}"
            found[arm.name, seed] = replace(config, output=output)
    return found


def _fingerprint(config: RunConfig, contents: Mapping[str, str]) -> str:
    shaping = {
        "settings": identity(config),
        "archives": [contents[url] for url in (config.data.url, *config.data.mix_with)],
        "teachers": [contents[address] for address in config.transfer.teachers],
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def short_names(teachers: Sequence[str]) -> tuple[str, ...]:
    """What tells teachers apart: the last part of the address, after "teacher-" if it has that."""
    names = [PurePosixPath(teacher.rstrip("/")).name for teacher in teachers]
    names = [name.rpartition("teacher-")[2] or name for name in names]
    if len(set(names)) < len(names):  # checkpoints of several runs, say
        names = [f"{name}.{m}" for m, name in enumerate(names)]
    return tuple(names)


def stretched(config: RunConfig, factor: float) -> RunConfig:
    """The same training over more iterations.

    Linear scheduled sampling and the fall of the learning rate are stretched with it; the inverse
    sigmoid of `training.sampling_scale` and the warm-up of `training.kl` stay as they are.
    """
    training = config.training

    def longer(steps: int) -> int:
        return max(1, round(steps * factor))

    decay_from = training.decay_from
    return replace(
        config,
        training=replace(
            training,
            num_steps=longer(training.num_steps),
            sampling_stop_step=longer(training.sampling_stop_step),
            decay_from=None if decay_from is None else int(decay_from * factor),
        ),
    )


def started(base: TransferConfig, method: Method, teacher: int) -> TransferConfig:
    """A student that starts from one teacher's weights, as far as they fit.

    Where `adapter` declares differences, tensors that do not fit start at random.
    """
    fits = base.adapter == AdapterConfig()
    return TransferConfig(
        method=method,
        teachers=(base.teachers[teacher],),
        adapter=AdapterConfig(units=base.adapter.units),  # the others are about running beside
        start=StartConfig(unmatched="refuse" if fits else "random"),
    )


def beside(
    base: TransferConfig, method: Literal["knowledge_flow", "art", "distillation"]
) -> TransferConfig:
    """Another method with the same teachers beside the student."""
    made = TransferConfig(
        method=method, teachers=base.teachers, start=base.start, adapter=base.adapter
    )
    if method == "distillation":
        return replace(made, teacher_input=base.teacher_input, imitation=base.imitation)
    if method == "art" or base.teacher_input == "student":  # which both refuse
        return made
    return replace(made, teacher_input=base.teacher_input)


def subset(base: TransferConfig, kept: Sequence[int]) -> TransferConfig:
    """Memory transfer from some of the teachers, in nothing else different."""
    start, weights = base.start, base.imitation.teacher_weights
    if start.teacher is not None:
        start = (
            replace(start, teacher=list(kept).index(start.teacher))
            if start.teacher in kept
            else StartConfig()
        )
    return replace(
        base,
        teachers=tuple(base.teachers[m] for m in kept),
        start=start,
        imitation=replace(
            base.imitation, teacher_weights=tuple(weights[m] for m in kept) if weights else ()
        ),
        # `auto` would change with the number of teachers.
        tmu=replace(base.tmu, combine=base.tmu.combination(len(base.teachers))),
    )


def _check(config: RunConfig) -> None:
    transfer = config.transfer
    if transfer.method != "tmu":
        raise ConfigError(
            f"The ledger is about memory transfer: its recipe needs transfer.method=tmu, not "
            f"{transfer.method}. Recipes that end with -tmu have it."
        )
    if transfer.control != "none" or not transfer.beta:
        raise ConfigError(
            f"transfer.control={transfer.control} and transfer.beta={transfer.beta:g}: both are "
            "arms of every ledger. Leave transfer.control out and transfer.beta above 0."
        )
