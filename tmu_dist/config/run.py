"""A whole run, and the one way to change a field of it by name.

YAML files, resumed runs and searches come through `with_overrides`, so an unknown name or a wrong
type fails the same way everywhere and every check runs again. Command-line flags are parsed by tyro
from the same dataclasses (`tmu_dist.train`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from tmu_dist.config.checks import ConfigError, nearest, require
from tmu_dist.config.compute import ComputeConfig
from tmu_dist.config.data import DataConfig, WindowConfig
from tmu_dist.config.model import ModelConfig
from tmu_dist.config.scale import FaultConfig, PlacementConfig, ScaleConfig
from tmu_dist.config.training import LaunchConfig, ScheduleConfig, TrainingConfig
from tmu_dist.config.transfer import TransferConfig


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
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        _check_scale(self)
        _check_placement(self)
        _check_start(self)


def _check_scale(config: RunConfig) -> None:
    scale = config.scale
    for name in ("num_workers", "cpus_per_worker"):
        require(
            getattr(scale, name) is None or config.launch.launcher == "ray",
            f"scale.{name} only has an effect with launch.launcher=ray, not "
            f"{config.launch.launcher}; torchrun takes --nproc-per-node.",
        )
    if scale.sequences_at_once is None:
        return
    require(
        not config.training.adversarial.is_on,
        "scale.sequences_at_once does not go with training.adversarial: discriminators learn from "
        "a rank's whole batch, and before the student does.",
    )
    require(
        not config.transfer.knowledge_flow.consistency,
        "scale.sequences_at_once does not go with transfer.knowledge_flow.consistency, which "
        "compares with the last iterate once an update.",
    )
    require(
        config.transfer.control != "shuffled" or scale.sequences_at_once % 2 == 0,
        "transfer.control=shuffled exchanges sequences in pairs, which must be learned from at "
        f"once: scale.sequences_at_once must be even, got {scale.sequences_at_once}.",
    )


def _check_start(config: RunConfig) -> None:
    if config.transfer.imitation_start == "ones":
        return
    require(
        config.model.norm_affine != "none",
        "transfer.imitation_start=memories gives normalisations gains and shifts to begin with, "
        "and with model.norm_affine=none they have none.",
    )
    require(
        config.transfer.adapter.channels == "same",
        "transfer.imitation_start=memories needs teachers with the student's channels, not "
        "transfer.adapter.channels=project: there an imitation is not what is compared.",
    )


def _check_placement(config: RunConfig) -> None:
    placement, transfer = config.placement, config.transfer
    require(
        placement == PlacementConfig() or transfer.runs_teachers_beside,
        f"placement has no effect with transfer.method={transfer.method}: no teacher runs beside "
        "its student." + (" ART's teachers are a part of it." if transfer.method == "art" else ""),
    )
    require(
        placement.kind != "cached" or transfer.control != "random_weights",
        "placement.kind=cached keeps what trained teachers tell: use another kind with "
        "transfer.control=random_weights.",
    )
    require(
        placement.kind != "cached"
        or transfer.teacher_input == "truth"
        or config.training.sampling == "always",
        "placement.kind=cached needs teachers that see the same frames in every epoch: set "
        "transfer.teacher_input=truth (they read true frames only) or training.sampling=always.",
    )


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
            require(isinstance(node, dict), f"Config field {path!r} is given twice.")
        require(leaf not in node, f"Config field {path!r} is given twice.")
        node[leaf] = value
    return _replace_tree(config, tree, "")


def _replace_tree(node: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(type(node))
    names = [f.name for f in fields(node)]
    values = {}
    for key, value in changes.items():
        path = prefix + key
        if key not in names:
            raise ConfigError(
                f"Unknown config field {path!r}.{nearest(key, names, prefix=prefix)} Fields here: "
                f"{', '.join(names)}."
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
    return parse_overrides(file.read_text(), where=str(path))


def parse_overrides(text: str, *, where: str) -> dict[str, Any]:
    """What `load_overrides` does with what is in the file."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Config file {where!r} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"Config file {where!r} must hold named settings, got {tree!r}.")
    return dict(flatten(tree))


def to_json(config: RunConfig) -> str:
    """The resolved config as it is saved beside every run."""
    return json.dumps(asdict(config), indent=2) + "\n"


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """Rebuild a run config from `asdict` or from a saved JSON file."""
    return with_overrides(RunConfig(), dict(flatten(tree)))


# Where things lie and run. An archive is known by its manifest hash and a teacher by its weights
# hash, not by address.
_WHERE_AND_HOW = (
    "output",
    "launch.",
    "data.url",
    "data.mix_with",
    "data.num_workers",
    "data.reading",
    "data.cache_",
    "transfer.teachers",
    "compute.",
    "scale.",
    "faults.",
    *(f"placement.{name}" for name in ("kind", "group", "memory_gib", "ahead", "cache")),
)
# What may differ between a checkpoint and the command that continues it.
_FREE_TO_CHANGE = (*_WHERE_AND_HOW, "schedule.", "training.num_steps")
# Which weights can be selected depends on when they are validated; the rest of a schedule is free.
_WITHOUT_EFFECT = (
    *_WHERE_AND_HOW,
    "schedule.log_every",
    "schedule.checkpoint_every",
    "schedule.keep_checkpoints",
)


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that shape what a run finds, by dotted name.

    Two runs with the same identity find the same from the same archives and teachers.
    """
    return {
        path: value
        for path, value in flatten(asdict(config))
        if not path.startswith(_WITHOUT_EFFECT)
    }


def resume_conflicts(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """Settings that forbid continuing `saved` as `wanted`, as readable lines; empty when none."""
    before, now = dict(flatten(asdict(saved))), dict(flatten(asdict(wanted)))
    free = set(_FREE_TO_CHANGE)
    # Here the last step shapes all steps before it.
    if saved.training.decay_from is not None or saved.transfer.method == "knowledge_flow":
        free.remove("training.num_steps")
    return [
        f"{path}: the checkpoint has {before[path]!r}, this command {now[path]!r}"
        for path in before
        if not path.startswith(tuple(free)) and before[path] != now[path]
    ]
