"""On a GPU teachers that are alike run together by default, and tell what they tell alone."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_batched_teachers import assert_alike, prepare, shown, teachers_of
from tmu_dist.config import ModelConfig, RunConfig
from tmu_dist.teachers.bank import ReplicatedBank, held_bytes
from tmu_dist.teachers.batched import BatchedBank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("cell", ["convlstm", "predrnn", "mim", "e3d_lstm"])
def test_together_they_tell_what_each_tells_by_itself(cell: str) -> None:
    """Stacked where they lie, and moved there afterwards; in float32 and under autocast."""
    model = ModelConfig(cell=cell, num_layers=2, hidden_channels=16, kernel_size=3)  # type: ignore[arg-type]
    teachers = [teacher.cuda() for teacher in teachers_of(model)]
    moved = teachers_of(model)
    bank, bank_of_moved = BatchedBank(teachers), BatchedBank(moved)
    for teacher in moved:
        teacher.cuda()
    given = shown(teachers[0])
    on_gpu = {name: value.cuda() for name, value in _tensors(given).items()}
    given = given._replace(**on_gpu)
    expected = ReplicatedBank(teachers).teach(given)
    assert_alike(bank.teach(given), expected, 1e-3)  # TF32 may be allowed
    assert_alike(bank_of_moved.teach(given), expected, 1e-3)
    assert held_bytes(bank) == held_bytes(bank_of_moved)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_alike(bank.teach(given), ReplicatedBank(teachers).teach(given), 3e-2)


def _tensors(given: object) -> dict[str, torch.Tensor]:
    values = given._asdict()  # type: ignore[attr-defined]
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def test_runs_do_it_by_themselves(tmu_config: RunConfig) -> None:
    prepared = prepare(tmu_config, device=torch.device("cuda"))
    assert type(prepared.method.bank) is BatchedBank  # type: ignore[attr-defined]
