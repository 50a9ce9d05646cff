"""What the doctor sees of one rank, against numbers from elsewhere, and how it judges ranks."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tmu_dist.collectives import Collectives
from tmu_dist.config import PlacementConfig, RunConfig
from tmu_dist.doctor.findings import Finding
from tmu_dist.doctor.rank_facts import (
    ExchangeFacts,
    Failure,
    LoaderFacts,
    Part,
    RankFacts,
    RanksSeen,
    StepFacts,
    TeacherFacts,
)
from tmu_dist.doctor.rank_findings import judge_ranks
from tmu_dist.doctor.ranks import look_at_rank, look_at_ranks
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.store import locate
from tmu_dist.training.launch import launch

CPU = torch.device("cpu")
GB = 10**9
EXCHANGE = ExchangeFacts(backend="gloo", latency_seconds=1e-4, bytes_per_second=1e9)
LOADER = LoaderFacts(
    processes=2, first_seconds=3.0, seconds_per_batch=0.1, batches=30, sequences=4.0
)
TEACHERS = TeacherFacts(
    count=2,
    kind="placed",
    predicted_bytes={"replicated": 2 * GB, "sharded": 2 * GB, "placed": GB},
    held_bytes=GB,
)
STEP = StepFacts(
    first_seconds=2.0,
    seconds=1.0,
    forward_seconds=0.2,
    losses=(0.5, 0.4, 0.3),
    exchanges=2,
    gradient_bytes=10**8,
    peak_bytes=10 * GB,
    total_bytes=80 * GB,
    taken_bytes=8 * GB,
    predicted_bytes=9 * GB,
)


def rank(number: int, **changes: Any) -> RankFacts:
    """One of two healthy ranks on GPUs of two nodes, but for some facts."""
    facts = RankFacts(
        rank=number,
        world_size=2,
        node=f"10.0.0.{number}",
        device="NVIDIA H200",
        interface="eth0",
        link_bits_per_second=1e10,
        part="end",
        exchange=EXCHANGE,
        loader=LOADER,
        teachers=TEACHERS,
        step=STEP,
    )
    return replace(facts, **changes)


def judged(*ranks: RankFacts, error: str = "") -> dict[str, list[Finding]]:
    """Findings that are not ok, by check."""
    found: dict[str, list[Finding]] = {}
    for finding in judge_ranks(RanksSeen(ranks=ranks, error=error)):
        if finding.status != "ok":
            found.setdefault(finding.check, []).append(finding)
    return found


def only(found: dict[str, list[Finding]], check: str, status: str) -> Finding:
    """The one finding that is not ok."""
    assert list(found) == [check]
    (finding,) = found[check]
    assert finding.status == status
    return finding


def failed(part: Part, number: int, text: str, *, may_follow: bool = False) -> RankFacts:
    """A rank one of whose parts failed."""
    failure = Failure(text=text, kind=text.partition(":")[0], may_follow=may_follow)
    return rank(number, failures={part: failure}, **{"step": None, part: None})


# Looking


def test_facts_of_one_rank_are_what_a_run_meets(tmu_config: RunConfig) -> None:
    told: list[RankFacts] = []
    facts = look_at_rank(tmu_config, Collectives(), CPU, tell=told.append)
    assert not Path(tmu_config.output).exists()
    launch(tmu_config)
    logged = [e["loss/total"] for e in read_log(tmu_config.output) if e["event"] == "train"]
    weights = [
        load_file(Path(locate(run)) / "weights.safetensors") for run in tmu_config.transfer.teachers
    ]
    num_bytes = sum(values.nbytes for each in weights for values in each.values())

    assert [each.part for each in told] == ["loader", "teachers", "step", "end"]
    assert told[-1] == facts and not facts.failures and facts.exchange is None
    assert facts.loader is not None and facts.loader.batches == 6  # 22 sequences, 4 at a time
    assert facts.teachers is not None and facts.teachers.held_bytes == num_bytes
    assert facts.teachers.predicted_bytes == {"replicated": num_bytes}
    assert facts.step is not None and list(facts.step.losses) == logged[:3]
    assert facts.step.exchanges == 2
    assert 10**7 < facts.step.peak_bytes < facts.step.total_bytes
    assert 10**5 < facts.step.predicted_bytes < 10**8
    assert json.loads(json.dumps(asdict(facts)))["step"]["losses"] == logged[:3]

    findings = judge_ranks(RanksSeen(ranks=(facts,)))
    assert {f.check: f.status for f in findings if f.check != "loader"} == {
        "exchange": "skipped",
        "teachers": "ok",
        "step": "ok",
    }


def test_faults_that_are_planted_are_found(tmu_config: RunConfig, tmp_path: Path) -> None:
    def seen(config: RunConfig) -> dict[str, Finding]:
        findings = judge_ranks(look_at_ranks(config, Collectives(), CPU))
        return {f.check: f for f in findings if f.status in ("fault", "skipped")}

    wild = replace(tmu_config.training, learning_rate=1e30)
    found = seen(replace(tmu_config, training=wild))
    assert found["step"].found.startswith(("the loss is nan at step", "the loss is inf at step"))
    assert "training.learning_rate" in found["step"].advice

    nowhere = (tmu_config.transfer.teachers[0], str(tmp_path / "nowhere"))
    found = seen(replace(tmu_config, transfer=replace(tmu_config.transfer, teachers=nowhere)))
    assert found["teachers"].status == "fault" and nowhere[1] in found["teachers"].found
    assert found["step"].status == "skipped" and "teachers failed" in found["step"].found

    tight = PlacementConfig(kind="replicated", memory_gib=1e-6)
    found = seen(replace(tmu_config, placement=tight))
    assert "do not fit" in found["teachers"].found

    found = seen(replace(tmu_config, data=replace(tmu_config.data, url=str(tmp_path))))
    assert found["loader"].status == "fault" and str(tmp_path) in found["loader"].found

    unknown = replace(tmu_config.training, rates={"no_such_part": 0.1})
    found = seen(replace(tmu_config, training=unknown))
    assert found["step"].status == "fault" and "no_such_part" in found["step"].found
    assert "teachers" not in found or found["teachers"].status == "skipped"


def test_without_inputs_only_the_exchange_is_looked_at(tiny_config: RunConfig) -> None:
    facts = look_at_rank(tiny_config, Collectives(), CPU, inputs_ready=False)
    assert facts.part == "end" and not facts.seconds
    assert {f.status for f in judge_ranks(RanksSeen(ranks=(facts,)))} == {"skipped"}


# Judging


def test_healthy_ranks_are_ok() -> None:
    findings = judge_ranks(RanksSeen(ranks=(rank(0), rank(1))))
    assert {finding.status for finding in findings} == {"ok"}
    numbers = {(f.check, name): value for f in findings for name, value in f.numbers.items()}
    assert numbers["exchange", "bytes_per_second"] == 1e9
    assert numbers["teachers", "predicted_bytes_replicated"] == 2 * GB
    assert numbers["step", "seconds"] == 1.0
    assert numbers["loader", "sequences_per_second"] == pytest.approx(80)
    assert numbers["loader", "learned_per_second"] == pytest.approx(8)


def test_no_rank_at_all_is_a_fault() -> None:
    finding = only(judged(error="3 workers need one CPU each"), "step", "fault")
    assert "3 workers need one CPU each" in finding.found


def test_who_failed_is_named_and_who_only_met_it_is_not() -> None:
    text = "OutOfMemoryError: no memory"
    found = judged(
        failed("step", 0, "RuntimeError: Connection closed by peer", may_follow=True),
        failed("step", 1, text),
    )
    finding = only(found, "step", "fault")
    assert finding.where == "rank 1 on 10.0.0.1" and text in finding.found
    assert "scale.sequences_at_once" in finding.advice
    follow = [failed("step", n, "RuntimeError: Timed out", may_follow=True) for n in range(2)]
    assert only(judged(*follow), "step", "fault").where == ""


def test_a_failed_exchange_names_ranks_nodes_and_interface() -> None:
    text = "RuntimeError: connectFullMesh failed"
    nothing = {"loader": None, "teachers": None}
    ranks = [replace(failed("exchange", n, text, may_follow=True), **nothing) for n in range(2)]
    found = judged(*ranks)
    (finding,) = found.pop("exchange")
    assert finding.status == "fault"
    assert finding.found == f"ranks 0, 1 on 10.0.0.0, 10.0.0.1 over eth0: {text}"
    assert "GLOO_SOCKET_IFNAME" in finding.advice and "NCCL_SOCKET_IFNAME" in finding.advice
    assert all(each.found == "not reached: exchange failed" for (each,) in found.values())


def test_ranks_of_which_nothing_more_is_heard_are_named() -> None:
    unmet = {"exchange": None, "loader": None, "teachers": None, "step": None}
    begun = [rank(number, part="exchange", **unmet) for number in range(2)]
    found = judged(*begun, error="WorkerGroupStartupFailedError: connect: refused")
    assert found["exchange"][0].status == "fault" and "refused" in found["exchange"][0].found
    lost = rank(1, part="step", step=None)
    finding = only(judged(rank(0, step=None), lost, error="rank 1 lost"), "step", "fault")
    assert finding.where == "rank 1 on 10.0.0.1" and "rank 1 lost" in finding.found
    late = only(judged(rank(0), rank(1), error="the store is full"), "step", "fault")
    assert "the store is full" in late.found


@pytest.mark.parametrize(
    ("bytes_per_second", "backend", "link", "status"),
    [
        (1e9, "nccl", 1e10, "ok"),
        (0.7e9, "nccl", 1e10, "ok"),
        (0.6e9, "nccl", 1e10, "warning"),  # less than half of 10 Gbit/s
        (0.6e9, "gloo", 1e10, "ok"),  # which the CPU limits
        (0.6e9, "nccl", None, "ok"),
        (0.45e9, "gloo", 1e10, "ok"),
        (0.39e9, "gloo", 1e10, "warning"),  # two exchanges of 0.1 GB take half of a second
    ],
)
def test_slow_exchanges(
    bytes_per_second: float, backend: str, link: float | None, status: str
) -> None:
    slow = replace(EXCHANGE, bytes_per_second=bytes_per_second, backend=backend)
    quick = replace(slow, bytes_per_second=5e9)
    seen = RanksSeen(
        ranks=(
            rank(0, exchange=quick, link_bits_per_second=link),
            rank(1, exchange=slow, link_bits_per_second=link),
        )
    )
    (finding,) = (each for each in judge_ranks(seen) if each.check == "exchange")
    assert finding.status == status
    assert finding.numbers["bytes_per_second"] == bytes_per_second


def test_one_node_is_not_judged_by_its_link() -> None:
    slow = replace(EXCHANGE, bytes_per_second=0.6e9, backend="nccl")
    assert not judged(*[rank(n, exchange=slow, node="10.0.0.1") for n in range(2)])


def test_teachers_that_weigh_more_than_predicted() -> None:
    heavy = rank(1, teachers=replace(TEACHERS, held_bytes=GB + 1))
    finding = only(judged(rank(0), heavy), "teachers", "warning")
    assert finding.where == "rank 1 on 10.0.0.1"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(loss: float) -> None:
    wrong = rank(1, step=replace(STEP, losses=(0.5, loss, loss)))
    finding = only(judged(rank(0), wrong), "step", "fault")
    assert finding.found == f"the loss is {loss} at step 2"
    assert finding.where == "rank 1 on 10.0.0.1"


def test_memory_is_of_a_gpu_or_shared_by_the_ranks_of_a_node() -> None:
    full = replace(STEP, peak_bytes=73 * GB)
    finding = only(judged(rank(0), rank(1, step=full)), "step", "warning")
    assert finding.where == "rank 1 on 10.0.0.1"
    assert finding.numbers == {
        "peak_bytes": 73.0 * GB,
        "total_bytes": 80.0 * GB,
        "taken_bytes": 8.0 * GB,
        "predicted_bytes": 9.0 * GB,
    }
    half = replace(STEP, peak_bytes=37 * GB)
    on_gpus = [rank(n, node="10.0.0.1", step=half) for n in range(2)]
    assert not judged(*on_gpus)
    finding = only(judged(*[replace(each, device="cpu") for each in on_gpus]), "step", "warning")
    assert finding.numbers["peak_bytes"] == 74.0 * GB


def test_memory_that_a_run_will_take_counts_before_it_is_taken() -> None:
    heavy = replace(STEP, predicted_bytes=73 * GB)
    finding = only(judged(rank(0), rank(1, step=heavy)), "step", "warning")
    assert finding.where == "rank 1 on 10.0.0.1"
    assert "73 GB are predicted for a rank's run, 8 GB came with these steps" in finding.found
    assert "scale.sequences_at_once" in finding.advice
    unknown = replace(heavy, taken_bytes=None, total_bytes=0)
    assert not judged(*[rank(n, step=unknown) for n in range(2)])


def test_a_slow_rank_is_named() -> None:
    slow = rank(1, step=replace(STEP, forward_seconds=0.31))
    finding = only(judged(rank(0), slow), "step", "warning")
    assert finding.where == "rank 1 on 10.0.0.1"
    assert not judged(rank(0), rank(1, step=replace(STEP, forward_seconds=0.29)))
    quick = [
        rank(0, step=replace(STEP, forward_seconds=0.001)),
        rank(1, step=replace(STEP, forward_seconds=0.02)),
    ]
    assert not judged(*quick)  # of milliseconds nothing follows


@pytest.mark.parametrize(
    ("processes", "seconds_per_batch", "wait"),
    [(2, 0.9, 0.0), (2, 1.05, 0.05 / 1.05), (2, 2.0, 0.5), (0, 0.1, 0.1 / 1.1), (0, 0.2, 1 / 6)],
)
def test_a_loader_that_steps_wait_for(
    processes: int, seconds_per_batch: float, wait: float
) -> None:
    loader = replace(LOADER, processes=processes, seconds_per_batch=seconds_per_batch)
    findings = judge_ranks(RanksSeen(ranks=(rank(0), rank(1, loader=loader))))
    (finding,) = (each for each in findings if each.check == "loader")
    assert finding.numbers["wait_share"] == pytest.approx(wait)
    assert finding.status == ("warning" if wait > 0.1 else "ok")
    if wait > 0.1:
        assert finding.where == "rank 1 on 10.0.0.1"
        assert f"data.num_workers={2 * processes or 2}" in finding.advice
