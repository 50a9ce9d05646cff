"""Where tests find real data: original files of nine sources that are not part of the project."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_DATA = Path(os.environ.get("TMU_DIST_TEST_DATA", _ROOT.parent / "shared" / "data"))


def real_data(source: str) -> Path:
    """Folder of one source, such as "knmi"; skips the test where it is absent."""
    folder = _DATA / source
    if not folder.is_dir():
        pytest.skip(
            f"real data of {source} are not here: put them into {folder}, or set TMU_DIST_TEST_DATA"
        )
    return folder
