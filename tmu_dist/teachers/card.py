"""What a teacher is, beside its weights: a card that says what it learned, on what, and how well.

Every model folder that the project writes (checkpoints included) has one, so any trained network
can be evaluated, continued from, or teach.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tmu_dist.config import AdapterConfig, ARTConfig, ModelConfig, TMUConfig, WindowConfig
from tmu_dist.data.manifest import Manifest, Units
from tmu_dist.models.shapes import FrameShape

CARD_FILE = "card.json"
"""Its name in a model folder."""
CARD_SCHEMA_VERSION = 1


class TeacherError(ValueError):
    """A teacher is missing, damaged, or does not fit the student."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The data that a network was trained on, as far as its numbers depend on it."""

    archive: str
    manifest_hash: str
    units: Units
    frame_interval_minutes: float | None
    normalisation: str = "stored uint8 / 255"
    """How stored numbers became those that the network read."""

    @classmethod
    def of(cls, manifest: Manifest) -> DataFacts:
        """The facts of one archive."""
        return cls(
            archive=manifest.name,
            manifest_hash=manifest.content_hash,
            units=manifest.units,
            frame_interval_minutes=manifest.frame_interval_minutes,
            normalisation=f"stored {manifest.dtype} / {manifest.units.max_code}",
        )


def frame_shape(manifest: Manifest) -> FrameShape:
    """The frames of one archive, as networks are built for them."""
    return FrameShape(channels=manifest.channels, height=manifest.height, width=manifest.width)


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """Everything needed to rebuild a network and to judge whether it may teach."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: int = CARD_SCHEMA_VERSION
    name: str
    method: str
    step: int
    seed: int
    frame: FrameShape
    window: WindowConfig
    model: ModelConfig
    tmu: TMUConfig
    num_slots: int
    """Teachers that the network's TMU layers have room for; 0 for a plain network."""
    data: DataFacts
    teachers: tuple[str, ...] = ()
    """Names of the teachers it learned from, in the order of its transfer gates."""
    teacher_parameters: tuple[int, ...] = ()
    """Frozen parameters that stood beside it during training, one number a teacher."""
    auxiliary_parameters: int = 0
    """Trained parameters that stood beside it, such as the transforms of Knowledge Flow."""
    sources: tuple[TeacherCard, ...] = ()
    """Cards of the networks inside it, which it reads as it runs (transfer.method=art); their
    weights lie among its own."""
    art: ARTConfig = field(default_factory=ARTConfig)
    """How it reads them."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What may differ between them and itself."""
    scores: dict[str, float] = field(default_factory=dict)
    git_revision: str = "unknown"
    weights_sha256: str = ""
    origin: str = ""
    """Of weights that another codebase trained: their file, its layout and sha256."""

    def to_json(self) -> str:
        """The card as it lies beside the weights."""
        return _ADAPTER.dump_json(self, indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str) -> TeacherCard:
        """Parse a card.

        Raises:
            TeacherError: the file is not a card of a known schema; `where` is named.
        """
        try:
            version = json.loads(text)["schema_version"]
        except (ValueError, TypeError, KeyError):
            raise TeacherError(
                f"{where}/card.json is not a valid teacher card: no schema_version in it."
            ) from None
        if version != CARD_SCHEMA_VERSION:
            raise TeacherError(
                f"{where}/card.json has schema version {version}; this version of tmu_dist reads "
                f"{CARD_SCHEMA_VERSION}. Export the teacher again."
            )
        try:
            card = _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise TeacherError(
                f"{where}/card.json is not a valid teacher card: {place}: {first['msg']}."
            ) from None
        return card


_ADAPTER = TypeAdapter(TeacherCard)


def same_scale(one: Units, other: Units) -> bool:
    """Whether a number means the same under both units, as a network reads it.

    How missing pixels are marked is no part of that: a network never sees their code.
    """

    def meaning(units: Units) -> tuple[str, str, float, float, int]:
        return units.quantity, units.unit, units.scale, units.offset, units.max_code

    return meaning(one) == meaning(other)
