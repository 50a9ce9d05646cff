"""The shapes by which networks, archives and teachers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class FrameShape:
    """Channels and size of the frames that a network reads and predicts."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


class MemoryShape(NamedTuple):
    """One layer's memory: channels, map size, and time slices that lie below each other in it."""

    channels: int
    height: int
    """Of one slice; the memory has slices * height rows."""
    width: int
    slices: int = 1
    """1 but for E3D-LSTM, whose memory holds a short window of time."""

    def __str__(self) -> str:
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{self.channels}x{slices}{self.height}x{self.width}"
