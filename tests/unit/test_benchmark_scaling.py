"""The scaling study's cost model against hand counts, real tensors and real placements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import report
from benchmarks.scaling.collectives import COLLECTIVES, Timing, fit, fitted, held_out
from benchmarks.scaling.model import (
    KINDS,
    Job,
    Kind,
    Network,
    all_reduce_bytes,
    fewer_bytes_than_sharded,
    memory,
    operations,
    reading_break_even,
    traffic,
)
from benchmarks.scaling.networks import (
    SIZES,
    make_batch,
    make_method,
    make_teacher,
    measure,
    saved_bytes,
)
from benchmarks.scaling.report import first_choice, held_out_errors, local_seconds, table
from benchmarks.scaling.simulate import (
    CLUSTERS,
    Cluster,
    Link,
    Prediction,
    Task,
    finish_times,
    predict,
    step_seconds,
)
from tmu_dist.models.build import count_parameters
from tmu_dist.teachers.bank import ReplicatedBank
from tmu_dist.teachers.placement import TeacherCost, plan_placement

NETWORK = Network(
    label="a small one",
    weights=1000,
    memory_numbers=300,
    teacher_operations=700,
    frame_bytes=50,
    mask_bytes=2,
    student_weights=900,
    weights_per_slot=10,
    student_operations=500,
    operations_per_slot=20,
    saved_bytes=4000,
    saved_bytes_per_slot=600,
)
CLUSTER = Cluster(2, Link(1.0, 100.0), Link(3.0, 40.0), 1000.0, 1e9, 80.0)


def job(kind: Kind, **changes: Any) -> Job:
    return Job(kind, teachers=5, ranks=4, group=2, sequences=6, at_once=2)._replace(**changes)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_all_reduce_is_what_the_steps_of_a_ring_send(ranks: int) -> None:
    """Played out: every step each rank sends one of n parts; the sums are complete at the end."""
    held = [[{rank} for _ in range(ranks)] for rank in range(ranks)]  # whose parts are in each sum
    sent = 0
    for step in range(2 * (ranks - 1)):
        moving = [(rank, (rank - step) % ranks) for rank in range(ranks)]
        copies = {rank: set(held[rank][part]) for rank, part in moving}
        for rank, part in moving:
            held[(rank + 1) % ranks][part] |= copies[rank]
        sent += 1
    assert all(part == set(range(ranks)) for parts in held for part in parts)
    assert all_reduce_bytes(600, ranks) == pytest.approx(sent * 600 / ranks)


@pytest.mark.parametrize(("teachers", "group"), [(5, 2), (5, 3), (2, 4), (8, 4)])
def test_placed_traffic_is_that_of_the_real_plan_sequence_by_sequence(
    teachers: int, group: int
) -> None:
    costs = [TeacherCost(name="", weight_bytes=4000, work=1.0)] * teachers
    holders = plan_placement("placed", costs, group, None).holders
    this = job("placed", teachers=teachers, group=group, passes=2, told_bytes=2)
    memories, frames = [0] * group, [0] * group
    for _ in range(this.passes * this.sequences):
        for reader in range(group):
            for holder in holders:
                memories[holder] += 300 * 2 * (holder != reader)
            for other in range(group):
                frames[reader] += (50 + 2) * (other != reader)
    found = traffic(NETWORK, this)
    assert found.told == pytest.approx(max(memories))
    assert found.frames == pytest.approx(max(frames))
    assert found.weights == found.read == 0


def test_sharded_weights_travel_once_a_forward_pass_and_memories_are_read_once_a_pass() -> None:
    found = traffic(NETWORK, job("sharded", passes=2))
    # 3 parts, 2 passes: each time the half of every teacher that this rank has goes to the other.
    assert found.weights == pytest.approx(3 * 2 * 5 * 4000 / 2)
    assert traffic(NETWORK, job("sharded", passes=2, at_once=6)).weights == found.weights / 3
    assert traffic(NETWORK, job("cached", passes=2)).read == 2 * 6 * 5 * 300 * 4
    assert traffic(NETWORK, job("replicated"))[1:] == (0, 0, 0, 0)
    for kind in KINDS:  # the student's gradients, whoever teaches
        assert traffic(NETWORK, job(kind)).gradients == pytest.approx(2 * 3 / 4 * 4 * 950)


def test_where_placed_and_sharded_send_the_same_lies_the_break_even() -> None:
    even = job("placed", teachers=4)
    sequences = fewer_bytes_than_sharded(NETWORK, even)
    assert sequences == pytest.approx(1000 / 300)
    there = Network(**NETWORK._asdict() | {"memory_numbers": 1000})
    assert fewer_bytes_than_sharded(there, even) == 1
    single = even._replace(sequences=6, at_once=1)
    assert traffic(there, single).told == traffic(there, single._replace(kind="sharded")).weights


def test_reading_breaks_even_where_it_takes_as_long_as_the_teachers() -> None:
    speed = reading_break_even(NETWORK, job("cached"), 1000.0)
    read = traffic(NETWORK, job("cached")).read / speed
    _, taught = operations(NETWORK, job("replicated"))
    assert read == pytest.approx(taught / 1000.0)


@pytest.mark.parametrize(("teachers", "group"), [(5, 2), (41, 4), (3, 8)])
def test_teachers_take_what_the_real_plan_says(teachers: int, group: int) -> None:
    costs = [TeacherCost(name="", weight_bytes=4000, work=1.0)] * teachers
    for kind in ("replicated", "placed", "sharded"):
        planned = max(plan_placement(kind, costs, group, None).resident_bytes)
        this = job(kind, teachers=teachers, group=group)
        assert memory(NETWORK, this).teachers == pytest.approx(planned, abs=teachers)


def test_one_rank_holds_the_same_whatever_is_placed() -> None:
    alone = {kind: job(kind, group=1, ranks=1) for kind in KINDS}
    assert memory(NETWORK, alone["placed"]).teachers == 5 * 4000
    assert traffic(NETWORK, alone["placed"]) == traffic(NETWORK, alone["replicated"])
    assert alone["placed"].imbalance == 1


def test_imbalance_is_the_work_of_the_fullest_rank() -> None:
    assert job("placed").imbalance == pytest.approx(3 / 2.5)
    assert job("placed", group=8).imbalance == pytest.approx(1 / (5 / 8))
    student, taught = operations(NETWORK, job("placed"))
    assert student == 3 * 6 * (500 + 5 * 20)
    assert taught == pytest.approx(6 * 3 * 2 * 700)
    assert operations(NETWORK, job("cached")) == (student, 0)


def test_networks_are_counted_as_real_tensors_are() -> None:
    """Built on the CPU with three teachers, which the counts have not seen."""
    size, teachers = SIZES["tiny"], 3
    found = measure(size)
    bank = ReplicatedBank([make_teacher(size) for _ in range(teachers)])
    method = make_method(size, bank)
    trainee, batch = method.trainee(method.build_student()), make_batch(size, 2)
    assert found.trained(teachers) == count_parameters(trainee)
    assert (found.weights,) * teachers == bank.parameters_per_teacher
    for teaching in method.teach(batch):
        told = sum(state.numel() for state in teaching.states["memory"].values())
        assert told == 2 * found.memory_numbers
    of_one, of_three = (
        saved_bytes(method, trainee, make_batch(size, sequences)) for sequences in (1, 3)
    )
    assert of_three - of_one == 2 * (found.saved_bytes + teachers * found.saved_bytes_per_slot)


def test_tasks_run_side_by_side_one_a_lane_first_come_first_served() -> None:
    tasks = [
        Task("a", 2.0),
        Task("b", 5.0),
        Task("a", 1.0, (1,)),
        Task("a", 4.0, (0,)),
        Task("b", 1.0, (0, 0)),
        Task("a", 1.0, (2, 4)),
    ]
    # Lane a: 0-2, then the fourth 2-6 because the third waits for b until 5, then 6-7.
    assert finish_times(tasks) == [2, 5, 7, 6, 6, 8]


def test_a_step_apart_is_the_sum_of_its_pieces() -> None:
    """Two nodes of two ranks, three parts: worked out by hand."""
    arithmetic = 3 * 6 * 600 / 1000
    teachers = 6 * 5 * 700 / 1000
    gradients = (2 * 1.0 + 3800 / 100) + (2 * 3.0 + 3800 / 40)
    found = {kind: step_seconds(NETWORK, job(kind, ahead=False), CLUSTER) for kind in KINDS}
    assert found["replicated"] == pytest.approx(arithmetic + teachers + gradients)
    frames, told = 3 * 1.0 + 6 * 52 / 100, 3 * 3 * 1.0 + 6 * 3 * 300 * 4 / 100
    placed = arithmetic + teachers * 3 / 2.5 + frames + told + gradients
    assert found["placed"] == pytest.approx(placed)
    weights = 3 * 5 * 1.0 + 3 * 5 * 2000 / 100
    assert found["sharded"] == pytest.approx(arithmetic + teachers + weights + gradients)
    assert found["cached"] == pytest.approx(arithmetic + 6 * 5 * 1200 / 40 + gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_hides_what_it_can_and_no_more(kind: Kind) -> None:
    network = Network(**NETWORK._asdict() | {"student_operations": 100_000})
    this = job(kind)
    apart = step_seconds(network, this._replace(ahead=False), CLUSTER)
    ahead = step_seconds(network, this, CLUSTER)
    arithmetic = sum(operations(network, this)) / 1000
    # Only gradients of the last part have nothing to hide behind.
    gradients = (2 * 1.0 + 3800 / 100) + (2 * 3.0 + 3800 / 40)
    assert arithmetic <= ahead <= arithmetic + gradients + 1e-6
    assert ahead < apart or kind == "replicated"


def test_groups_of_several_nodes_share_the_nodes_network() -> None:
    near = step_seconds(NETWORK, job("placed", ahead=False, at_once=6), CLUSTER)
    this = job("placed", ahead=False, at_once=6, group=4)
    far = step_seconds(NETWORK, this, CLUSTER)
    sent = traffic(NETWORK, job("placed"))
    inside = 1.0 + sent.frames / 100 + 3 * 1.0 + sent.told / 100  # the busiest has three teachers
    sent = traffic(NETWORK, this)
    # A rank has half of its node's 40 bytes a second; two of three others are on the other node.
    outside = (1 + 2) * 2 * 3.0 + (sent.frames + sent.told) * 2 / 3 / 20
    taught = (this.imbalance - 3 / 2.5) * 6 * 5 * 700 / 1000
    assert far - near == pytest.approx(outside + taught - inside)


def test_parts_are_as_large_as_memory_allows_and_none_may_fit() -> None:
    needed = memory(NETWORK, Job("placed", 5, 4, 2, 6, 3)).total
    for fits, at_once in ((needed, 3), (needed - 1, 2), (10.0, None)):
        cluster = CLUSTER._replace(memory_bytes=fits)
        found = predict(NETWORK, "placed", cluster, teachers=5, ranks=4, sequences=6)
        assert found.at_once == at_once
    assert math.isinf(found.seconds)


def test_the_simplest_of_equally_fast_placements_is_chosen() -> None:
    def chosen(*seconds: float) -> str:
        return first_choice({k: Prediction(1, s, s) for k, s in zip(KINDS, seconds)})

    assert chosen(1.01, 1.0, 1.0, 3.0) == "replicated"
    assert chosen(1.1, 1.05, 1.0, 3.0) == "sharded"
    assert chosen(math.inf, 2.0, 2.0, 1.0) == "cached"
    assert chosen(*[math.inf] * 4) == "none fits"


def timings(latency: float, bandwidth: float, noise: float = 0.0) -> list[Timing]:
    """As if this machine were exactly what the model says, but for the sizes in between."""
    found = []
    for name, sent in COLLECTIVES.items():
        messages = 2 if name.startswith("all_reduce") else 1
        for place, size in enumerate((100, 1000, 10_000, 100_000)):
            seconds = latency * messages * 1 + 2 * sent(size, 2) / bandwidth
            found.append(Timing(name, 2, size, seconds * (1 + noise * (place % 2))))
    return found


def test_a_fit_finds_latency_and_bandwidth_and_is_judged_by_other_sizes() -> None:
    made = [each for each in timings(1e-4, 2e6, noise=0.25) if each.name == "all_gather uint8"]
    found = fit(fitted(made))
    assert found == (pytest.approx(1e-4), pytest.approx(2e6))
    assert {each.size for each in held_out(made)} == {1000, 100_000}
    assert held_out_errors(made) == pytest.approx([0.2, 0.2])


def test_a_fit_has_no_negative_latency() -> None:
    made = [Timing("all_reduce fp32", 2, size, 1e-9 * size**1.3) for size in (10, 1000, 10**5)]
    found = fit(made)
    assert found.latency == 0
    assert found.bandwidth > 0
    with pytest.raises(ValueError, match="two or more"):
        fit([])


def test_a_local_step_is_scaled_arithmetic_and_measured_collectives() -> None:
    fits = {name.partition(" ")[0]: fit(timings(0.5, 1e3)[4:8]) for name in COLLECTIVES}
    this = Job("placed", 3, 2, 2, 6, 6)
    student, taught = operations(NETWORK, this._replace(kind="replicated"))
    sent = traffic(NETWORK, this)
    expected = 10 * (student + taught * 4 / 3) / (student + taught)
    expected += (1 + 2) * 0.5 + 2 * (sent.frames + sent.told) / 1e3
    assert local_seconds(NETWORK, this, 10.0, fits) == pytest.approx(expected)


def record() -> dict[str, Any]:
    """A run on one small network, two ranks, two rounds."""
    facts = NETWORK._asdict()
    held = {"2": [[8000, 9000], [8000, 9500]], "3": [[12_000, 0], [12_000, 0]]}
    placed = {"2": [[4000, 0], [4000, 0]], "3": [[8000, 100], [4000, 200]]}
    return {
        "command": "python -m benchmarks.scaling", "minutes": 1.0, "git_revision": "abc",
        "machine": {"cpu": "C", "cores": 2}, "versions": {"torch": "2"},
        "networks": {"paper": facts, "radar": facts, "wide": facts},
        "collectives": [each._asdict() for each in timings(1e-4, 2e6)],
        "held": {"network": "paper", "ranks": {"2": {"replicated": held, "placed": placed}}},
        "timed": {
            "network": "paper", "ranks": 2, "teachers": 3, "sequences": 1, "losses_differ": 0.0,
            "kinds": {
                "replicated": {"seconds": [1.0, 2.0], "losses": [1.0]},
                "placed": {"seconds": [1.5, 4.0], "losses": [1.0]},
            },
        },
    }  # fmt: skip


def test_the_table_says_what_was_measured_beside_what_was_predicted() -> None:
    text = table(record())
    assert "| 2 | 3 | placed | 0.008 / 0.0002 | 0.667 | 0.667 |" in text
    assert "| placed | 2.75 (1.5 - 4) | 1.75 |" in text
    assert "| all_to_all bf16 | 2 | 0.1 | 0.00 | 2 / 2 | 0% | 0% |" in text
    assert text.count("a small one, 8 sequences a GPU") == 3 * len(CLUSTERS)
    assert text.endswith("on C, 2 cores, torch 2, at revision abc.\n")


def test_figures_have_a_line_for_each_placement_that_fits_anywhere() -> None:
    figure = report.figure(NETWORK, "H100-like")
    assert [line.get_label() for line in figure.axes[0].lines] != []
    assert len(figure.axes[0].lines) == len(KINDS)
    assert {text.get_text() for text in figure.axes[0].texts} == set(KINDS)


def test_the_document_has_the_facts_of_the_papers_network() -> None:
    paper = measure(SIZES["paper"])
    assert paper.weights == 2_971_648  # docs/methods.md
    assert paper.memory_numbers == 19 * 4 * 64 * 16 * 16
    document = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for made in (report._facts, report._traffic, report._memory):
        row = next(line for line in made({"paper": paper}).splitlines() if "paper" in line)
        assert row in document
