"""Arithmetic in one pass: the same numbers and gradients as the plain operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tmu_dist.models import fused
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.cells.convlstm import ConvLSTMCell
from tmu_dist.models.tmu import MemoryTransfer

P = 32


def maps(channels: int, scale: float = 1.0) -> Tensor:
    x = scale * torch.randn(2, channels, 6, 5)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def check(ours: Callable[[], Tensor], plain: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Compare values and gradients, near float32's rounding."""
    a, b = ours(), plain()
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    along = torch.randn_like(b)
    for x, y in zip(
        torch.autograd.grad(a, inputs, along), torch.autograd.grad(b, inputs, along), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("peephole", ["channel", "none"])
def test_a_convlstm_computes_the_same(peephole: str) -> None:
    torch.manual_seed(0)
    cell = ConvLSTMCell(P, P, kernel_size=3, map_size=(6, 5), peephole=peephole, forget_bias=0.5)
    if cell.peepholes is not None:
        torch.nn.init.normal_(cell.peepholes)
    x, hidden, memory = maps(P), maps(P), maps(P)
    used: list[bool] = []

    def step(fuses: bool) -> Tensor:
        cell.fuses = fuses
        proposal = cell.propose(x, CellState(hidden, memory), Carry())
        used.append("_Propose" in str(proposal.memory_BPHW.grad_fn))
        state, _ = cell.emit(proposal, proposal.memory_BPHW)
        return torch.cat([state.hidden_BPHW, proposal.memory_BPHW], 1)

    inputs = [x, hidden, memory, *cell.parameters()]
    check(lambda: step(True), lambda: step(False), inputs)
    assert used == [True, False]


@pytest.mark.parametrize("combine", ["paper", "mean"])
@pytest.mark.parametrize("num_teachers", [1, 3])
def test_a_transfer_computes_the_same(combine: str, num_teachers: int) -> None:
    torch.manual_seed(0)
    transfer = MemoryTransfer(16, P, num_teachers, map_size=(6, 5), combine=combine)
    memory, x, hidden = maps(P), maps(16), maps(P)

    def step(fuses: bool) -> Tensor:
        transfer.fuses = fuses
        memory_after, imitations, gates = transfer(memory, x, hidden)
        return torch.cat([memory_after, imitations.flatten(1, 2)], 1) + gates.detach().mean()

    inputs = [memory, x, hidden, *transfer.parameters()]
    check(lambda: step(True), lambda: step(False), inputs)


def test_large_and_strange_numbers() -> None:
    """Saturated gates are 0 and 1, small memories keep their digits, and NaN stays NaN."""
    values = torch.tensor([-1e30, -200.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 200.0, 1e30, torch.nan])
    memory = torch.zeros(1, 16, 1, 10).to(memory_format=torch.channels_last)
    memory[0, 0, 0] = values
    output = torch.full_like(memory, 1e4)
    hidden = fused.emit(output, memory, None)
    torch.testing.assert_close(hidden[0, 0, 0], torch.tanh(values), equal_nan=True)
    closed = fused.emit(-output, memory, None)[0, 0, 0, :9]
    torch.testing.assert_close(closed, torch.zeros(9))


def test_it_is_left_to_plain_operations_where_it_cannot_be() -> None:
    lying_so = maps(4 * P)
    assert fused.can_fuse(lying_so, P)
    assert not fused.can_fuse(lying_so.contiguous(), P)
    assert not fused.can_fuse(lying_so.double(), P)
    assert not fused.can_fuse(lying_so, 20)
    assert not fused.can_fuse(lying_so, P, torch.zeros(3, P, 6, 5))
