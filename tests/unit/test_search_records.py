"""What is read of a search's runs, and how their operations are counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY_MODEL
from tests.transfer_methods import CASES, FRAME, batch, built, case_of
from tests.unit.test_training import MODELS
from tmu_dist.backbones import BACKBONES
from tmu_dist.config import (
    BetaSchedule,
    KnowledgeFlowConfig,
    RunConfig,
    TransferConfig,
    with_overrides,
)
from tmu_dist.data.storage import join_url
from tmu_dist.evaluation.operations import count_operations, forward_operations
from tmu_dist.evaluation.training_operations import TrainingOperations, training_operations
from tmu_dist.folders import write_text
from tmu_dist.models.build import build_predictor
from tmu_dist.run_folder import LOG_FILE, RESULT_FILE, Event, read_log
from tmu_dist.teachers.store import load_card, load_model
from tmu_dist.training.launch import launch
from tuning.journal import State, Trial
from tuning.plan import Search, SearchConfig, Stage
from tuning.records import (
    Operations,
    Report,
    progress_of,
    read_record,
    read_records,
    source_names,
)
from tuning.space import Axis, Point, Space

# Operations


def operations_of(config: RunConfig) -> TrainingOperations:
    cards = [load_card(address) for address in config.transfer.teachers]
    return training_operations(config, FRAME, cards)


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_that_the_method_runs(
    name: str, tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """Of the real networks, with the teachers' and the last iterate's part counted alone."""
    config = case_of(tiny_config, name, teacher_runs)
    run = built(config)
    everything = count_operations(
        lambda: run.transfer.method.loss(run.trainee, batch(size=2, step=3)).total()
    )
    teachers = [load_model(address).model for address in config.transfer.teachers]
    plain = build_predictor(FRAME, TINY_MODEL)
    frozen = 0
    if not CASES[name].starts or CASES[name].network == "sources":
        frozen = sum(forward_operations(each, FRAME, config.window) for each in teachers)
    if name == "knowledge_flow":  # which remembers the last iterate
        frozen += forward_operations(plain, FRAME, config.window)
        frozen += 5 * 2 * 2 * (2 * 16 * 4 * 4)  # 5 steps, 2 layers, 2 teachers, 4 x 4 filters
    both_directions = 2
    found = operations_of(replace(config, transfer=_always_taught(config.transfer)))
    assert found.first == both_directions * (3 * (everything // 2 - frozen) + frozen)


def _always_taught(transfer: TransferConfig) -> TransferConfig:
    return replace(transfer, beta_schedule=BetaSchedule())


@pytest.mark.parametrize("cell", BACKBONES)
def test_a_plain_network_takes_three_forward_passes(cell: str, tiny_config: RunConfig) -> None:
    model = MODELS.get(cell) or replace(TINY_MODEL, cell=cell)
    config = with_overrides(replace(tiny_config, model=model), {"training.reverse_input": "off"})
    plain = build_predictor(FRAME, model)
    once = forward_operations(plain, FRAME, config.window)
    assert operations_of(config).first == 3 * once > 0


def test_counting_draws_nothing_and_reads_no_weights(tmu_config: RunConfig, tmp_path: Path) -> None:
    cards = [load_card(address) for address in tmu_config.transfer.teachers]
    elsewhere = with_overrides(
        tmu_config, {"transfer.teachers": ("gone-1", "gone-2"), "placement.precision": "bf16"}
    )
    before = torch.get_rng_state()
    found = training_operations(elsewhere, FRAME, cards)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == training_operations(tmu_config, FRAME, cards)


def test_iterations_without_teachers_are_counted_without(tmu_config: RunConfig) -> None:
    def total(**changes: Any) -> int:
        changed = replace(tmu_config, transfer=replace(tmu_config.transfer, **changes))
        return operations_of(with_overrides(changed, {"training.num_steps": 10})).until(7)

    taught, alone = total(), total(beta=0.0)
    assert alone < taught and alone % 7 == taught % 7 == 0
    until_4 = BetaSchedule(shape="linear", start=1, stop=4)
    # The weight is 0 from iteration 4 on.
    assert total(beta_schedule=until_4) == 3 * (taught // 7) + 4 * (alone // 7)
    after_4 = BetaSchedule(shape="linear", start=4, stop=9, final=0.1)
    assert total(beta=0.0, beta_schedule=after_4) == 4 * (alone // 7) + 3 * (taught // 7)
    flow = TransferConfig(method="knowledge_flow", teachers=tmu_config.transfer.teachers)
    half = replace(flow, knowledge_flow=KnowledgeFlowConfig(alone_fraction=0.5))
    found = operations_of(
        with_overrides(replace(tmu_config, transfer=half), {"training.num_steps": 10})
    )
    plain = replace(tmu_config, transfer=TransferConfig())
    assert found.num_first == 5 and found.later == operations_of(plain).first < found.first


def test_operations_of_runs_are_counted_once_a_kind(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(config: RunConfig, *rest: Any) -> TrainingOperations:
        counted.append(config.transfer.beta)
        return TrainingOperations(first=10, num_first=3, later=1)

    monkeypatch.setattr("tuning.records.training_operations", count)
    found = Operations()
    batch_size = tmu_config.training.batch_size
    for beta in (0.1, 0.3, 1.0):
        config = with_overrides(tmu_config, {"transfer.beta": beta})
        assert found(config, 0) == 0
        assert found(config, 5) == 32 * batch_size
    assert len(counted) == 1
    found(with_overrides(tmu_config, {"transfer.beta": 0.0}), 1)
    found(with_overrides(tmu_config, {"model.hidden_channels": 8}), 1)
    assert len(counted) == 3
    gone = with_overrides(tmu_config, {"transfer.teachers": ("gone",)})
    assert Operations()(gone, 1) is None


# Logs


def validation(step: int, mse: float, **more: float) -> Event:
    return {"event": "validation", "step": step, "mse_per_frame": mse, "seconds": step / 2, **more}


def liveness(step: int, gate_means: list[list[float]]) -> Event:
    return {"event": "liveness", "step": step, "gate_means": gate_means}


def write_run(stage: Stage, events: list[Event], *, is_finished: bool = False) -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    write_text(stage.config.output, LOG_FILE, text)
    if is_finished:
        write_text(stage.config.output, RESULT_FILE, "{}")


def search_of(
    base: RunConfig,
    folder: str,
    *axes: Axis,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Search:
    space = Space(name="test", axes=axes, settings=settings or {})
    return Search(
        folder=folder,
        recipe="tiny",
        command="",
        base=base,
        space=space,
        options=SearchConfig(**options),
    )


def trial_of(point: Point, *, number: int = 3, seed: int = 0, state: State = "open") -> Trial:
    return Trial(number=number, point_number=1, point=point, seed=seed, state=state)


SOURCES = Axis(name="sources", values=((), ("1",), ("2",), ("1", "2")))


def test_a_run_tells_the_error_of_the_weights_that_it_offers(tiny_config: RunConfig) -> None:
    events = [
        {"event": "train", "step": 1, "loss/total": 1.0},
        validation(3, 5.0, mae_per_frame=50.0),
        validation(6, 7.0, mae_per_frame=40.0),
        validation(7, 4.0, mae_per_frame=60.0),
    ]
    best = progress_of(tiny_config, events, "mse_per_frame")
    assert [report.error for report in best] == [5.0, 5.0, 4.0]
    assert best[-1] == Report(level=7, error=4.0, step=7, seconds=3.5)
    # The lowest squared error decides which weights are offered.
    absolute = progress_of(tiny_config, events, "mae_per_frame")
    assert [report.error for report in absolute] == [50.0, 50.0, 60.0]
    final = with_overrides(tiny_config, {"training.select": "final"})
    assert [r.error for r in progress_of(final, events, "mse_per_frame")] == [5.0, 7.0, 4.0]
    assert progress_of(tiny_config, [], "mse_per_frame") == []


def test_a_trial_that_has_not_begun_has_found_nothing(tmu_config: RunConfig) -> None:
    search = search_of(tmu_config, "memory://records/none", SOURCES)
    trial = trial_of({"sources": ("2",)})
    (found,) = read_records(search, [trial])
    assert found.reports == () and found.error is None and found.gates == ()
    assert found.operations == 0 and not found.is_whole
    assert (found.sources, found.method) == (("2",), "tmu")
    assert found.folder == "memory://records/none/trials/0003"
    assert read_record(search, trial).operations is None


def test_a_trial_of_one_run_in_a_store(tmu_config: RunConfig) -> None:
    search = search_of(tmu_config, "memory://records/steps", SOURCES)
    trial = trial_of({"sources": ("1", "2")}, state="stopped")
    (stage,) = search.stages(3, trial.point, 0)
    events = [
        liveness(0, [[0.1, 0.2], [0.3, 0.4]]),
        validation(3, 5.0),
        liveness(6, [[0.5, 0.1], [0.7, 0.3]]),
        validation(6, 6.0),
    ]
    write_run(stage, events)
    (found,) = read_records(search, [trial])
    assert [(r.level, r.error) for r in found.reports] == [(3, 5.0), (6, 5.0)]
    assert found.gates == pytest.approx((0.6, 0.2))
    assert found.sources == ("1", "2") and found.num_steps == 7 and found.fraction == 1.0
    expected = operations_of(stage.config).first * 6 * stage.config.training.batch_size
    assert found.operations == expected


def test_sources_keep_the_names_that_they_have_among_all(tiny_config: RunConfig) -> None:
    """Also in a run of one of them, and where the teachers are a setting of the space."""
    teachers = ("runs/one/teacher", "runs/other/teacher")
    settings = {"transfer.method": "tmu", "transfer.teachers": teachers}
    arm = Axis(name="arm", values=("scratch", "finetune-teacher.1", "tmu"))
    search = search_of(tiny_config, "memory://records/names", arm, settings=settings)
    assert source_names(search) == ("teacher.0", "teacher.1")
    found = [read_record(search, trial_of({"arm": name})) for name in arm.values]
    assert [each.sources for each in found] == [(), ("teacher.1",), ("teacher.0", "teacher.1")]
    assert [each.method for each in found] == ["scratch", "finetune", "tmu"]


def test_by_fraction_only_finished_runs_are_reported(tmu_config: RunConfig) -> None:
    search = search_of(
        with_overrides(tmu_config, {"training.num_steps": 8}),
        "memory://records/fractions",
        Axis(name="transfer.beta", values=(0.1, 1.0)),
        scheduler="asha",
        fidelity="fraction",
        fractions=(0.25, 0.5, 1.0),
    )
    trial = trial_of({"transfer.beta": 1.0})
    first, second, last = search.stages(3, trial.point, 0)
    write_run(first, [validation(2, 9.0)], is_finished=True)
    write_run(second, [validation(3, 7.0), validation(4, 8.0)])
    found = read_record(search, trial, lambda config, steps: 100.0 * steps)
    assert [(r.level, r.error, r.step) for r in found.reports] == [(0.25, 9.0, 2)]
    assert found.folder == second.config.output and found.fraction == 0.5
    assert found.num_steps == 4 and found.operations == 600
    write_run(second, [validation(3, 7.0), validation(4, 8.0)], is_finished=True)
    found = read_record(search, trial, lambda config, steps: None)
    assert [(r.level, r.error) for r in found.reports] == [(0.25, 9.0), (0.5, 7.0)]
    assert [r.seconds for r in found.reports] == [1.0, 1.0 + 2.0]
    assert found.operations is None
    assert last.config.training.num_steps == 8


def test_a_real_run_is_read(tmu_config: RunConfig, tmp_path: Path) -> None:
    base = with_overrides(tmu_config, {"training.num_steps": 4, "schedule.validate_every": 2})
    beta = Axis(name="transfer.beta", values=(0.1, 1.0))
    search = search_of(base, str(tmp_path / "search"), beta)
    trial = trial_of({"transfer.beta": 1.0}, seed=5, state="finished")
    (stage,) = search.stages(3, trial.point, 5)
    result = launch(stage.config)
    (found,) = read_records(search, [trial])
    assert [report.step for report in found.reports] == [2, 4]
    assert found.error == result.best_mse_per_frame
    # Up to the last validation, which ends the run.
    assert found.reports[-1].seconds == pytest.approx(result.seconds)
    assert 0 < found.reports[0].seconds < found.reports[1].seconds
    assert len(found.gates) == 2 and all(0 < gate < 1 for gate in found.gates)
    assert found.folder == join_url(search.folder, "trials/0003") and found.is_whole
    assert read_log(found.folder)[-1]["event"] == "validation"
