"""What a run is made of beside its student: its loaders, and the card of what it will train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tmu_dist.collectives import Ranks
from tmu_dist.config import DataConfig, RunConfig, TrainingConfig
from tmu_dist.data.loader import Archive, SequenceLoader
from tmu_dist.models.shapes import FrameShape
from tmu_dist.provenance import git_revision
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError
from tmu_dist.transfer.prepare import PreparedTransfer


def open_loaders(
    archives: Sequence[Archive],
    data: DataConfig,
    training: TrainingConfig,
    ranks: Ranks,
    *,
    pin_memory: bool,
) -> tuple[SequenceLoader, SequenceLoader]:
    """This rank's sequences for training, and those of the first archive for validation."""
    common: dict[str, Any] = {
        "global_batch_size": training.batch_size,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "node_ranks": ranks.on_node,
        "num_workers": data.num_workers,
        "pin_memory": pin_memory,
    }
    learned_from = SequenceLoader(
        archives,
        "train",
        seed=training.seed,
        fraction=data.fraction,
        mix_weights=data.mix_weights,
        shuffle_window=data.shuffle_window,
        shuffle_lanes=data.shuffle_lanes,
        **common,
    )
    return learned_from, SequenceLoader(archives[0], "val", shuffle=False, **common)


def untrained_card(
    config: RunConfig,
    frame: FrameShape,
    data: DataFacts,
    transfer: PreparedTransfer,
    auxiliary_parameters: int,
) -> TeacherCard:
    """What the run says of its student before the first step.

    Args:
        config: of the run.
        frame: that the student reads.
        data: of the archive that it learns from first.
        transfer: its method and teachers.
        auxiliary_parameters: trained weights that the student does not keep.
    """
    card = TeacherCard(
        name=Path(config.output).name,
        method=config.transfer.method,
        step=0,
        seed=config.training.seed,
        frame=frame,
        window=config.window,
        model=config.model,
        tmu=config.transfer.tmu,
        num_slots=config.transfer.num_tmu_slots,
        data=data,
        teachers=tuple(card.name for card in transfer.teachers),
        teacher_parameters=transfer.resident_parameters,
        auxiliary_parameters=auxiliary_parameters,
        git_revision=git_revision(),
    )
    return transfer.method.describe(card)


def check_same_teachers(hashes_by_rank: Sequence[Sequence[str]]) -> None:
    """Refuse to begin where ranks read different weights: of a teacher that is still trained.

    Args:
        hashes_by_rank: of every teacher's weights, rank by rank.

    Raises:
        TeacherError: they differ.
    """
    for rank, hashes in enumerate(hashes_by_rank):
        if different := [
            m for m, pair in enumerate(zip(hashes, hashes_by_rank[0])) if len(set(pair)) > 1
        ]:
            raise TeacherError(
                f"Rank {rank} has read other weights than rank 0 of teachers {different} (numbered "
                "from 0 in transfer.teachers). A run that is still trained offers new ones from "
                "time to time: name one of its model folders, or wait until it is finished."
            )
