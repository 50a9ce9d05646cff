"""The doctor on two gloo processes: the exchange, teachers of which each holds its part, and a rank
whose failure the other one only meets."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.test_ranks import spawn
from tmu_dist.collectives import Collectives
from tmu_dist.config import PlacementConfig, RunConfig
from tmu_dist.doctor import ranks as doctor_ranks
from tmu_dist.doctor.rank_facts import RanksSeen
from tmu_dist.doctor.rank_findings import judge_ranks
from tmu_dist.doctor.ranks import look_at_ranks
from tmu_dist.run_folder import read_log
from tmu_dist.training.loop import train

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")


def _look(collectives: Collectives, config: RunConfig, folder: str) -> None:
    """Look, healthy; train; and look again where rank 1 cannot read, and where it cannot train."""
    rank = collectives.ranks.rank
    seen = {"healthy": look_at_ranks(config, collectives, CPU)}
    train(config, collectives, CPU)
    elsewhere = replace(config, data=replace(config.data, url=f"{folder}/elsewhere"))
    seen["unread"] = look_at_ranks(elsewhere if rank else config, collectives, CPU)
    if rank:
        doctor_ranks.process_peak = _no_memory
    seen["untrained"] = look_at_ranks(config, collectives, CPU)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(seen))


def _no_memory(device: torch.device) -> int:
    raise MemoryError("of this rank alone")


def test_two_ranks_see_the_same(tmu_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tmu_config, placement=PlacementConfig(kind="placed", group="all"))
    spawn(2, _look, config, str(tmp_path))
    files = [tmp_path / f"{rank}.pickle" for rank in range(2)]
    by_rank: list[dict[str, RanksSeen]] = [pickle.loads(file.read_bytes()) for file in files]
    assert by_rank[0] == by_rank[1]

    seen = by_rank[0]["healthy"]
    findings = {finding.check: finding for finding in judge_ranks(seen)}
    assert [facts.rank for facts in seen.ranks] == [0, 1] and not seen.error
    assert not any(facts.failures for facts in seen.ranks)
    assert findings["exchange"].status in ("ok", "warning")
    assert 0 < findings["exchange"].numbers["latency_seconds"] < 10
    assert findings["exchange"].numbers["bytes_per_second"] > 1e5

    teachers = [facts.teachers for facts in seen.ranks]
    for each in teachers:
        assert each is not None and each.kind == "placed" and each.count == 2
        assert each.held_bytes == each.predicted_bytes["placed"]
        assert 2 * each.held_bytes == each.predicted_bytes["replicated"]

    logged = [e["loss/total"] for e in read_log(config.output) if e["event"] == "train"]
    losses = [facts.step.losses for facts in seen.ranks if facts.step is not None]
    assert [sum(pair) / 2 for pair in zip(*losses, strict=True)] == pytest.approx(logged[:3])

    unread = [f for f in judge_ranks(by_rank[0]["unread"]) if f.status == "fault"]
    assert [(f.check, f.where[:7]) for f in unread] == [("loader", "rank 1 ")]
    assert "elsewhere" in unread[0].found
    untrained = [f for f in judge_ranks(by_rank[0]["untrained"]) if f.status == "fault"]
    assert [(f.check, f.where[:7]) for f in untrained] == [("step", "rank 1 ")]
    assert "MemoryError: of this rank alone" in untrained[0].found
