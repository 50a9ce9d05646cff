"""Archives that several families of recipes make: flying digits as a source, clips of people.

Human3.6M and Weizmann are given to registered users only. At the studies' small scale other clips
of the user stand in for a missing copy, under a name that says so (`stands_in`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tmu_dist.recipes.base import Archives
from tmu_dist.recipes.digits import mnist
from tmu_dist.recipes.originals import CLIPS, HUMAN36M, KTH, WEIZMANN, is_named, originals
from tmu_dist.workspace import in_workspace

STAND_IN = "other clips"
"""First words of the names of archives that stand in for a missing data set."""

_KTH_VALIDATE, _KTH_TEST_FROM = {15, 16}, 17
"""Persons, as everybody splits them."""


def digits_archive(
    url: str, *, frames: int, side: int, sequences: tuple[int, int, int]
) -> Archives:
    """Two flying digits, in frames of 64 pixels as the paper's or in smaller ones alike."""
    shrink = side / 64
    train, val, test = map(str, sequences)
    arguments = (
        *("moving-mnist", "--digits", "2", "--out", url),
        *("--train", train, "--val", val, "--test", test),
        *("--frames", str(frames), "--frame-size", str(side)),
        *("--digit-size", f"{28 * shrink:.0f}", "--speed", f"{3 * shrink}", f"{5 * shrink}"),
        *mnist(),
    )
    return {url: arguments}


def kth_archive(
    url: str, *, frames: int, side: int, colour: str = "grey", timing: Sequence[str] = ()
) -> Archives:
    """KTH's clips; where persons who validate or test are missing, repetitions are split instead.

    Args:
        url: of the archive.
        frames: of a sequence.
        side: of the frames, in pixels.
        colour: "grey" or "rgb".
        timing: arguments that say how far apart frames and sequences are; none: the usual ones.
    """
    folder = originals(KTH)
    arguments = (
        *("video", "--dataset", "kth", "--source", folder, "--out", url),
        *("--frames", str(frames), "--size", str(side), str(side), "--colour", colour),
        *timing,
        *_split(folder),
    )
    return {url: arguments}


def human_archive(prefix: str, *, side: int, may_stand_in: bool) -> Archives:
    """Human3.6M by the paper's protocol, or what stands in for it."""
    if may_stand_in and stands_in(HUMAN36M):
        return _stand_in(prefix, "target", side)
    url = in_workspace(f"archives/{prefix}-human36m")
    arguments = (
        *("video", "--dataset", "human36m", "--source", originals(HUMAN36M), "--out", url),
        *("--protocol", "paper", "--size", str(side), str(side)),
    )
    return {url: arguments}


def weizmann_archive(prefix: str, *, side: int, may_stand_in: bool) -> Archives:
    """Weizmann, or what stands in for it."""
    if may_stand_in and stands_in(WEIZMANN):
        return _stand_in(prefix, "source", side)
    url = in_workspace(f"archives/{prefix}-weizmann")
    arguments = (
        *("video", "--dataset", "weizmann", "--source", originals(WEIZMANN), "--out", url),
        *("--size", str(side), str(side)),
    )
    return {url: arguments}


def stands_in(variable: str) -> bool:
    """Whether other clips are taken for a data set of which the user names no copy."""
    return not is_named(variable)


def _stand_in(prefix: str, role: str, side: int) -> Archives:
    """Any clips, divided between splits by the user: few clips cannot be by lot."""
    url = in_workspace(f"archives/{prefix}-clips-{role}")
    arguments = (
        *("video", "--source", f"{originals(CLIPS).rstrip('/')}/{role}", "--out", url),
        *("--name", f"{STAND_IN} ({role})", "--split-folders"),
        *("--frames", "8", "--frame-step", "3", "--stride", "2", "--crop", "centre"),
        *("--size", str(side), str(side), "--colour", "rgb"),
    )
    return {url: arguments}


def _split(folder: str) -> tuple[str, ...]:
    """How a part of KTH is split that lacks the persons who usually validate or test.

    Split by persons, a few clips leave networks before scenes that they have never seen, where
    none forecasts better than the last frame.
    """
    clips = Path(folder).rglob("person[0-9][0-9]_*") if "://" not in folder else ()
    found = (re.match(r"person(\d\d)_", clip.name) for clip in clips)
    persons = {int(match[1]) for match in found if match}
    if not persons or (_KTH_VALIDATE & persons and max(persons) >= _KTH_TEST_FROM):
        return ()
    return ("--split-by", "repetitions")
