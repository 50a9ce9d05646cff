"""The contract of `data_prep.readers.radar.RadarReader`, asserted on one file of any format."""

from __future__ import annotations

import fnmatch
import pickle
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_prep.readers.radar import UNITS, BadFileError, RadarFile, RadarReader
from tmu_dist.data.manifest import SourceCard

KEYS_READ = 4
"""Of a file with more fields, the first ones and the last are read."""


def check_radar_reader(
    reader: RadarReader,
    path: Path,
    *,
    quantity: str,
    interval_minutes: float | None = None,
    shape: tuple[int, int] | None = None,
) -> RadarFile:
    """Assert the whole contract of a reader on one sound file, and on damaged copies of it.

    Args:
        reader: with the options that the file needs.
        path: a sound file.
        quantity: what the file must be found to hold.
        interval_minutes: what `scan` must say; None does not look.
        shape: (height, width) that every field must have; None does not look.

    Returns:
        What `scan` said, for further assertions.
    """
    _check_class(reader, path)
    assert reader.recognises(path) is True, f"{reader.name} does not recognise {path}"
    scanned = reader.scan(path)
    _check_scan(scanned)
    assert scanned.quantity == quantity
    if interval_minutes is not None:
        assert scanned.interval_minutes == pytest.approx(interval_minutes)
    if shape is not None:
        assert (scanned.grid.height, scanned.grid.width) == shape
    _check_fields(reader, path, scanned)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy == reader and copy.scan(path) == scanned
    with tempfile.TemporaryDirectory() as folder:
        _check_bad_files(reader, path, scanned, Path(folder))
    return scanned


def _check_class(reader: RadarReader, path: Path) -> None:
    assert reader.name and reader.name == reader.name.lower()
    assert reader.extra is None or reader.extra
    assert isinstance(reader.source, SourceCard)
    assert all(pattern == pattern.lower() for pattern in reader.patterns)
    name = path.name.lower()
    assert any(fnmatch.fnmatch(name, pattern) for pattern in reader.patterns), (
        f"no pattern of {reader.name} fits {path.name}: {reader.patterns}"
    )


def _check_scan(scanned: RadarFile) -> None:
    assert scanned.quantity in UNITS
    assert (scanned.accumulation_minutes is not None) == (scanned.quantity == "accumulation")
    for minutes in (scanned.interval_minutes, scanned.accumulation_minutes):
        assert minutes is None or minutes > 0
    assert scanned.missing_rule.strip()
    assert all(note.strip() for note in scanned.notes)
    assert scanned.frames, "a file without fields must be a BadFileError"
    keys = [frame.key for frame in scanned.frames]
    assert len(set(keys)) == len(keys), f"keys repeat: {keys}"
    for frame in scanned.frames:
        assert frame.time.utcoffset() == timedelta(0), f"{frame.time!r} is not aware UTC"
        assert frame.lead_minutes >= 0


def _check_fields(reader: RadarReader, path: Path, scanned: RadarFile) -> None:
    keys = [frame.key for frame in scanned.frames]
    if len(keys) > KEYS_READ:
        keys = [*keys[: KEYS_READ - 1], keys[-1]]
    fields = reader.fields(path, keys)
    assert isinstance(fields, Iterator), "fields must come one at a time, not as a list"
    in_order = [_checked(values_HW, scanned).copy() for values_HW in fields]
    assert len(in_order) == len(keys)
    backwards = [values_HW.copy() for values_HW in reader.fields(path, keys[::-1])]
    for expected_HW, values_HW in zip(in_order, backwards[::-1], strict=True):
        np.testing.assert_array_equal(values_HW, expected_HW)
    (alone_HW,) = reader.fields(path, keys[-1:])
    np.testing.assert_array_equal(alone_HW, in_order[-1])
    assert list(reader.fields(path, [])) == []
    with pytest.raises(BadFileError) as raised:
        list(reader.fields(path, ["no such key"]))
    _check_names(raised.value, path)


def _checked(values_HW: NDArray[np.float32], scanned: RadarFile) -> NDArray[np.float32]:
    assert values_HW.dtype == np.float32
    assert values_HW.shape == (scanned.grid.height, scanned.grid.width)
    assert not np.isinf(values_HW).any(), "missing is NaN, nothing is infinite"
    if scanned.quantity != "reflectivity":
        assert not (values_HW < 0).any(), f"{scanned.quantity} below 0: a flag left in?"
    return values_HW


def _check_bad_files(reader: RadarReader, path: Path, scanned: RadarFile, folder: Path) -> None:
    """Copies keep the file's name, so that nothing but their content can give them away."""
    data = path.read_bytes()
    truncated = folder / "truncated" / path.name
    truncated.parent.mkdir()
    truncated.write_bytes(data[: len(data) * 6 // 10])
    reader.recognises(truncated)  # must not raise; the header may well be there
    with pytest.raises(BadFileError) as raised:
        reader.scan(truncated)
        for _ in reader.fields(truncated, [frame.key for frame in scanned.frames]):
            pass
    _check_names(raised.value, truncated)

    for kind, content in (("text", b"Hourly sums, see the manual.\n" * 40), ("empty", b"")):
        wrong = folder / kind / path.name
        wrong.parent.mkdir()
        wrong.write_bytes(content)
        _check_refused(reader, wrong)
    _check_refused(reader, folder / "absent" / path.name)


def _check_refused(reader: RadarReader, path: Path) -> None:
    assert reader.recognises(path) is False
    with pytest.raises(BadFileError) as raised:
        reader.scan(path)
    _check_names(raised.value, path)


def _check_names(error: BadFileError, path: Path) -> None:
    assert error.path == str(path) and error.reason
    assert str(path) in str(error)
