"""Teachers that cannot know better: what transfer must beat to be transfer (transfer.control).

Legend: B batch, T time, C channels, H, W height, width, Z noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tmu_dist.draws import keyed_hash
from tmu_dist.teachers.adapter import TeacherPlan
from tmu_dist.teachers.bank import FrozenTeacher, Shown, TeacherBank, Teaching
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import WEIGHTS_FILE, LoadedModel, build_network, model_files

_WEIGHTS = 0x3E16
"""Use of the hash: no other draw of a run has it."""


class ShuffledBank:
    """Each sequence is taught what the teachers make of its partner in the batch.

    Partners are neighbours (0 and 1, 2 and 3, ...), whatever the number of ranks: a rank's part of
    a global batch begins at an even place where every rank has an even number of sequences. What
    teachers tell keeps its distribution and loses all that it says about this sequence. In the
    last batch of an epoch, filled up by repeats, a sequence may meet its own.

    Args:
        bank: who runs the teachers.
    """

    def __init__(self, bank: TeacherBank) -> None:
        self._bank = bank

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        return self._bank.parameters_per_teacher

    @property
    def plans(self) -> tuple[TeacherPlan, ...]:
        return self._bank.plans

    @property
    def own(self) -> tuple[FrozenTeacher, ...]:
        return self._bank.own

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        """As `TeacherBank.teach`, with partners' places exchanged.

        Raises:
            ValueError: a sequence has no partner.
        """
        size = len(shown.frames_BTCHW)
        if size % 2:
            raise ValueError(
                f"transfer.control=shuffled exchanges sequences in pairs, and this rank has {size} "
                "of them: choose training.batch_size so that training.batch_size / ranks is even, "
                "and an even scale.sequences_at_once, if any."
            )
        return tuple(taught.map(_partners) for taught in self._bank.teach(shown))


def with_random_weights(
    card: TeacherCard, *, seed: int, number: int, device: torch.device | str = "cpu"
) -> LoadedModel:
    """A teacher's network before any training: the same architecture, other weights.

    Args:
        card: of the teacher, whose own weights are not looked at.
        seed: of the run.
        number: of the teacher in it; torch's generators are left alone.
        device: where the network is to be; it is drawn on the CPU.
    """
    key = keyed_hash(np.array([number]), _WEIGHTS, seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(key[0]))
        model = build_network(card)
    weights = model_files(model.state_dict(), card)[WEIGHTS_FILE]
    untrained = replace(
        card,
        name=f"{card.name} (random weights)",
        step=0,
        scores={},
        origin="",
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    return LoadedModel(model.to(device).eval().requires_grad_(False), untrained)


def _partners(values: Tensor) -> Tensor:
    """The same with the places 0 and 1, 2 and 3, ... of the first axis exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
