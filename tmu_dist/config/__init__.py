"""The configuration of a run: frozen dataclasses that check themselves.

`run` has the whole and the one way to change a field by name; `data`, `model`, `transfer`,
`training`, `compute` and `scale` have its sections.

Deliberately not here: named runs (`tmu_dist.recipes`), and anything that needs torch or ray.
"""

from tmu_dist.config.checks import ConfigError
from tmu_dist.config.compute import ComputeConfig
from tmu_dist.config.data import DataConfig, WindowConfig
from tmu_dist.config.model import Backbone, ModelConfig, SAVPConfig, VPNConfig
from tmu_dist.config.run import (
    RunConfig,
    flatten,
    from_dict,
    identity,
    load_overrides,
    parse_overrides,
    resume_conflicts,
    to_json,
    with_overrides,
)
from tmu_dist.config.scale import FaultConfig, PlacementConfig, ScaleConfig
from tmu_dist.config.training import (
    AdversarialConfig,
    KLConfig,
    LaunchConfig,
    Precision,
    ScheduleConfig,
    TrainingConfig,
)
from tmu_dist.config.transfer import (
    AdapterConfig,
    ARTConfig,
    BetaSchedule,
    Control,
    DistillationConfig,
    ImitationConfig,
    KnowledgeFlowConfig,
    L2SPConfig,
    Method,
    StartConfig,
    TMUConfig,
    TransferConfig,
)

__all__ = [
    "ARTConfig",
    "AdapterConfig",
    "AdversarialConfig",
    "Backbone",
    "BetaSchedule",
    "ComputeConfig",
    "ConfigError",
    "Control",
    "DataConfig",
    "DistillationConfig",
    "FaultConfig",
    "ImitationConfig",
    "KLConfig",
    "KnowledgeFlowConfig",
    "L2SPConfig",
    "LaunchConfig",
    "Method",
    "ModelConfig",
    "PlacementConfig",
    "Precision",
    "RunConfig",
    "SAVPConfig",
    "ScaleConfig",
    "ScheduleConfig",
    "StartConfig",
    "TMUConfig",
    "TrainingConfig",
    "TransferConfig",
    "VPNConfig",
    "WindowConfig",
    "flatten",
    "from_dict",
    "identity",
    "load_overrides",
    "parse_overrides",
    "resume_conflicts",
    "to_json",
    "with_overrides",
]
