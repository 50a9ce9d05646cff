"""Teachers: what is stored comes back, and what is missing, damaged or unfit is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY_MODEL
from tmu_dist.config import AdapterConfig, ModelConfig, RunConfig
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import Units
from tmu_dist.data.storage import write_bytes
from tmu_dist.models.build import skeleton
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.adapter import StudentFacts, TeacherPlan, plan_teacher
from tmu_dist.teachers.bank import Teaching
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError, same_scale
from tmu_dist.teachers.store import load_card, load_model, locate
from tmu_dist.training.launch import launch
from tmu_dist.zoo import add_teacher, list_cards, main


def test_run_checkpoint_and_zoo_give_the_same_network(
    teacher_runs: tuple[str, str], tmp_path: Path
) -> None:
    run = teacher_runs[0]
    folder = add_teacher(run, tmp_path / "zoo", name="first")
    (checkpoint,) = Path(run, "checkpoints").iterdir()
    states = [load_model(str(s)).model.state_dict() for s in (run, folder, checkpoint)]
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])
    assert [card.name for card in list_cards(tmp_path / "zoo")] == ["first"]
    loaded = load_model(run)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.card.scores["mse_per_frame"] > 0


def test_teacher_from_a_url(teacher_runs: tuple[str, str]) -> None:
    folder = Path(locate(teacher_runs[0]))
    for file in folder.iterdir():
        write_bytes("memory://zoo/first", file.name, file.read_bytes())
    here, there = load_model(teacher_runs[0]), load_model("memory://zoo/first")
    assert here.card == there.card


def test_zoo_commands(
    teacher_runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = ["--zoo", str(tmp_path / "zoo")]
    main([*zoo, "add", teacher_runs[0], "--name", "first"])
    main([*zoo, "list"])
    main([*zoo, "show", "first"])
    shown = capsys.readouterr().out
    assert "1 teacher(s)" in shown and '"weights_sha256"' in shown
    with pytest.raises(SystemExit) as leaving:
        main([*zoo, "add", teacher_runs[1], "--name", "first"])
    assert leaving.value.code == 2
    assert "already has" in capsys.readouterr().err


def test_damage_is_named(teacher_runs: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(locate(teacher_runs[0]), folder)
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(TeacherError, match=r"weights.safetensors is damaged"):
        load_model(str(folder))
    weights.write_bytes(content[:-10])
    with pytest.raises(TeacherError, match=r"weights.safetensors is damaged"):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(TeacherError, match=r"holds no weights.safetensors"):
        load_model(str(folder))
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "schema_version": 99}))
    with pytest.raises(TeacherError, match="schema version 99"):
        load_card(str(folder))
    (folder / "card.json").write_text("{}")
    with pytest.raises(TeacherError, match="not a valid teacher card"):
        load_card(str(folder))
    with pytest.raises(TeacherError, match="does not exist"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(TeacherError, match="neither card.json"):
        load_model(str(tmp_path))


def plan(card: TeacherCard, frame: FrameShape, model: ModelConfig, data: DataFacts) -> TeacherPlan:
    """Of a student that allows no differences."""
    student = StudentFacts(frame=frame, memories=skeleton(frame, model).memory_shapes, data=data)
    return plan_teacher(
        card, skeleton(card.frame, card.model).memory_shapes, student, AdapterConfig()
    )


def test_a_teacher_must_fit(teacher_runs: tuple[str, str]) -> None:
    card = load_card(teacher_runs[0])
    same = plan(card, card.frame, TINY_MODEL, card.data)
    assert same == TeacherPlan.unchanged(skeleton(card.frame, TINY_MODEL).memory_shapes)
    other = ModelConfig(num_layers=3, hidden_channels=8, kernel_size=3, patch_size=2)
    units = replace(card.data.units, quantity="rain rate", unit="mm/h")
    with pytest.raises(TeacherError) as refusal:
        plan(
            card,
            replace(card.frame, width=24),
            other,
            replace(card.data, units=units, frame_interval_minutes=5.0),
        )
    for part in (
        "hidden channels: teacher 4, student 8 (transfer.adapter.channels=project)",
        "layers: teacher 2, student 3 (transfer.adapter.layers=stretch)",
        "memory grid: teacher 4x4, student 8x12 (transfer.adapter.grid=resample)",
        "frames: teacher 1x16x16, student 1x16x24 (transfer.adapter.frames=resize)",
        "mm/h",
        "frame interval [min]: teacher None, student 5.0 (transfer.adapter.units=any)",
    ):
        assert part in str(refusal.value)


RADAR = Units(
    quantity="reflectivity",
    unit="dBZ",
    scale=70 / 254,
    offset=0.0,
    max_code=254,
    missing_code=255,
)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"missing_code": None}, True),
        ({"quantity": "rain_rate"}, False),
        ({"unit": "mm/h"}, False),
        ({"scale": 60 / 254}, False),
        ({"offset": -10.0}, False),
        ({"max_code": 200}, False),
    ],
)
def test_scales_are_the_same_where_numbers_mean_the_same(
    teacher_runs: tuple[str, str], change: dict[str, Any], same: bool
) -> None:
    """How missing pixels are marked is no part of it: a network never sees their code."""
    other = replace(RADAR, **change)
    assert same_scale(RADAR, other) == same_scale(other, RADAR) == same
    card = load_card(teacher_runs[0])
    card = replace(card, data=replace(card.data, units=RADAR))
    student = replace(card.data, archive="other", manifest_hash="other", units=other)
    with nullcontext() if same else pytest.raises(TeacherError, match="units: teacher Units"):
        plan(card, card.frame, TINY_MODEL, student)


def test_a_card_knows_how_stored_numbers_became_those_of_the_network(archive_url: str) -> None:
    manifest = open_archive(archive_url).manifest
    assert DataFacts.of(manifest).normalisation == "stored uint8 / 255"
    units = replace(RADAR, scale=70 / 65_534, max_code=65_534, missing_code=65_535)
    radar = DataFacts.of(replace(manifest, dtype="uint16", units=units))
    assert radar.normalisation == "stored uint16 / 65534"
    assert radar.units == units


def test_cards_from_before_codes_had_a_largest_one_still_count(
    teacher_runs: tuple[str, str],
) -> None:
    card = load_card(teacher_runs[0])
    record = json.loads(card.to_json())
    del record["data"]["units"]["max_code"]
    assert TeacherCard.from_json(json.dumps(record), where="here") == card


def test_a_teaching_is_listed_rebuilt_and_changed_as_a_whole() -> None:
    first, second, third, fourth = torch.arange(4.0)
    given = Teaching({"memory": {1: second, 0: first}, "hidden": {0: third}}, fourth)
    listed = given.tensors()
    assert list(listed) == [("memory", 0), ("memory", 1), ("hidden", 0), ("predictions", None)]
    assert [values.item() for values in listed.values()] == [0, 1, 2, 3]
    rebuilt = Teaching.of(dict(reversed(listed.items())))
    assert rebuilt.states == given.states and rebuilt.predictions_BTCHW is fourth
    changed = given.map(lambda values: values + 10)
    assert changed.states == {"memory": {0: 10, 1: 11}, "hidden": {0: 12}}
    assert changed.predictions_BTCHW == 13
    assert Teaching({"memory": {0: first}}).map(torch.exp).predictions_BTCHW is None


def test_training_refuses_an_unfit_teacher_before_it_starts(tmu_config: RunConfig) -> None:
    config = replace(tmu_config, model=replace(TINY_MODEL, hidden_channels=6))
    with pytest.raises(TeacherError, match="hidden channels: teacher 4, student 6"):
        launch(config)
    assert not Path(config.output).exists()


def test_finetune_starts_at_the_teacher_and_refuses_a_partial_match(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    transfer = replace(tiny_config.transfer, method="finetune", teachers=teacher_runs[:1])
    config = replace(tiny_config, transfer=transfer)
    # A step of vanishing length leaves the start where it was.
    still = replace(config, training=replace(config.training, num_steps=1, learning_rate=1e-30))
    student = load_model(launch(still).run).model.state_dict()
    start = load_model(teacher_runs[0]).model.state_dict()
    assert all(torch.equal(student[name], start[name]) for name in start)

    other = replace(config, model=replace(TINY_MODEL, peephole="none"), output=config.output + "2")
    with pytest.raises(TeacherError, match=r"2 of \d+ tensors differ|peepholes is unknown"):
        launch(other)
