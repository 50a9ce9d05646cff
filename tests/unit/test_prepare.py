"""From settings to a method: what does not go together is refused before anything is trained."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tmu_dist.collectives import RankGroup
from tmu_dist.config import ConfigError, RunConfig, with_overrides
from tmu_dist.data.loader import open_archive
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.bank import ReplicatedBank
from tmu_dist.teachers.card import DataFacts, TeacherError
from tmu_dist.teachers.placed import PlacedBank
from tmu_dist.teachers.store import load_model, write_model
from tmu_dist.transfer import prepare as prepare_module
from tmu_dist.transfer.base import TaughtMethod
from tmu_dist.transfer.prepare import PreparedTransfer, prepare_transfer


def prepare(config: RunConfig, group: RankGroup | None = None) -> PreparedTransfer:
    manifest = open_archive(config.data.url).manifest
    frame = FrameShape(channels=manifest.channels, height=manifest.height, width=manifest.width)
    return prepare_transfer(config, frame, DataFacts.of(manifest), torch.device("cpu"), group)


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


# Who loads what


@pytest.fixture
def copies(tmu_config: RunConfig, tmp_path: Path) -> tuple[RunConfig, list[Path]]:
    """A run with two teachers whose folders may be damaged."""
    folders = [tmp_path / f"copy-{number}" for number in range(2)]
    for folder, source in zip(folders, tmu_config.transfer.teachers, strict=True):
        loaded = load_model(source)
        write_model(folder, loaded.model, loaded.card)
    changes = {"transfer.teachers": tuple(map(str, folders))}
    return with_overrides(tmu_config, changes), folders


def bank_of(prepared: PreparedTransfer) -> Any:
    assert isinstance(prepared.method, TaughtMethod)
    return prepared.method.bank


def test_a_rank_needs_the_weights_of_the_teachers_that_it_holds(
    copies: tuple[RunConfig, list[Path]],
) -> None:
    """And knows the others by their cards: it says the same of them as who has them all."""
    config, folders = copies
    whole = prepare(config)
    assert isinstance(bank_of(whole), ReplicatedBank)
    (folders[0] / "weights.safetensors").unlink()
    config = with_overrides(config, {"placement.kind": "placed"})
    first, second = (RankGroup(range(2), place) for place in range(2))
    prepared = prepare(config, second)
    assert isinstance(bank_of(prepared), PlacedBank)
    assert prepared.placement is not None and prepared.placement.holders == (0, 1)
    assert prepared.resident_parameters == whole.resident_parameters
    bytes_of_one = 4 * whole.resident_parameters[0]
    assert prepared.placement.resident_bytes == (bytes_of_one, bytes_of_one)
    assert prepared.teachers == whole.teachers
    assert bank_of(prepared).plans == bank_of(whole).plans
    with pytest.raises(TeacherError, match=r"copy-0 holds no weights\.safetensors"):
        prepare(config, first)


def test_untrained_teachers_need_no_trained_weights(
    copies: tuple[RunConfig, list[Path]],
) -> None:
    config, folders = copies
    config = with_overrides(config, {"transfer.control": "random_weights"})
    before = prepare(config).teachers
    for folder in folders:
        (folder / "weights.safetensors").unlink()
    assert prepare(config).teachers == before
    assert len({card.weights_sha256 for card in before}) == 2


def test_precision_halves_the_weights_of_convolutions(tmu_config: RunConfig) -> None:
    full, half = (
        prepare(with_overrides(tmu_config, {"placement.precision": precision}))
        for precision in ("student", "bf16")
    )
    resident = []
    for prepared in (full, half):
        teachers = bank_of(prepared).own
        values = [value for teacher in teachers for value in teacher.parameters()]
        resident.append(sum(value.nbytes for value in values))
        assert prepared.placement is not None
        assert prepared.placement.resident_bytes == (resident[-1],)
    assert resident[1] < resident[0]
    assert half.resident_parameters == full.resident_parameters


def test_what_a_rank_has_no_room_for_is_refused(tmu_config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"2 teachers do not fit into the 9.97e-08 GiB"):
        prepare(with_overrides(tmu_config, {"placement.memory_gib": 1e-7}))


@pytest.mark.parametrize("method", ["scratch", "art", "finetune"])
def test_without_teachers_beside_the_student_nothing_is_placed(
    tmu_config: RunConfig, method: str
) -> None:
    teachers = tmu_config.transfer.teachers[: {"scratch": 0, "art": 2, "finetune": 1}[method]]
    prepared = prepare(
        with_overrides(tmu_config, {"transfer.method": method, "transfer.teachers": teachers})
    )
    assert prepared.placement is None and prepared.resident_parameters == ()
    assert len(prepared.teachers) == len(teachers)


def test_a_teacher_that_changes_while_it_is_read_is_refused(
    copies: tuple[RunConfig, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between card and weights another checkpoint is offered under the same name."""
    config, folders = copies
    load_card = prepare_module.load_card

    def load_and_replace(address: str) -> Any:
        card = load_card(address)
        if address == str(folders[1]):
            shutil.copytree(folders[0], folders[1], dirs_exist_ok=True)
        return card

    monkeypatch.setattr(prepare_module, "load_card", load_and_replace)
    with pytest.raises(TeacherError, match="copy-1 changed while it was read"):
        prepare(config)
