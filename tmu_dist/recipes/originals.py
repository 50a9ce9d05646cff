"""Where original files lie that recipes make archives of: a variable each, named if it is missing.

Deliberately not here: reading them (`data_prep`), or what is made of them (the recipes).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tmu_dist.workspace import in_workspace

RADAR = "TMU_DIST_RADAR"
MNIST = "TMU_DIST_MNIST"
KTH = "TMU_DIST_KTH"
WEIZMANN = "TMU_DIST_WEIZMANN"
HUMAN36M = "TMU_DIST_HUMAN36M"
CLIPS = "TMU_DIST_CLIPS"

WHAT = {
    RADAR: "a folder with mch/, fmi/ and knmi/ in it (docs/radar.md)",
    MNIST: "the folder of the four MNIST idx files; without the variable, the 5,000 digits that "
    "come with a dependency are used",
    KTH: "the folder of KTH's clips, personNN_ACTION_dS_uncomp.avi, with their 00sequences.txt",
    WEIZMANN: "the folder of Weizmann's clips, PERSON_ACTION.avi",
    HUMAN36M: "the folder of Human3.6M's stored frames, SUBJECT_ACTION_TAKE.CAMERA_FRAME.jpg",
    CLIPS: "a folder of any other clips, with target/{train,val,test}/ and source/{train,val}/ in "
    "it, which stand in for Human3.6M and Weizmann; or name your copies of these with "
    f"{HUMAN36M} and {WEIZMANN} (docs/studies.md)",
}
"""What each variable names."""
_WITHOUT = {variable: variable.removeprefix("TMU_DIST_").lower() for variable in WHAT}
"""Folders in the workspace where files are looked for without the variable."""


def is_named(variable: str) -> bool:
    """Whether the user says where these files lie."""
    return bool(os.environ.get(variable))


def originals(variable: str) -> str:
    """The folder or URL of some original files."""
    return os.environ.get(variable) or in_workspace(_WITHOUT[variable])


def missing_originals(arguments: Sequence[str]) -> str | None:
    """What to do about original files that `python -m data_prep ARGUMENTS` would not find.

    Returns:
        None where they are there, lie in a store, or are none of those above.
    """
    for flag, folder in pairwise(arguments):
        if flag not in ("--source", "--mnist") or "://" in folder or Path(folder).is_dir():
            continue
        for variable, what in WHAT.items():
            root = originals(variable)
            if folder == root or folder.startswith(root.rstrip("/") + "/"):
                return f"{folder} does not exist: set {variable} to {what}."
    return None
