"""From settings to a method: what does not go together is refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tmu_dist.config import ConfigError, RunConfig, with_overrides
from tmu_dist.data.loader import open_archive
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import DataFacts, TeacherError
from tmu_dist.transfer.prepare import PreparedTransfer, prepare_transfer


def prepare(config: RunConfig) -> PreparedTransfer:
    manifest = open_archive(config.data.url).manifest
    frame = FrameShape(channels=manifest.channels, height=manifest.height, width=manifest.width)
    return prepare_transfer(config, frame, DataFacts.of(manifest), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {
                "transfer.method": "knowledge_flow",
                "transfer.knowledge_flow.consistency": 0.1,
                "training.reverse_input": "average",
            },
            ConfigError,
            "two passes share an update",
        ),
        (
            {"transfer.tmu.layers": (0,), "transfer.imitation.layers": (0, 1)},
            ConfigError,
            r"\[1\] are no TMU layers",
        ),
        ({"transfer.imitation.layers": (0, 5)}, ConfigError, "teachers could teach"),
        (
            {"model.cell": "predrnn", "transfer.tmu.zigzag": True},
            TeacherError,
            "has no memory M to teach",
        ),
        ({"transfer.tmu.zigzag": True}, (ConfigError, TeacherError), "zigzag"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmu_config: RunConfig, changes: dict[str, Any], error: Any, message: str
) -> None:
    config = with_overrides(tmu_config, changes)
    with pytest.raises(error, match=message):
        prepare(config)


@pytest.mark.parametrize("method", ["finetune", "l2_sp"])
def test_of_what_is_only_started_from_only_the_units_matter(
    tmu_config: RunConfig, method: str
) -> None:
    transfer = {"transfer.method": method, "transfer.teachers": tmu_config.transfer.teachers[:1]}
    config = with_overrides(tmu_config, transfer)
    prepared = prepare(config)
    assert prepared.resident_parameters == () and prepared.start is not None
    adapter = replace(config.transfer.adapter, grid="resample")
    with pytest.raises(TeacherError, match="of transfer.adapter only units has an effect"):
        prepare(replace(config, transfer=replace(config.transfer, adapter=adapter)))
